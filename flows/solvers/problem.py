"""What is solved: the dynamics that the user writes, and the right-hand side that the methods see."""

from __future__ import annotations

import bisect
import contextlib
import copy
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flows.errors import InvalidValueError

if TYPE_CHECKING:
    from flows.solvers.compiled import CompiledSteps
    from flows.solvers.jumps import Jumps

ADJOINT = "adjoint of "  # prefix of a component's name for its adjoint
PARAMETERS = "gradient of a parameter"  # name of the components of an adjoint solve that belong to parameters

UNLOCKED = contextlib.nullcontext()

State = tuple[Tensor, ...]
Dynamics = Callable[[Tensor, State], State]  # (t, state) -> time derivative of each component


class NotCompilableError(Exception):
    """Steps cannot be compiled; the message says why. It does not leave the solver, whose steps then run uncompiled."""


@dataclass(frozen=True)
class Compilable:
    """What compiled steps need to know of some dynamics.

    Args:
        key: the computation. Dynamics with equal keys and equal tensors have equal derivatives.
        module: its parameters and buffers are used.
        tensors: what else is used and may differ between solves.
        rebuild: the same dynamics with other tensors in place of `tensors`, and nothing that they have cached.
        forward_mode: whether derivatives are taken in forward mode.
        parameters: tensors whose gradients are integrated; those that `module` and `tensors` hold.
        piece: samples that a large solve without gradients takes at once; 0: all, as they may depend on each other.
    """

    key: Hashable
    module: nn.Module
    tensors: Sequence[Tensor]
    rebuild: Callable[..., Any]
    forward_mode: bool = False
    parameters: Sequence[Tensor] = ()
    piece: int = 0


class RowEnds:
    """Where each sample of a solve ends.

    Args:
        times: (B,).
        sign: 1 where time runs forwards, −1 where it runs backwards.
    """

    def __init__(self, times: Tensor, sign: float) -> None:
        self._times = sign * times
        self._sign = sign
        self._sorted = sorted(self._times.tolist())
        self.size = len(self._sorted)

    def count(self, t0: float) -> int:
        """The number of samples that end after `t0`."""
        return self.size - bisect.bisect_right(self._sorted, self._sign * t0)

    def moving(self, t0: float) -> Tensor | None:
        """Which samples end after `t0`, (B,); `None` if all do."""
        return None if self.count(t0) == self.size else self._times > self._sign * t0


