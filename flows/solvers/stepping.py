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
from flows.solvers.problem import RightHandSide, State
from flows.solvers.runge_kutta import Step, error_estimate, take_step
from flows.solvers.statistics import Attempt
from flows.solvers.step_size import SAFETY, Growth, initial_size
from flows.solvers.tableaux import RungeKutta

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
    controller: str,
) -> Iterator[Step]:
    """The accepted steps from `start` to `end`.

    `Growth` sets the size of the next attempt from the errors of the last ones. When at most four steps would reach the
    end, they share the rest equally, because shorter steps are rejected less often. A single last step may use up the
    margin of 0.9.

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
    size, bad = initial_size(method, first, state, slope, start, end, norm)
    if bad:
        raise errors.not_finite(log.direction, t, sign * size, log.names, state, slope)
    size = min(max(min(size, limits.first_step), min_step, finest), max_step)
    last: Attempt | None = None
    begin, growth = state, Growth(controller, method.order)
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
            cause = errors.explosion(begin, state, last)
            raise errors.underflow(log.direction, norm.rtol, norm.atol, t, sign * size, last, cause)
        log.start()
        moving = function.in_step(t, target)
        slope = moving(t, state) if slope is None else moving.stop(slope)
        step = take_step(method, moving, t, target, state, slope)
        measured = step.measured
        if measured is None:
            measured = norm.measure(error_estimate(method, step), state, step.end, function.moving_share(t))
        ratio, component, sample = norm.worst_of(measured, function.moving_share(t))
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
        size = size * growth(ratio)
        if accepted and target == goal:
            if goal == end:
                return
            goal, slope, size = next(goals), None, max(size, proposed)
        size = min(max(size, min_step), max_step)
    cause = errors.explosion(begin, state, last)
    raise errors.step_limit(log.direction, limits.max_steps, t, sign * size, last, max_step, cause)


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


def through(stops: Sequence[float] | None, times: Sequence[float]) -> Sequence[float]:
    """Monotonic times, with those of `stops` that lie between them."""
    if stops is None:
        return times
    inside = {t for t in stops if min(times[0], times[-1]) < t < max(times[0], times[-1])}
    return sorted(inside | set(times), reverse=times[-1] < times[0])


def check_step_size(step_size: float, times: Sequence[float]) -> None:
    """Raise `InvalidValueError` if steps of this size between `times` are more than a million."""
    total = sum(abs(end - start) / step_size for start, end in itertools.pairwise(times))
    if total > MAX_FIXED_STEPS:
        raise InvalidValueError(
            f"step_size = {step_size:g} takes {total:.2g} steps from {times[0]:g} to {times[-1]:g}, and the most are "
            f"{MAX_FIXED_STEPS:,}; set a larger step_size"
        )
