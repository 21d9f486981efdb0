"""Integration in one direction, forward or for the adjoint, with fixed settings."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from flows.solvers import errors
from flows.solvers.compiled import compiled_steps
from flows.solvers.control import ErrorNorm
from flows.solvers.multistep import integrate_by_torchdiffeq
from flows.solvers.outputs import Outputs
from flows.solvers.problem import RightHandSide, State, all_finite
from flows.solvers.runge_kutta import Step
from flows.solvers.stepping import StepLimits, StepLog, adaptive_steps, fixed_steps, through
from flows.solvers.tableaux import RK4, RUNGE_KUTTA, RungeKutta


@dataclass(frozen=True)
class Integrator:
    """Solves one ODE from time to time.

    Args:
        method: name of the method.
        norm: how the error of a step is measured.
        limits: bounds of adaptive steps.
        step_size: of a fixed-step method.
        options: of a method that torchdiffeq runs.
        compiles: whether the steps of a Runge-Kutta method run as compiled code; `"pieces"`: those of large batches
            without gradients alone, which one program serves.
        controller: of the sizes of adaptive steps, by name.
        grid: times at which fixed steps end, beside those of the outputs.
    """

    method: str
    norm: ErrorNorm
    limits: StepLimits
    step_size: float | None
    options: Mapping[str, Any]
    compiles: bool | Literal["pieces"] = False
    controller: str = "i"
    grid: Sequence[float] | None = None

    def prepared(self, function: RightHandSide, outputs: Outputs) -> RightHandSide:
        """The right-hand side with its compiled steps, if they are wanted and there can be any."""
        if self.compiles:
            interpolates = not outputs.stops or (self.step_size is None and outputs.size > 2)
            only_pieces = self.compiles == "pieces"
            function.steps = compiled_steps(function, self.tableau, self.norm, interpolates, only_pieces)
        return function

    @property
    def tableau(self) -> RungeKutta | None:
        """The coefficients of a Runge-Kutta method, `None` for a method that torchdiffeq runs."""
        return RUNGE_KUTTA.get(self.method)

    def integrate(
        self, function: RightHandSide, state: State, outputs: Outputs, log: StepLog
    ) -> State:  # each component (outputs, *component)
        """The states at all outputs, in their order. Autograd records them where it is on."""
        method = self.tableau
        if method is None:
            at, pick = outputs.grid()
            return pick(self._by_torchdiffeq(function, state, at, log))
        pieces: list[State] = []
        position = 0
        for step in self.steps(method, function, state, outputs, log):
            count = outputs.count(step.t1, position)
            pieces += outputs.within(method, step, position, count)
            position += count
        return outputs.join(pieces)

    def _by_torchdiffeq(
        self, function: RightHandSide, state: State, times: Sequence[float], log: StepLog
    ) -> State:  # each component (times, *component)
        """The states at all times; the method starts anew where the function jumps."""
        jumps = [] if function.jumps is None else function.jumps.between(times[0], times[-1])
        sign = math.copysign(1.0, times[-1] - times[0])
        found: list[State] = []
        goals, first = [*jumps, times[-1]], times[0]
        for goal in goals:
            inside = [t for t in times if sign * first < sign * t < sign * goal]
            points = [first, *inside, goal]
            piece = integrate_by_torchdiffeq(
                self.method,
                function.between(first, goal),
                state,
                points,
                self.norm,
                self.step_size,
                self.limits,
                self.options,
                log,
            )
            state, first = tuple(component[-1] for component in piece), goal
            begins, ends = int(bool(found)), len(points) - int(goal not in times)
            found.append(tuple(component[begins:ends] for component in piece))
        return tuple(torch.cat(pieces) for pieces in zip(*found, strict=True))

    def steps(
        self, method: RungeKutta, function: RightHandSide, state: State, outputs: Outputs, log: StepLog
    ) -> Iterator[Step]:
        """The accepted steps of a Runge-Kutta method."""
        if method.is_adaptive:
            span, controller = outputs.span, self.controller
            return adaptive_steps(method, function, state, *span, self.norm, self.limits, log, controller)
        assert self.step_size is not None
        interpolates = not outputs.stops
        times = through(self.grid, outputs.stops or outputs.span)
        return fixed_steps(method, function, state, times, self.step_size, log, interpolates)

    def check_finite(
        self,
        function: RightHandSide,
        start: State,
        times: Sequence[float],
        end: State,
        names: tuple[str, ...],
        direction: str,
    ) -> None:
        """Raise if the state at the end is not finite.

        After fixed steps, the solve is repeated to find the first step with bad values. For a multistep method it is
        repeated with rk4, whose answer is used if it blames the same component and sample.

        Raises:
            SolverError: the state holds NaN or infinite values.
        """
        if all_finite(*end):
            return
        span = times[-1] - times[0]
        function = copy.copy(function)
        function.steps = None
        failed = errors.blow_up(
            direction, self.method, times[-1], math.copysign(self.step_size or abs(span), span), names, end
        )
        if self.step_size is None:
            raise failed
        which = errors.first_bad(names, end)
        with torch.no_grad():
            for step in fixed_steps(
                self.tableau or RK4,
                function,
                start,
                through(self.grid, times),
                self.step_size,
                StepLog(direction, names, []),
            ):
                if all_finite(*step.end):
                    continue
                found = errors.first_bad(names, step.end)
                if self.tableau is None and (which is None or found is None or found[:2] != which[:2]):
                    break
                raise errors.blow_up(direction, self.method, step.t0, step.t1 - step.t0, names, step.end)
        raise failed
