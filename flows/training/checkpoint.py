"""Files of a run: checkpoints, written whole and read without running anything in them, and its folder."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from flows.errors import FileError, InvalidValueError

FORMAT = "flows checkpoint"
VERSION = 3  # of the arrangement, and of what fields make of the same weights
FOLDER = "checkpoints"
METRICS, SUMMARY, CONFIG = "metrics.jsonl", "summary.json", "config.yaml"
RUN_FILES = (FOLDER, METRICS, SUMMARY)  # each shows that a run lives in a folder, unless it is empty
RUNS = Path("runs")  # where runs live that were given no folder

# What a checkpoint must hold: to use its model, and to continue its run.
MODEL = {"data": dict, "ema": dict, "position": dict}
RUN = MODEL | {
    "run": str,
    "model": dict,
    "ema_updates": int,
    "optimizer": dict,
    "means": dict,
    "ranks": list,
}


class CheckpointError(InvalidValueError):
    """A checkpoint is missing, damaged, or not one of ours."""


class OutputFolderError(FileError):
    """A run cannot live in the folder that was asked for."""


def describe(dataset: Any) -> dict[str, Any]:
    """Return plain values that identify the data of a run, and from which its model can be built again."""
    own = getattr(dataset, "description", dict)  # data of the user's own may do without
    return {"name": getattr(dataset, "name", type(dataset).__name__), **own()}


def save_checkpoint(path: str | os.PathLike[str], content: Mapping[str, Any]) -> Path:
    """Write `content` so that `path` holds either the old checkpoint or the whole new one.

    The file is written under a temporary name in the same folder, flushed to the disk, and renamed.

    Args:
        path: the file; its folder is made if needed.
        content: nested dicts and lists of tensors, numbers and strings.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, "version": VERSION, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, with `weights_only=True`: no code in the file is run.

    Raises:
        CheckpointError: the file is missing, damaged, holds anything but data, or is not a checkpoint of
            this package and version.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: the file does not exist")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns of in a foreign file ends in an error below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a flows checkpoint: it is damaged, or holds objects other than tensors, numbers "
            "and text, which are never loaded because they could run code"
        ) from error
    except Exception as error:  # torch and pickle raise almost anything on damaged bytes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} is truncated or damaged and cannot be read ({reason}); use another checkpoint of the run"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a flows checkpoint (it was written by something else)")
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has checkpoint version {content.get('version')}, this version of flows reads {VERSION}; read it "
            "with the version that wrote it, or train again"
        )
    return content


def check_content(content: Mapping[str, Any], path: str | os.PathLike[str], kinds: Mapping[str, type]) -> None:
    """Compare a checkpoint with `MODEL` or `RUN`.

    Raises:
        CheckpointError: something is missing, or of another type.
    """
    wrong = [name for name, kind in kinds.items() if not isinstance(content.get(name), kind)]
    if not wrong:
        sizes, weights, step = content["data"].get("event_shape"), content["ema"], content["position"].get("step")
        if sizes is not None and not all(isinstance(size, int) and size > 0 for size in sizes):
            wrong.append("data")
        if not all(isinstance(value, torch.Tensor) for value in weights.values()):
            wrong.append("ema")
        if not isinstance(step, int):
            wrong.append("position")
    if wrong:
        raise CheckpointError(
            f"{path} is not a whole checkpoint of a run: {', '.join(wrong)} missing or not as written by flows; use "
            "another checkpoint"
        )


def find_checkpoint(
    path: str | os.PathLike[str],  # a checkpoint file or the folder of a run
    prefer: str = "best",  # "best" or "last", where both are there
) -> Path:
    """Return the checkpoint file that `path` means.

    Raises:
        CheckpointError: there is none; the message says what is there instead.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise CheckpointError(f"a checkpoint is a file, or the folder of a run; got {path!r}")
    path = Path(path)
    if path.is_file():
        return path
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}: there is no such file or folder")
    other = "last" if prefer == "best" else "best"
    for folder in (path / FOLDER, path):
        for name in (prefer, other):
            if (folder / f"{name}.pt").is_file():
                return folder / f"{name}.pt"
    found = sorted(entry.name for entry in path.iterdir())[:8]
    raise CheckpointError(
        f"no checkpoint in the folder {path}: expected {FOLDER}/{prefer}.pt in it, "
        f"found {', '.join(found) if found else 'nothing'}"
    )


def run_folder(checkpoint: str | os.PathLike[str]) -> Path:
    """Return the folder of the run of a checkpoint file; for a stray file, the folder that it lies in."""
    return own_run_folder(checkpoint) or Path(checkpoint).parent


def own_run_folder(checkpoint: str | os.PathLike[str]) -> Path | None:
    """Return the folder of the run of a checkpoint file; None for a stray file, which belongs to no run."""
    folder = Path(checkpoint).parent
    return folder.parent if folder.name == FOLDER else None


def to_json(content: Mapping[str, Any]) -> str:
    """Return the text of a JSON file."""
    return json.dumps(content, indent=2) + "\n"


@contextlib.contextmanager
def claimed_folder(
    path: str | os.PathLike[str] | None,  # None: a new one, runs/<name>/<date>_<time>
    resuming: bool = False,
    name: str = "",
) -> Iterator[Path]:
    """Make the folder of a run, and keep every other run out of it while entered.

    The claim is a lock of the operating system on the file `.lock`. A process that is killed leaves none behind.

    Raises:
        OutputFolderError: the folder cannot be written, another process trains in it, or it holds another run and
            is not resumed.
    """
    path = open_run_folder(new_folder(RUNS / name) if path is None else path, resuming)
    try:
        claim = FileLock(path / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise OutputFolderError(
            f"another process is training in the output folder {path}; wait for it, or choose another output_dir"
        ) from error
    with claim:
        yield open_run_folder(path, resuming)  # looks again: another run may have come and gone


def new_folder(parent: Path) -> Path:
    """Make `parent/<date>_<time>`, with a number at the end if another process was faster.

    Raises:
        OutputFolderError: it cannot be written.
    """
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    for number in itertools.count(1):
        folder = parent / (name if number == 1 else f"{name}_{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise OutputFolderError(f"the output folder {folder} cannot be written ({error.strerror})") from error
        return folder
    raise AssertionError("numbers do not end")


def open_run_folder(path: str | os.PathLike[str], resuming: bool = False) -> Path:
    """Make the folder of a run.

    Raises:
        OutputFolderError: it cannot be written, or holds another run and is not resumed.
    """
    path = Path(path)
    taken = [] if resuming else [name for name in RUN_FILES if _has_content(path / name)]
    if taken:
        raise OutputFolderError(
            f"the output folder {path} holds another run already ({', '.join(taken)}): continue that one with "
            f"resume={path}, or choose another output_dir; nothing is overwritten"
        )
    probe = path / f".write-test-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputFolderError(
            f"the output folder {path} cannot be written ({error.strerror}); choose another output_dir"
        ) from error
    return path


def _has_content(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.is_file() and path.stat().st_size > 0


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_result(path: str | os.PathLike[str], text: str) -> Path:
    """Write a file that the user asked for, and the folders that it needs."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise OutputFolderError(f"{path} cannot be written ({error.strerror}); choose another output") from error
    return path


def branch_run(source: Path, folder: Path) -> None:
    """Copy what a run needs to continue in another folder."""
    for name in (Path(FOLDER) / "best.pt", Path(METRICS)):
        if (source / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)
