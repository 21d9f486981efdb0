"""Continuing a run from the command line with the settings that it was started with."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.errors import InvalidValueError
from flows.training.checkpoint import FOLDER, CheckpointError, find_checkpoint, load_checkpoint
from flows.training.runs import checkpoint_config

# What may change without making it another run: how it is run and watched, and how long a stage lasts.
CHANGEABLE = re.compile(
    r"trainer\.(?!(?:precision|ema_decay|gradient_clip|accumulate_batches)$)\w+|objective\.\w+\.steps"
)
OWN = ("resume", "output_dir", "trust")  # of the resuming command itself


def resumed_config(
    path: str | os.PathLike[str],  # a checkpoint or the folder of a run
    overrides: Sequence[str],  # as given on the command line
    trust: Sequence[str] = (),
) -> tuple[dict[str, Any], Path]:
    """The settings of a run with the overrides that a resumed run allows, and the checkpoint to continue from.

    Without an ``output_dir`` among the overrides, the run continues in its own folder.

    Raises:
        CheckpointError: there is no usable checkpoint, or no folder that it belongs to.
        ValueError: an override would change what the run is.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    file = find_checkpoint(path, prefer="last")
    config = checkpoint_config(load_checkpoint(file), file, trust)
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    given = {override.key_or_group: override.value() for override in parsed}
    fixed = [key for key in given if key not in OWN and not CHANGEABLE.fullmatch(key)]
    if fixed:
        raise InvalidValueError(
            f"a resumed run keeps the settings that it was started with; {', '.join(fixed)} cannot change, only the "
            "steps of a stage and how the trainer runs and watches it (trainer.devices, trainer.log_every, ...) can. "
            "Leave it out, or start a new run"
        )
    for key, value in given.items():
        if key not in OWN:
            _replace(config, key, value, file)
    if "output_dir" in given:
        config["output_dir"] = str(given["output_dir"])
    elif file.parent.name == FOLDER:
        config["output_dir"] = str(file.parent.parent)
    else:
        raise CheckpointError(f"{file} lies in no run's {FOLDER} folder; say with output_dir=... where to continue")
    return config, file


def _replace(config: dict[str, Any], key: str, value: Any, file: Path) -> None:
    """Set ``config["a"]["b"]`` for the key ``"a.b"``, which must exist."""
    *parents, last = key.split(".")
    node = config
    for parent in parents:
        node = node.get(parent, {})
    if last not in node:
        raise InvalidValueError(f"the run in {file} has no setting {key}")
    node[last] = value
