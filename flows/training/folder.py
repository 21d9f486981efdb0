"""The folder of a run."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from flows.errors import FileError
from flows.training.checkpoint import FOLDER

MARKS = (FOLDER, "metrics.jsonl", "summary.json")  # each shows that a run lives here, unless it is empty
RUNS = Path("runs")  # where runs live that were given no folder


class OutputFolderError(FileError):
    """A run cannot live in the folder that was asked for."""


@contextlib.contextmanager
def claimed_folder(
    path: str | os.PathLike[str] | None,  # None: a new one, runs/<name>/<date>_<time>
    resuming: bool = False,
    name: str = "",
) -> Iterator[Path]:
    """Make the folder of a run, and keep every other run out of it while the context lasts.

    The claim is a lock of the operating system on the file ``.lock``: a process that is killed leaves none behind.

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
    """Make ``parent/<date>_<time>``, with a number behind it where another process was faster.

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
    taken = [] if resuming else [mark for mark in MARKS if _has_content(path / mark)]
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
    """Write a file that the user asked for, with the folders that it needs."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise OutputFolderError(f"{path} cannot be written ({error.strerror}); choose another output") from error
    return path


def branch_run(source: Path, folder: Path) -> None:
    """Bring along what a run that is continued in another folder goes on from."""
    for name in (Path(FOLDER) / "best.pt", Path("metrics.jsonl")):
        if (source / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)
