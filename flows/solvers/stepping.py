"""From one time to another, step by step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flows.errors import InvalidValueError
from flows.solvers import errors as failure
from flows.solvers.control import ErrorNorm
from flows.solvers.problem import RightHandSide, State, all_finite
from flows.solvers.runge_kutta import RungeKutta, Step, error_estimate, interpolate, take_step
from flows.solvers.statistics import Attempt

SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0  # of the step size: below what the error allows, and within these factors
SHARED = 4  # the last steps of a solve, of equal size
ROUNDING = 1e-6  # of times, relative to a step


@dataclass
class Log:
    """Where the steps of one solve are written down."""

    direction: str  # "forward" or "adjoint"
    names: tuple[str, ...]  # of the components
    attempts: list[Attempt]
    observed: dict[str, list[tuple[float, Tensor]]] = field(default_factory=dict)
    observe: Callable[[State], Mapping[str, Tensor]] | None = None  # of the derivatives at accepted steps
    begin: Callable[[], None] | None = None  # called before each attempt

    def start(self) -> None:
        if self.begin is not None:
            self.begin()

    def step(self, attempt: Attempt, slope: State | None = None) -> None:
        """``slope``: the derivatives at the start of the step, where they are known."""
        self.attempts.append(attempt)
        if self.observe is not None and slope is not None and attempt.accepted:
            with torch.no_grad():
                for name, value in self.observe(slope).items():
                    self.observed.setdefault(name, []).append((attempt.t, value))


def adaptive_steps(
    method: RungeKutta,
    function: RightHandSide,
    state: State,
    start: float,
    end: float,
    norm: ErrorNorm,
    max_steps: int,
    min_step: float,
    max_step: float,
    first_step: float,
    log: Log,
) -> Iterator[Step]:
    """The accepted steps from ``start`` to ``end``, where the last one ends; each is tried from the size before.

    With r the error over tolerance of :class:`ErrorNorm`, the next size is 0.9 r^(-1/order) times the last, within
    [0.2, 10] times, and not above it after a rejection. Where up to four such steps would reach the end, they share
    what remains, since shorter ones are refused less; a single one may use up the margin of 0.9. Sizes are from
    ``min_step`` to ``max_step``, and the first at most ``first_step``.
    [Hairer, Nørsett & Wanner 1993, II.4]
    """
    t, sign = start, math.copysign(1.0, end - start)
    finest = 16 * torch.finfo(state[0].dtype).eps * max(abs(start), abs(end))  # stage times would fall together
    if max_step < finest:
        raise InvalidValueError(
            f"max_step must be at least {finest:.2g}, what {state[0].dtype} resolves, got {max_step:g}"
        )
    slope = function(t, state)
    size, bad = _initial_size(method, function, state, slope, start, end, norm)
    if bad:
        raise failure.not_finite(log.direction, t, sign * size, log.names, state, slope)
    size = min(max(min(size, first_step), min_step, finest), max_step)
    last: Attempt | None = None
    for _ in range(max_steps):
        remaining = abs(end - t)
        # One above min_step might be refused again and again; rounding is no step of its own
        margin = 1 - ROUNDING / 2 if size <= min_step else SAFETY
        if size >= margin * remaining and max_step * (1 + ROUNDING) >= remaining:
            target = end
        else:
            if size * SHARED > remaining:
                size = max(remaining / max(2, math.ceil(remaining / size - ROUNDING)), min_step, finest)
            target = t + sign * size
        size = abs(target - t)
        if size < min(finest, remaining):
            if last is not None and math.isnan(last.error):
                raise failure.not_finite(log.direction, t, sign * size, log.names, state, slope, last)
            raise failure.underflow(log.direction, norm.rtol, norm.atol, t, sign * size, last)
        log.start()
        step = take_step(method, function, t, target, state, slope)
        ratio, component, sample = norm.worst(error_estimate(method, step), state, step.end)
        shortest = size <= min_step * (1 + ROUNDING)
        accepted = ratio <= 1 or (shortest and math.isfinite(ratio))
        last = Attempt(t, target - t, accepted, ratio, component, sample)
        log.step(last, slope)
        if shortest and not accepted:
            raise failure.not_finite(log.direction, t, sign * size, log.names, state, slope, last)
        if last.accepted:
            yield step
            if target == end:
                return
            t, state, slope = target, step.end, step.next_slope
        size = min(max(size * _factor(ratio, method.order), min_step), max_step)
    raise failure.step_limit(log.direction, max_steps, t, sign * size, last, max_step)


def fixed_steps(
    method: RungeKutta, function: RightHandSide, state: State, times: Sequence[float], step_size: float, log: Log
) -> Iterator[Step]:
    """Equal steps of at most ``step_size`` from each of ``times`` to the next."""
    for t0, t1 in itertools.pairwise(grid(times, step_size)):
        log.start()
        step = take_step(method, function, t0, t1, state)
        log.step(Attempt(t0, t1 - t0), step.slopes[0])
        yield step
        state = step.end


def grid(times: Sequence[float], step_size: float) -> list[float]:
    """The times themselves, with equal steps of at most ``step_size`` between them."""
    points = [times[0]]
    for start, end in itertools.pairwise(times):
        steps = max(1, math.ceil(abs(end - start) / step_size - 1e-3))  # forgive rounding of times
        points += [start + (end - start) * i / steps for i in range(1, steps)] + [end]
    return points


def passed(step: Step, times: Sequence[float], position: int) -> int:
    """How many of ``times``, from ``position`` on, lie in the step; its end counts, its start does not."""
    sign = math.copysign(1.0, step.t1 - step.t0)
    count = 0
    while position + count < len(times) and sign * (step.t1 - times[position + count]) >= 0:
        count += 1
    return count


def state_at(method: RungeKutta, step: Step, t: float) -> State:
    """The state at a time within the step."""
    return step.end if t == step.t1 else interpolate(method, step, t)


def collect(method: RungeKutta, steps: Iterable[Step], state: State, times: Sequence[float]) -> State:
    """The states at all ``times``, each component (T, *component)."""
    states = [state]
    for step in steps:
        for t in times[len(states) : len(states) + passed(step, times, len(states))]:
            states.append(state_at(method, step, t))
    return tuple(torch.stack(component) for component in zip(*states, strict=True))


def _factor(ratio: float, order: int) -> float:
    """The next step over this one."""
    if not ratio < math.inf:
        return SHRINK
    if ratio == 0:
        return GROW
    return min(GROW, max(SAFETY * ratio ** (-1 / order), SHRINK if ratio > 1 else 1.0))


@torch.no_grad()
def _initial_size(
    method: RungeKutta, function: RightHandSide, state: State, slope: State, start: float, end: float, norm: ErrorNorm
) -> tuple[float, bool]:
    """A first step whose error should be within the tolerance, and whether anything was not finite.

    One more evaluation. It says how fast the slope changes, see :func:`_first_step`.
    """
    span = abs(end - start)
    sizes, speeds = (norm(values, state, state)[0] for values in (state, slope))
    largest, fastest = (max(values, key=_nan_is_most) for values in (sizes, speeds))
    if not math.isfinite(largest) or not math.isfinite(fastest):  # bad values, or an overflow of their squares
        return 1e-6 * span, not all_finite(*state, *slope)
    first = min(1e-6 if min(largest, fastest) < 1e-5 else 0.01 * largest / fastest, span)
    ahead = start + math.copysign(first, end - start)
    moved = tuple(y + (ahead - start) * k for y, k in zip(state, slope, strict=True))
    difference = tuple(b - a for a, b in zip(slope, function(ahead, moved), strict=True))
    bends = [bend / first for bend in norm(difference, state, state)[0]]
    if not all(map(math.isfinite, bends)):
        return first, False
    return min(_first_step(method, *rates) for rates in zip(speeds, bends, strict=True)), False


def _first_step(method: RungeKutta, speed: float, bend: float) -> float:
    """The first step that a component allows whose slope has the norm s, over tolerance, and changes at the rate b.

    If it changed exponentially, with the time τ = s / b, the error of a method of order p would be C s τ (h / τ)^p;
    0.4 of the step at which this meets the tolerance is taken, and of τ at most, as most equations are less simple. The
    classical choice, h^p max(s, b) = 0.01, is the least: it has no regard for τ, and is far too short for a component
    that starts at zero, as a log-density does, since the s of that is large. A component that is at rest, or moves
    evenly, sets no bound. [Hairer, Nørsett & Wanner 1993, II.4]
    """
    if bend == 0:
        return math.inf
    classical = (0.01 / max(speed, bend)) ** (1 / method.order)
    time = speed / bend
    error = method.error_constant * speed * time  # of h = τ
    return max(classical, 0.4 * time * max(error, 1.0) ** (-1 / method.order))


def _nan_is_most(value: float) -> float:
    return math.inf if math.isnan(value) else value
