"""One solve: what the forward pass and the gradients share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flows.errors import InvalidValueError
from flows.solvers.integrator import Integrator
from flows.solvers.problem import ADJOINT, Dynamics, RightHandSide, State
from flows.solvers.replay import Precision
from flows.solvers.statistics import SolverStatistics
from flows.solvers.stepping import StepLog


@dataclass(frozen=True)
class Task:
    """One solve of some dynamics through some times.

    Args:
        dynamics: as passed to `flows.ODESolver.solve`.
        times: where the state is wanted.
        forward: how to solve for the state.
        backward: how to solve for the adjoint.
        statistics: grow while the task is solved.
        precision: the autocast setting to evaluate the dynamics in.
    """

    dynamics: Dynamics
    times: tuple[float, ...]
    forward: Integrator
    backward: Integrator
    statistics: SolverStatistics
    precision: Precision

    def forward_function(self, state: State) -> RightHandSide:
        """The dynamics, counted as evaluations of the forward solve."""
        return RightHandSide(self.dynamics, state, self.statistics.count_forward)

    def backward_function(self, state: State) -> RightHandSide:
        """The dynamics without cached tensors, counted as evaluations for the gradient."""
        return RightHandSide(self.dynamics, state, self.statistics.count_backward).fresh()

    def forward_log(self, begin: Callable[[], None] | None = None) -> StepLog:
        """Where the forward solve records its steps; `begin` is called before each attempt."""
        observe = getattr(self.dynamics, "observe", None)
        statistics = self.statistics
        return StepLog("forward", statistics.components, statistics.attempts, statistics.observed, observe, begin)

    def integrate(self, state: State) -> State:  # each component (T, *component)
        """The states at all times. Autograd records them where it is on."""
        return self.forward.integrate(self.forward_function(state), state, self.times, self.forward_log())

    def integrate_adjoint(self, function: RightHandSide, state: State, start: float, end: float) -> State:
        """The state at `end`: the components, the adjoint of each, and the gradients of the parameters."""
        times = (start, end)
        components = self.statistics.components
        names = (*components, *(ADJOINT + name for name in components))
        log = StepLog("adjoint", self.backward.norm.names, self.statistics.backward_attempts)
        states = self.backward.integrate(function, state, times, log)
        reached = tuple(component[-1] for component in states)
        self.backward.check_finite(function, state, times, reached, names, "adjoint")
        return reached


def checked_times(times: Tensor | Sequence[float]) -> tuple[float, ...]:
    """The times as floats.

    Raises:
        InvalidValueError: they are not strictly monotonic or not finite, or they require gradients.
    """
    if isinstance(times, Tensor) and times.requires_grad:
        raise InvalidValueError(
            "times that require gradients would get none; scale time inside the dynamics instead: dx/ds = T v(T s, x) "
            "with s from 0 to 1"
        )
    try:
        seconds = torch.as_tensor(times, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise InvalidValueError(f"times must be a sequence of numbers, got {times!r}") from None
    if seconds.ndim != 1 or not bool(seconds.isfinite().all()):
        raise InvalidValueError(f"times must be a sequence of finite numbers, got {seconds.tolist()}")
    values = tuple(seconds.tolist())
    steps = [b - a for a, b in itertools.pairwise(values)]
    if not steps or not (all(step > 0 for step in steps) or all(step < 0 for step in steps)):
        raise InvalidValueError(
            f"times must be at least two, strictly increasing or strictly decreasing, got {list(values)}"
        )
    return values


def checked_state(state: State) -> State:
    """The state as a tuple.

    Raises:
        InvalidValueError: it is not a sequence of real floating-point tensors of one dtype and device.
    """
    if isinstance(state, Tensor) or not len(state) or not all(isinstance(part, Tensor) for part in state):
        raise InvalidValueError(
            f"the state must be a tuple of tensors, got {type(state).__name__}; write (x,) for a single one"
        )
    first = state[0]
    if not first.is_floating_point() or any((c.dtype, c.device) != (first.dtype, first.device) for c in state):
        found = ", ".join(f"{component.dtype} on {component.device}" for component in state)
        raise InvalidValueError(f"all components of the state must have one floating dtype and device, got {found}")
    return tuple(state)
