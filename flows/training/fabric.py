"""The machine that trains: Lightning Fabric, devices and precision, and signals that stop a run."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeVar

import torch

from flows.arguments import checked
from flows.errors import ComputationError, InvalidValueError, restored_error, sendable

try:
    from lightning_fabric import Fabric
    from lightning_fabric.accelerators.accelerator import Accelerator
    from lightning_fabric.strategies.strategy import Strategy
except ModuleNotFoundError:
    from lightning.fabric import Fabric  # pyright: ignore[reportMissingImports]
    from lightning.fabric.accelerators.accelerator import Accelerator  # pyright: ignore[reportMissingImports]
    from lightning.fabric.strategies.strategy import Strategy  # pyright: ignore[reportMissingImports]

__all__ = [
    "Accelerator",
    "Fabric",
    "FirstProcessError",
    "Hardware",
    "StopSignals",
    "Strategy",
    "TrainingInterrupted",
    "build_fabric",
    "deterministic_algorithms",
    "on_first_process",
]

T = TypeVar("T")
CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


class FirstProcessError(ComputationError):
    """The first of several processes failed at something that the others wait for."""


@checked
@dataclass(frozen=True)
class Hardware:
    """Where a run computes, and in which precision.

    Args:
        accelerator: `"auto"` (a GPU where there is one), `"cpu"`, `"cuda"`, `"mps"`, or one of Fabric's own.
        devices: how many, or which.
        strategy: how several devices train together; see `lightning_fabric.Fabric`.
        precision: such as `"32-true"`, `"64-true"` or `"bf16-mixed"`; `"auto"`: bf16-mixed on a GPU that computes in
            it, 32-true elsewhere.
        deterministic: on a GPU, use algorithms that give the same bits each time, some of them slower. Without it the
            order of sums differs from run to run there. A CPU always gives the same bits.
        compile: run the field and its divergence through torch.compile; `"auto"`: on a GPU, the stages that can be.
    """

    accelerator: str | Accelerator = "auto"
    devices: int | str | Sequence[int] = 1
    strategy: str | Strategy = "auto"
    precision: str | int = "32-true"
    deterministic: bool = False
    compile: bool | Literal["auto"] = False


def build_fabric(hardware: Hardware, callbacks: Sequence[Any] = ()) -> Fabric:
    """Build Fabric for this hardware.

    Raises:
        ValueError: this machine cannot train so.
    """
    precision = hardware.precision
    if str(precision) in ("16", "16-mixed"):
        raise InvalidValueError(
            f"precision {precision} scales the loss and skips steps whose gradients overflow, so that neither "
            "diverging nor resuming could be told apart from it; use bf16-mixed, which needs no scaling"
        )
    where: dict[str, Any] = {name: getattr(hardware, name) for name in ("accelerator", "devices", "strategy")}
    try:
        if precision == "auto":
            kind = Fabric(**where).device.type
            half = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            precision = "bf16-mixed" if half else "32-true"
        return Fabric(**where, precision=precision, callbacks=list(callbacks))  # type: ignore[arg-type]
    except Exception as error:  # of many types, some of them Lightning's own
        raise InvalidValueError(f"this hardware cannot be used: {error}") from error


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """While entered, use algorithms of torch that give the same bits each time.

    An operation that has none raises torch's RuntimeError, which names it.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    workspace = os.environ.get(CUBLAS_WORKSPACE)
    os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")  # which versions of torch ask for
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        if workspace is None:
            os.environ.pop(CUBLAS_WORKSPACE, None)
        torch.use_deterministic_algorithms(before, warn_only=warns)


def on_first_process(fabric: Fabric, function: Callable[[], T]) -> T:
    """Call `function` in the first process alone and return its result in all; it must survive pickling.

    Raises:
        FirstProcessError: in the other processes, if `function` fails in the first, which keeps its own error.
    """
    if fabric.world_size == 1:
        return function()
    outcome: Any = None
    if fabric.is_global_zero:
        try:
            outcome = (function(), None)
        except BaseException as error:
            fabric.broadcast((None, f"{type(error).__name__}: {error}"))
            raise
    result, failure = fabric.broadcast(outcome)
    if failure is not None:
        raise FirstProcessError(f"process {fabric.global_rank} stops, since the first process failed: {failure}")
    return result


class TrainingInterrupted(KeyboardInterrupt):
    """Training was stopped by a signal after a whole step, and its state was saved.

    Attributes:
        checkpoint: the file that continues the run.
        step: the number of steps done.
        signal_number: SIGINT or SIGTERM.
        packages: to pass as `trust=` when resuming, since the settings of the run call their classes.
    """

    def __init__(self, checkpoint: Path, step: int, signal_number: int, packages: Sequence[str] = ()) -> None:
        super().__init__(f"training was stopped after step {step} and saved in {checkpoint}")
        self.checkpoint = checkpoint
        self.step = step
        self.signal_number = signal_number
        self.packages = tuple(packages)

    def __reduce__(self) -> tuple[Any, ...]:
        return restored_error, (type(self), self.args, sendable(vars(self)))


class StopSignals:
    """While entered, turns the first SIGINT (Ctrl-C) or SIGTERM into a request to stop after this step.

    A second signal interrupts at once, as does the first one after `no_more_steps`. Outside the main thread, where
    Python allows no signal handlers, nothing changes.
    """

    def __init__(self) -> None:
        self.requested: int | None = None  # the number of the signal
        self._at_once = False
        self._previous: dict[int, Any] = {}

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
        """Interrupt at once from now on, also for a signal that came before.

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
