"""Continuing a run with its own settings, as far as the command line does not change them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from flows.cli.jobs import read_json
from flows.errors import FlowsError, InvalidValueError
from flows.training.annotations import show
from flows.training.checkpoint import CheckpointError, find_checkpoint
from flows.training.continuing import differences, saved_state, was_killed_early
from flows.training.files import CONFIG, FOLDER, SUMMARY, OutputFolderError
from flows.training.identity import load_to_resume
from flows.training.runs import checkpoint_config, completed
from flows.training.settings import complete, instantiate, no_setting
from flows.training.stage import Stage
from flows.training.trusted import check_trusted, foreign_packages

# A resumed run may be watched differently, run on other devices, or last longer, and its data may lie elsewhere: they
# are recognised by their content. Anything else would make it another.
CHANGEABLE_ON_RESUME = re.compile(
    r"hardware\.(?!precision$)\w+|reporting\.\w+|evaluation\.[\w.]+|optimization\.(on|max)_solver_errors?"
    r"|objective\.\w+\.(steps|seconds)|data\.(path|columns|delimiter|header)"
)


RESUME_SETTINGS = ("resume", "output_dir", "trust")
MAX_DIFFERENCES = 8  # in a message


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
    config = checkpoint_config(load_to_resume(file), file, trust, of_run=True)
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    given = {override.key_or_group: override.value() for override in parsed}
    fixed = [key for key in given if key not in RESUME_SETTINGS and not CHANGEABLE_ON_RESUME.fullmatch(key)]
    if fixed:
        raise InvalidValueError(
            f"a resumed run keeps the settings that it was started with; {', '.join(fixed)} cannot change, only the "
            "steps of a stage and how it is run and watched (hardware.devices, reporting.log_every, data.path, "
            "...) can. Leave it out, or start a new run"
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


@dataclass(frozen=True)
class Continued:
    """What `resume=auto` has found in the folder of a run."""

    checkpoint: Path | None  # None: nothing was saved, and the run starts
    summary: dict[str, Any] | None = None  # of a run that is done


def find_run(config: Mapping[str, Any], trust: Sequence[str] = ()) -> Continued:
    """Look into the output folder for the run that these settings describe.

    Raises:
        InvalidValueError: there is no folder, or the run in it was started with other settings.
        CheckpointError: its checkpoint cannot be read.
    """
    folder = config.get("output_dir")
    file = saved_state(folder)
    assert folder is not None
    own = [*trust, *foreign_packages(config)]  # what the command line names itself needs no further trust
    if file is None:
        if was_killed_early(folder):
            begun = _settings_in(Path(folder))
            check_trusted(begun, own)
            _compare(begun, config, folder)
        return Continued(None)
    content = load_to_resume(file)
    old = checkpoint_config(content, file, own, of_run=True)
    changed = _compare(old, config, folder)
    summary = read_json(Path(folder) / SUMMARY)
    tested_alike = not any(name.startswith("evaluation.") for name in changed)
    is_done = summary is not None and tested_alike and _is_done(config, content.get("position"), summary)
    return Continued(file, summary if is_done else None)


def _compare(old: Mapping[str, Any], new: Mapping[str, Any], folder: Any) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, which all may.

    Raises:
        InvalidValueError: others differ, too.
    """
    changed = differences(_comparable(old), _comparable(new))
    fixed = {name: values for name, values in changed.items() if not CHANGEABLE_ON_RESUME.fullmatch(name)}
    if fixed:
        shown = [f"{name} was {show(old)} and is now {show(new)}" for name, (old, new) in fixed.items()]
        more = f", and {len(shown) - MAX_DIFFERENCES} more" if len(shown) > MAX_DIFFERENCES else ""
        raise InvalidValueError(
            f"the run in {folder} was started with other settings: {'; '.join(shown[:MAX_DIFFERENCES])}{more}. "
            "resume=auto continues a run with the settings that it was started with; only the steps of a stage and how "
            "the run is watched and where it runs can change. Give the same settings again, or another output_dir"
        )
    return changed


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """All settings that describe a run, the defaults written out."""
    config = {name: value for name, value in config.items() if name not in RESUME_SETTINGS}
    try:
        return completed(config)
    except (FlowsError, AttributeError, KeyError, TypeError):  # told when the run is built
        return complete(config)


def _settings_in(folder: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        raise OutputFolderError(
            f"{folder / CONFIG} are not the settings of a run, so resume=auto cannot tell what was begun there; "
            "choose another output_dir"
        )
    return content


def _is_done(config: Mapping[str, Any], position: Any, summary: Mapping[str, Any]) -> bool:
    """Whether a run with these stages has nothing left to train, and was tested after its last step."""
    name, stage = list(config["objective"].items())[-1]
    if not isinstance(position, Mapping) or position.get("stage") != name:
        return False
    if summary.get("evaluated_with") is None or summary.get("steps") != position.get("step"):
        return False
    last: Stage = instantiate(stage, f"objective.{name}")
    return last.done(position.get("step_in_stage", 0), position.get("seconds_in_stage", 0.0)) >= 1
