"""Colours, axes and ranges that all plots share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from torch import Tensor

DATA, FLOW, MUTED = "#3b5b92", "#e8684a", "#9aa3b2"  # colours of the data, of the flow, and of all else
DENSITY, TIME = "magma", "plasma"  # colour maps
MAX_QUANTILE_POINTS = 1_000_000  # torch.quantile refuses more than 2²⁴


def tidy(axes: Axes) -> None:
    """Mute the ticks and the frame."""
    axes.tick_params(labelsize=8, color=MUTED)
    for spine in axes.spines.values():
        spine.set_color(MUTED)


def quantiles(
    points: Tensor,  # (n, ...)
    levels: Sequence[float],
) -> Tensor:  # (len(levels), ...), float64
    """Return quantiles over the first axis.

    Of more than a million points, about a million evenly spaced ones are used.
    """
    step = -(-len(points) // MAX_QUANTILE_POINTS)
    return torch.quantile(points[::step].double(), torch.tensor(levels, dtype=torch.float64), dim=0)
