"""Lightning Fabric, from whichever of its two packages is installed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from flows.errors import ComputationError, InvalidValueError

try:
    from lightning_fabric import Fabric
    from lightning_fabric.accelerators import Accelerator
    from lightning_fabric.strategies import Strategy
except ModuleNotFoundError:
    from lightning.fabric import Fabric
    from lightning.fabric.accelerators import Accelerator
    from lightning.fabric.strategies import Strategy

__all__ = [
    "Accelerator",
    "Fabric",
    "FirstProcessError",
    "Strategy",
    "build_fabric",
    "deterministic_algorithms",
    "on_first_process",
]

T = TypeVar("T")
CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


class FirstProcessError(ComputationError):
    """The first of several processes failed at something that the others wait for."""


def build_fabric(
    accelerator: str | Accelerator, devices: int | str | Sequence[int], strategy: str | Strategy, precision: str | int
) -> Fabric:
    """Fabric with these settings; precision ``"auto"`` is bf16-mixed on a GPU that computes in it, else 32-true.

    Raises:
        ValueError: this machine cannot train so.
    """
    if str(precision) in ("16", "16-mixed"):
        raise InvalidValueError(
            f"precision {precision} scales the loss and skips steps whose gradients overflow, so that neither "
            "diverging nor resuming could be told apart from it; use bf16-mixed, which needs no scaling"
        )
    try:
        if precision == "auto":
            kind = Fabric(accelerator=accelerator, devices=devices, strategy=strategy).device.type
            half = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            precision = "bf16-mixed" if half else "32-true"
        return Fabric(accelerator=accelerator, devices=devices, strategy=strategy, precision=precision)
    except Exception as error:  # of many types, some of them Lightning's own
        raise InvalidValueError(f"this machine cannot train with these settings: {error}") from error


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Torch's algorithms that give the same bits each time, on a GPU too; what was set before is set again at the end.

    Operations that have none raise a RuntimeError of torch's, which names them.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    workspace = os.environ.get(CUBLAS)
    os.environ.setdefault(CUBLAS, ":4096:8")  # which versions of torch ask for
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        if workspace is None:
            os.environ.pop(CUBLAS, None)
        torch.use_deterministic_algorithms(before, warn_only=warns)


def on_first_process(fabric: Fabric, function: Callable[[], T]) -> T:
    """What ``function`` returns, called by the first process alone and handed to all; it must survive pickling.

    Raises:
        FirstProcessError: in the other processes, if ``function`` fails in the first, which keeps its own error.
    """
    if fabric.world_size == 1:
        return function()
    outcome = None
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
