"""The command line before Hydra composes it: what is no setting is refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from flows.cli.help import choices_of, config_folder
from flows.errors import InvalidValueError
from flows.training.annotations import SettingsError
from flows.training.settings import no_setting

OPEN_PARTS = {  # of each program: their settings may have any name, as far as Hydra is concerned
    "train": (
        "data",
        "model",
        "transform",
        "field",
        "encoder",
        "divergence",
        "solver",
        "base",
        "objective",
        "optimizer",
        "optimization",
        "hardware",
        "reporting",
        "evaluation",
    ),
    "evaluate": ("data", "divergence", "solver", "outliers"),
    "sample": ("data", "solver"),
    "predict": ("solver",),
    "compare_estimators": ("data", "transform", "field", "encoder", "divergence", "solver"),
}


def check_choices(arguments: Sequence[str]) -> None:
    """Check that what is given for a group, such as `divergence`, is the name of a choice.

    Raises:
        InvalidValueError: it is a number, a mapping, or nothing.
    """
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    for override in OverridesParser.create().parse_overrides(overrides):
        group = str(override.key_or_group)
        folder = config_folder() / group
        if override.is_delete() or override.is_sweep_override() or not folder.is_dir():
            continue
        value = override.value()
        # nothing is chosen by null where nothing is chosen by default
        if not isinstance(value, str | list) and not (group == "experiment" and value is None):
            choices = ", ".join(choices_of(group))
            shown = "null" if value is None else value
            raise InvalidValueError(f"{group} must be the name of a choice, got {shown}; there are {choices}")


def refuse(arguments: Sequence[str], parts: Mapping[str, str]) -> None:
    """Refuse overrides of parts that a program ignores.

    Args:
        arguments: the command line.
        parts: names of parts, and what to do instead.

    Raises:
        InvalidValueError: a part is among the overrides.
    """
    for argument in arguments:
        part = re.split(r"[./@=]", argument.lstrip("+~"))[0]
        if part in parts and not argument.startswith("-"):
            raise InvalidValueError(f"{part} cannot be chosen here: {parts[part]}")


KEPT = dict.fromkeys(("model", "field", "transform", "base", "encoder"), "a trained model keeps its own")


def check_added(arguments: Sequence[str], name: str) -> None:
    """Check that settings added with `+` belong to the program `name`, and that none of its own is removed with `~`.

    Raises:
        SettingsError: there is no such setting or group, or the program needs it.
    """
    content = OmegaConf.load(config_folder() / f"{name}.yaml")
    assert isinstance(content, DictConfig)
    groups = {str(group) for entry in content.defaults if isinstance(entry, DictConfig) for group in entry}
    known = {str(key) for key in content if key != "defaults"} | set(OPEN_PARTS[name]) | {"hydra"}
    known |= {re.split(r"[./@ ]", group.removeprefix("override "))[0] for group in groups}
    for argument in arguments:
        removed = re.split(r"[./@=]", argument)[0].removeprefix("~")
        if argument.startswith("~") and removed in content and removed != "hydra":
            raise SettingsError(f"{argument} would remove a setting that the program needs; set {removed}=... instead")
    overrides = [argument for argument in arguments if argument.startswith("+") and "=" in argument]
    for override in OverridesParser.create().parse_overrides(overrides):
        top = re.split(r"[./@]", str(override.key_or_group))[0]
        if top not in known:
            raise SettingsError(no_setting(top, "", sorted(known - {"hydra"})))
