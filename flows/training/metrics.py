"""Averages of what the objective reports, gathered without waiting for the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

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
