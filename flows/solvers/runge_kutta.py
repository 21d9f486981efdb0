"""One step of a Runge-Kutta method, its error estimate, and interpolation within the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flows.solvers.problem import State
from flows.solvers.tableaux import RungeKutta

Function = Callable[[float, State], State]  # (t, state) -> derivatives


@dataclass(frozen=True)
class Step:
    """A step from (t0, start) to (t1, end)."""

    t0: float
    t1: float
    start: State
    end: State
    slopes: tuple[State, ...]  # the stages k_1, ..., k_s
    next_slope: State | None  # f(t1, end), the first stage of the next step; None in a fixed-step method


def take_step(
    method: RungeKutta, function: Function, t0: float, t1: float, start: State, slope: State | None = None
) -> Step:
    """Take one differentiable step.

    Args:
        method: coefficients.
        function: the right-hand side.
        t0, t1: start and end of the step.
        start: the state at t0.
        slope: f(t0, start), if it is already known.
    """
    dt = t1 - t0
    slopes = [function(t0, start) if slope is None else slope]
    end = start
    for node, row in zip(method.nodes, method.coefficients, strict=True):
        end = advance(start, slopes, row, dt)
        slopes.append(function(t1 if node == 1.0 else t0 + node * dt, end))
    next_slope = None
    if method.is_adaptive and method.last_stage_is_next:
        next_slope = slopes[-1]
    else:
        end = advance(start, slopes, method.weights, dt)
        if method.is_adaptive:
            next_slope = function(t1, end)
    return Step(t0, t1, start, end, tuple(slopes), next_slope)


def error_estimate(method: RungeKutta, step: Step) -> State:
    """dt Σ_i (b_i − b̂_i) k_i, a constant for autograd."""
    with torch.no_grad():
        return combination(step.slopes, method.error, step.t1 - step.t0)


def states_within(method: RungeKutta, step: Step, times: Iterable[float]) -> list[State]:
    """The states at some times within the step: its end as it is, the others by interpolation."""
    return [step.end if t == step.t1 else interpolate(method, step, t) for t in times]


def interpolate(method: RungeKutta, step: Step, t: float) -> State:
    """The state at a time within a step of an adaptive method.

    It is a polynomial in t that meets the values and slopes at both ends of the step. The polynomial is a cubic, or
    a quartic that also meets the value in the middle if the method has coefficients for it.
    """
    assert step.next_slope is not None, "fixed steps end at each output time"
    dt, x = step.t1 - step.t0, (t - step.t0) / (step.t1 - step.t0)
    ends = list(zip(step.start, step.end, step.slopes[0], step.next_slope, strict=True))
    cubic = tuple(_hermite(x, y0, y1, dt * k0, dt * k1) for y0, y1, k0, k1 in ends)
    if method.middle is None:
        return cubic
    bump = 16 * (x * (1 - x)) ** 2  # 1 in the middle; value and slope are 0 at the ends
    centre = (_hermite(0.5, y0, y1, dt * k0, dt * k1) for y0, y1, k0, k1 in ends)
    middle = advance(step.start, step.slopes, method.middle, dt)
    return tuple(y + bump * (m - c) for y, m, c in zip(cubic, middle, centre, strict=True))


def _hermite(x: float, y0: Tensor, y1: Tensor, slope0: Tensor, slope1: Tensor) -> Tensor:
    """The cubic with these values and slopes at 0 and 1."""
    left, right = (1 - x) ** 2, x**2
    return left * (1 + 2 * x) * y0 + right * (3 - 2 * x) * y1 + left * x * slope0 - right * (1 - x) * slope1


def advance(start: State, slopes: Sequence[State], weights: Sequence[float], dt: float) -> State:
    """start + dt Σ_i w_i k_i."""
    increments = combination(slopes, weights, dt)
    return tuple(y + increment for y, increment in zip(start, increments, strict=True))


def combination(slopes: Sequence[State], weights: Sequence[float], dt: float) -> State:
    """dt Σ_i w_i k_i, without the terms of weight 0."""
    terms = [(dt * weight, slope) for weight, slope in zip(weights, slopes, strict=False) if weight]
    (scale, first), *rest = terms
    totals = [scale * component for component in first]
    for weight, slope in rest:
        totals = [torch.add(total, k, alpha=weight) for total, k in zip(totals, slope, strict=True)]
    return tuple(totals)
