"""What a solve returns: states, and statistics about its steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from flows.solvers.problem import State


class Attempt(NamedTuple):
    """One attempted step, from t to t + dt.

    Example:
        ```python
        import torch

        import flows

        flow = flows.CNF(flows.fields.MLP((2,)))
        with torch.no_grad():
            statistics = flow.estimate_log_prob(torch.randn(10, 2)).statistics
        [(step.t, step.dt, step.accepted) for step in statistics.attempts]
        ```
    """

    t: float
    dt: float  # negative where time runs backwards
    accepted: bool = True
    error: float | None = None  # the largest error over tolerance of a component; None in a fixed-step method
    component: str | None = None  # the component with the largest error, which limits the step
    sample: int | None = None  # the index in the batch where that component has its largest error


def shortest(attempts: Sequence[Attempt]) -> Attempt | None:
    """The shortest accepted step, or `None` if there is none.

    The last step does not count unless it is the only one, because its size follows from the end of the solve.
    """
    steps = [attempt for attempt in attempts if attempt.accepted]
    return min(steps[:-1] or steps, key=lambda attempt: abs(attempt.dt), default=None)


@dataclass
class SolverStatistics:
    """The cost and the steps of a solve. The backward figures grow while gradients are computed.

    Example:
        ```python
        import torch

        import flows

        flow = flows.CNF(flows.fields.MLP((2,)))
        with torch.no_grad():
            statistics = flow.estimate_log_prob(torch.randn(10, 2)).statistics
        statistics.nfe_forward, len(statistics.attempts)  # evaluations of the field, attempted steps
        ```
    """

    components: tuple[str, ...] = ()  # names, in the order of the state
    nfe_forward: int = 0  # evaluations of the dynamics
    nfe_backward: int = 0  # evaluations of the adjoint solve, or of the recomputation between checkpoints
    attempts: list[Attempt] = field(default_factory=list)  # forward
    backward_attempts: list[Attempt] = field(default_factory=list)  # of the adjoint solve
    observed: dict[str, list[tuple[float, Tensor]]] = field(default_factory=dict)  # (t, 0-d) at accepted steps

    def count_forward(self) -> None:
        """Count one evaluation in the forward solve."""
        self.nfe_forward += 1

    def count_backward(self) -> None:
        """Count one evaluation for the gradient."""
        self.nfe_backward += 1

    @property
    def accepted(self) -> int:
        """Accepted forward steps. A fixed-step method accepts all."""
        return sum(attempt.accepted for attempt in self.attempts)

    @property
    def rejected(self) -> int:
        """Rejected forward steps, each tried again with a shorter one."""
        return len(self.attempts) - self.accepted

    @property
    def forced(self) -> int:
        """Steps of size `min_step` that were accepted with an error above the tolerance."""
        return sum(attempt.accepted and (attempt.error or 0.0) > 1 for attempt in self.attempts)

    @property
    def shortest(self) -> Attempt | None:
        """The shortest accepted forward step, not counting the last."""
        return shortest(self.attempts)

    @property
    def limited_by(self) -> Mapping[str, float]:
        """For each component, the share of forward attempts that it limited. Empty for fixed steps."""
        counts = Counter(attempt.component for attempt in self.attempts if attempt.component is not None)
        total = counts.total()
        return {name: counts[name] / total for name in self.components} if total else {}

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Times and values of a quantity that the dynamics `observe`, such as "divergence_standard_error"."""
        points = self.observed.get(name, [])
        return [t for t, _ in points], [float(value) for _, value in points]


@dataclass(frozen=True)
class Solution:
    """The states at the requested times, with the statistics of the solve.

    Example:
        ```python
        import torch

        import flows

        solver = flows.ODESolver(rtol=1e-8, atol=1e-8)
        start = (torch.ones(1, 1, dtype=torch.float64),)
        solution = solver.solve(lambda t, state: (-state[0],), start, [0.0, 1.0, 2.0])
        solution.states[0]  # (3, 1, 1): 1, e⁻¹, e⁻²
        ```
    """

    times: Tensor  # (T,), or (B, T) with times of each sample's own
    states: State  # each component (T, *component)
    statistics: SolverStatistics

    @property
    def end(self) -> State:
        """The state at the last time."""
        return tuple(component[-1] for component in self.states)
