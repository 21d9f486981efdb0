"""Warns early when solves get expensive."""

from __future__ import annotations

import statistics as stats
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flows.evaluation import Evaluation
from flows.solvers import Attempt, SolverStatistics
from flows.solvers.statistics import shortest
from flows.training.state import Run

if TYPE_CHECKING:
    pass

WINDOW = 20  # solves whose median is typical
FIRST_MEDIAN = 5  # solves whose median stands for it at the beginning
EXPLOSION = 3.0  # times the typical number of evaluations; repeated when it doubles
NEVER_WARN_BELOW = 100  # evaluations
ALWAYS_WARN_ABOVE = 1000  # evaluations, where the error drives the steps; repeated when they double


class EvaluationWatch:
    """Notices a solve that takes many times the usual evaluations, or very many.

    Those of the backward pass count. Usual is the lowest median of 20 solves in a row, so a slow rise is noticed, too;
    before there are 20, from the `early`-th on, the median of those. The warning names the time and the
    sample of the shortest steps.
    """

    def __init__(self, early: int = FIRST_MEDIAN) -> None:
        self.early = early
        self._recent: deque[int] = deque(maxlen=WINDOW)
        self._typical: float | None = None
        self._threshold = EXPLOSION
        self._many = ALWAYS_WARN_ABOVE

    def __call__(self, statistics: SolverStatistics | None) -> str | None:
        """Return a warning about this solve, if there is reason for one."""
        if statistics is None:
            return None
        nfe, typical = statistics.nfe_forward + statistics.nfe_backward, self._typical
        if typical is None and len(self._recent) >= self.early:
            typical = stats.median(self._recent)
        self._recent.append(nfe)
        if len(self._recent) == WINDOW:
            median = stats.median(self._recent)
            self._typical = median if self._typical is None else min(self._typical, median)
        exploded = typical is not None and nfe >= max(NEVER_WARN_BELOW, self._threshold * typical)
        if not exploded and nfe < self._many:
            return None
        culprit = _culprit(statistics)
        if not exploded and not culprit:  # the user's many steps, of fixed size
            return None
        usual = ": the field is"
        if exploded and typical is not None:
            usual = f", {nfe / typical:.1f} times the usual {typical:.0f}: the field gets"
            while nfe >= self._threshold * typical:
                self._threshold *= 2
        while nfe >= self._many:
            self._many *= 2
        backward = f" ({statistics.nfe_backward} of them backward)" if statistics.nfe_backward else ""
        return (
            f"the solve took {nfe} evaluations{backward}{usual} stiff{culprit}. Try a regulariser, a lower learning "
            "rate, or larger rtol and atol"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what it has seen."""
        return {
            "recent": list(self._recent),
            "typical": self._typical,
            "threshold": self._threshold,
            "many": self._many,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the watch that had this state."""
        self._recent = deque(state["recent"], maxlen=WINDOW)
        self._typical, self._threshold, self._many = state["typical"], state["threshold"], state["many"]


class EvaluationWarning:
    """Warns early when solves get expensive, in training and in validation."""

    def __init__(self) -> None:
        self._training = EvaluationWatch()
        self._validation = EvaluationWatch(early=1)

    def on_optimizer_step(self, run: Run) -> None:
        for solve in run.solves:
            if warning := self._training(solve):
                run.warn(warning)
                run.call("on_expensive_solve", solve)

    def on_validation_end(self, run: Run, evaluation: Evaluation | None, is_best: bool) -> None:
        if not run.position.step:  # a flow at rest takes fewer evaluations than is usual
            return
        if evaluation is not None and (warning := self._validation(evaluation.statistics)):
            run.warn(f"in validation, {warning}")

    def state_dict(self) -> dict[str, Any]:
        """Return what it has seen."""
        return {"training": self._training.state_dict(), "validation": self._validation.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the one that had this state."""
        self._training.load_state_dict(state["training"])
        self._validation.load_state_dict(state["validation"])


def _culprit(statistics: SolverStatistics) -> str:
    """Name where the steps are shortest, and the component and sample that cause most of them."""
    backward = statistics.nfe_backward > statistics.nfe_forward and statistics.backward_attempts
    attempts: Sequence[Attempt] = statistics.backward_attempts if backward else statistics.attempts
    least = shortest(attempts)
    if least is None or least.component is None:
        return ""
    size = abs(least.dt)
    short = [attempt for attempt in attempts if abs(attempt.dt) <= 2 * size]
    (component, sample), _ = Counter((attempt.component, attempt.sample) for attempt in short).most_common(1)[0]
    return (
        f" around t = {least.t:.3g}, where the shortest step is {size:.1e} and the "
        f"{str(component).replace('_', '-')} of sample {sample} of the batch has the largest error"
    )