class RightHandSide:
    """Dynamics that count their evaluations and return derivatives in the dtype of the state.

    Args:
        dynamics: as passed to `flows.ODESolver.solve`.
        like: a state with the shapes, dtype and device to expect.
        count: called once per evaluation.
        ends: where each sample ends, if they end apart. A sample that has ended does not move.
        jumps: where the dynamics jump in time, if they do.
    """

    def __init__(
        self,
        dynamics: Dynamics,
        like: State,
        count: Callable[[], None],
        ends: RowEnds | None = None,
        jumps: Jumps | None = None,
    ) -> None:
        self.dynamics = dynamics
        self.shapes = [tuple(component.shape) for component in like]
        self.dtype, self.device = like[0].dtype, like[0].device
        self.count = count
        self.ends = ends
        self.jumps = jumps if jumps else None
        self.moving: Tensor | None = None  # (B,), which samples move in this step; None: all
        self.bounds: tuple[float, float] | None = None  # of the times at which this step may evaluate
        self.steps: CompiledSteps | None = None  # None: steps run uncompiled
        self.compiles = False  # this is traced, and the compiler leaves out by itself what nobody needs

    def __call__(self, t: float | Tensor, state: State) -> State:
        with UNLOCKED if self.steps is None else self.steps.lock:  # another thread may compile steps of the same model
            return self._checked(self.dynamics(self._announced(t), state), self.shapes)

    @property
    def leading(self) -> Callable[[float | Tensor, State], State] | None:
        """The derivative of the first component alone; `None` unless all derivatives depend on that component alone."""
        first = getattr(self.dynamics, "leading", None)
        if first is None or self.compiles:
            return None
        return lambda t, state: self._checked((first(self._announced(t), state),), self.shapes[:1])

    def _announced(self, t: float | Tensor) -> Tensor:
        """The time of an evaluation, which is counted."""
        self.count()
        if isinstance(t, Tensor):
            return t.to(self.dtype) if self.bounds is None else t.to(self.dtype).clamp(*self.bounds)
        return torch.full((), self.bounded(t), dtype=self.dtype, device=self.device)

    def _checked(self, derivatives: State, expected: list[tuple[int, ...]]) -> State:
        shapes = [tuple(derivative.shape) for derivative in derivatives]
        if shapes != expected:
            raise InvalidValueError(f"the dynamics must return derivatives of shapes {expected}, got {shapes}")
        return self.stop(tuple(derivative.to(self.dtype) for derivative in derivatives))

    def bounded(self, t: float) -> float:
        """The nearest time at which this step may evaluate."""
        return t if self.bounds is None else min(max(t, self.bounds[0]), self.bounds[1])

    def count_evaluations(self, number: int) -> None:
        """Count evaluations that compiled code has made."""
        for _ in range(number):
            self.count()

    def compilable(self) -> Compilable:
        """What compiled steps need to know.

        Raises:
            NotCompilableError: steps cannot be compiled.
        """
        found = getattr(self.dynamics, "compilable", None)
        if found is None:
            name = getattr(self.dynamics, "__name__", type(self.dynamics).__name__)
            raise NotCompilableError(f"the dynamics {name} have no method `compilable` that states their tensors")
        stated: Compilable = found()

        def rebuild(tensors: Sequence[Tensor], parameters: Sequence[Tensor], like: State) -> RightHandSide:
            return RightHandSide(stated.rebuild(tensors), like, lambda: None)

        return replace(stated, rebuild=rebuild)

    def in_step(self, t0: float, t1: float) -> RightHandSide:
        """The same function for a step, in which only those samples move that end after `t0`."""
        if self.ends is None and self.jumps is None:
            return self
        step = self.between(t0, t1)
        if self.ends is not None:
            step = copy.copy(step)
            step.moving = self.ends.moving(t0)
        return step

    def between(self, t0: float, t1: float) -> RightHandSide:
        """The same function, evaluated between the jumps around two times only."""
        if self.jumps is None:
            return self
        step = copy.copy(self)
        step.bounds = self.jumps.around(t0, t1)
        return step

    def restarts(self, t: float) -> bool:
        """Whether the derivatives jump at `t`, so that those of the step before are of no use."""
        return self.jumps is not None and t in self.jumps

    def moving_share(self, t0: float) -> float:
        """The share of samples that move in a step from `t0`."""
        return 1.0 if self.ends is None else self.ends.count(t0) / self.ends.size

    def stop(self, derivatives: State) -> State:
        """The derivatives, 0 for samples that do not move in this step."""
        if self.moving is None:
            return derivatives
        first = self.moving.view(-1, *[1] * (derivatives[0].ndim - 1))
        masks = (first, *[self.moving] * (len(derivatives) - 1))
        return tuple(d.where(mask, torch.zeros_like(d)) for d, mask in zip(derivatives, masks, strict=True))

    def fresh(self) -> RightHandSide:
        """The same function for a new graph, without tensors that the dynamics cached in earlier evaluations."""
        renew = getattr(self.dynamics, "fresh", None)
        renewed = copy.copy(self)
        renewed.dynamics = self.dynamics if renew is None else renew()
        return renewed


def component_names(dynamics: Dynamics, state: State) -> tuple[str, ...]:
    """The names of the components: `dynamics.component_names` if given, otherwise "state" and numbers."""
    names = getattr(dynamics, "component_names", None)
    if names is None:
        return "state", *(f"component {i}" for i in range(1, len(state)))
    if len(names) != len(state):
        raise InvalidValueError(
            f"component_names must name each of the {len(state)} components of the state, got {tuple(names)}"
        )
    return tuple(names)


def batch_size_of(state: State) -> int:
    """The first dimension of the first component."""
    return len(state[0]) if state[0].ndim else 1


def mean_by_sample(
    component: Tensor,  # (B, *event) if its batch dimension comes first, else (*, B)
    batch_size: int,
    batch_first: bool,
) -> Tensor:  # (B,)
    """The mean over all dimensions but the batch. Without a batch dimension, all samples have the same mean."""
    if batch_first and component.ndim > 0:
        return component if component.ndim == 1 else component.flatten(1).mean(1)
    if component.ndim > 0 and component.shape[-1] == batch_size:
        return component if component.ndim == 1 else component.reshape(-1, batch_size).mean(0)
    return component.mean().expand(batch_size)


def rows_of(
    state: State,
    rows: Tensor,  # (N,)
) -> State:  # each component (N, *rest)
    """The state of some samples. The batch comes first in the first component, and last in the others."""
    return (state[0][rows], *(component[..., rows].movedim(-1, 0) for component in state[1:]))


def all_finite(*components: Tensor) -> bool:
    """Whether no value is NaN or infinite. Waits for the device once."""
    return bool(torch.stack([component.isfinite().all() for component in components]).all())
