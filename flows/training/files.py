"""Files and folders of a run: written whole or not at all, and owned by one process."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from flows.errors import FileError

FOLDER = "checkpoints"
PLOTS = "plots"
METRICS, SUMMARY, CONFIG = "metrics.jsonl", "summary.json", "config.yaml"
RUN_FILES = (FOLDER, METRICS, SUMMARY)  # each shows that a run lives in a folder, unless it is empty
RUNS = Path("runs")  # where runs live that were given no folder
EVENTS, EVENTS_OF_RUNS = "events.out.tfevents.", ".run"  # begin, end the names of a run's files for TensorBoard
BRANCHING = ".branching"  # lies in a folder while what an older run needs to go on there is copied
STALE = 3600.0  # seconds after which a temporary file is a dead process's, wherever that ran
_TEMPORARY = re.compile(r"\..+~(?P<host>[^~]*)~(?P<pid>\d+)~\d+\.tmp|\.(?:last|best)\.pt\.(?P<old_pid>\d+)\.tmp")
_numbers = itertools.count()  # of the temporary files of this process


class OutputFolderError(FileError):
    """A run cannot live in the folder that was asked for."""


class RunFileError(FileError):
    """A file of a run that is under way cannot be written or read; what was saved before is whole."""


def atomic_write(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> Path:
    """Let `path` hold either its old content or the whole new one, also after a kill or a power cut.

    The file is written under a temporary name in the same folder, flushed to the disk, and renamed; then the folder is
    flushed. Permissions of an old file stay.

    Args:
        path: the file, in a folder that exists.
        write: called with a file open for bytes.

    Raises:
        OSError: the file cannot be written; `path` is as it was.
    """
    path = Path(path)
    temporary, handled = _temporary(path), sys.exc_info()[1]
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(OSError):  # there is no old file
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = _os_error(error, handled)
        if reason is None or reason is error:
            raise
        raise reason from error
    flush_folder(path.parent)
    return path


def _temporary(path: Path) -> Path:
    """A name beside `path` for a file of this process alone."""
    host = socket.gethostname()[:40]
    return path.with_name(f".{path.name[:40]}~{host}~{os.getpid()}~{next(_numbers)}.tmp")


def _os_error(error: BaseException | None, handled: BaseException | None) -> OSError | None:
    """The failure of the disk behind `error`; torch raises a RuntimeError of its own after it.

    What the caller had `handled` when the file was begun is another story.
    """
    while isinstance(error, RuntimeError) and error is not handled:
        error = error.__cause__ or error.__context__
    return error if isinstance(error, OSError) and error is not handled else None


def remove_leftovers(*folders: Path) -> None:
    """Remove the temporary files that killed processes left in these folders.

    A file is left alone if its process may still live: one of that number runs on this machine, or it ran on another
    machine and the file is younger than an hour. This process is known to write nothing there now.
    """
    for path in (path for folder in folders if folder.is_dir() for path in folder.iterdir()):
        if (found := _TEMPORARY.fullmatch(path.name)) is None:
            continue
        with contextlib.suppress(OSError):
            here = found["host"] in (None, socket.gethostname()[:40])  # None: of an older version
            dead = here and not _lives(int(found["pid"] or found["old_pid"]))
            if dead or time.time() - path.stat().st_mtime > STALE:
                path.unlink()


def _lives(pid: int) -> bool:
    """Whether another process of this machine has that number."""
    if pid == os.getpid():
        return False
    if sys.platform == "win32":  # where `os.kill` would end or interrupt it; the file's age decides
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it belongs to another user
        return True
    return True


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
    except OSError as error:
        raise not_writable(path, error) from error
    with claim:
        open_run_folder(path, resuming)  # looks again: another run may have come and gone
        remove_leftovers(path, path / FOLDER, path / PLOTS)
        if (path / BRANCHING).exists():
            _undo_branch(path)
        yield path


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
        except (OSError, ValueError) as error:
            raise not_writable(folder, error) from error
        return folder
    raise AssertionError("numbers do not end")


def open_run_folder(path: str | os.PathLike[str], resuming: bool = False) -> Path:
    """Make the folder of a run.

    Raises:
        OutputFolderError: it cannot be written, or holds another run and is not resumed.
    """
    path = Path(path)
    try:
        free = resuming or _is_half_branched(path)
        taken = [] if free else [name for name in RUN_FILES if _has_content(path / name)]
    except (OSError, ValueError) as error:
        raise not_writable(path, error) from error
    if taken:
        raise OutputFolderError(
            f"the output folder {path} holds another run already ({', '.join(taken)}): continue that one with "
            f"resume={path}, or choose another output_dir; nothing is overwritten"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = _temporary(path / "write-test")
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        raise not_writable(path, error) from error
    return path


def not_writable(path: Path, error: Exception) -> OutputFolderError:
    """Return the error to raise where a run cannot begin in a folder."""
    reason = getattr(error, "strerror", None) or error
    return OutputFolderError(f"the output folder {path} cannot be written ({reason}); choose another output_dir")


def _has_content(path: Path) -> bool:
    """Whether more lies there than a process that was killed at its start leaves behind."""
    if path.is_dir():
        return any(_TEMPORARY.fullmatch(entry.name) is None for entry in path.iterdir())
    return path.is_file() and path.stat().st_size > 0


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    atomic_write(path, lambda file: file.write(text.encode()))


def write_figure(path: Path, figure: Any) -> None:
    """Write a figure of matplotlib whole or not at all, in the format of the name's ending."""
    atomic_write(path, lambda file: figure.savefig(file, format=path.suffix[1:]))


def write_result(path: str | os.PathLike[str], content: Any) -> Path:
    """Write a text or figure that the user asked for, and the folders that it needs; links are followed."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        place = Path(os.path.realpath(path)) if path.is_symlink() else path
        if isinstance(content, str):
            write_text(place, content)
        else:
            write_figure(place, content)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputFolderError(f"{path} cannot be written ({reason}); choose another output") from error
    return path


def branch_run(source: Path, folder: Path) -> None:
    """Copy what a run needs to continue in another folder; `end_branch` follows once its state is saved there."""
    write_text(folder / BRANCHING, f"{source}\n")
    events = [path.relative_to(source) for path in source.glob(f"{EVENTS}*{EVENTS_OF_RUNS}")]
    for name in (Path(FOLDER) / "best.pt", Path(METRICS), *events):
        if (source / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            with (source / name).open("rb") as content:
                atomic_write(folder / name, lambda file, content=content: shutil.copyfileobj(content, file))


def end_branch(folder: Path) -> None:
    """Make the copies of `branch_run` those of a run of its own."""
    (folder / BRANCHING).unlink(missing_ok=True)


def _is_half_branched(folder: Path) -> bool:
    """Whether a process was killed in here after `branch_run`, before it had saved a state of its own."""
    return (folder / BRANCHING).exists() and not (folder / FOLDER / "last.pt").exists()


def _undo_branch(folder: Path) -> None:
    if _is_half_branched(folder):
        for name in (Path(FOLDER) / "best.pt", Path(METRICS)):
            (folder / name).unlink(missing_ok=True)
    end_branch(folder)
