"""The methods that torchdiffeq runs: Adams' multistep methods, and those of scipy.

torchdiffeq is imported at the first solve, because it loads scipy.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from flows.checks import check_number
from flows.errors import InvalidValueError
from flows.solvers import errors
from flows.solvers.control import ErrorNorm
from flows.solvers.problem import RightHandSide, State
from flows.solvers.statistics import Attempt
from flows.solvers.stepping import StepLimits, StepLog, grid

ADAMS = ("explicit_adams", "implicit_adams")
SCIPY = "scipy_solver"
SCIPY_METHODS = ("RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA")
EVALUATIONS_PER_STEP = 10  # of the dynamics that count as one step of a scipy method
OPTIONS = {"explicit_adams": ("max_order",), "implicit_adams": ("max_order", "max_iters"), SCIPY: ("solver",)}


def check_options(method: str, options: Mapping[str, Any]) -> None:
    """Check the options of a method that torchdiffeq runs.

    Raises:
        InvalidValueError: an option is unknown or has a wrong value.
    """
    known = OPTIONS[method]
    unknown = [str(name) for name in options if name not in known]
    if unknown:
        raise InvalidValueError(
            f"method {method!r} has no option {', '.join(unknown)}; its options are {', '.join(known)}"
        )
    if "max_order" in options:  # below 4, torchdiffeq would silently use another method
        check_number("max_order", options["max_order"], whole=True, at_least=4, at_most=12)
    if "max_iters" in options:
        check_number("max_iters", options["max_iters"], whole=True, at_least=1)
    if options.get("solver", "LSODA") not in SCIPY_METHODS:
        raise InvalidValueError(f"solver must be one of {', '.join(SCIPY_METHODS)}, got {options['solver']!r}")


def integrate_by_torchdiffeq(
    method: str,
    function: RightHandSide,
    state: State,
    times: Sequence[float],
    norm: ErrorNorm,
    step_size: float | None,
    limits: StepLimits,
    options: Mapping[str, Any],
    log: StepLog,
) -> State:  # each component (T, *component)
    """The states at all times.

    Raises:
        SolverError: scipy gives up, or has taken ten evaluations for each of `limits.max_steps`.
    """
    from torchdiffeq import odeint

    at = torch.tensor(times, dtype=state[0].dtype, device=state[0].device)

    def solve(dynamics: Callable[[Tensor, State], State], given: Mapping[str, Any]) -> State:
        states = odeint(dynamics, state, at, rtol=norm.rtol, atol=norm.atol, method=method, options=dict(given))
        return cast(State, states)

    if method == SCIPY:
        return _ScipySolve(function, state, times, norm, limits.max_steps, log).run(solve, options)
    assert step_size is not None
    points = grid(times, step_size)
    for start, end in itertools.pairwise(points):
        log.record(Attempt(start, end - start))
    at_points = torch.tensor(points, dtype=at.dtype, device=at.device)
    default = {"max_order": 4} if method == "explicit_adams" else {}  # higher orders need steps below 0.001/|λ|
    return solve(function, {**default, **options, "grid_constructor": lambda f, y, t: at_points})


class _ScipySolve:
    """A solve by scipy that stops after too many evaluations and says where it was."""

    def __init__(
        self,
        function: RightHandSide,
        state: State,
        times: Sequence[float],
        norm: ErrorNorm,
        max_steps: int,
        log: StepLog,
    ) -> None:
        self.function = function
        self.latest = state
        self.num_times = len(times)
        self.norm = norm
        self.max_steps = max_steps
        self.log = log
        self.evaluations = 0
        self.failed_inside = False  # whether an error came from the dynamics or from us, not from the solver
        self.recent_times: deque[float] = deque([times[0]], maxlen=20)

    def __call__(self, t: Tensor, y: State) -> State:
        self.evaluations += 1
        self.recent_times.append(float(t))
        self.latest = y
        self.failed_inside = True
        if self.evaluations > EVALUATIONS_PER_STEP * self.max_steps:
            last = self.last_attempt()
            raise errors.step_limit(self.log.direction, self.max_steps, last.t, last.dt, last)
        derivatives = self.function(t, y)
        self.failed_inside = False
        return derivatives

    def run(self, solve: Callable[..., State], options: Mapping[str, Any]) -> State:
        """The states at all times."""
        try:
            states = solve(self, options)
        except RuntimeError as error:  # torchdiffeq cannot arrange the states at times that scipy has not reached
            if self.failed_inside:
                raise
            last = self.last_attempt()
            raise errors.gave_up(SCIPY, last.t, last.dt, last) from error
        if len(states[0]) < self.num_times:
            last = self.last_attempt()
            raise errors.gave_up(SCIPY, last.t, last.dt, last)
        return states

    def last_attempt(self) -> Attempt:
        """About the last step, blamed on the component whose slope is largest relative to its tolerance."""
        t = self.recent_times[-1]
        dt = (t - self.recent_times[0]) / len(self.recent_times)
        with torch.no_grad():
            speed = self.norm.worst(self.function(t, self.latest), self.latest, self.latest)
        return Attempt(t, dt, False, *speed)
