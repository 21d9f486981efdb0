"""One solve: what the forward pass and the gradients share."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flows.errors import InvalidValueError
from flows.solvers.integrator import Integrator
from flows.solvers.jumps import MARGIN, Jumps
from flows.solvers.outputs import Outputs, OwnTimes, SharedTimes
from flows.solvers.problem import (
    ADJOINT,
    Compilable,
    Dynamics,
    NotCompilableError,
    RightHandSide,
    State,
    batch_size_of,
)
from flows.solvers.replay import Precision
from flows.solvers.statistics import SolverStatistics
from flows.solvers.stepping import StepLog


@dataclass(frozen=True)
class Task:
    """One solve of some dynamics.

    Args:
        dynamics: as passed to `flows.ODESolver.solve`.
        outputs: where the state is wanted.
        forward: how to solve for the state.
        backward: how to solve for the adjoint.
        statistics: grow while the task is solved.
        precision: the autocast setting to evaluate the dynamics in.
        jumps: where the dynamics jump in time.
    """

    dynamics: Dynamics
    outputs: Outputs
    forward: Integrator
    backward: Integrator
    statistics: SolverStatistics
    precision: Precision
    jumps: Jumps

    def forward_function(self, state: State) -> RightHandSide:
        """The dynamics, counted as evaluations of the forward solve."""
        function = RightHandSide(self.dynamics, state, self.statistics.count_forward, self.outputs.ends, self.jumps)
        return self.forward.prepared(function, self.outputs)

    def backward_function(self, state: State) -> RightHandSide:
        """The dynamics without cached tensors, counted as evaluations for the gradient."""
        function = RightHandSide(self.dynamics, state, self.statistics.count_backward, self.outputs.ends, self.jumps)
        return function.fresh()

    def recompute_function(self, state: State) -> RightHandSide:
        """The same for steps of the forward solve that are taken again."""
        return self.forward.prepared(self.backward_function(state), self.outputs)

    def forward_log(self, begin: Callable[[], None] | None = None) -> StepLog:
        """Where the forward solve records its steps; `begin` is called before each attempt."""
        observe = getattr(self.dynamics, "observe", None)
        statistics = self.statistics
        return StepLog("forward", statistics.components, statistics.attempts, statistics.observed, observe, begin)

    def integrate(self, state: State) -> State:  # each component (outputs, *component)
        """The states at all outputs. Autograd records them where it is on."""
        return self.forward.integrate(self.forward_function(state), state, self.outputs, self.forward_log())

    def between(self, state: State, i: int) -> tuple[RightHandSide, tuple[float, float]]:
        """The dynamics from output time `i` back to the one before, and the times to solve them for."""
        function = self.backward_function(state)
        if isinstance(self.outputs, SharedTimes):
            return function, (self.outputs.times[i], self.outputs.times[i - 1])
        assert isinstance(self.outputs, OwnTimes)
        function.ends = None
        end, start = (self.outputs.times[:, j].to(state[0]) for j in (i, i - 1))
        return _Warped(function, state, start, end - start, self._warped_jumps(i, state)), (1.0, 0.0)

    def _warped_jumps(self, i: int, state: State) -> Jumps:
        """The jumps of all samples, as shares of their intervals from output time `i` − 1 to `i`."""
        if not self.jumps:
            return Jumps()
        assert isinstance(self.outputs, OwnTimes)
        start, end = (self.outputs.whole.times[:, j : j + 1] for j in (i - 1, i))
        shares = (torch.tensor(self.jumps.times, dtype=torch.float64) - start) / (end - start)  # NaN in samples at rest
        inside = (shares >= 0) & (shares <= 1)
        if not bool(inside.any()):
            return Jumps()
        shortest = float((end - start).abs()[inside.any(1)].min())
        margin = max(self.jumps.margin / shortest, MARGIN * torch.finfo(state[0].dtype).eps)
        return Jumps(shares[inside].tolist(), margin)

    def integrate_adjoint(self, function: RightHandSide, state: State, start: float, end: float) -> State:
        """The state at `end`: the components, the adjoint of each, and the gradients of the parameters."""
        times = (start, end)
        components = self.statistics.components
        names = (*components, *(ADJOINT + name for name in components))
        log = StepLog("adjoint", self.backward.norm.names, self.statistics.backward_attempts)
        outputs = SharedTimes(times)
        states = self.backward.integrate(self.backward.prepared(function, outputs), state, outputs, log)
        reached = tuple(component[-1] for component in states)
        self.backward.check_finite(function, state, times, reached, names, "adjoint")
        return reached


class _Warped(RightHandSide):
    """Dynamics in which each sample runs through an interval of its own while s goes from 0 to 1.

    With t = start + s · length, dy/ds = length · f(t, y).
    """

    def __init__(self, function: RightHandSide, like: State, start: Tensor, length: Tensor, jumps: Jumps) -> None:
        super().__init__(self._derivatives, like, lambda: None, jumps=jumps)
        self.function = function
        self.start, self.length = start, length

    def _derivatives(self, s: Tensor, state: State) -> State:
        first, *others = self.function(self.start + s * self.length, state)
        return (self.length.view(-1, *[1] * (first.ndim - 1)) * first, *(self.length * other for other in others))

    def compilable(self) -> Compilable:
        raise NotCompilableError("samples have times of their own, and gradient='adjoint'")

    def fresh(self) -> RightHandSide:
        renewed = copy.copy(self)
        renewed.function = self.function.fresh()
        renewed.dynamics = renewed._derivatives
        return renewed


def checked_outputs(
    times: Tensor | Sequence[float], state: State, counts: Tensor | None = None, rows: slice | None = None
) -> Outputs:
    """Where the state is wanted, from the arguments of `flows.ODESolver.solve`.

    Raises:
        InvalidValueError: the times are not strictly monotonic or not finite, they require gradients, the rows do not
            start together or are not as many as the samples.
    """
    if isinstance(times, Tensor) and times.requires_grad:
        raise InvalidValueError(
            "times that require gradients would get none; flows.NeuralODE.trajectory gives gradients of times"
        )
    try:
        table = torch.as_tensor(times, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise InvalidValueError(f"times must be a sequence of numbers, got {times!r}") from None
    if table.ndim == 2:
        own = table if rows is None else table[rows]
        if len(own) != batch_size_of(state):
            raise InvalidValueError(
                f"times of shape (B, T) need a row for each of {batch_size_of(state)} samples, got {len(own)}"
            )
        outputs = _own_times(table, state[0].device, counts)
        return outputs if rows is None else outputs.part(rows)
    if table.ndim != 1 or not bool(table.isfinite().all()):
        raise InvalidValueError(f"times must be a sequence of finite numbers, got {table.tolist()}")
    if counts is not None:
        raise InvalidValueError("counts need times of shape (B, T), a row for each sample")
    values = tuple(table.tolist())
    steps = [b - a for a, b in itertools.pairwise(values)]
    if not steps or not (all(step > 0 for step in steps) or all(step < 0 for step in steps)):
        raise InvalidValueError(
            f"times must be at least two, strictly increasing or strictly decreasing, got {list(values)}"
        )
    return SharedTimes(values)


def _own_times(table: Tensor, device: torch.device, counts: Tensor | None) -> OwnTimes:
    size, length = table.shape
    counts = torch.full((size,), length) if counts is None else counts.to("cpu", torch.int64)
    fits = counts.shape == (size,) and bool(((counts >= 1) & (counts <= length)).all())
    if not fits or bool((counts < 2).all()):
        raise InvalidValueError(
            f"counts must be {size} numbers from 1 to {length}, one of them at least 2, got {counts.tolist()}"
        )
    inside = torch.arange(length) < counts[:, None]
    table = table.gather(1, torch.arange(length).clamp(max=counts[:, None] - 1))
    if not bool(table.isfinite().all()):
        row = int((~table.isfinite()).any(1).nonzero()[0])
        raise InvalidValueError(f"times must be finite numbers, got {table[row].tolist()} in row {row}")
    if bool((table[:, 0] != table[0, 0]).any()):
        raise InvalidValueError("the rows of times must start together; flows.NeuralODE.trajectory shifts them")
    steps = table.diff(dim=1)
    sign = 1.0 if float(steps.sum()) > 0 else -1.0
    wrong = ((sign * steps <= 0) & inside[:, 1:]).any(1).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise InvalidValueError(
            "each row of times must be strictly increasing, or each strictly decreasing, got "
            f"{table[row][inside[row]].tolist()} in row {row}"
        )
    return OwnTimes(table, counts, device)


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
