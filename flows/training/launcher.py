"""The processes of a run: started together, and ended together."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from flows.errors import ComputationError, FlowsError, InvalidValueError
from flows.training.processes import free_port, started_together

LOG = logging.getLogger("flows")
WHOLE_RUN = "the whole run ends with it, and resume= goes on from its last checkpoint"
PARENT = "FLOWS_PARENT"  # the number of the process that has started this one to train with it
POLL_SECONDS = 0.2
GRACE_SECONDS = 3.0  # for the first process to end by itself when another one has ended
TELL_FIRST_SECONDS = 1.0  # for the first process to tell of an error that all have
PR_SET_PDEATHSIG = 1  # of Linux
WORKERS = ("joblib", "submitit")  # whose commands are of no use in another process


class ProcessEndedError(ComputationError):
    """One of the processes that train together has ended before the run."""


@contextlib.contextmanager
def together(fabric: Any) -> Iterator[None]:
    """Start the other processes of a run; while entered, all end soon after one of them ends.

    They run the same command as this one. They end with it however it ends, also by SIGKILL.

    Raises:
        ProcessEndedError: another process has ended. That process says why.
        InvalidValueError: there is no command that could be run again.
    """
    if started_together() is not None:
        _end_with(os.getppid())  # torchrun ends them, unless it is killed
    if fabric.world_size == 1:
        fabric.launch()
        yield
        return
    others = None
    if PARENT in os.environ:
        _end_with(int(os.environ.pop(PARENT)))
    elif started_together() is None and fabric.strategy.launcher is not None:
        others = _Others.of(fabric.world_size)
    try:
        fabric.launch()
        yield
    except BaseException as error:
        if others is not None and not isinstance(error, (FlowsError, KeyboardInterrupt)):
            if ended := others.wait_for_failure():
                raise ProcessEndedError(f"{ended}; {WHOLE_RUN}") from error
        elif others is None and fabric.global_rank > 0:
            time.sleep(TELL_FIRST_SECONDS)
        raise
    finally:
        if others is not None:
            others.done()


class _Others:
    """The processes beside the first one, on the same machine.

    Args:
        number: of all processes.
    """

    _started: _Others | None = None  # by this process

    @classmethod
    def of(cls, number: int) -> _Others | None:
        """The other processes, started if this is the first run of this process; None: someone else starts them."""
        if cls._started is None:
            if "LOCAL_RANK" in os.environ:
                return None
            cls._started = cls(number)
        elif cls._started.number != number:
            raise InvalidValueError(
                f"this program has trained in {cls._started.number} processes, and cannot train in {number} then; use "
                "the same hardware.devices in all its runs, or another program"
            )
        cls._started.watch()
        return cls._started

    def __init__(self, number: int) -> None:
        workers = [name for name in WORKERS if any(name in word for word in sys.orig_argv)]
        if workers:
            raise InvalidValueError(
                f"hardware.devices={number} starts {number} processes with the command of this one, which is a "
                f"worker of {workers[0]}; use hydra/launcher=basic, one job after the other, or one device a job"
            )
        if hasattr(sys, "ps1") or "ipykernel" in sys.modules or not sys.orig_argv[1:]:
            raise InvalidValueError(
                f"hardware.devices={number} starts {number} processes with the command of this one, and an interactive "
                "session has none that could be run again; write a script, or use one device"
            )
        self.number = number
        own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0"}
        own |= {"WORLD_SIZE": str(number), PARENT: str(os.getpid())}
        own.setdefault("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS") or str(_threads(number)))
        self._processes = {}
        for rank in range(1, number):
            environment = {**os.environ, **own, "LOCAL_RANK": str(rank)}
            command = [sys.executable, *sys.orig_argv[1:]]
            self._processes[rank] = subprocess.Popen(command, env=environment, preexec_fn=_ends_with_parent())
        del own[PARENT]
        os.environ.update(own, LOCAL_RANK="0")  # another run of this program joins the same processes
        self._over = threading.Event()

    def watch(self) -> None:
        """End this process if another one ends before the run."""
        self._over = threading.Event()
        threading.Thread(target=self._watch, name="watch the other processes", daemon=True).start()

    def failure(self) -> str | None:
        """What has ended, and how; None if nothing has."""
        for rank, process in self._processes.items():
            code = process.poll()
            if code is not None and (code != 0 or not self._over.is_set()):
                how = f"has ended with the code {code}, and has said why"
                if code < 0:
                    how = f"was ended by {signal.Signals(-code).name}"
                    how += ", perhaps for want of memory" if code == -signal.SIGKILL else ""
                return f"process {rank} (pid {process.pid}) of the {self.number} that train together {how}"
        return None

    def wait_for_failure(self) -> str | None:
        """The same, for as long as it takes until another process has told of its error."""
        until = time.monotonic() + TELL_FIRST_SECONDS + GRACE_SECONDS
        while (ended := self.failure()) is None and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
        return ended

    def done(self) -> None:
        """Stop watching; the others end by themselves, or with this process."""
        self._over.set()

    def _watch(self) -> None:
        over = self._over
        while not over.wait(POLL_SECONDS):
            if ended := self.failure():
                if over.wait(GRACE_SECONDS):
                    return
                LOG.error("%s; %s", ended, WHOLE_RUN)
                for process in self._processes.values():
                    process.kill()
                os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))  # it may hang in a collective


def _threads(number: int) -> int:
    return max(1, (os.cpu_count() or 1) // number)


def _ends_with_parent() -> Callable[[], None] | None:
    """What a new process of Linux calls before anything else, so that it ends with this one; None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    set_option, parent = ctypes.CDLL(None).prctl, os.getpid()

    def ask() -> None:
        set_option(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended in between
            os.kill(os.getpid(), signal.SIGKILL)

    return ask


@functools.cache  # once for all runs of this process
def _end_with(parent: int) -> None:
    """End this process soon after its parent, where the system does not do so."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

    threading.Thread(target=watch, name="end with the parent", daemon=True).start()
