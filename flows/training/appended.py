"""A file that grows while a run trains."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import BinaryIO

LOG = logging.getLogger("flows")


class AppendedFile:
    """A file that only grows. A full disk or lost permission delays what is written, and never ends the run.

    What cannot be written is kept in memory and written at the next call that succeeds, in order. The first failure is
    warned of. Nothing is buffered otherwise, so a killed process loses nothing that it has written.

    Args:
        path: the file; made if needed, with its folder, else continued.
    """

    closed = False  # for writers that ask

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._pending = bytearray()
        self._file: BinaryIO | None = None
        self._fails = False
        self.flush()

    def write(self, data: bytes) -> int:
        """Append `data`, now or later."""
        self._pending += data
        self.flush()
        return len(data)

    def flush(self) -> None:
        """Write what waits."""
        try:
            if self._file is None or os.fstat(self._file.fileno()).st_nlink == 0:  # the file was deleted
                self._open()
            while self._pending:
                written = self._file.write(self._pending)  # type: ignore[union-attr]
                del self._pending[:written]
        except OSError as error:
            if not self._fails:
                LOG.warning(
                    "%s cannot be written (%s); training goes on, and what is missing is written as soon as it can be",
                    self.path,
                    error.strerror or error,
                )
            self._fails = True
        else:
            self._fails = False

    def sync(self) -> None:
        """Flush to the disk, so that a checkpoint written later never knows of more than is there."""
        self.flush()
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what waits, and close."""
        self.flush()
        if self._pending:
            LOG.warning("the last %d bytes of %s could not be written and are lost", len(self._pending), self.path)
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _open(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab", buffering=0)
