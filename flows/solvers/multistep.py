"""The methods that torchdiffeq runs: Adams' multistep methods, and those of scipy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torchdiffeq import odeint
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.solvers import FixedGridODESolver

from flows.solvers.problem import RightHandSide, State
from flows.solvers.statistics import Attempt
from flows.solvers.stepping import Log, grid


def integrate_by_torchdiffeq(
    method: str,
    function: RightHandSide,
    state: State,
    times: Sequence[float],
    rtol: float,
    atol: float,
    step_size: float | None,
    options: Mapping[str, Any],
    log: Log,
) -> State:
    """The states at all times, each component (T, *component); fewer times if scipy gives up."""
    given = dict(options)
    if method == "explicit_adams":
        given.setdefault("max_order", 4)  # torchdiffeq's 12 is unstable beyond steps of about 0.001/|λ|
    at = torch.tensor(times, dtype=state[0].dtype, device=state[0].device)
    if issubclass(SOLVERS[method], FixedGridODESolver):
        points = torch.tensor(grid(times, step_size), dtype=at.dtype, device=at.device)
        given["grid_constructor"] = lambda f, y, t: points
        function.callback_step = lambda t, y, dt: log.step(Attempt(float(t), float(dt)))
    return odeint(function, state, at, rtol=rtol, atol=atol, method=method, options=given)
