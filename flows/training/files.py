"""Files and folders of a run: written whole or not at all, and owned by one process."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from flows.errors import FileError

FOLDER = "checkpoints"
METRICS, SUMMARY, CONFIG = "metrics.jsonl", "summary.json", "config.yaml"
RUN_FILES = (FOLDER, METRICS, SUMMARY)  # each shows that a run lives in a folder, unless it is empty
RUNS = Path("runs")  # where runs live that were given no folder
_numbers = itertools.count()  # of the temporary files of this process


class OutputFolderError(FileError):
    """A run cannot live in the folder that was asked for."""


def atomic_write(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> Path:
    """Let `path` hold either its old content or the whole new one, also after a kill or a power cut.

    The file is written under a temporary name in the same folder, flushed to the disk, and renamed; then the folder is
    flushed.

    Args:
        path: the file, in a folder that exists.
        write: called with a file open for bytes.

    Raises:
        OSError: the file cannot be written; `path` is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:40]}.{socket.gethostname()[:40]}.{os.getpid()}.{next(_numbers)}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)
    return path


def flush_folder(path: Path) -> None:
    """Make the names in a folder survive a power cut, on systems that can."""
    with contextlib.suppress(OSError):  # Windows opens no folders, and some network file systems flush none
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


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
    atomic_write(path, lambda file: file.write(text.encode()))


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
