"""What a solve returns, and what it has to tell about itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from flows.solvers.problem import State


class Attempt(NamedTuple):
    """A step that was tried, from t to t + dt."""

    t: float
    dt: float  # negative where time runs backwards
    accepted: bool = True
    error: float | None = None  # over tolerance, of the component that has most; None in a fixed-step method
    component: str | None = None  # the one that limits the step
    sample: int | None = None  # where in the batch that component has its largest error


def shortest(attempts: Sequence[Attempt]) -> Attempt | None:
    """The shortest accepted one but for the last, which ends where the solve ends; ``None`` where there is none."""
    steps = [attempt for attempt in attempts if attempt.accepted]
    return min(steps[:-1] or steps, key=lambda attempt: abs(attempt.dt), default=None)


@dataclass
class SolverStatistics:
    """What a solve has cost so far, and where. The backward part grows while gradients are computed."""

    components: tuple[str, ...] = ()  # names, in the order of the state
    nfe_forward: int = 0  # evaluations of the dynamics
    nfe_backward: int = 0  # by the adjoint solve, or to solve the segments between checkpoints again
    attempts: list[Attempt] = field(default_factory=list)  # forward
    backward_attempts: list[Attempt] = field(default_factory=list)  # of the adjoint solve
    observed: dict[str, list[tuple[float, Tensor]]] = field(default_factory=dict)  # (t, 0-d) at accepted steps

    def count_forward(self) -> None:
        """One more evaluation in the forward solve."""
        self.nfe_forward += 1

    def count_backward(self) -> None:
        """One more for the gradient."""
        self.nfe_backward += 1

    @property
    def accepted(self) -> int:
        """Steps forward; a fixed-step method accepts all."""
        return sum(attempt.accepted for attempt in self.attempts)

    @property
    def rejected(self) -> int:
        """Steps forward that were tried again, shorter."""
        return len(self.attempts) - self.accepted

    @property
    def forced(self) -> int:
        """Steps of the length ``min_step`` that were accepted with an error above the tolerance."""
        return sum(attempt.accepted and (attempt.error or 0.0) > 1 for attempt in self.attempts)

    @property
    def shortest(self) -> Attempt | None:
        """The shortest accepted step forward but for the last one, which ends where the solve ends."""
        return shortest(self.attempts)

    @property
    def limited_by(self) -> Mapping[str, float]:
        """For each component, the share of the forward attempts whose size it limited; none with fixed steps."""
        counts = Counter(attempt.component for attempt in self.attempts if attempt.component is not None)
        total = counts.total()
        return {name: counts[name] / total for name in self.components} if total else {}

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Times and values of what the dynamics ``observe``, such as "divergence_standard_error"."""
        points = self.observed.get(name, [])
        return [t for t, _ in points], [float(value) for _, value in points]


@dataclass(frozen=True)
class Solution:
    """The states at the requested times, and what it took to reach them."""

    times: Tensor  # (T,)
    states: State  # each component (T, *component)
    statistics: SolverStatistics

    @property
    def end(self) -> State:
        """The state at the last time."""
        return tuple(component[-1] for component in self.states)
