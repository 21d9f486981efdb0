"""Densities and samples of flows in the plane."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from flows.arguments import checked
from flows.checks import whole_number
from flows.datasets import Dataset
from flows.models.cnf import CNF
from flows.models.mass import exactly
from flows.plots.doubt import doubt, marked
from flows.plots.style import (
    DATA,
    DENSITY,
    FLOW,
    check_in_the_plane,
    check_names,
    points_to_plot,
    quantiles,
    tidy,
)

FEW, MOST = 50, 5000  # points of the data that do not say where samples lie; points that are shown


@checked
def density(flow: CNF, dataset: Dataset, resolution: int = 128, *, evaluated_with: str | None = None) -> Figure:
    """Plot the density of the data beside that of the flow, on one colour scale: that of the data.

    If the density of the data is unknown, a histogram of training points replaces it. A density that cannot be right,
    by its solver error or its mass, has "unresolved" in its title. `Auto()` replaces a stochastic divergence, whose
    noise would bias the exponential.

    Args:
        resolution: pixels along each side; the flow is evaluated at resolution² points.
        evaluated_with: name of the divergence estimator, shown in small type. Default: not shown.

    Example:
        ```python
        import flows

        data = flows.datasets.Moons()
        flow = flows.CNF(flows.fields.MLP((2,), hidden=(8,)))
        flows.plots.density(flow, data, resolution=16).savefig("density.png")
        ```
    """
    check_in_the_plane(flow, "density")
    whole_number("resolution", resolution, 2, 4096)
    reference = points_to_plot("the data", dataset.reference(), 2)
    low, high = square(reference)
    extent = (low[0], high[0], low[1], high[1])
    axes_of_grid = [torch.linspace(low[i], high[i], 2 * resolution + 1)[1::2] for i in (0, 1)]  # centres of pixels
    grid = torch.cartesian_prod(*axes_of_grid)
    with torch.no_grad(), exactly(flow):
        points = grid.to(flow.device, torch.promote_types(grid.dtype, flow.dtype))
        modelled = flow.log_prob(points).exp().cpu().reshape(resolution, resolution).T.numpy()
        total = float(modelled.astype(float).mean()) * (high[0] - low[0]) * (high[1] - low[1])
        mark = doubt(flow, total, low, high, reference)
    if dataset.has_log_prob:
        title, known = "data density", dataset.log_prob(grid).exp().reshape(resolution, resolution).T.numpy()
    else:
        title, known = f"{len(reference):,} data points", histogram(reference, low, high, bins=64)
    peak = float(np.quantile(known, 0.998))  # of the data, so that all flows on them share a scale
    figure = Figure(figsize=(9.6, 4.6), dpi=120, layout="compressed")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, name, values in zip(panels, (title, marked("flow density", mark)), (known, modelled), strict=True):
        image = axes.imshow(
            values, origin="lower", extent=extent, cmap=DENSITY, vmin=0, vmax=peak, interpolation="bilinear"
        )
        label_plane(axes, name)
    panels[1].set_ylabel("")
    tidy(figure.colorbar(image, ax=panels, label="density per unit area", pad=0.02, extend="max").ax)
    if evaluated_with is not None:
        note_estimator(panels[1], evaluated_with)
    return figure


@checked
def scatter(
    drawn: Tensor,  # (n, 2)
    data: Tensor | None,  # (m, 2)
    names: Sequence[str] | None = None,  # of the features
) -> Figure:
    """Plot samples of the flow beside points of the data, if there are any.

    Example:
        ```python
        import flows

        data, flow = flows.datasets.Moons(), flows.CNF(flows.fields.MLP((2,), hidden=(8,)))
        flows.plots.scatter(flow.sample((200,)), data.sample(200)).savefig("scatter.png")
        ```
    """
    drawn = points_to_plot("drawn", drawn, 2)
    data = None if data is None else points_to_plot("data", data, 2)
    check_names(names, 2)
    shown = [("flow samples", drawn, FLOW)] if data is None else [("data", data, DATA), ("flow samples", drawn, FLOW)]
    is_sparse = data is not None and len(data) < FEW  # such as the rows of a table that have some context
    low, high = square(torch.cat([points for _, points, _ in shown]) if is_sparse else shown[0][1])
    figure = Figure(figsize=(4.5 * len(shown), 4.8), dpi=120, layout="compressed")
    count = MOST if is_sparse else min(MOST, *(len(points) for _, points, _ in shown))
    panels = figure.subplots(1, len(shown), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (name, points, colour) in zip(panels, shown, strict=True):
        axes.scatter(*points[:count].T.numpy(), s=4, color=colour, alpha=0.35, linewidths=0)
        axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
        label_plane(axes, name, names)
    for axes in panels[1:]:
        axes.set_ylabel("")
    return figure


def square(points: Tensor, quantile: float = 0.001, margin: float = 0.12) -> tuple[list[float], list[float]]:
    """Return two corners of a square around nearly all `points` (n, 2)."""
    ends = quantiles(points, (quantile, 1 - quantile))
    half = float((ends[1] - ends[0]).max()) * (0.5 + margin) or 0.5  # one point, or equal ones
    centre = (ends[0] + ends[1]) / 2
    return (centre - half).tolist(), (centre + half).tolist()


def histogram(points: Tensor, low: Sequence[float], high: Sequence[float], bins: int) -> np.ndarray:
    """Return the density per unit area in bins² cells; rows run along the second coordinate."""
    ranges = [(low[i], high[i]) for i in (0, 1)]
    counts, *_ = np.histogram2d(*points.cpu().double().numpy().T, bins=bins, range=ranges)
    return counts.T / (len(points) * (high[0] - low[0]) * (high[1] - low[1]) / bins**2)


def note_estimator(axes: Axes, name: str) -> None:
    """Say in a panel which divergence estimator its density was evaluated with."""
    place = {"ha": "right", "va": "bottom", "fontsize": 7, "color": "white"}
    axes.text(0.98, 0.02, f"evaluated with {name}", transform=axes.transAxes, **place)


def label_plane(axes: Axes, title: str, names: Sequence[str] | None = None) -> None:
    """Set the title, the names of both axes and an equal aspect."""
    first, second = names or ("$x_1$", "$x_2$")
    axes.set(title=title, xlabel=first, ylabel=second, aspect="equal")
    tidy(axes)
