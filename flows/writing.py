"""Files are written whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import math
import os
import re
import shutil
import socket
import stat
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from flows.errors import FileError

STALE = 3600.0  # seconds after which a temporary file is a dead process's, wherever that ran
_TEMPORARY = re.compile(r"\..+~(?P<host>[^~]*)~(?P<pid>\d+)~\d+\.tmp|\.(?:last|best)\.pt\.(?P<old_pid>\d+)\.tmp")
_numbers = itertools.count()  # of the temporary files of this process


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
    temporary, handled = temporary_name(path), sys.exc_info()[1]
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


def temporary_name(path: Path) -> Path:
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


def is_temporary(name: str) -> bool:
    """Whether `atomic_write` gives such names to files that are not whole yet."""
    return _TEMPORARY.fullmatch(name) is not None


def flush_folder(path: Path) -> None:
    """Make the names in a folder survive a power cut, on systems that can."""
    with contextlib.suppress(OSError):  # Windows opens no folders, and some network file systems flush none
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def to_json(content: Mapping[str, Any]) -> str:
    """Return the text of a JSON file."""
    return json.dumps(content, indent=2) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    atomic_write(path, lambda file: file.write(text.encode()))


def write_figure(path: Path, figure: Any) -> None:
    """Write a figure of matplotlib whole or not at all, in the format of the name's ending."""
    atomic_write(path, lambda file: figure.savefig(file, format=path.suffix[1:]))


def write_result(
    path: str | os.PathLike[str],
    content: Any,  # a text, a figure of matplotlib, or a function that writes bytes into a file
) -> Path:
    """Write what the user asked for whole or not at all, and make the folders that it needs; links are followed.

    Raises:
        FileError: the file cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        place = Path(os.path.realpath(path)) if path.is_symlink() else path
        if isinstance(content, str):
            write_text(place, content)
        elif callable(content):
            atomic_write(place, content)
        else:
            write_figure(place, content)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"{path} cannot be written ({reason}); choose another output") from error
    return path


def write_columns(path: Path, columns: Mapping[str, Sequence[Any]], digits: int | None = None) -> Path:
    """Write columns by name: numbers, words, and NaN or None for what is unknown.

    A .csv has an empty field there, a .parquet file a null.

    Args:
        digits: of numbers in a .csv; None: as many as tell them apart.

    Raises:
        FileError: the file cannot be written.
    """
    write = _write_parquet if path.suffix == ".parquet" else _write_csv
    return write_result(path, lambda file: write(file, columns, digits))


def _write_csv(file: BinaryIO, columns: Mapping[str, Sequence[Any]], digits: int | None) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in zip(*columns.values(), strict=True):
        writer.writerow([_field(value, digits) for value in row])
    text.detach()  # flushes, and leaves the file open


def _field(value: Any, digits: int | None) -> str:
    if value is None or value != value:
        return ""
    exact = digits is None or not isinstance(value, float) or not math.isfinite(value)
    return str(value) if exact else f"{value:.{digits}g}"


def _write_parquet(file: BinaryIO, columns: Mapping[str, Sequence[Any]], digits: int | None) -> None:
    import pyarrow as pa  # slow to import
    import pyarrow.parquet as pq

    pq.write_table(pa.table({name: pa.array(values, from_pandas=True) for name, values in columns.items()}), file)


def kind_of(path: Path) -> str:
    """What lies at a path: "file", "folder", "pipe", "socket" or "device"."""
    mode = path.stat().st_mode
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")
