"""One and the same call for starting a run and for continuing it: `resume="auto"`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from flows.errors import InvalidValueError
from flows.training.files import (
    CONFIG,
    EVENTS,
    EVENTS_OF_RUNS,
    FOLDER,
    METRICS,
    SUMMARY,
    OutputFolderError,
    check_place,
)
from flows.training.identity import whole_checkpoints
from flows.training.loggers import flat

AUTO = "auto"


def saved_state(folder: str | os.PathLike[str] | None) -> Path | None:
    """The checkpoint that continues the run in a folder; None if the run is to be started.

    Raises:
        InvalidValueError: there is no folder.
        OutputFolderError: the folder cannot be written, or holds results and nothing to continue them from.
    """
    if folder is None:
        raise InvalidValueError(
            "resume=auto starts a run, or continues it when the same command comes again, so it needs a folder that "
            "the command finds again; give output_dir=..."
        )
    check_place(folder)
    last = Path(folder) / FOLDER / "last.pt"
    if last.is_file():
        return last
    results = [name for name in (SUMMARY, f"{FOLDER}/best.pt") if (Path(folder) / name).exists()]
    metrics = Path(folder) / METRICS
    if metrics.is_file() and metrics.stat().st_size > 0:  # a run has no metrics before its first checkpoint
        results.append(METRICS)
    if results:
        others = whole_checkpoints(last.parent)
        other = "".join(f", or continue from step {others[one]} with resume={one} alone" for one in list(others)[:1])
        raise OutputFolderError(
            f"the output folder {folder} holds {' and '.join(results)} of a run but no {FOLDER}/last.pt to continue it "
            f"from; put that file back{other}, or choose another output_dir; nothing is overwritten"
        )
    return None


def was_killed_early(folder: str | os.PathLike[str]) -> bool:
    """Whether a run has begun in a folder, which holds its settings, but was killed before its first checkpoint."""
    return (Path(folder) / CONFIG).is_file() and saved_state(folder) is None


def discard_unsaved(folder: Path, config: Mapping[str, Any] | None) -> None:
    """Remove what such a run has left; call it under the folder's lock.

    Args:
        folder: of the run.
        config: the settings that are going to be written there; None: none are.

    Raises:
        OutputFolderError: a run has saved something there in the meantime, or the settings are those of something else.
    """
    if saved_state(folder) is not None:
        raise OutputFolderError(f"another process has trained in the output folder {folder}; run the command again")
    if config is not None and _names_in(folder / CONFIG) != set(config):
        raise OutputFolderError(
            f"the output folder {folder} holds a {CONFIG} that is not of such a run; choose another output_dir; "
            "nothing is overwritten"
        )
    for file in (folder / METRICS, *folder.glob(f"{EVENTS}*{EVENTS_OF_RUNS}")):
        file.unlink(missing_ok=True)


def _names_in(path: Path) -> set[Any] | None:
    """The names of the settings in a file; None if it holds none."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return set(content) if isinstance(content, dict) else None


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings, by their dotted names, that differ between two runs; each with both values.

    A setting that one of them lacks has the value `None` there.
    """
    before, after = flat(old), flat(new)
    names = dict.fromkeys([*before, *after])
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}
