"""What part of an axis the points of a picture take up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MOST = 1_000_000  # points looked at; torch.quantile refuses more than 2^24


def quantiles(
    points: Tensor,  # (n, ...)
    levels: Sequence[float],
) -> Tensor:  # (len(levels), ...), float64
    """Quantiles over the first axis; of many points, those of about a million evenly spaced ones."""
    step = -(-len(points) // MOST)
    return torch.quantile(points[::step].double(), torch.tensor(levels, dtype=torch.float64), dim=0)
