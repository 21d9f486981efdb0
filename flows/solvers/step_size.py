"""How long the steps of an adaptive method are: the first one, and each from the errors before it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from flows.solvers.control import ErrorNorm
from flows.solvers.problem import RightHandSide, State, all_finite
from flows.solvers.tableaux import RungeKutta

SAFETY = 0.9  # the next step is this factor shorter than its error estimate allows
LEAST_GROWTH, MOST_GROWTH = 0.2, 10.0  # bounds of the next step size over the last one
CONTROLLERS: Mapping[str, tuple[float, float, float]] = {  # gains: integral, proportional, derivative
    "i": (1.0, 0.0, 0.0),
    "pi": (0.7, 0.4, 0.0),
    "pid": (0.7, 0.4, 0.1),
}


class Growth:
    """The next step size over this one, by a controller of the errors.

    Let r₁ be the error over tolerance of this attempt, as `ErrorNorm` measures it, r₂ and r₃ those of the accepted
    attempts before it, and p the order of the method. With gains k_I, k_P and k_D, the size of the next attempt is

        0.9 r₁^(−(k_I + k_P + k_D)/p) r₂^((k_P + 2 k_D)/p) r₃^(−k_D/p)

    times the size of this one, at least as long and at most 10 times. After a rejected attempt it is 0.9 r₁^(−1/p), at
    least 0.2. The first attempts, after which errors are missing, take k_I = 1 alone.
    [Söderlind 2003, ACM Trans. Math. Software 29; Hairer, Nørsett & Wanner 1993, II.4]

    Args:
        controller: its name, which sets the gains.
        order: p.
    """

    def __init__(self, controller: str, order: int) -> None:
        integral, proportional, derivative = CONTROLLERS[controller]
        self._exponents = (
            -(integral + proportional + derivative) / order,
            (proportional + 2 * derivative) / order,
            -derivative / order,
        )
        self._order = order
        self._needed = 3 if derivative else 2 if proportional else 1
        self._errors: list[float] = []  # of the accepted attempts, the last one first

    def __call__(self, error: float) -> float:
        """The growth after an attempt with this error over tolerance."""
        if not error < math.inf:
            return LEAST_GROWTH
        if error > 1:
            return max(SAFETY * error ** (-1 / self._order), LEAST_GROWTH)
        if error == 0:
            self._errors = []
            return MOST_GROWTH
        self._errors = [error, *self._errors[:2]]
        exponents = self._exponents if len(self._errors) >= self._needed else (-1 / self._order,)
        size = math.prod(e**k for e, k in zip(self._errors, exponents, strict=False))
        return min(MOST_GROWTH, max(SAFETY * size, 1.0))


@torch.no_grad()
def initial_size(
    method: RungeKutta, function: RightHandSide, state: State, slope: State, start: float, end: float, norm: ErrorNorm
) -> tuple[float, bool]:
    """A first step size that should meet the tolerance, and whether anything was NaN or infinite.

    Takes one evaluation, which shows how fast the slope changes; see `_first_step`.
    """
    span = abs(end - start)
    sizes, speeds = (norm(values, state, state)[0] for values in (state, slope))
    largest, fastest = (max(values, key=_nan_as_largest) for values in (sizes, speeds))
    if not math.isfinite(largest) or not math.isfinite(fastest):  # bad values, or their squares overflow
        return 1e-6 * span, norm.anywhere(not all_finite(*state, *slope), state[0].device)
    first = min(1e-6 if min(largest, fastest) < 1e-5 else 0.01 * largest / fastest, span)
    ahead = start + math.copysign(first, end - start)
    moved = tuple(y + (ahead - start) * k for y, k in zip(state, slope, strict=True))
    difference = tuple(b - a for a, b in zip(slope, function(ahead, moved), strict=True))
    bends = [bend / first for bend in norm(difference, state, state)[0]]
    if not all(map(math.isfinite, bends)):
        return first, False
    return min(_first_step(method, *rates) for rates in zip(speeds, bends, strict=True)), False


def _first_step(method: RungeKutta, speed: float, bend: float) -> float:
    """The first step size that one component allows.

    Its slope has the norm s (over tolerance) and changes at the rate b. If it changed exponentially, with the time
    τ = s / b, the error estimate of a method of order p would be C s τ (h / τ)^p. Take 0.6 of the h at which this meets
    the tolerance, and at most 0.6 τ, because most equations are less simple. But take at least the classical choice,
    h^p max(s, b) = 0.01. That alone ignores τ and is far too short for a component that starts at zero, such as a
    log-density, because its s is large. A component whose slope is constant sets no bound.
    [Hairer, Nørsett & Wanner 1993, II.4]
    """
    if bend == 0:
        return math.inf
    classical = (0.01 / max(speed, bend)) ** (1 / method.order)
    time = speed / bend
    error = method.error_constant * speed * time  # at h = τ
    return max(classical, 0.6 * time * max(error, 1.0) ** (-1 / method.order))


def _nan_as_largest(value: float) -> float:
    return math.inf if math.isnan(value) else value
