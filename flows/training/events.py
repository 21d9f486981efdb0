"""Events that TensorBoard shows."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flows.arguments import checked
from flows.training.appended import AppendedFile
from flows.training.files import EVENTS, EVENTS_OF_RUNS
from flows.training.loggers import HParams, Layout

SHRUNK = 0.6  # of the size of a figure, beside that of its words

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@checked
class TensorBoardLogger:
    """Writes TensorBoard events: numbers as scalars, figures as images, strings as text.

    A disk that fails delays events and never ends the run, see `AppendedFile`.

    Args:
        directory: the folder of the run.
        resume_step: the step that a resumed run starts from; later events, written before it was stopped, are hidden.
        suffix: ends the name of the file.
        count: of the events in the files that this one follows.
        thumbnails: draw figures smaller, so that their words are larger beside them.

    Attributes:
        count: of the events so far, but those that begin a file.

    Example:
        ```python
        import flows

        logger = flows.training.TensorBoardLogger("events")
        logger.log({"train/loss": 1.4}, step=20)
        logger.close()
        ```
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        resume_step: int | None = None,
        suffix: str = "",
        count: int = 0,
        thumbnails: bool = False,
    ) -> None:
        from tensorboard.compat.proto import event_pb2  # not needed unless asked for
        from tensorboard.summary.writer.record_writer import RecordWriter

        protocol: Any = event_pb2
        self._new_event = protocol.Event
        now = _after_others(Path(directory), suffix)
        name = f"{EVENTS}{now:.6f}.{socket.gethostname()}.{os.getpid()}{suffix}"  # sorted by time
        self.file = AppendedFile(Path(directory) / name)
        self._writer = RecordWriter(self.file)
        self.count = count
        self.thumbnails = thumbnails
        self._write(file_version="brain.Event:2")
        if resume_step is not None:
            self._write(step=resume_step + 1, session_log=protocol.SessionLog(status=protocol.SessionLog.START))

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import summary

        for name, value in metrics.items():
            if _is_figure(value):
                figure = thumbnail(value) if self.thumbnails else value
                self._write(summary.image(name, _pixels(figure), dataformats="HWC"), step)
            elif isinstance(value, str):
                self._write(summary.text(name, value), step)
            elif isinstance(value, HParams):
                self._log_hparams(value, step)
            elif isinstance(value, Layout):
                charts = {
                    group: {
                        title: ["Multiline", [f"^{re.escape(tag)}$" for tag in tags]] for title, tags in own.items()
                    }
                    for group, own in value.charts.items()
                }
                self._write(summary.custom_scalars(charts), step)
            else:
                self._write(summary.scalar(name, value), step)

    def _log_hparams(self, value: HParams, step: int) -> None:
        """Write the summaries into this run's own event file, so that a run is one row of the table."""
        from torch.utils.tensorboard.summary import hparams, scalar

        settings = {
            key: setting if isinstance(setting, (bool, int, float, str)) else str(setting)
            for key, setting in value.settings.items()
        }
        results = {key: result for key, result in value.results.items() if result is not None}
        for summary in hparams(settings, results):
            self._write(summary)
        for name, result in results.items():
            self._write(scalar(name, result), step)

    def _write(self, summary: Any = None, step: int = 0, **content: Any) -> None:
        self.count += summary is not None
        event = self._new_event(wall_time=time.time(), step=int(step), summary=summary, **content)
        self._writer.write(event.SerializeToString())

    def close(self) -> None:
        self.file.close()


def _exactly(tags: Sequence[str]) -> list[str]:
    """Patterns of these tags alone."""
    return [f"^{re.escape(tag)}$" for tag in tags]


def _after_others(folder: Path, suffix: str) -> float:
    """The time, or a later one if a clock was ahead when the last file of that suffix was begun."""
    names = [path.name.removeprefix(EVENTS).split(".") for path in folder.glob(f"{EVENTS}*{suffix}")]
    times = [float(f"{name[0]}.{name[1]}") for name in names if name[0].isdecimal() and name[1].isdecimal()]
    return max([time.time(), *(begun + 1e-3 for begun in times)])


def keep_events(folder: Path, count: int) -> int:
    """Remove all but the first `count` events from the files of a run; returns how many there were of these.

    Those that begin a file do not count. Half an event, which a killed process has left, and what follows it in its
    file are removed, too.
    """
    kept = 0
    for path in sorted(folder.glob(f"{EVENTS}*{EVENTS_OF_RUNS}")):  # by time
        size, found = _leading_events(path, count - kept)
        kept += found
        if not found:
            path.unlink()
        elif size < path.stat().st_size:
            os.truncate(path, size)
    return kept


def _leading_events(path: Path, most: int) -> tuple[int, int]:
    """The bytes and the number of the first events of a file, at most `most`."""
    from tensorboard.compat.proto import event_pb2

    protocol: Any = event_pb2
    size = found = 0
    with path.open("rb") as file:
        while found < most and len(header := file.read(12)) == 12:
            length = struct.unpack("<Q", header[:8])[0]
            if length > path.stat().st_size or len(record := file.read(length + 4)) < length + 4:
                break
            try:
                found += protocol.Event.FromString(record[:-4]).HasField("summary")
            except Exception:  # damaged; the errors of protocol buffers are of several types
                break
            size += 12 + len(record)
    return size, found


def _is_figure(value: object) -> bool:
    """Whether it is a figure; without matplotlib, which is slow to import, nothing is."""
    matplotlib: Any = sys.modules.get("matplotlib.figure")
    return matplotlib is not None and isinstance(value, matplotlib.Figure)


def thumbnail(figure: Figure) -> Figure:
    """Make a figure smaller, so that its words are larger beside it and legible where pictures are small."""
    if not any(axes.axison for axes in figure.axes):
        return figure  # pictures without words
    width, height = figure.get_size_inches()
    figure.set_size_inches(SHRUNK * width, SHRUNK * height)
    figure.set_dpi(figure.dpi / SHRUNK)
    with contextlib.suppress(RuntimeError):  # of a colour bar that another layout has placed
        figure.set_layout_engine("compressed" if _has_images(figure) else "constrained")
    return figure


def _has_images(figure: Figure) -> bool:
    return any(axes.get_aspect() != "auto" for axes in figure.axes)


def _pixels(figure: Figure) -> np.ndarray:  # (height, width, 3), bytes
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
