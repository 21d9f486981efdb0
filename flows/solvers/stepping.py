"""From one time to another, step by step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flows.solvers import failure
from flows.solvers.control import ErrorNorm
from flows.solvers.problem import RightHandSide, State
from flows.solvers.rungekutta import RungeKutta, Step, error_estimate, interpolate, take_step
from flows.solvers.statistics import Attempt

SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0  # of the step size: below what the error allows, and within these factors


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
    log: Log,
) -> Iterator[Step]:
    """The accepted steps from ``start`` to ``end``, where the last one ends; each is tried from the size before.

    With r the error over tolerance of :class:`ErrorNorm`, the next size is 0.9 r^(-1/order) times the last, within
    [0.2, 10] times, and not above it after a rejection. [Hairer, Nørsett & Wanner 1993, II.4]
    """
    t, sign = start, math.copysign(1.0, end - start)
    finest = 16 * torch.finfo(state[0].dtype).eps * max(abs(start), abs(end))  # stage times would fall together
    slope = function(t, state)
    size, bad = _initial_size(method, function, state, slope, start, end, norm)
    if bad:
        raise failure.not_finite(log.direction, t, sign * size, log.names, state, slope)
    size = max(size, min_step)
    last: Attempt | None = None
    for _ in range(max_steps):
        remaining = abs(end - t)
        target = end if size >= remaining else t + sign * size
        size = abs(target - t)
        if size < min(finest, remaining):
            if last is not None and math.isnan(last.error):
                raise failure.not_finite(log.direction, t, sign * size, log.names, state, slope)
            raise failure.underflow(log.direction, norm.rtol, norm.atol, t, sign * size, last)
        log.start()
        step = take_step(method, function, t, target, state, slope)
        ratios, samples = norm(error_estimate(method, step), state, step.end)
        worst = max(range(len(ratios)), key=lambda i: math.inf if math.isnan(ratios[i]) else ratios[i])
        ratio = ratios[worst]
        shortest = size <= min_step * (1 + 1e-6)  # rounding of times
        accepted = ratio <= 1 or (shortest and math.isfinite(ratio))
        last = Attempt(t, target - t, accepted, ratio, log.names[worst], samples[worst])
        log.step(last, slope)
        if shortest and not accepted:
            raise failure.not_finite(log.direction, t, sign * size, log.names, state, slope)
        if last.accepted:
            yield step
            if target == end:
                return
            t, state, slope = target, step.end, step.next_slope
        size = max(size * _factor(ratio, method.order), min_step)
    raise failure.step_limit(log.direction, max_steps, t, sign * size, last)


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
    """A first step whose error is about a hundredth of the tolerance, and whether anything was not finite.

    One more evaluation. [Hairer, Nørsett & Wanner 1993, II.4]
    """
    span = abs(end - start)
    sizes, speeds = (max(norm(values, state, state)[0], key=_nan_is_most) for values in (state, slope))
    if not math.isfinite(sizes) or not math.isfinite(speeds):  # bad values, or an overflow of their squares
        return 1e-6 * span, not _all_finite(state, slope)
    first = min(1e-6 if min(sizes, speeds) < 1e-5 else 0.01 * sizes / speeds, span)
    ahead = start + math.copysign(first, end - start)
    moved = tuple(y + (ahead - start) * k for y, k in zip(state, slope, strict=True))
    difference = tuple(b - a for a, b in zip(slope, function(ahead, moved), strict=True))
    bend = max(norm(difference, state, state)[0], key=_nan_is_most) / first
    if not math.isfinite(bend):
        return first, False
    steepest = max(speeds, bend)
    second = max(1e-6, first * 1e-3) if steepest <= 1e-15 else (0.01 / steepest) ** (1 / method.order)
    return min(100 * first, second, span), False


def _all_finite(*states: State) -> bool:
    return all(bool(component.isfinite().all()) for state in states for component in state)


def _nan_is_most(value: float) -> float:
    return math.inf if math.isnan(value) else value
