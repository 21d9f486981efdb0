"""Progress bars: live at a terminal, a line now and then in a log."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

Bar = TypeVar("Bar", bound=tqdm)

LOG_SECONDS = 30  # between lines of a log
NOTHING_DONE = re.compile(r"(^|[\s|])0(/[\d.]+\w?|\w*)? \[")  # such as "|  0/10 [" and "0pt ["
CONTROL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|[\r\n]")  # what moves the cursor of a terminal


def new_bar(iterable: Iterable[Any] | None = None, kind: type[Bar] = tqdm, **settings: Any) -> Bar:
    """Return a bar on stderr, or where `file` says.

    Where that is no terminal, such as a file or a pipe, it writes a line every half a minute and one at the end.

    Args:
        iterable: what to count; None: call `update`.
        kind: class of the bar.
        settings: of tqdm.
    """
    stream = settings.pop("file", None) or sys.stderr
    if not _is_live(stream):
        stream, settings = _Lines(stream), {**settings, "mininterval": LOG_SECONDS, "maxinterval": LOG_SECONDS}
    return kind(iterable, file=stream, **settings)


def _is_live(stream: Any) -> bool:
    """Whether a line can be written again in its place."""
    try:
        is_terminal = bool(stream.isatty())
    except (AttributeError, OSError, ValueError):
        is_terminal = False
    inner = getattr(stream, "_stream", stream)  # of flows.training.streams
    return is_terminal or type(inner).__module__.partition(".")[0] == "ipykernel"  # notebooks show bars live


class _Lines:
    """A stream for tqdm that makes lines of what it draws; the bar of nothing done yet is left out."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        line = CONTROL.sub("", text).rstrip()
        if line.strip() and not NOTHING_DONE.search(line):
            self._stream.write(f"{line}\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return False
