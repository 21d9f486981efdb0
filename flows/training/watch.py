"""An early word when solves get expensive."""

from __future__ import annotations

import statistics as stats
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

from flows.solvers import Attempt, SolverStatistics

WINDOW = 20  # solves whose median is typical
EARLY = 5  # solves whose median stands for it before there are so many
FACTOR = 3.0  # times the typical number of evaluations is an explosion; told again at each doubling
LEAST = 100  # evaluations; fewer are no trouble


class EvaluationWatch:
    """Notices when a training solve takes many times the evaluations that solves have taken so far.

    The yardstick is the lowest median of 20 solves in a row, so that a slow rise is noticed as well as a jump; before
    there are 20, from the fifth on, the median of those. It holds for all stages of a run. What is told names the time
    and the sample that the shortest steps are due to.
    """

    def __init__(self) -> None:
        self._recent: deque[int] = deque(maxlen=WINDOW)
        self._typical: float | None = None
        self._threshold = FACTOR

    def __call__(self, statistics: SolverStatistics | None) -> str | None:
        """A warning about this solve, if there is reason for one."""
        if statistics is None:
            return None
        nfe, typical = statistics.nfe_forward, self._typical
        if typical is None and len(self._recent) >= EARLY:
            typical = stats.median(self._recent)
        self._recent.append(nfe)
        if len(self._recent) == WINDOW:
            median = stats.median(self._recent)
            self._typical = median if self._typical is None else min(self._typical, median)
        if typical is None or nfe < max(LEAST, self._threshold * typical):
            return None
        while nfe >= self._threshold * typical:
            self._threshold *= 2
        return (
            f"the solve took {nfe} evaluations, {nfe / typical:.1f} times the usual {typical:.0f}: the field gets "
            f"stiff{_culprit(statistics)}. Try a regulariser, a lower learning rate, or larger rtol and atol"
        )

    def state_dict(self) -> dict[str, Any]:
        """What it has seen."""
        return {"recent": list(self._recent), "typical": self._typical, "threshold": self._threshold}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the watch that had this state."""
        self._recent = deque(state["recent"], maxlen=WINDOW)
        self._typical, self._threshold = state["typical"], state["threshold"]


def _culprit(statistics: SolverStatistics) -> str:
    """Where the steps are shortest, and the component and sample that are to blame most often there."""
    shortest = statistics.shortest
    if shortest is None or shortest.component is None:
        return ""
    size = abs(shortest.dt)
    short = [attempt for attempt in statistics.attempts if abs(attempt.dt) <= 2 * size]
    (component, sample), _ = Counter(_blamed(attempt) for attempt in short).most_common(1)[0]
    return (
        f" around t = {shortest.t:.3g}, where the shortest step is {size:.1e} and the {component.replace('_', '-')} of "
        f"sample {sample} of the batch has the largest error"
    )


def _blamed(attempt: Attempt) -> tuple[str, int]:
    return attempt.component, attempt.sample
