"""zuko's neural spline flow, to stand beside."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flows.datasets import Batch
from flows.objectives import LossOutput
from flows.transforms import Transform


class SplineFlow(nn.Module):
    """A neural spline flow on standardised data. [Durkan et al. 2019, arXiv:1906.04032]

    Args:
        transform: fitted; data space to flow space.
        dimension: of a point.
        transforms, bins, hidden: of ``zuko.flows.NSF``.

    Raises:
        ImportError: zuko is not installed.
    """

    def __init__(
        self,
        transform: Transform,
        dimension: int,
        transforms: int = 4,
        bins: int = 16,
        hidden: tuple[int, ...] = (128, 128),
    ) -> None:
        super().__init__()
        try:
            from zuko.flows import NSF
        except ImportError as error:
            raise ImportError("this benchmark needs zuko: pip install 'flows[bench]'") from error
        self.transform = transform
        self.flow = NSF(dimension, transforms=transforms, bins=bins, hidden_features=hidden)

    def log_prob(self, x: Tensor) -> Tensor:  # (B, d) to (B,), data space
        y, log_det = self.transform(x)
        return self.flow().log_prob(y) + log_det


def spline_nll(model: SplineFlow, batch: Batch, generator: torch.Generator | None = None) -> LossOutput:
    """−mean log p(x), as an objective."""
    return LossOutput(-model.log_prob(batch.x).mean())
