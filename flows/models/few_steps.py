"""Sampling in few evaluations: a grid of times fitted to a flow."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from flows.arguments import checked
from flows.checks import check_number
from flows.dynamics import StateDynamics
from flows.errors import InvalidValueError
from flows.models.cnf import CNF
from flows.solvers import ODESolver
from flows.solvers.runge_kutta import take_step
from flows.solvers.tableaux import RUNGE_KUTTA, RungeKutta

METHODS = tuple(name for name, method in RUNGE_KUTTA.items() if not method.is_adaptive)
TOLERANCE = 1e-5  # of the solve that the grid is compared with
LEARNING_RATE = 0.05  # of the logarithms of the steps


@checked
def fit_grid(
    flow: CNF,
    evaluations: int,
    method: Literal["auto", "euler", "midpoint", "heun2", "heun3", "rk4"] = "auto",
    context: Tensor | None = None,  # (num_points, *context)
    num_points: int = 256,
    steps: int = 60,
    generator: torch.Generator | None = None,
) -> ODESolver:
    r"""Fit the times of few, fixed steps to a trained flow, for sampling.

    The steps minimise the mean square distance between the ends of `num_points` paths from the base and those of an
    accurate solve, E ‖x_grid(1) − x(1)‖² in flow space. On these points the fitted grid is never worse than the even
    one. The flow's weights do not change. It costs about 3 `steps` · `evaluations` evaluations of each method.

    Take the result for samples only. The log-density of a flow is that of its ODE, which needs an accurate solve;
    samples in few steps follow it up to the distance above.

    Args:
        evaluations: of the field for one sample.
        method: `"auto"` takes the best of those whose stages divide the evaluations.
        context: contexts in data units, for a flow that takes them; one for each point.
        num_points: base points to fit to.
        steps: of Adam.
        generator: of the base points.

    Returns:
        A solver with `method` and `grid`: `flow.solver = flows.fit_grid(flow, 8)`.

    Raises:
        InvalidValueError: no method takes exactly so many evaluations.

    Example:
        ```python
        import flows

        flow = flows.CNF(flows.fields.MLP((2,), hidden=(16,)))
        exact = flow.solver
        flow.solver = flows.fit_grid(flow, evaluations=4, num_points=32, steps=10)
        samples = flow.sample((100,))
        flow.solver = exact  # for likelihoods
        ```
    """
    check_number("evaluations", evaluations, whole=True, at_least=1)
    check_number("num_points", num_points, whole=True, at_least=1)
    check_number("steps", steps, whole=True, at_least=0)
    names = [
        name
        for name in (METHODS if method == "auto" else (method,))
        if evaluations % RUNGE_KUTTA[name].evaluations == 0
    ]
    if not names:
        stages = RUNGE_KUTTA[method].evaluations
        raise InvalidValueError(
            f"evaluations must be a multiple of {stages}, the stages of {method!r}, got {evaluations}; or use "
            "method='auto'"
        )
    count = num_points if context is None else len(context)
    with torch.no_grad():
        start = flow.base.sample((count,), generator)
        features = None if context is None else flow.encode(context)
        dynamics = StateDynamics(flow.bind(features))
        accurate = ODESolver(rtol=TOLERANCE, atol=TOLERANCE, max_steps=10_000)
        target = accurate.solve(dynamics, (start,), (0.0, 1.0)).end[0]
    found = []
    for name in names:
        number = evaluations // RUNGE_KUTTA[name].evaluations
        error, grid = _fitted(dynamics, RUNGE_KUTTA[name], number, start, target, steps)
        found.append((error, ODESolver(name, grid=grid)))
    return min(found, key=lambda pair: pair[0])[1]


def _fitted(
    dynamics: StateDynamics, method: RungeKutta, number: int, start: Tensor, target: Tensor, steps: int
) -> tuple[float, tuple[float, ...]]:
    """The smallest mean square distance that was found, and its grid; the first one is even."""
    logits = torch.zeros(number, dtype=start.dtype, device=start.device, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=LEARNING_RATE)
    best: tuple[float, Tensor] | None = None
    for step in range(steps + 1 if number > 1 else 1):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / (steps + 1))
        with torch.enable_grad():
            times = torch.cat([logits.new_zeros(1), logits.softmax(0).cumsum(0)[:-1], logits.new_ones(1)])
            loss = (_march(dynamics, method, times, start) - target).square().mean()
            value = float(loss.detach())
            if value == value and (best is None or value < best[0]):  # not NaN
                best = value, times.detach()
            if loss.requires_grad and value > 0:
                (logits.grad,) = torch.autograd.grad(loss.log(), [logits])
                optimizer.step()
    value, times = best or (float("inf"), torch.linspace(0, 1, number + 1))
    return value, tuple(times.tolist())


def _march(dynamics: StateDynamics, method: RungeKutta, times: Tensor, start: Tensor) -> Tensor:
    """The points at t = 1 by one step between each two times."""
    state: Any = (start,)
    for t0, t1 in itertools.pairwise(times.unbind()):
        dt = t1 - t0
        moments: Sequence[Tensor] = [t0, *(t1 if node == 1.0 else t0 + node * dt for node in method.nodes), t1]
        state = take_step(method, dynamics, 0.0, 0.0, state, moments=(moments, dt)).end
    return state[0]
