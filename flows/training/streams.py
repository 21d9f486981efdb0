"""Streams of the terminal that never end a run."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

GONE = (errno.EPIPE, errno.EIO, errno.EBADF)  # nobody will read what is written here again


@contextlib.contextmanager
def unbreakable_streams(until_exit: bool = False) -> Iterator[None]:
    """While entered, let no print, warning or progress bar raise because nobody can read it any more.

    The reader of a pipe may have ended, the terminal may be closed, or the disk that a log goes to may be full.
    Characters that the terminal cannot show are replaced.

    Args:
        until_exit: the program ends afterwards, and what cannot be written is dropped, or its exit would fail.
    """
    for number in range(3):  # a file that took the place of a closed stream would receive what libraries print
        with contextlib.suppress(OSError):
            _keep_taken(number)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (UnbreakableStream(stream) for stream in before)  # type: ignore[assignment]
    try:
        yield
    finally:
        for stream in before:
            with contextlib.suppress(Exception):  # of a stream of somebody's own
                UnbreakableStream(stream).flush(last=until_exit)
        sys.stdout, sys.stderr = before


def _keep_taken(number: int) -> None:
    try:
        os.fstat(number)
    except OSError:
        os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


class UnbreakableStream:
    """A text stream that drops what cannot be written.

    Args:
        stream: to write to; None, as for a program that was started without it: nowhere.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream._stream if isinstance(stream, UnbreakableStream) else stream

    def __eq__(self, other: object) -> bool:
        """Whether both write to the same place; tqdm asks, to print above its bars."""
        return (other._stream if isinstance(other, UnbreakableStream) else other) is self._stream

    def __hash__(self) -> int:
        return hash(id(self._stream))

    def write(self, text: str) -> int:
        """Write `text`, or drop it; returns its length."""
        if self._stream is not None:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "ascii"
                self.write(text.encode(encoding, "replace").decode(encoding))
            except (OSError, ValueError) as error:  # ValueError: the stream is closed
                self._give_up(error)
        return len(text)

    def flush(self, last: bool = False) -> None:
        """Flush what can be flushed; after the last time, nothing is left that could not be."""
        if self._stream is not None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                if last:
                    self._send_nowhere()
                else:
                    self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Send a standard stream nowhere once nobody can read it again."""
        if isinstance(error, OSError) and error.errno in GONE:
            self._send_nowhere()

    def _send_nowhere(self) -> None:
        stream = self._stream
        if stream is None:
            return
        with contextlib.suppress(OSError, ValueError, AttributeError):
            number = stream.fileno()
            if number in (1, 2):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)

    def isatty(self) -> bool:
        """Return whether this is a terminal."""
        try:
            return self._stream is not None and self._stream.isatty()
        except (OSError, ValueError):
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
