"""One step of a Runge-Kutta method, its error estimate, and interpolation within the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flows.solvers.problem import State, rows_of
from flows.solvers.tableaux import RungeKutta

Function = Callable[[Any, State], State]  # (t, state) -> derivatives


@dataclass(frozen=True)
class Step:
    """A step from (t0, start) to (t1, end)."""

    t0: float
    t1: float
    start: State
    end: State
    slopes: tuple[State, ...]  # the stages k_1, ..., k_s; silent ones may lack components
    next_slope: State | None  # f(t1, end), the first stage of the next step; None where nobody needs it
    measured: Tensor | None = None  # what `ErrorNorm.measure` found, where the step ran as compiled code


def take_step(
    method: RungeKutta,
    function: Function,
    t0: float,
    t1: float,
    start: State,
    slope: State | None = None,
    with_next_slope: bool = False,
    moments: tuple[Sequence[Any], Tensor] | None = None,
) -> Step:
    """Take one differentiable step.

    Args:
        method: coefficients.
        function: the right-hand side.
        t0, t1: start and end of the step.
        start: the state at t0.
        slope: f(t0, start), if it is already known.
        with_next_slope: whether a fixed step gets its `next_slope` too, for interpolation.
        moments: the times of all stages and the end, and the length of the step, where compiled code has them as
            tensors.
    """
    compiled = getattr(function, "steps", None)
    if compiled is not None:
        step = compiled.take(function, t0, t1, start, slope, with_next_slope)
        if step is not None:
            return step
    times, dt = (stage_times(method, t0, t1), t1 - t0) if moments is None else moments
    slopes = [function(times[0], start) if slope is None else slope]
    end = start
    leading = getattr(function, "leading", None)  # others do not matter to any slope, so stages need not have them
    last = len(method.nodes) if method.next_is_a_stage else None
    for stage, (t, row) in enumerate(zip(times[1:], method.coefficients, strict=False), 1):
        if leading is None or stage == last:
            end = advance(start, slopes, row, dt)
        else:
            end = (*advance(start[:1], [slope[:1] for slope in slopes], row, dt), *start[1:])
        slopes.append(leading(t, end) if leading and stage in method.silent else function(t, end))
    if method.next_is_a_stage:
        return Step(t0, t1, start, end, tuple(slopes), slopes[-1])
    end = advance(start, slopes, method.weights, dt)
    wants_next = method.is_adaptive or with_next_slope
    return Step(t0, t1, start, end, tuple(slopes), function(times[-1], end) if wants_next else None)


def stage_times(method: RungeKutta, t0: float, t1: float) -> list[float]:
    """The times of all stages, and the end of the step."""
    dt = t1 - t0
    return [t0, *(t1 if node == 1.0 else t0 + node * dt for node in method.nodes), t1]


def error_estimate(method: RungeKutta, step: Step) -> State:
    """dt Σ_i (b_i − b̂_i) k_i, a constant for autograd."""
    with torch.no_grad():
        return combination(step.slopes, method.error, step.t1 - step.t0)


def interpolate(
    method: RungeKutta,
    step: Step,
    t: float | Tensor,  # or (N,), on the device of the state
) -> State:  # (*component), or (N, *component)
    """The state at a time within a step of an adaptive method, or at each of several.

    It is a polynomial in t that meets the values and slopes at both ends of the step. The polynomial is a cubic, or
    a quartic that also meets the value in the middle if the method has coefficients for it.
    """
    assert step.next_slope is not None, "fixed steps end at each output time"
    dt = step.t1 - step.t0
    share = (t - step.t0) / dt
    middle = None if method.middle is None else advance(step.start, step.slopes, method.middle, dt)
    states = []
    for i, end in enumerate(step.end):
        x = share.to(end).view(-1, *[1] * end.ndim) if isinstance(share, Tensor) else share
        ends = (step.start[i], end, step.slopes[0][i], step.next_slope[i])
        y = _polynomial(x, dt, *ends, None if middle is None else middle[i])
        states.append(torch.where(x == 1, end, y) if isinstance(x, Tensor) else y)  # without its rounding at the end
    return tuple(states)


def interpolate_rows(
    method: RungeKutta,
    step: Step,
    rows: Tensor,  # (N,), indices of samples
    times: Tensor,  # (N,), within the step
) -> State:  # each component (N, *rest)
    """`interpolate` at one time for each of some samples, with the memory of these samples only."""
    assert step.next_slope is not None, "interpolation needs the slope at the end"
    dt = step.t1 - step.t0
    ends = [rows_of(values, rows) for values in (step.start, step.end, step.slopes[0], step.next_slope)]
    middle = None
    if method.middle is not None:
        slopes = [rows_of(slope, rows) if m else slope for slope, m in zip(step.slopes, method.middle, strict=True)]
        middle = advance(ends[0], slopes, method.middle, dt)
    states = []
    for i, end in enumerate(ends[1]):
        x = ((times - step.t0) / dt).to(end).view(-1, *[1] * (end.ndim - 1))
        y0, y1, slope0, slope1 = (values[i] for values in ends)
        y = _polynomial(x, dt, y0, y1, slope0, slope1, None if middle is None else middle[i])
        states.append(torch.where(x == 1, end, y))  # without the rounding of the polynomial
    return tuple(states)


def _polynomial(
    x: float | Tensor, dt: float, y0: Tensor, y1: Tensor, slope0: Tensor, slope1: Tensor, middle: Tensor | None
) -> Tensor:
    """The interpolating polynomial at the share `x` of a step of length `dt`."""
    cubic = _hermite(x, y0, y1, dt * slope0, dt * slope1)
    if middle is None:
        return cubic
    bump = 16 * (x * (1 - x)) ** 2  # 1 in the middle; value and slope are 0 at the ends
    return cubic + bump * (middle - _hermite(0.5, y0, y1, dt * slope0, dt * slope1))


def _hermite(x: float | Tensor, y0: Tensor, y1: Tensor, slope0: Tensor, slope1: Tensor) -> Tensor:
    """The cubic with these values and slopes at 0 and 1."""
    left, right = (1 - x) ** 2, x**2
    return left * (1 + 2 * x) * y0 + right * (3 - 2 * x) * y1 + left * x * slope0 - right * (1 - x) * slope1


def advance(start: State, slopes: Sequence[State], weights: Sequence[float], dt: float | Tensor) -> State:
    """start + dt Σ_i w_i k_i."""
    increments = combination(slopes, weights, dt)
    return tuple(y + increment for y, increment in zip(start, increments, strict=True))


def combination(slopes: Sequence[State], weights: Sequence[float], dt: float | Tensor) -> State:
    """dt Σ_i w_i k_i, without the terms of weight 0."""
    if isinstance(dt, Tensor):
        return tuple(dt * component for component in combination(slopes, weights, 1.0))
    terms = [(dt * weight, slope) for weight, slope in zip(weights, slopes, strict=False) if weight]
    (scale, first), *rest = terms
    totals = [scale * component for component in first]
    for weight, slope in rest:
        totals = [torch.add(total, k, alpha=weight) for total, k in zip(totals, slope, strict=True)]
    return tuple(totals)
