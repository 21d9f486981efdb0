"""Flows whose contexts are classes, in the plane: one column a class."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from flows.datasets import Dataset, one_hot
from flows.models.cnf import CNF
from flows.plots.plane import histogram, square
from flows.plots.style import DATA, DENSITY, FLOW, tidy

MOST = 8  # classes shown, the first ones


def class_samples(
    flow: CNF, dataset: Dataset, num_points: int = 2000, generator: torch.Generator | None = None
) -> Figure:
    """Points of each class in the data, above samples of the flow given that class."""
    points, classes, low, high = _by_class(dataset)
    figure, panels = _panels(len(classes))
    for label, (context, axes) in enumerate(zip(classes, panels.T, strict=True)):
        with torch.no_grad():
            drawn = flow.sample((num_points,), context.to(flow.device, flow.dtype), generator).cpu()
        for own, shown, colour in zip(axes, (points[label][:num_points], drawn), (DATA, FLOW), strict=True):
            own.scatter(*shown.T.numpy(), s=4, color=colour, alpha=0.35, linewidths=0)
            own.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
            tidy(own)
    _name(panels, "data", "flow samples")
    return figure


def class_densities(flow: CNF, dataset: Dataset, resolution: int = 96) -> Figure:
    """The density of each class in the data, above that of the flow given the class, on one colour scale a class.

    Where the data's density is not known, a histogram of its validation points stands for it.
    """
    points, classes, low, high = _by_class(dataset)
    sides = [torch.linspace(low[i], high[i], 2 * resolution + 1)[1::2] for i in (0, 1)]  # centres of pixels
    grid = torch.cartesian_prod(*sides)
    figure, panels = _panels(len(classes))
    for label, (context, axes) in enumerate(zip(classes, panels.T, strict=True)):
        with torch.no_grad():
            modelled = flow.log_prob(grid.to(flow.device, flow.dtype), context.to(flow.device, flow.dtype)).exp().cpu()
        if getattr(dataset, "has_log_prob", False):
            known = dataset.log_prob(grid, context).exp().reshape(resolution, resolution).T.numpy()
        else:
            known = histogram(points[label], low, high, bins=48)
        pictures = (known, modelled.reshape(resolution, resolution).T.numpy())
        peak = max(float(np.quantile(picture, 0.998)) for picture in pictures)
        for own, picture in zip(axes, pictures, strict=True):
            extent = (low[0], high[0], low[1], high[1])
            own.imshow(picture, origin="lower", extent=extent, cmap=DENSITY, vmin=0, vmax=peak)
            tidy(own)
    _name(panels, "data density", "flow density")
    return figure


def _by_class(dataset: Dataset) -> tuple[list[Tensor], Tensor, list[float], list[float]]:
    """Validation points (n, 2) of each class, the contexts of the classes, and the corners of a square around all."""
    batch = next(iter(dataset.validation_batches(dataset.num_validation)))
    classes = one_hot(torch.arange(min(dataset.num_classes, MOST)), dataset.num_classes)
    points = [batch.x[batch.context[:, label] > 0.5] for label in range(len(classes))]
    return points, classes, *square(batch.x)


def _panels(columns: int) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(max(4.5, 2.6 * columns), 5.2), dpi=120, layout="compressed")
    return figure, figure.subplots(2, columns, sharex=True, sharey=True, squeeze=False)


def _name(panels: np.ndarray, upper: str, lower: str) -> None:
    for label, axes in enumerate(panels[0]):
        axes.set_title(f"class {label}")
    for axes, name in zip(panels[:, 0], (upper, lower), strict=True):
        axes.set_ylabel(name)
