"""Flows conditional on a class, in the plane: one column a class."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from flows.arguments import checked
from flows.checks import whole_number
from flows.datasets import Dataset, one_hot
from flows.models.cnf import CNF
from flows.models.mass import exactly
from flows.plots.doubt import doubt
from flows.plots.plane import histogram, note_estimator, square
from flows.plots.style import DATA, DENSITY, FLOW, check_classes, check_in_the_plane, tidy

MAX_CLASSES = 8  # the first classes are shown


@checked
def class_samples(
    flow: CNF, dataset: Dataset, num_points: int = 2000, generator: torch.Generator | None = None
) -> Figure:
    """Plot the data of each class above samples of the flow given that class.

    Example:
        ```python
        import flows

        data = flows.datasets.MoonsByClass()
        flow = flows.CNF(flows.fields.MLP((2,), hidden=(8,), context_shape=(2,)))
        flows.plots.class_samples(flow, data, num_points=100).savefig("classes.png")
        ```
    """
    check_in_the_plane(flow, "class_samples")
    whole_number("num_points", num_points)
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


@checked
def class_densities(flow: CNF, dataset: Dataset, resolution: int = 96, *, evaluated_with: str | None = None) -> Figure:
    """Plot the density of each class above that of the flow given the class.

    Each class has its own colour scale. If the density of the data is unknown, a histogram of validation points
    replaces it. A density that cannot be right has "unresolved" above it; see `density`.

    Args:
        resolution: pixels along each side; the flow is evaluated at resolution² points for each class.
        evaluated_with: name of the divergence estimator, shown in small type. Default: not shown.

    Example:
        ```python
        import flows

        data = flows.datasets.MoonsByClass()
        flow = flows.CNF(flows.fields.MLP((2,), hidden=(8,), context_shape=(2,)))
        flows.plots.class_densities(flow, data, resolution=16).savefig("class_densities.png")
        ```
    """
    check_in_the_plane(flow, "class_densities")
    whole_number("resolution", resolution, 2, 4096)
    points, classes, low, high = _by_class(dataset)
    sides = [torch.linspace(low[i], high[i], 2 * resolution + 1)[1::2] for i in (0, 1)]  # centres of pixels
    grid = torch.cartesian_prod(*sides)
    figure, panels = _panels(len(classes))
    for label, (context, axes) in enumerate(zip(classes, panels.T, strict=True)):
        with torch.no_grad(), exactly(flow):
            modelled = flow.log_prob(grid.to(flow.device, flow.dtype), context.to(flow.device, flow.dtype)).exp().cpu()
            total = float(modelled.double().mean()) * (high[0] - low[0]) * (high[1] - low[1])
            if mark := doubt(flow, total, low, high, points[label], context):
                axes[1].set_title(mark, fontsize=8)
        if dataset.has_log_prob:
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
    if evaluated_with is not None:
        note_estimator(panels[1, -1], evaluated_with)
    return figure


def _by_class(dataset: Dataset) -> tuple[list[Tensor], Tensor, list[float], list[float]]:
    """Return validation points (n, 2) of each class, the contexts, and two corners of a square around all."""
    check_classes(dataset, "this plot")
    batch = next(iter(dataset.validation_batches(dataset.num_validation)))
    assert dataset.num_classes is not None  # as checked
    assert batch.context is not None, f"{dataset.name} states classes but has no contexts"
    classes = one_hot(torch.arange(min(dataset.num_classes, MAX_CLASSES)), dataset.num_classes)
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
