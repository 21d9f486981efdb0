"""Other settings for the parts of a trained flow, given on the command line of a program that loads one."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

PARTS = ("data", "divergence", "solver")


def register_parts() -> None:
    """Make ``open_data``, ``open_divergence`` and ``open_solver`` available to the defaults of a program's settings.

    Each lets the part take settings of any name, which Hydra refuses otherwise: those that there are depend on the
    checkpoint. ``${choices:solver,...}`` lists the choices of groups, for ``--help``.
    """
    from hydra.core.config_store import ConfigStore
    from omegaconf import DictConfig, OmegaConf

    for part in PARTS:
        node = DictConfig({part: DictConfig({}, flags={"struct": False})})
        ConfigStore.instance().store(name=f"open_{part}", node=node)
    OmegaConf.register_new_resolver("choices", _choices, replace=True)


def with_changes(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which the parts named in ``changes`` are others.

    A part with a ``_target_`` replaces the old one, any other changes single settings of it; without settings it
    changes nothing.
    """
    from omegaconf import OmegaConf

    changed = dict(config)
    for part, new in changes.items():
        if new:
            replaces = "_target_" in new
            changed[part] = dict(new) if replaces else OmegaConf.to_container(OmegaConf.merge(config[part], new))
    return changed


def _choices(*groups: str) -> str:
    from hydra.core.global_hydra import GlobalHydra

    loader = GlobalHydra.instance().config_loader()
    lines = (f"{group}: {', '.join(loader.get_group_options(group))}" for group in groups)
    return "\n".join(textwrap.fill(line, 110, subsequent_indent="  ") for line in lines)
