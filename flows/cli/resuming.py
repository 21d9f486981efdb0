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

from flows.checks import whole_number
from flows.cli.jobs import read_json
from flows.cli.steps import share_steps
from flows.errors import FlowsError, InvalidValueError
from flows.training.annotations import show
from flows.training.checkpoint import CheckpointError, find_checkpoint
from flows.training.continuing import differences, saved_state, was_killed_early
from flows.training.files import CONFIG, FOLDER, SUMMARY, OutputFolderError
from flows.training.identity import load_to_resume
from flows.training.loading import checkpoint_config
from flows.training.runs import completed
from flows.training.settings import complete, instantiate, no_setting
from flows.training.stage import Stage
from flows.training.trusted import check_trusted, foreign_packages

# A resumed run may be watched differently, run on other devices, or last longer, and its data may lie elsewhere: they
# are recognised by their content. Anything else would make it another.
CHANGEABLE_ON_RESUME = re.compile(
    r"hardware\.(?!precision$)\w+|reporting\.\w+|evaluation\.[\w.]+|optimization\.(on|max)_solver_errors?"
    r"|objective\.\w+\.(steps|seconds|patience)|data\.(path|validation_path|test_path|columns|delimiter|header)"
)


RESUME_SETTINGS = ("resume", "output_dir", "trust")
MAX_DIFFERENCES = 8  # in a message


def resumed_config(
    path: str | os.PathLike[str],  # a checkpoint or the folder of a run
    overrides: Sequence[str],  # as given on the command line
    trust: Sequence[str] = (),
    composed: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], Path]:
    """The settings of a run to resume, and the checkpoint to continue from.

    Overrides may change how the run is watched, where it runs and how long it lasts, or say again what the run has.
    Without an `output_dir` among them, the run continues in its own folder.

    Args:
        composed: the settings that the command line chooses, for choices of groups such as `data=moons`.

    Raises:
        CheckpointError: there is no usable checkpoint, or it lies in no run's folder.
        InvalidValueError: an override would make it another run, or the run has no such setting.
    """
    file = find_checkpoint(path, prefer="last")
    content = load_to_resume(file)
    config = checkpoint_config(content, file, trust)
    before = _comparable(config)
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    given = {str(override.key_or_group): override for override in parsed}
    removed = [key for key, override in given.items() if override.is_delete()]
    if removed:
        raise InvalidValueError(f"a resumed run keeps its settings, so ~{removed[0]} cannot remove one; leave it out")
    fixed: list[str] = []
    known: dict[str, Any] = {}  # what the run has for them, where that is one value
    for key, override in given.items():
        if key in RESUME_SETTINGS or key == "steps":
            continue
        if key in config and isinstance(before.get(key), Mapping) and composed is not None:
            fixed += _choose(config, key, before, composed)
        else:
            fixed += _replace(config, key, override.value(), before, file, known)
    if "steps" in given:
        _share_what_is_left(config, given["steps"].value(), content.get("position"))
    if fixed:
        had = f" ({', '.join(f'{key} is {show(value)}' for key, value in known.items())})" if known else ""
        raise InvalidValueError(
            f"a resumed run keeps the settings that it was started with; {', '.join(fixed)} cannot change, only the "
            "steps of a stage and how it is run and watched (hardware.devices, reporting.log_every, data.path, "
            f"...) can{had}. Leave it out, or start a new run"
        )
    if "output_dir" in given:
        config["output_dir"] = str(given["output_dir"].value())
    elif file.parent.name == FOLDER:
        config["output_dir"] = str(file.parent.parent)
    else:
        raise CheckpointError(f"{file} lies in no run's {FOLDER} folder; say with output_dir=... where to continue")
    return config, file


def _share_what_is_left(config: dict[str, Any], total: Any, position: Any) -> None:
    """Share the steps of the whole run among the stages that are not over."""
    whole_number("steps", total, 1)
    stages, stage = dict(config["objective"]), position.get("stage") if isinstance(position, Mapping) else None
    first = list(stages).index(stage) if stage in stages else 0
    over = position["stage_starts"][first] if stage in stages else 0
    taken = position["step"] if stage in stages else 0
    left = dict(list(stages.items())[first:])
    if total - over < len(left) or total < taken:
        raise InvalidValueError(f"steps={total} are fewer than the {taken} that the run has taken; give more")
    shared: dict[str, Any] = {"steps": total - over, "objective": left}
    share_steps(shared)
    config["objective"] = {**stages, **shared["objective"]}


def _choose(config: dict[str, Any], part: str, before: Mapping[str, Any], composed: Mapping[str, Any]) -> list[str]:
    """Take the choice of a group, `data=moons`; returns what it would change and cannot, in words."""
    chosen = {**before, part: composed.get(part)}
    try:
        chosen = _comparable(chosen)
    except (FlowsError, TypeError, KeyError, AttributeError):
        return [part]
    changed = differences({part: before[part]}, {part: chosen[part]})
    if any(not CHANGEABLE_ON_RESUME.fullmatch(name) for name in changed):
        return [part]
    for name, (_, value) in changed.items():
        _set(config, name, value)
    return []


def _replace(
    config: dict[str, Any], key: str, value: Any, before: Mapping[str, Any], file: Path, known: dict[str, Any]
) -> list[str]:
    """Set `config["a"]["b"]` for the key `a.b`; returns what it would change and cannot, in words.

    Raises:
        InvalidValueError: the run has no such setting.
    """
    node, parent = before, ""
    *parents, last = key.split(".")
    for word in [*parents, last]:
        if not isinstance(node, Mapping) or word not in node:
            valid = [name for name in node if not str(name).startswith("_")] if isinstance(node, Mapping) else []
            raise InvalidValueError(f"{no_setting(word, parent, valid)} in the run {file}")
        node, parent = node[word], f"{parent}.{word}" if parent else word
    if node == value or (isinstance(node, Sequence) and isinstance(value, Sequence) and list(node) == list(value)):
        return []
    if not CHANGEABLE_ON_RESUME.fullmatch(key):
        known |= {} if isinstance(node, Mapping) else {key: node}
        return [key]
    _set(config, key, value)
    return []


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node: Any = config
    for word in parents:
        node = node.setdefault(word, {})
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
