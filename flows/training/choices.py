"""All choices of a group of settings, such as every estimator in conf/divergence."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from flows.errors import InvalidValueError
from flows.training.settings import instantiate


def instances(
    group: str,
    names: Sequence[str] | None = None,  # None: all
    variants: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """What the choices of a group describe, by name, within a running program of Hydra's.

    A new yaml in the folder of the group, here or in a folder of ``hydra.searchpath``, is a new choice.

    Args:
        names: of the choices to take.
        variants: more of them by a name of their own, each a choice with other settings:
            ``{"orthonormal": {"divergence": "hutchinson", "probes": "orthonormal"}}``.

    Raises:
        ValueError: a name is not a choice of the group; the message lists those that there are.
    """
    from hydra import compose
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    context = HydraConfig.get()
    main, where = context.job.config_name, list(context.overrides.hydra)  # such as further folders to search
    choices = GlobalHydra.instance().config_loader().get_group_options(group, config_name=main, overrides=where)
    variants = {} if variants is None else variants
    valid = [*choices, *variants]
    names = valid if names is None else [names] if isinstance(names, str) else list(names)
    found = {}
    for name in names:
        if name not in valid:
            close = difflib.get_close_matches(str(name), valid, n=1)
            suggestion = f"; did you mean {close[0]}?" if close else ""
            raise InvalidValueError(f"{name!r} is not a choice of {group}; there are {', '.join(valid)}{suggestion}")
        changes = dict(variants.get(name, {}))
        base = changes.pop(group, name)
        if base not in choices:
            raise InvalidValueError(
                f"the variant {name!r} must say which {group} it varies, {group}: {choices[0]} for instance; "
                f"there are {', '.join(choices)}"
            )
        composed = OmegaConf.to_container(compose(overrides=[f"+{group}={base}", *where])[group], resolve=True)
        found[name] = instantiate({**composed, **changes}, group if base == name else f"variants.{name}")
    return found
