"""Metrics that compare each point of the data with an ensemble of draws for it: coverage, CRPS, energy score."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from flows.arguments import checked
from flows.checks import check_number, whole_number
from flows.errors import InvalidValueError
from flows.evaluation.metrics.base import Measurement, SampleMetric


class PredictiveMetric(SampleMetric):
    """Compares each point of the data with draws of its own, from the model given the point's context.

    Args:
        num_draws: of the ensemble of one point.
        max_points: of the data; the first are taken.

    Example:
        ```python
        from flows.evaluation.metrics import CRPS

        CRPS(num_draws=20)  # one of them: `evaluation.metrics=[crps]`
        ```
    """

    def __init__(self, num_draws: int = 100, max_points: int = 1_000) -> None:
        self.num_draws = whole_number("num_draws", num_draws, 2)
        self.max_points = whole_number("max_points", max_points, 2)

    @abstractmethod
    def scores(self, draws: Tensor, data: Tensor) -> Tensor:
        """Return the score (n,) of each point of data (n, k), given draws (S, n, k)."""

    @checked
    def __call__(
        self,
        draws: Tensor,  # (S, n, *event)
        data: Tensor,  # (n, *event)
    ) -> Measurement:
        """The mean score over the data, and its standard error.

        Raises:
            InvalidValueError: the shapes do not fit, there are fewer than two draws or points, or a value is not
                finite.
        """
        if draws.ndim != data.ndim + 1 or draws.shape[1:] != data.shape or len(draws) < 2:
            raise InvalidValueError(
                f"{self.name} needs two or more draws for each point, (S, n, *event) for data (n, *event), got "
                f"{tuple(draws.shape)} and {tuple(data.shape)}"
            )
        rows = self.points(data, "data")
        ensemble = self.points(draws.flatten(0, 1), "draws").view(len(draws), *rows.shape)
        scores = self.scores(ensemble, rows)
        return Measurement(float(scores.mean()), float(scores.std() / math.sqrt(len(scores))))


@checked
class Coverage(PredictiveMetric):
    """The share of the data inside central intervals of their draws; right if it equals `level`.

    An interval of the rank of a value among its S draws, whose edges are weighted, so that the expectation is exactly
    `level` for any S where draws and data have one distribution. It is the mean over the entries of a point.

    Args:
        level: share of the probability that an interval holds.
        num_draws, max_points: see `PredictiveMetric`.

    Example:
        ```python
        import flows
        from flows.evaluation import DensityEvaluator, Coverage

        data = flows.datasets.Diabetes(context_columns=["bmi"])
        evaluator = DensityEvaluator(data, metrics=[Coverage(num_draws=20)])
        ```
    """

    def __init__(self, level: float = 0.9, num_draws: int = 100, max_points: int = 1_000) -> None:
        super().__init__(num_draws, max_points)
        check_number("level", level, above=0, below=1)
        self.level = level

    def scores(self, draws: Tensor, data: Tensor) -> Tensor:
        size = len(draws) + 1
        below = ((draws < data).sum(0) + (draws <= data).sum(0)) / 2  # ties count half
        low, high = below / size, (below + 1) / size
        tail = (1 - self.level) / 2
        overlap = high.clamp(max=1 - tail) - low.clamp(min=tail)
        return (overlap.clamp(min=0) * size).mean(1)


@checked
class CRPS(PredictiveMetric):
    """The continuous ranked probability score, E|X − y| − ½ E|X − X′|, in data units; lower is better.

    The mean over the entries of a point. The second term leaves out equal draws, so the estimate is unbiased. For
    N(μ, σ²) and z = (y − μ)/σ it is σ [z (2Φ(z) − 1) + 2φ(z) − 1/√π]. [Gneiting & Raftery 2007, JASA 102, 359]

    Args:
        num_draws, max_points: see `PredictiveMetric`.

    Example:
        ```python
        import torch

        from flows.evaluation import CRPS

        print(CRPS()(torch.randn(100, 50, 1), torch.randn(50, 1)))  # about 1/√π = 0.56
        ```
    """

    def scores(self, draws: Tensor, data: Tensor) -> Tensor:
        size = len(draws)
        rank = torch.arange(1, size + 1, dtype=draws.dtype).view(-1, 1, 1)
        spread = ((2 * rank - size - 1) * draws.sort(0).values).sum(0) / (size * (size - 1))  # ½ E|X − X′|
        return ((draws - data).abs().mean(0) - spread).mean(1)


@checked
class EnergyScore(PredictiveMetric):
    """The energy score, E‖X − y‖ − ½ E‖X − X′‖, in data units; lower is better.

    It looks at all entries of a point together; for one entry it is the CRPS. The estimate is unbiased. Draws and data
    of N(0, I) in d dimensions have Γ((d + 1)/2)/Γ(d/2). [Gneiting & Raftery 2007, JASA 102, 359]

    Args:
        num_draws, max_points: see `PredictiveMetric`.

    Example:
        ```python
        import flows
        from flows.evaluation import DensityEvaluator, EnergyScore

        data = flows.datasets.Diabetes(context_columns=["bmi"])
        evaluator = DensityEvaluator(data, metrics=[EnergyScore(num_draws=20)])
        ```
    """

    def scores(self, draws: Tensor, data: Tensor) -> Tensor:
        size = len(draws)
        near = (draws - data).norm(dim=-1).mean(0)
        apart = torch.stack([torch.cdist(own, own).sum() for own in draws.unbind(1)])
        return near - apart / (2 * size * (size - 1))
