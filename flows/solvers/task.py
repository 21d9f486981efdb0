"""One solve: settings, dynamics and times, with what is learnt on the way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flows.errors import InvalidValueError
from flows.solvers import errors as failure
from flows.solvers.control import ErrorNorm
from flows.solvers.multistep import integrate_by_torchdiffeq
from flows.solvers.problem import (
    ADJOINT,
    Dynamics,
    Precision,
    RightHandSide,
    State,
    all_finite,
    batch_size_of,
    component_names,
)
from flows.solvers.runge_kutta import Step, runge_kutta
from flows.solvers.statistics import SolverStatistics
from flows.solvers.stepping import Log, adaptive_steps, collect, fixed_steps

if TYPE_CHECKING:
    from flows.solvers.solver import ODESolver


class Task:
    """A solve that runs forward here, and backward in the ways of the gradients.

    Args:
        solver: the settings.
        dynamics, state, times: see :meth:`ODESolver.solve`.
    """

    def __init__(self, solver: ODESolver, dynamics: Dynamics, state: State, times: Tensor | Sequence[float]) -> None:
        self.seconds = _checked(times)
        self.times = torch.tensor(self.seconds, dtype=state[0].dtype, device=state[0].device)
        self.solver = solver
        self.method = runge_kutta(solver.method)
        self.dynamics = dynamics
        self.precision = Precision(state[0].device)
        names = component_names(dynamics, state)
        self.statistics = SolverStatistics(names)
        weights = solver.error_control.weights(dynamics, names)
        size, per_sample = batch_size_of(state), solver.error_control.per_sample
        self._norm = ErrorNorm(names, weights, solver.rtol, solver.atol, size, per_sample)
        rtol, atol = solver.adjoint_rtol or solver.rtol, solver.adjoint_atol or solver.atol
        both = names + tuple(ADJOINT + name for name in names)
        self._adjoint_norm = ErrorNorm(both, 2 * weights, rtol, atol, size, per_sample)

    def forward_function(self, state: State) -> RightHandSide:
        """The dynamics, counting what the forward solve evaluates."""
        return RightHandSide(self.dynamics, state, self.statistics.count_forward)

    def backward_function(self, state: State) -> RightHandSide:
        """The dynamics, counting what is evaluated for the gradient, and free of what the forward solve kept."""
        return RightHandSide(self.dynamics, state, self.statistics.count_backward).fresh()

    def integrate(self, state: State) -> State:
        """The states at all times, each component (T, *component); autograd records where it is on."""
        function = self.forward_function(state)
        if self.method is None:
            states = self._by_torchdiffeq(function, state, self.seconds, self._norm, self._forward_log())
        else:
            states = collect(self.method, self.steps(function, state), state, self.seconds)
        return states

    def steps(self, function: RightHandSide, state: State, begin: Callable[[], None] | None = None) -> Iterator[Step]:
        """The accepted steps of the forward solve, by a Runge-Kutta method; ``begin`` is called before each attempt."""
        return self._steps(function, state, self.seconds, self._norm, self._forward_log(begin))

    def integrate_adjoint(self, function: RightHandSide, state: State, start: float, end: float) -> State:
        """The state at ``end``: the components, the adjoint of each, and the gradients of the parameters."""
        norm = self._adjoint_norm
        if not self.solver.adjoint_seminorm:
            norm = norm.extended("gradient of a parameter", len(state))
        log = Log("adjoint", norm.names, self.statistics.backward_attempts)
        times = (start, end)
        if self.method is None:
            states = self._by_torchdiffeq(function, state, times, norm, log)
        else:
            states = collect(self.method, self._steps(function, state, times, norm, log), state, times)
        self._require_finite("adjoint", function, state, states, self._adjoint_norm.names, times)
        return tuple(component[1] for component in states)

    def check(self, states: State, state: State) -> None:
        """Raise if the solve from ``state`` has not arrived, or at a state that is not finite."""
        self._require_finite("forward", self.forward_function(state), state, states, self._norm.names, self.seconds)

    def _require_finite(
        self,
        direction: str,
        function: RightHandSide,
        state: State,
        states: State,
        names: tuple[str, ...],
        seconds: Sequence[float],
    ) -> None:
        end, solver = tuple(component[-1] for component in states), self.solver
        if all_finite(*end):
            return
        if solver.step_size:  # once more, to see where it happened; instead of a multistep method by rk4, if it agrees
            method = self.method or runge_kutta("rk4")
            which = failure.first_bad(names, end)
            with torch.no_grad():
                for step in fixed_steps(method, function, state, seconds, solver.step_size, Log(direction, names, [])):
                    if not all_finite(*step.end):
                        found = failure.first_bad(names, step.end)
                        if self.method is None and (which is None or found is None or found[:2] != which[:2]):
                            break
                        raise failure.blow_up(direction, solver.method, step.t0, step.t1 - step.t0, names, step.end)
        dt = math.copysign(solver.step_size or abs(seconds[-1] - seconds[0]), seconds[-1] - seconds[0])
        raise failure.blow_up(direction, solver.method, seconds[-1], dt, names, end)

    def _steps(
        self, function: RightHandSide, state: State, times: Sequence[float], norm: ErrorNorm, log: Log
    ) -> Iterator[Step]:
        solver = self.solver
        if not self.method.is_adaptive:
            return fixed_steps(self.method, function, state, times, solver.step_size, log)
        return adaptive_steps(
            self.method,
            function,
            state,
            times[0],
            times[-1],
            norm,
            solver.max_steps,
            solver.min_step,
            solver.max_step or math.inf,
            abs(self.seconds[-1] - self.seconds[0]) / 2,  # the error of one step over all is not to be trusted
            log,
        )

    def _by_torchdiffeq(
        self, function: RightHandSide, state: State, times: Sequence[float], norm: ErrorNorm, log: Log
    ) -> State:
        solver = self.solver
        return integrate_by_torchdiffeq(
            solver.method,
            function,
            state,
            times,
            norm,
            solver.step_size,
            solver.max_steps,
            solver.options,
            log,
        )

    def _forward_log(self, begin: Callable[[], None] | None = None) -> Log:
        return Log(
            "forward",
            self._norm.names,
            self.statistics.attempts,
            self.statistics.observed,
            getattr(self.dynamics, "observe", None),
            begin,
        )


def _checked(times: Tensor | Sequence[float]) -> list[float]:
    """The times as numbers.

    Raises:
        ValueError: they are not strictly monotonic, or require gradients.
    """
    if isinstance(times, Tensor) and times.requires_grad:
        raise InvalidValueError(
            "times that require gradients would get none; scale time inside the dynamics instead: dx/ds = T v(T s, x) "
            "with s from 0 to 1"
        )
    seconds = torch.as_tensor(times, dtype=torch.float64, device="cpu").tolist()
    steps = [b - a for a, b in itertools.pairwise(seconds)]
    if not steps or not (all(step > 0 for step in steps) or all(step < 0 for step in steps)):
        raise InvalidValueError(
            f"times must be at least two, strictly increasing or strictly decreasing, got {seconds}"
        )
    return seconds
