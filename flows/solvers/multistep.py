"""The methods that torchdiffeq runs: Adams' multistep methods, and those of scipy."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchdiffeq import odeint
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.solvers import FixedGridODESolver

from flows.solvers import errors as failure
from flows.solvers.control import ErrorNorm
from flows.solvers.errors import SolverError
from flows.solvers.problem import RightHandSide, State
from flows.solvers.statistics import Attempt
from flows.solvers.stepping import Log, grid

EVALUATIONS = 10  # of the dynamics, that count as one step of scipy's methods


def integrate_by_torchdiffeq(
    method: str,
    function: RightHandSide,
    state: State,
    times: Sequence[float],
    norm: ErrorNorm,
    step_size: float | None,
    max_steps: int,
    options: Mapping[str, Any],
    log: Log,
) -> State:
    """The states at all times, each component (T, *component).

    Raises:
        SolverError: scipy gives up, or has taken ``EVALUATIONS`` evaluations for each of ``max_steps``.
    """
    given = dict(options)
    if method == "explicit_adams":
        given.setdefault("max_order", 4)  # torchdiffeq's 12 is unstable beyond steps of about 0.001/|λ|
    at = torch.tensor(times, dtype=state[0].dtype, device=state[0].device)
    if issubclass(SOLVERS[method], FixedGridODESolver):
        points = torch.tensor(grid(times, step_size), dtype=at.dtype, device=at.device)
        given["grid_constructor"] = lambda f, y, t: points
        function.callback_step = lambda t, y, dt: log.step(Attempt(float(t), float(dt)))
    if method != "scipy_solver":
        return odeint(function, state, at, rtol=norm.rtol, atol=norm.atol, method=method, options=given)
    reached: deque[float] = deque([times[0]], maxlen=20)  # the times of the last evaluations
    latest = state

    def step() -> float:
        """About how far scipy gets with a step: it evaluates some times more than once."""
        return (reached[-1] - reached[0]) / len(reached)

    def limited(t: Tensor, y: State) -> State:
        nonlocal evaluations, latest
        evaluations += 1
        reached.append(float(t))
        latest = y
        if evaluations > EVALUATIONS * max_steps:
            raise failure.step_limit(log.direction, max_steps, reached[-1], step(), fastest())
        return function(t, y)

    def fastest() -> Attempt:
        """A step that ended here, limited by the component that moves most there, over its tolerance."""
        with torch.no_grad():
            speed = norm.worst(function(reached[-1], latest), latest, latest)
        return Attempt(reached[-1], step(), False, *speed)

    def stopped() -> SolverError:
        return failure.gave_up(method, reached[-1], step(), fastest())

    evaluations = 0
    try:
        states = odeint(limited, state, at, rtol=norm.rtol, atol=norm.atol, method=method, options=given)
    except RuntimeError as error:
        if "invalid for input of size" not in str(error):  # torchdiffeq arranges times that scipy has not reached
            raise
        raise stopped() from None
    if len(states[0]) < len(times):
        raise stopped()
    return states
