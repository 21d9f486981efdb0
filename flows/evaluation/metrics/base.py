"""The contract of metrics that look at draws of a model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flows.errors import InvalidTypeError, InvalidValueError
from flows.naming import by_name, in_words


@dataclass(frozen=True)
class Measurement:
    """A figure with its standard error.

    Example:
        ```python
        import torch

        from flows.evaluation.metrics import Wasserstein2

        distance = Wasserstein2()(torch.randn(200, 2), torch.randn(200, 2))
        distance.value, distance.standard_error
        ```
    """

    value: float
    standard_error: float  # NaN where it is unknown

    def __str__(self) -> str:
        error = "" if math.isnan(self.standard_error) else f" ± {self.standard_error:.2g}"
        return f"{self.value:.4f}{error}"


class SampleMetric(ABC):
    """A figure from draws of a model and data.

    To add one, subclass `TwoSampleMetric` or `PredictiveMetric`, and import it in `flows/evaluation/metrics`;
    `evaluation.metrics=[name]` then takes it by the lower-case name of its class.

    Example:
        ```python
        import flows
        from flows.evaluation.metrics import Wasserstein2

        metric: flows.evaluation.SampleMetric = Wasserstein2(max_points=500)
        ```
    """

    @property
    def name(self) -> str:
        """Its name among the figures of a run."""
        return in_words(type(self).__name__)

    @abstractmethod
    def __call__(self, draws: Tensor, data: Tensor) -> Measurement:
        """Measure."""

    def points(self, given: Tensor, what: str) -> Tensor:
        """Return points (n, *event) as rows (n, k) in float64 on the CPU.

        Raises:
            InvalidValueError: there are fewer than two, or a value is not finite.
        """
        if len(given) < 2 or given.numel() == 0:
            raise InvalidValueError(f"{self.name} needs at least two {what}, got shape {tuple(given.shape)}")
        rows = given.detach().reshape(len(given), -1).to("cpu", torch.float64)
        bad = (~rows.isfinite()).any(1).nonzero()
        if len(bad):
            raise InvalidValueError(
                f"{self.name}: {len(bad)} of {len(rows)} {what} hold NaN or infinite values, the first at index "
                f"{bad[0].item()}"
            )
        return rows

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"

    def __eq__(self, other: Any) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), *map(repr, vars(self).items())))


def chosen_metrics(given: Sequence[SampleMetric | str]) -> tuple[SampleMetric, ...]:
    """Return the metrics; names become metrics with their defaults.

    Raises:
        InvalidTypeError, InvalidValueError: there is none of that name, or one comes twice.

    Example:
        ```python
        from flows.evaluation.metrics import chosen_metrics

        chosen_metrics(["mmd", "crps"])
        ```
    """
    if isinstance(given, str):
        raise InvalidTypeError(f"metrics must be a list, such as [{given}], got the text {given!r}")
    found = tuple(by_name(SampleMetric, one, "metrics") for one in given)
    names = [one.name for one in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InvalidValueError(f"metrics must have each metric once, got {twice[0]} {names.count(twice[0])} times")
    return found
