"""Continuing a run with its own settings, as far as the command line does not change them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from flows.errors import InvalidValueError
from flows.training.checkpoint import CheckpointError, find_checkpoint, load_checkpoint
from flows.training.files import FOLDER
from flows.training.runs import checkpoint_config
from flows.training.settings import no_setting

# A resumed run may be watched differently, run on other devices, or last longer. Anything else would make it another.
CHANGEABLE_ON_RESUME = re.compile(
    r"hardware\.(?!precision$)\w+|reporting\.\w+|evaluation\.[\w.]+|optimization\.(on|max)_solver_errors?"
    r"|objective\.\w+\.(steps|seconds)"
)


RESUME_SETTINGS = ("resume", "output_dir", "trust")


def resumed_config(
    path: str | os.PathLike[str],  # a checkpoint or the folder of a run
    overrides: Sequence[str],  # as given on the command line
    trust: Sequence[str] = (),
) -> tuple[dict[str, Any], Path]:
    """The settings of a run to resume, and the checkpoint to continue from.

    Overrides may change how the run is watched, where it runs and how long it lasts. Without an `output_dir` among
    them, the run continues in its own folder.

    Raises:
        CheckpointError: there is no usable checkpoint, or it lies in no run's folder.
        InvalidValueError: an override would make it another run.
    """
    file = find_checkpoint(path, prefer="last")
    config = checkpoint_config(load_checkpoint(file), file, trust)
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    given = {override.key_or_group: override.value() for override in parsed}
    fixed = [key for key in given if key not in RESUME_SETTINGS and not CHANGEABLE_ON_RESUME.fullmatch(key)]
    if fixed:
        raise InvalidValueError(
            f"a resumed run keeps the settings that it was started with; {', '.join(fixed)} cannot change, only the "
            "steps of a stage and how it is run and watched (hardware.devices, reporting.log_every, ...) can. "
            "Leave it out, or start a new run"
        )
    for key, value in given.items():
        if key not in RESUME_SETTINGS:
            _replace(config, key, value, file)
    if "output_dir" in given:
        config["output_dir"] = str(given["output_dir"])
    elif file.parent.name == FOLDER:
        config["output_dir"] = str(file.parent.parent)
    else:
        raise CheckpointError(f"{file} lies in no run's {FOLDER} folder; say with output_dir=... where to continue")
    return config, file


def _replace(config: dict[str, Any], key: str, value: Any, file: Path) -> None:
    """Set `config["a"]["b"]` for the key `a.b`, which must exist."""
    parent, _, last = key.rpartition(".")
    node: Any = config
    for word in parent.split("."):
        node = node.get(word) if isinstance(node, dict) else None
    if not isinstance(node, dict) or last not in node:
        valid = [name for name in node if not name.startswith("_")] if isinstance(node, dict) else []
        raise InvalidValueError(f"{no_setting(last, parent, valid)} in the run {file}")
    node[last] = value
