"""The files in the folder of a run: that they belong to that run, and that they are whole."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.errors import DataWarning, warn
from flows.training.checkpoint import (
    MODEL,
    RUN,
    CheckpointError,
    DamagedCheckpointError,
    check_content,
    load_checkpoint,
)
from flows.training.files import FOLDER, own_run_folder
from flows.training.model_file import is_model_file
from flows.writing import write_text

RUN_ID = ".run"  # in the folder of a run: the name of the run that lives there
MAX_ID = 100  # characters


def mark_folder(folder: Path, run: str) -> None:
    """Write down which run lives in a folder."""
    if _read_id(folder) != run:
        with contextlib.suppress(OSError):  # without it only a foreign checkpoint goes unnoticed
            write_text(folder / RUN_ID, f"{run}\n")


def check_same_run(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Require that a checkpoint in the folder of a run was written by that run.

    Raises:
        CheckpointError: it was copied there from another one.
    """
    folder = own_run_folder(path)
    own = None if folder is None else _read_id(folder)
    if own is not None and own != checkpoint["run"]:
        raise CheckpointError(
            f"{path} was written by another run ({checkpoint['run'][:12]}) than the one that lives in {folder} "
            f"({own[:12]}): it was copied there, and its metrics and best weights are not those beside it. Resume the "
            "run that it came from, or move the file out of the folder and continue it with output_dir=..., a new one"
        )


def load_best(folder: Path, keep: bool = False) -> dict[str, Any] | None:
    """Read the best checkpoint of a run; None if there is none, or none that can be read.

    A damaged one is set aside, with a warning, so that the run can go on.

    Args:
        folder: of the run.
        keep: leave a damaged one where it is.

    Raises:
        CheckpointError: it cannot be read now, which says nothing about what it holds.
    """
    path = folder / FOLDER / "best.pt"
    if not path.exists():
        return None
    try:
        content = load_checkpoint(path)
        check_content(content, path, MODEL)
    except DamagedCheckpointError as error:
        if keep:
            warn(f"the best weights of the run before are not copied: {error}", DataWarning)
        else:
            set_aside(path, str(error))
        return None
    except CheckpointError as error:
        if not path.is_file():  # a folder in its place
            set_aside(path, str(error))
            return None
        raise CheckpointError(
            f"the best weights of the run cannot be read: {error}. Resume again once they can be, or move the file "
            "away to go on without them"
        ) from error
    return content


def load_to_resume(path: Path) -> dict[str, Any]:
    """Read the checkpoint that a run goes on from.

    Raises:
        CheckpointError: it cannot be read; if it is damaged, the message names a whole one beside it.
    """
    if is_model_file(path):
        raise CheckpointError(
            f"{path} holds a model alone, and a run goes on from its checkpoint: give the folder of the run. To "
            "train a model further in a new run: flows.Trainer(flows.load(path), data, objective, steps=...) in Python"
        )
    try:
        content = load_checkpoint(path)
        check_content(content, path, RUN)
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(f"{error}. {_way_on(path)}") from error
    return content


def whole_checkpoints(folder: Path) -> dict[Path, int]:
    """The checkpoints in a folder that a run can go on from, with their steps, the latest first."""
    found = {}
    for path in sorted(folder.glob("*.pt")):
        with contextlib.suppress(CheckpointError):
            content = load_checkpoint(path)
            check_content(content, path, RUN)
            found[path] = content["position"]["step"]
    return dict(sorted(found.items(), key=lambda one: -one[1]))


def _way_on(path: Path) -> str:
    others = whole_checkpoints(path.parent)
    if not others:
        return "No other checkpoint beside it is whole: train again, with another output_dir"
    other, step = next(iter(others.items()))
    return f"{other} is whole, after step {step}: continue from it in a new folder, resume={other} output_dir=..."


def set_aside(path: Path, reason: str) -> Path | None:
    """Rename a damaged file, so that a new one can be written in its place, and warn.

    Returns:
        Its new path; None if it cannot be renamed.
    """
    for number in range(1, 1000):
        new = path.with_name(f"{path.name}.damaged{'' if number == 1 else number}")
        if not new.exists():
            break
    try:
        os.replace(path, new)
    except OSError:
        new = None
    kept = f"kept as {new.name}" if new is not None else "left where it is"
    warn(f"{path.name} is damaged, and {kept}; the run goes on without it: {reason}", DataWarning)
    return new


def _read_id(folder: Path) -> str | None:
    try:
        with (folder / RUN_ID).open(encoding="utf-8") as file:
            found = file.read(MAX_ID).strip()
    except (OSError, UnicodeDecodeError):
        return None
    return found if re.fullmatch(r"\w+", found) else None
