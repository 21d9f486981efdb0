"""The folder of a run: which files it holds, and that it belongs to one process."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from flows.errors import FileError
from flows.writing import atomic_write, is_temporary, kind_of, remove_leftovers, temporary_name, write_text

FOLDER = "checkpoints"
PLOTS = "plots"
METRICS, SUMMARY, CONFIG = "metrics.jsonl", "summary.json", "config.yaml"
RUN_FILES = (FOLDER, METRICS, SUMMARY)  # each shows that a run lives in a folder, unless it is empty
RUNS = Path("runs")  # where runs live that were given no folder
EVENTS, EVENTS_OF_RUNS = "events.out.tfevents.", ".run"  # begin, end the names of a run's files for TensorBoard
BRANCHING = ".branching"  # lies in a folder while what an older run needs to go on there is copied


class OutputFolderError(FileError):
    """A run cannot live in the folder that was asked for."""


class RunFileError(FileError):
    """A file of a run that is under way cannot be written or read; what was saved before is whole."""


def run_folder(checkpoint: str | os.PathLike[str]) -> Path:
    """Return the folder of the run of a checkpoint file; for a stray file, the folder that it lies in."""
    return own_run_folder(checkpoint) or Path(checkpoint).parent


def own_run_folder(checkpoint: str | os.PathLike[str]) -> Path | None:
    """Return the folder of the run of a checkpoint file; None for a stray file, which belongs to no run."""
    folder = Path(checkpoint).parent
    return folder.parent if folder.name == FOLDER else None


def check_place(path: str | os.PathLike[str] | None) -> None:
    """Refuse an output folder that cannot be made or written, before anything is computed for it.

    Nothing is left there.

    Args:
        path: the folder; None: a new one in `runs`.

    Raises:
        OutputFolderError: it is an address or a file, or it lies where this process may not write.
    """
    path = RUNS if path is None else Path(path)
    if address := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", str(path)):
        raise OutputFolderError(
            f"output_dir={path} is an address ({address[1]}), and a run needs a folder of this machine, such as one "
            "where that store is mounted; copy the files later"
        )
    try:
        above = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
        if not above.is_dir():
            kind = kind_of(above) if above.exists() else "link to nowhere"
            if above != path:
                raise OutputFolderError(
                    f"{above} is a {kind}, so the output folder {path} cannot be written (Not a directory); choose "
                    "another output_dir"
                )
            raise OutputFolderError(f"output_dir={path} is no folder but a {kind}; choose another output_dir")
        probe = temporary_name(above / "write-test")
        probe.mkdir()
        probe.rmdir()
    except OutputFolderError:
        raise
    except (OSError, ValueError) as error:
        raise not_writable(path, error) from error


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
        probe = temporary_name(path / "write-test")
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
        return not all(is_temporary(entry.name) for entry in path.iterdir())
    return path.is_file() and path.stat().st_size > 0


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
