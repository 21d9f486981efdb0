"""The machine that trains: Lightning Fabric, devices and precision."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from flows.arguments import checked
from flows.checks import check_number
from flows.errors import ComputationError, FlowsError, InvalidValueError
from flows.shares import Share, sharing
from flows.training.processes import check_processes, in_batch_script, started_together

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
    "SharedEvaluationError",
    "Strategy",
    "build_fabric",
    "deterministic_algorithms",
    "evaluated_together",
    "on_first_process",
    "share_of",
]

T = TypeVar("T")
CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


class FirstProcessError(ComputationError):
    """The first of several processes failed at something that the others wait for."""


class SharedEvaluationError(ComputationError):
    """An evaluation that several processes share failed, perhaps in this one alone: it must not go on."""


@checked
@dataclass(frozen=True)
class Hardware:
    """Where a run computes, and in which precision.

    Args:
        accelerator: `"auto"` (a GPU where there is one), `"cpu"`, `"cuda"`, `"mps"`, or one of Fabric's own.
        devices: how many, or which; each trains in a process of its own. Processes that torchrun has started train
            together.
        strategy: how several devices train together; see `lightning_fabric.Fabric`.
        precision: such as `"32-true"`, `"64-true"` or `"bf16-mixed"`; `"auto"`: bf16-mixed on a GPU that computes in
            it, 32-true elsewhere.
        deterministic: on a GPU, use algorithms that give the same bits each time, some of them slower. Without it the
            order of sums differs from run to run there. A CPU always gives the same bits.
        compile: train with compiled code: stages that solve take compiled steps, as with `solver.compile`, which
            concerns validation and the test as well; for other stages, such as flow matching, the field is compiled.
            `"auto"`: on a GPU all stages that can be; elsewhere stages that solve, of 1000 steps or two minutes.
        max_cpu_hours: on a CPU, try one step of each stage first and refuse a run that would take longer. None: begin,
            and tell how long it takes.

    Example:
        ```python
        import flows

        hardware = flows.training.Hardware(accelerator="cpu", precision="64-true")
        ```
    """

    accelerator: str | Accelerator = "auto"
    devices: int | str | Sequence[int] = 1
    strategy: str | Strategy = "auto"
    precision: str | int = "32-true"
    deterministic: bool = False
    compile: bool | Literal["auto"] = False
    max_cpu_hours: float | None = None

    def __post_init__(self) -> None:
        if self.max_cpu_hours is not None:
            check_number("max_cpu_hours", self.max_cpu_hours, above=0, otherwise="null allows any")


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
    check_processes(hardware.accelerator, hardware.devices)
    where: dict[str, Any] = {name: getattr(hardware, name) for name in ("accelerator", "devices", "strategy")}
    if (started := started_together()) is not None:
        where |= {"devices": started.here, "num_nodes": started.machines}
    alone = in_batch_script() and isinstance(hardware.strategy, str)
    if alone:  # Fabric would wait for processes of Slurm
        where["plugins"] = [_own_processes()]
    try:
        if precision == "auto":
            kind = Fabric(**where).device.type
            half = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            precision = "bf16-mixed" if half else "32-true"
        return Fabric(**where, precision=precision, callbacks=list(callbacks))  # type: ignore[arg-type]
    except Exception as error:  # of many types, some of them Lightning's own
        given = ", ".join(f"{name}={value!r}" for name, value in where.items() if name != "plugins")
        reason = str(error).partition(". ")[0].removesuffix(".")  # the rest is advice for programmers
        raise InvalidValueError(
            f"this hardware cannot be used: {reason}; asked for were {given} and precision={hardware.precision!r}"
        ) from error


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


def share_of(fabric: Fabric) -> Share | None:
    """The share of this process in the batches of a run; None if it trains alone."""
    if fabric.world_size == 1:
        return None

    def gather(tensor: torch.Tensor) -> torch.Tensor:
        own = tensor.detach().to(fabric.device).contiguous()
        every = [torch.empty_like(own) for _ in range(fabric.world_size)]
        torch.distributed.all_gather(every, own)
        return torch.stack(every).to(tensor.device)

    return Share(fabric.global_rank, fabric.world_size, gather)


def evaluated_together(fabric: Fabric, evaluator: Any, evaluate: Callable[[], T]) -> T:
    """Call `evaluate` in all processes, which share its batches, or in the first alone if `evaluator` shares none.

    All of them return the result of the first, which must survive pickling.

    Raises:
        SharedEvaluationError: it failed where the batches are shared.
    """
    share = share_of(fabric)
    if share is None or not getattr(evaluator, "shares", False):
        return on_first_process(fabric, evaluate)
    try:
        with sharing(share):
            found = evaluate()
    except FlowsError as error:
        raise SharedEvaluationError(
            f"process {fabric.global_rank} stops, and all others with it, since their shared evaluation failed: {error}"
        ) from error
    return fabric.broadcast(found)


def _own_processes() -> Any:
    """The environment in which Fabric starts the processes itself."""
    try:
        from lightning_fabric.plugins.environments.lightning import LightningEnvironment
    except ModuleNotFoundError:
        from lightning.fabric.plugins.environments.lightning import (  # pyright: ignore[reportMissingImports]
            LightningEnvironment,
        )
    return LightningEnvironment()
