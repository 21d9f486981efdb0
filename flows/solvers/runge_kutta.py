"""Runge-Kutta methods: coefficients, one step, and what lies inside a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver

from flows.solvers.problem import State

Function = Callable[[float, State], State]  # (t, state) -> derivatives


@dataclass(frozen=True)
class RungeKutta:
    """An explicit method with s stages, k_i = f(t + c_i dt, y + dt Σ_j a_ij k_j), y′ = y + dt Σ_i b_i k_i."""

    order: int
    nodes: tuple[float, ...]  # c_2, ..., c_s
    coefficients: tuple[tuple[float, ...], ...]  # a, a row for each stage but the first
    weights: tuple[float, ...]  # b
    error: tuple[float, ...] | None = None  # e: the error estimate is dt Σ_i e_i k_i; None: no estimate
    middle: tuple[float, ...] | None = None  # m: y(t + dt/2) ≈ y + dt Σ_i m_i k_i to the order that the quartic needs

    @property
    def is_adaptive(self) -> bool:
        """Whether it estimates its error."""
        return self.error is not None

    @property
    def last_stage_is_next(self) -> bool:
        """Whether the last stage is evaluated at the end of the step, and so serves as the first of the next."""
        return self.weights[-1] == 0 and self.coefficients[-1] == self.weights[:-1]

    @property
    def evaluations(self) -> int:
        """Evaluations a step."""
        return len(self.weights) - (1 if self.is_adaptive and self.last_stage_is_next else 0)

    @cached_property
    def error_constant(self) -> float:
        """|eᵀ A^(p−1) 1| of an adaptive method: the estimate for y′ = λy at the order p is this times |λh|^p |y|."""
        rows = [(), *self.coefficients]
        if len(self.error) > len(rows):  # the estimate also uses the slope at the end
            rows.append(self.weights)
        powers = [1.0] * len(rows)
        for _ in range(self.order - 1):
            powers = [sum(a * power for a, power in zip(row, powers, strict=False)) for row in rows]
        return abs(sum(e * power for e, power in zip(self.error, powers, strict=True)))


FIXED = {
    "euler": RungeKutta(1, (), (), (1.0,)),
    "midpoint": RungeKutta(2, (1 / 2,), ((1 / 2,),), (0.0, 1.0)),
    "heun2": RungeKutta(2, (1.0,), ((1.0,),), (1 / 2, 1 / 2)),
    "heun3": RungeKutta(3, (1 / 3, 2 / 3), ((1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4)),
    "rk4": RungeKutta(  # the 3/8 rule, which has a smaller error than the classical one
        4, (1 / 3, 2 / 3, 1.0), ((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)
    ),
}


@cache
def runge_kutta(method: str) -> RungeKutta | None:
    """The method of that name; the embedded pairs come from torchdiffeq. ``None`` if it is no Runge-Kutta method."""
    if method in FIXED:
        return FIXED[method]
    source = SOLVERS[method]
    if not issubclass(source, RKAdaptiveStepsizeODESolver):
        return None
    tableau = source.tableau
    return RungeKutta(
        source.order,
        tuple(tableau.alpha.tolist()),
        tuple(tuple(row.tolist()) for row in tableau.beta),
        tuple(tableau.c_sol.tolist()),
        tuple(tableau.c_error.tolist()),
        tuple(source.mid.tolist()) if source.order > 3 else None,  # those of lower order are worse than the cubic
    )


@dataclass(frozen=True)
class Step:
    """A step from (t0, start) to (t1, end)."""

    t0: float
    t1: float
    start: State
    end: State
    slopes: tuple[State, ...]  # the stages k_1, ..., k_s
    next_slope: State | None  # f(t1, end) of an adaptive method: the first stage of the next step


def take_step(
    method: RungeKutta, function: Function, t0: float, t1: float, start: State, slope: State | None = None
) -> Step:
    """One step; ``slope`` is f(t0, start) where it is known. Differentiable."""
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
    """dt Σ_i e_i k_i, a constant for autograd."""
    with torch.no_grad():
        return combination(step.slopes, method.error, step.t1 - step.t0)


def interpolate(method: RungeKutta, step: Step, t: float) -> State:
    """The polynomial in t that meets values and slopes at both ends of the step: a cubic; a quartic that meets the
    value in the middle too, where the method knows one."""
    dt, x = step.t1 - step.t0, (t - step.t0) / (step.t1 - step.t0)
    parts = zip(step.start, step.end, step.slopes[0], step.next_slope, strict=True)
    cubic = tuple(_hermite(x, y0, y1, dt * k0, dt * k1) for y0, y1, k0, k1 in parts)
    if method.middle is None:
        return cubic
    bump = 16 * (x * (1 - x)) ** 2  # 1 in the middle; no value and no slope at the ends
    parts = zip(step.start, step.end, step.slopes[0], step.next_slope, strict=True)
    centre = (_hermite(0.5, y0, y1, dt * k0, dt * k1) for y0, y1, k0, k1 in parts)
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
    """dt Σ_i w_i k_i, without the terms of weight zero."""
    terms = [(dt * weight, slope) for weight, slope in zip(weights, slopes, strict=False) if weight]
    (scale, first), *rest = terms
    totals = [scale * component for component in first]
    for weight, slope in rest:
        totals = [torch.add(total, k, alpha=weight) for total, k in zip(totals, slope, strict=True)]
    return tuple(totals)
