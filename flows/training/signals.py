"""Signals that stop a run, after a whole step and with its state saved."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from flows.errors import restored_error, sendable

# Who sends them: people, schedulers, a terminal that closes, limits, a power supply.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGPWR")
OVERRIDES = ("SIGINT", "SIGTERM")  # heard even where the program has a handler of its own
REPEATED = ("SIGHUP", "SIGXCPU")  # come again by themselves, from shell and kernel, every second: nobody is impatient
ECHO_SECONDS = 0.3  # in which a second signal is the first one's echo, as `timeout` sends it to process and group
AGAIN_SECONDS = 0.05  # until an interruption that Python swallowed comes again


class TrainingInterrupted(KeyboardInterrupt):
    """Training was stopped by a signal, and its state was saved.

    Attributes:
        checkpoint: the file that continues the run.
        step: the number of steps done in that file.
        signal_number: of the signal, such as `signal.SIGTERM`.
        packages: to pass as `trust=` when resuming, since the settings of the run call their classes.
        lost: steps done since the file was written; not 0 only if a second signal came.
    """

    def __init__(
        self, checkpoint: Path, step: int, signal_number: int, packages: Sequence[str] = (), lost: int = 0
    ) -> None:
        end = f"; {lost} later steps are lost, since a second signal came" if lost else ""
        super().__init__(f"training was stopped after step {step} and saved in {checkpoint}{end}")
        self.checkpoint = checkpoint
        self.step = step
        self.signal_number = signal_number
        self.packages = tuple(packages)
        self.lost = lost

    def __reduce__(self) -> tuple[Any, ...]:
        return restored_error, (type(self), self.args, sendable(vars(self)))


class StopSignals:
    """While entered, turns the first signal that stops programs into a request to stop after this step.

    A second one interrupts at once, as does the first one within `at_once`. Repeated SIGHUP and SIGXCPU do not count as
    a second one. A signal that this process ignores, as SIGHUP under `nohup`, stays ignored; a handler of the user's
    own for anything but SIGINT and SIGTERM stays, too. Outside the main thread, where Python allows no signal handlers,
    nothing changes.
    """

    def __init__(self) -> None:
        self.requested: int | None = None  # the number of the signal
        self._since = 0.0
        self._at_once = False
        self._swallowed = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for name in NAMES:
                number = getattr(signal, name, None)  # Windows lacks most
                before = None if number is None else signal.getsignal(number)
                if number is not None and (before is signal.SIG_DFL or (name in OVERRIDES and callable(before))):
                    self._previous[number] = signal.signal(number, self._receive)
            if self._previous:
                self._usual_hook, sys.unraisablehook = sys.unraisablehook, self._again
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._previous:
            sys.unraisablehook = self._usual_hook
        self._previous.clear()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """While entered, interrupt at once, also for a signal that came before: the state is saved.

        Raises:
            KeyboardInterrupt: there is a signal.
        """
        self._at_once = True
        try:
            if self.requested is not None:
                raise KeyboardInterrupt
            yield
        finally:
            self._at_once = False

    def _again(self, unraisable: Any) -> None:
        """Interrupt anew after Python swallowed the interruption, in the callback of an object that is deleted."""
        if self.requested is None or not issubclass(unraisable.exc_type, KeyboardInterrupt):
            self._usual_hook(unraisable)
            return
        self._swallowed = True
        threading.Timer(AGAIN_SECONDS, self._repeat, [self.requested]).start()

    def _repeat(self, number: int) -> None:
        if self._previous:  # still entered
            signal.raise_signal(number)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._swallowed:
            self._swallowed = False
            raise KeyboardInterrupt
        now = time.monotonic()
        first = self.requested is None
        if first:
            self.requested, self._since = number, now
        elif signal.Signals(number).name in REPEATED or (number != signal.SIGINT and now - self._since < ECHO_SECONDS):
            return
        self.requested = number
        if self._at_once or not first:
            raise KeyboardInterrupt
