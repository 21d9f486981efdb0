"""Figures that compare a model with data: bits per dimension, AUROC."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flows.errors import InvalidValueError


@dataclass(frozen=True)
class BitsPerDim:
    """−log₂ P(x)/d for discrete data of d dimensions, as the sum of its parts.

    log P(x) ≥ log p_flow(y) + log|det ∂y/∂x| − log q(u | x) has one term for each step from levels to flow space. Each
    part is a term times −1/(d log 2). `model` is the density of the flow, `logit` and `scaling` are
    log-determinants, and `dequantisation` is that of the noise. `importance_weighting` is what several draws of the
    noise gain over one, so it is never positive. Levels count from 0 in steps of 1: a uniform guess costs log₂ L bits.

    Args:
        parts: in bits per dimension, by name.
        standard_error: of their sum; NaN where it is unknown.

    Example:
        ```python
        import flows
        from flows.evaluation import likelihood
        from flows.transforms import Compose, Dequantise, UnitInterval

        data = flows.datasets.Digits()
        transform = Compose(dequantise=Dequantise(17), scale=UnitInterval(17))
        flow = flows.CNF(flows.fields.MLP((1, 8, 8), hidden=(8,)), transform=transform)
        likelihood(flow, data.test_batches(200)).bits_per_dim.parts
        ```
    """

    parts: Mapping[str, float]
    standard_error: float = math.nan

    @property
    def value(self) -> float:
        """The sum of the parts."""
        return math.fsum(self.parts.values())

    @classmethod
    def from_log_prob(
        cls,
        terms: Mapping[str, float],  # nats; they add up to log P(x)
        event_shape: Sequence[int],
        standard_error: float = math.nan,  # nats
    ) -> BitsPerDim:
        """Convert log-probabilities in nats."""
        unit = math.prod(event_shape) * math.log(2)
        return cls({name: 0.0 - value / unit for name, value in terms.items()}, standard_error / unit)

    def __str__(self) -> str:
        error = "" if math.isnan(self.standard_error) else f" ± {self.standard_error:.4f}"
        parts = " ".join(f"{value:+.4f} {name.replace('_', ' ')}" for name, value in self.parts.items())
        return f"{self.value:.4f}{error} = {parts}"


@dataclass(frozen=True)
class AUROC:
    """The probability that an outlier scores higher than a point of the data; ties count half.

    Example:
        ```python
        import flows
        from flows.evaluation import likelihood, outlier_scores

        data, outliers = flows.datasets.Moons(num_test=100), flows.datasets.Circles(num_test=100)
        flow = flows.CNF(flows.fields.MLP((2,), hidden=(8,)))
        known = likelihood(flow, data.test_batches(100))
        scores = outlier_scores(flow, data, known, "test", outliers, batch_size=100)
        scores.likelihood, scores.typicality
        ```
    """

    value: float  # 1: told apart without a mistake, 0.5: not at all
    standard_error: float

    @classmethod
    def of(
        cls,
        outliers: Tensor,  # (m,), scores
        data: Tensor,  # (n,)
    ) -> AUROC:
        """Compute the Mann-Whitney statistic and its standard error.

        The standard error is that of DeLong et al. 1988 (Biometrics 44, 837).
        """
        from scipy.stats import rankdata  # slow to import

        m, n = len(outliers), len(data)
        if min(m, n) < 2:
            raise InvalidValueError(f"an AUROC needs two outliers and two points of the data, got {m} and {n}")
        if unknown := int(outliers.isnan().sum() + data.isnan().sum()):
            raise InvalidValueError(f"scores must be numbers or infinite, and {unknown} of {m + n} are NaN")
        ranks = torch.from_numpy(rankdata(torch.cat([outliers, data]).numpy()))
        own = [torch.from_numpy(rankdata(part.numpy())) for part in (outliers, data)]
        above = (ranks[:m] - own[0]) / n  # the share of the data below each outlier
        below = 1 - (ranks[m:] - own[1]) / m  # the share of outliers above each point of the data
        return cls(float(above.mean()), math.sqrt(float(above.var() / m + below.var() / n)))

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.standard_error:.4f}"
