"""Colours, axes and ranges that all plots share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from torch import Tensor

from flows.checks import check_points
from flows.datasets import Dataset
from flows.errors import InvalidValueError
from flows.models.cnf import CNF

DATA, FLOW, MUTED = "#3b5b92", "#e8684a", "#9aa3b2"  # colours of the data, of the flow, and of all else
DENSITY, TIME = "magma", "plasma"  # colour maps
MAX_QUANTILE_POINTS = 1_000_000  # torch.quantile refuses more than 2²⁴


def points_to_plot(name: str, points: Tensor, *shape: int | None) -> Tensor:
    """Return the points without a graph, on the CPU.

    Args:
        shape: of one point; None stands for any size.

    Raises:
        InvalidValueError: there is no point, one is NaN or infinite, or their shape is another.
    """
    if points.ndim != len(shape) + 1 or any(b not in (None, a) for a, b in zip(points.shape[1:], shape, strict=True)):
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise InvalidValueError(f"{name} must hold points of shape (n, {expected}), got {tuple(points.shape)}")
    points = points.detach() if points.is_floating_point() else points.detach().double()
    check_points(name, points, at_least=1)
    bad = int((~points.isfinite()).flatten(1).any(1).sum())
    if bad:
        raise InvalidValueError(f"{bad} of {len(points)} points of {name} hold NaN or infinite values; leave them out")
    return points.cpu()


def check_names(names: Sequence[str] | None, size: int) -> None:
    """Require a name for each feature, if there are names."""
    if names is not None and len(names) < size:
        raise InvalidValueError(f"names must name each of the {size} features, got {list(names)}")


def check_in_the_plane(flow: CNF, what: str) -> None:
    """Require a flow of points in the plane."""
    if flow.event_shape != (2,):
        raise InvalidValueError(f"{what} is for flows in the plane, event_shape (2,), got {flow.event_shape}")


def check_classes(dataset: Dataset, what: str) -> None:
    """Require data with classes."""
    if dataset.num_classes is None:
        raise InvalidValueError(f"{what} needs data with classes, and {dataset.name!r} has none")


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
