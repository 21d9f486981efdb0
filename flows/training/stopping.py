"""Stopping a run from outside without losing it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType


class TrainingInterrupted(KeyboardInterrupt):
    """Training was stopped by a signal after a whole step, and its state was saved.

    Attributes:
        checkpoint: the file that continues the run.
        step: the number of steps done.
        signal_number: SIGINT or SIGTERM.
        packages: whose classes the settings of the run call, beside this one; the run that goes on must trust them.
    """

    def __init__(self, checkpoint: Path, step: int, signal_number: int, packages: Sequence[str] = ()) -> None:
        super().__init__(f"training was stopped after step {step} and saved in {checkpoint}")
        self.checkpoint = checkpoint
        self.step = step
        self.signal_number = signal_number
        self.packages = tuple(packages)


class StopSignals:
    """While entered, turns the first SIGINT (Ctrl-C) or SIGTERM into a request to stop after this step.

    A second signal interrupts at once, and so does the first one after :meth:`no_more_steps`. Outside the main
    thread, where Python allows no signal handlers, nothing changes.
    """

    def __init__(self) -> None:
        self.requested: int | None = None  # the number of the signal
        self._at_once = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def no_more_steps(self) -> None:
        """Interrupt at once from now on, also for a signal that no step has heeded.

        Raises:
            KeyboardInterrupt: there is one.
        """
        self._at_once = True
        if self.requested is not None:
            raise KeyboardInterrupt

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = self.requested is not None
        self.requested = number
        if again or self._at_once:
            raise KeyboardInterrupt
