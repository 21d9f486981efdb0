"""The steps of a Runge-Kutta method from one time to another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flows.errors import InvalidValueError
from flows.solvers import errors
from flows.solvers.control import ErrorNorm
from flows.solvers.problem import RightHandSide, State, all_finite
from flows.solvers.runge_kutta import Step, error_estimate, take_step
from flows.solvers.statistics import Attempt
from flows.solvers.tableaux import RungeKutta

SAFETY = 0.9  # the next step is this factor shorter than its error estimate allows
LEAST_GROWTH, MOST_GROWTH = 0.2, 10.0  # bounds of the next step size over the last one
SHARED_STEPS = 4  # when this many steps reach the end, they share the rest equally
TIME_ROUNDING = 1e-6  # relative to a step
MAX_FIXED_STEPS = 1_000_000


@dataclass
class StepLog:
    """Where the steps of one solve are recorded."""

    direction: str  # "forward" or "adjoint"
    names: tuple[str, ...]  # of the components
    attempts: list[Attempt]
    observed: dict[str, list[tuple[float, Tensor]]] = field(default_factory=dict)
    observe: Callable[[State], Mapping[str, Tensor]] | None = None  # of the derivatives at accepted steps
    begin: Callable[[], None] | None = None  # called before each attempt

    def start(self) -> None:
        """Announce an attempt."""
        if self.begin is not None:
            self.begin()

    def record(self, attempt: Attempt, slope: State | None = None) -> None:
        """Record an attempt; `slope` has the derivatives at its start, if known."""
        self.attempts.append(attempt)
        if self.observe is not None and slope is not None and attempt.accepted:
            with torch.no_grad():
                for name, value in self.observe(slope).items():
                    self.observed.setdefault(name, []).append((attempt.t, value))


@dataclass(frozen=True)
class StepLimits:
    """Bounds of an adaptive solve."""

    max_steps: int  # attempts
    min_step: float  # a step of this size is accepted whatever its error
    max_step: float
    first_step: float  # bound of the first step


def adaptive_steps(
    method: RungeKutta,
    function: RightHandSide,
    state: State,
    start: float,
    end: float,
    norm: ErrorNorm,
    limits: StepLimits,
    log: StepLog,
) -> Iterator[Step]:
    """The accepted steps from `start` to `end`.

    Let r be the error over tolerance of an attempt, as `ErrorNorm` measures it, and p the order of the method. The next
    attempt has 0.9 r^(−1/p) times the size of this one, within [0.2, 10] times. It is not shorter after an accepted
    attempt, nor longer after a rejected one. When at most four steps would reach the end, they share the rest equally,
    because shorter steps are rejected less often. A single last step may use up the margin of 0.9.

    Where the function jumps, a step ends and the next one starts with a new slope. It is not shorter than the last one
    would have been without the jump.
    [Hairer, Nørsett & Wanner 1993, II.4]
    """
    t, sign = start, math.copysign(1.0, end - start)
    goals = iter([*([] if function.jumps is None else function.jumps.between(start, end)), end])
    goal = next(goals)
    max_step, min_step = limits.max_step, limits.min_step
    finest = 16 * torch.finfo(state[0].dtype).eps * max(abs(start), abs(end))  # shorter: stages have equal times
    if max_step < finest:
        raise InvalidValueError(
            f"max_step must be at least {finest:.2g}, what {state[0].dtype} resolves, got {max_step:g}"
        )
    first = function.between(t, goal)
    slope: State | None = first(t, state)
    size, bad = _initial_size(method, first, state, slope, start, end, norm)
    if bad:
        raise errors.not_finite(log.direction, t, sign * size, log.names, state, slope)
    size = min(max(min(size, limits.first_step), min_step, finest), max_step)
    last: Attempt | None = None
    begin = state
    for _ in range(limits.max_steps):
        remaining, proposed = abs(goal - t), size
        # A last step above min_step needs the margin, or it might be rejected again and again. Rounding of times must
        # not leave a step of its own.
        margin = 1 - TIME_ROUNDING / 2 if size <= min_step else SAFETY
        if size >= margin * remaining and max_step * (1 + TIME_ROUNDING) >= remaining:
            target = goal
        else:
            if size * SHARED_STEPS > remaining:
                size = max(remaining / max(2, math.ceil(remaining / size - TIME_ROUNDING)), min_step, finest)
            target = t + sign * size
        size = abs(target - t)
        if size < min(finest, remaining):
            if last is not None and last.error is not None and math.isnan(last.error):
                raise errors.not_finite(log.direction, t, sign * size, log.names, state, slope, last)
            growth = errors.explosion(begin, state, last)
            raise errors.underflow(log.direction, norm.rtol, norm.atol, t, sign * size, last, growth)
        log.start()
        moving = function.in_step(t, target)
        slope = moving(t, state) if slope is None else moving.stop(slope)
        step = take_step(method, moving, t, target, state, slope)
        measured = step.measured
        if measured is None:
            measured = norm.measure(error_estimate(method, step), state, step.end, function.moving_share(t))
        ratio, component, sample = norm.worst_of(measured)
        shortest = size <= min_step * (1 + TIME_ROUNDING)
        accepted = ratio <= 1 or (shortest and math.isfinite(ratio))
        last = Attempt(t, target - t, accepted, ratio, component, sample)
        log.record(last, slope)
        if shortest and not accepted:
            raise errors.not_finite(log.direction, t, sign * size, log.names, state, slope, last)
        if accepted:
            assert step.next_slope is not None
            yield step
            t, state, slope = target, step.end, step.next_slope
        size = size * _growth(ratio, method.order)
        if accepted and target == goal:
            if goal == end:
                return
            goal, slope, size = next(goals), None, max(size, proposed)
        size = min(max(size, min_step), max_step)
    growth = errors.explosion(begin, state, last)
    raise errors.step_limit(log.direction, limits.max_steps, t, sign * size, last, max_step, growth)


def fixed_steps(
    method: RungeKutta,
    function: RightHandSide,
    state: State,
    times: Sequence[float],
    step_size: float,
    log: StepLog,
    with_next_slope: bool = False,
) -> Iterator[Step]:
    """Equal steps of at most `step_size` from each of `times` to the next.

    Args:
        with_next_slope: whether each step has the slope at its end, for interpolation. It costs one evaluation in all,
            because that slope is also the first one of the next step.
    """
    slope = None
    stops = times if function.jumps is None else function.jumps.through(times)
    for t0, t1 in itertools.pairwise(grid(stops, step_size)):
        log.start()
        moving = function.in_step(t0, t1)
        known = None if slope is None or function.restarts(t0) else moving.stop(slope)
        step = take_step(method, moving, t0, t1, state, known, with_next_slope)
        log.record(Attempt(t0, t1 - t0), step.slopes[0])
        yield step
        state, slope = step.end, step.next_slope


def grid(times: Sequence[float], step_size: float) -> list[float]:
    """The times themselves, with equal steps of at most `step_size` between them.

    Raises:
        InvalidValueError: these are more than a million steps.
    """
    check_step_size(step_size, times)
    points = [times[0]]
    for start, end in itertools.pairwise(times):
        steps = max(1, math.ceil(abs(end - start) / step_size - 1e-3))  # tolerates rounding of the times
        points += [start + (end - start) * i / steps for i in range(1, steps)] + [end]
    return points


def check_step_size(step_size: float, times: Sequence[float]) -> None:
    """Raise `InvalidValueError` if steps of this size between `times` are more than a million."""
    total = sum(abs(end - start) / step_size for start, end in itertools.pairwise(times))
    if total > MAX_FIXED_STEPS:
        raise InvalidValueError(
            f"step_size = {step_size:g} takes {total:.2g} steps from {times[0]:g} to {times[-1]:g}, and the most are "
            f"{MAX_FIXED_STEPS:,}; set a larger step_size"
        )


def _growth(ratio: float, order: int) -> float:
    """The next step size over this one, given the error over tolerance."""
    if not ratio < math.inf:
        return LEAST_GROWTH
    if ratio == 0:
        return MOST_GROWTH
    return min(MOST_GROWTH, max(SAFETY * ratio ** (-1 / order), LEAST_GROWTH if ratio > 1 else 1.0))


@torch.no_grad()
def _initial_size(
    method: RungeKutta, function: RightHandSide, state: State, slope: State, start: float, end: float, norm: ErrorNorm
) -> tuple[float, bool]:
    """A first step size that should meet the tolerance, and whether anything was NaN or infinite.

    Takes one evaluation, which shows how fast the slope changes; see `_first_step`.
    """
    span = abs(end - start)
    sizes, speeds = (norm(values, state, state)[0] for values in (state, slope))
    largest, fastest = (max(values, key=_nan_as_largest) for values in (sizes, speeds))
    if not math.isfinite(largest) or not math.isfinite(fastest):  # bad values, or their squares overflow
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
    """The first step size that one component allows.

    Its slope has the norm s (over tolerance) and changes at the rate b. If it changed exponentially, with the time
    τ = s / b, the error estimate of a method of order p would be C s τ (h / τ)^p. Take 0.4 of the h at which this meets
    the tolerance, and at most 0.4 τ, because most equations are less simple. But take at least the classical choice,
    h^p max(s, b) = 0.01. That alone ignores τ and is far too short for a component that starts at zero, such as a
    log-density, because its s is large. A component whose slope is constant sets no bound.
    [Hairer, Nørsett & Wanner 1993, II.4]
    """
    if bend == 0:
        return math.inf
    classical = (0.01 / max(speed, bend)) ** (1 / method.order)
    time = speed / bend
    error = method.error_constant * speed * time  # at h = τ
    return max(classical, 0.4 * time * max(error, 1.0) ** (-1 / method.order))


def _nan_as_largest(value: float) -> float:
    return math.inf if math.isnan(value) else value
