"""Numbers to log: averages of what the objective reports, and what a solve has to tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flows.solvers import SolverStatistics

Metric = float | Tensor


class MetricMeans:
    """Sums the metrics of each step where they are and reads them only when they are logged.

    Reading a tensor on a GPU makes the program wait for it, so :meth:`add` never does.
    """

    def __init__(self) -> None:
        self._sums: dict[str, float | Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: Mapping[str, Metric]) -> None:
        """Add the values of one step."""
        for name, value in metrics.items():
            value = value.detach() if isinstance(value, Tensor) else float(value)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def pop(self) -> dict[str, float]:
        """The means since the last call; the sums start again."""
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums = dict(state["sums"])
        self._counts = dict(state["counts"])


def step_metrics(statistics: SolverStatistics) -> dict[str, float]:
    """What the steps of a solve have to tell; nothing where a method keeps them to itself."""
    if not statistics.attempts:
        return {}
    metrics = {"steps_accepted": statistics.accepted, "steps_rejected": statistics.rejected}
    if statistics.limited_by:  # an adaptive method
        metrics |= {f"limited_by_{name}": share for name, share in statistics.limited_by.items()}
        metrics |= {"shortest_step": abs(statistics.shortest.dt), "steps_forced": statistics.forced}
    return metrics
