"""Lightning Fabric, from whichever of its two packages is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

try:
    from lightning_fabric import Fabric
except ModuleNotFoundError:
    from lightning.fabric import Fabric

__all__ = ["Fabric", "FirstProcessError", "on_first_process"]

T = TypeVar("T")


class FirstProcessError(RuntimeError):
    """The first of several processes failed at something that the others wait for."""


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
