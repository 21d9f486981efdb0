"""An early word when solves get expensive."""

from __future__ import annotations

import statistics as stats
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

from flows.solvers import Attempt, SolverStatistics
from flows.solvers.statistics import shortest

WINDOW = 20  # solves whose median is typical
EARLY = 5  # solves whose median stands for it before there are so many
FACTOR = 3.0  # times the typical number of evaluations is an explosion; told again at each doubling
LEAST = 100  # evaluations; fewer are no trouble
MANY = 1000  # are trouble whatever is typical, where the error drives the steps; told again at each doubling


class EvaluationWatch:
    """Notices when a solve takes many times the evaluations that solves have taken so far, or very many.

    Those of the backward pass count. The yardstick is the lowest median of 20 solves in a row, so that a slow rise is
    noticed as well as a jump; before there are 20, from the ``early``-th on, the median of those. It holds for all
    stages of a run. What is told names the time and the sample that the shortest steps are due to.
    """

    def __init__(self, early: int = EARLY) -> None:
        self.early = early
        self._recent: deque[int] = deque(maxlen=WINDOW)
        self._typical: float | None = None
        self._threshold = FACTOR
        self._many = MANY

    def __call__(self, statistics: SolverStatistics | None) -> str | None:
        """A warning about this solve, if there is reason for one."""
        if statistics is None:
            return None
        nfe, typical = statistics.nfe_forward + statistics.nfe_backward, self._typical
        if typical is None and len(self._recent) >= self.early:
            typical = stats.median(self._recent)
        self._recent.append(nfe)
        if len(self._recent) == WINDOW:
            median = stats.median(self._recent)
            self._typical = median if self._typical is None else min(self._typical, median)
        exploded = typical is not None and nfe >= max(LEAST, self._threshold * typical)
        if not exploded and nfe < self._many:
            return None
        culprit = _culprit(statistics)
        if not exploded and not culprit:  # the user's many steps, of fixed size
            return None
        while exploded and nfe >= self._threshold * typical:
            self._threshold *= 2
        while nfe >= self._many:
            self._many *= 2
        backward = f" ({statistics.nfe_backward} of them backward)" if statistics.nfe_backward else ""
        usual = f", {nfe / typical:.1f} times the usual {typical:.0f}: the field gets" if exploded else ": the field is"
        return (
            f"the solve took {nfe} evaluations{backward}{usual} stiff{culprit}. Try a regulariser, a lower learning "
            "rate, or larger rtol and atol"
        )

    def state_dict(self) -> dict[str, Any]:
        """What it has seen."""
        return {
            "recent": list(self._recent),
            "typical": self._typical,
            "threshold": self._threshold,
            "many": self._many,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the watch that had this state."""
        self._recent = deque(state["recent"], maxlen=WINDOW)
        self._typical, self._threshold = state["typical"], state["threshold"]
        self._many = state.get("many", MANY)  # checkpoints used to be without


def _culprit(statistics: SolverStatistics) -> str:
    """Where the steps are shortest, and the component and sample that are to blame most often there."""
    backward = statistics.nfe_backward > statistics.nfe_forward and statistics.backward_attempts
    attempts: Sequence[Attempt] = statistics.backward_attempts if backward else statistics.attempts
    least = shortest(attempts)
    if least is None or least.component is None:
        return ""
    size = abs(least.dt)
    short = [attempt for attempt in attempts if abs(attempt.dt) <= 2 * size]
    (component, sample), _ = Counter(_blamed(attempt) for attempt in short).most_common(1)[0]
    return (
        f" around t = {least.t:.3g}, where the shortest step is {size:.1e} and the {component.replace('_', '-')} of "
        f"sample {sample} of the batch has the largest error"
    )


def _blamed(attempt: Attempt) -> tuple[str, int]:
    return attempt.component, attempt.sample
