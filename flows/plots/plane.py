"""Flows in the plane."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from flows.datasets import Dataset
from flows.models.cnf import CNF
from flows.plots.paths import draw_paths
from flows.plots.ranges import quantiles
from flows.plots.style import DATA, DENSITY, FLOW, MUTED, TIME, tidy


def density(flow: CNF, dataset: Dataset, resolution: int = 128) -> Figure:
    """The density of the data in the plane beside that of the flow, on one colour scale.

    Where the data's density is not known, a histogram of its training points stands for it.

    Args:
        resolution: pixels along each side; the flow is evaluated at ``resolution ** 2`` points.
    """
    reference = dataset.reference()
    low, high = square(reference)
    extent = (low[0], high[0], low[1], high[1])
    axes_of_grid = [torch.linspace(low[i], high[i], 2 * resolution + 1)[1::2] for i in (0, 1)]  # centres of pixels
    grid = torch.cartesian_prod(*axes_of_grid)
    with torch.no_grad():
        modelled = flow.log_prob(grid.to(flow.device, flow.dtype)).exp().cpu().reshape(resolution, resolution).T.numpy()
    if getattr(dataset, "has_log_prob", False):
        title, known = "data density", dataset.log_prob(grid).exp().reshape(resolution, resolution).T.numpy()
    else:
        title, known = f"{len(reference):,} data points", histogram(reference, low, high, bins=64)
    peak = max(float(np.quantile(known, 0.998)), float(np.quantile(modelled, 0.998)))
    figure = Figure(figsize=(9.6, 4.6), dpi=120, layout="compressed")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, name, values in zip(panels, (title, "flow density"), (known, modelled), strict=True):
        image = axes.imshow(
            values, origin="lower", extent=extent, cmap=DENSITY, vmin=0, vmax=peak, interpolation="bilinear"
        )
        _plane(axes, name)
    panels[1].set_ylabel("")
    tidy(figure.colorbar(image, ax=panels, label="density per unit area", pad=0.02).ax)
    return figure


def scatter(
    drawn: Tensor,  # (n, 2)
    data: Tensor | None,  # (m, 2)
    names: Sequence[str] | None = None,  # of the features
) -> Figure:
    """Samples of the flow beside points of the data, if there are any."""
    shown = [("flow samples", drawn, FLOW)] if data is None else [("data", data, DATA), ("flow samples", drawn, FLOW)]
    low, high = square(shown[0][1])
    figure = Figure(figsize=(4.5 * len(shown), 4.8), dpi=120, layout="compressed")
    count = min(5000, *(len(points) for _, points, _ in shown))
    panels = figure.subplots(1, len(shown), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (name, points, colour) in zip(panels, shown, strict=True):
        axes.scatter(*points[:count].T.numpy(), s=4, color=colour, alpha=0.35, linewidths=0)
        axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
        _plane(axes, name, names)
    for axes in panels[1:]:
        axes.set_ylabel("")
    return figure


def trajectories(
    flow: CNF, data: Tensor, num_paths: int = 250, num_times: int = 41, generator: torch.Generator | None = None
) -> Figure:
    """The paths of points in the plane from the base, t = 0, to the data, t = 1, in data space."""
    paths = draw_paths(flow, num_paths, torch.linspace(0, 1, num_times), generator)  # (T, n, 2)
    low, high = square(torch.cat([data.cpu(), paths.flatten(0, 1).to(data)]), quantile=0.002)
    figure = Figure(figsize=(6.2, 5.2), dpi=120, layout="compressed")
    axes = figure.subplots()
    segments = torch.stack([paths[:-1], paths[1:]], dim=2).transpose(0, 1).reshape(-1, 2, 2).numpy()
    times = np.tile((np.arange(num_times - 1) + 0.5) / (num_times - 1), num_paths)
    lines = LineCollection(segments, array=times, cmap=TIME, norm=Normalize(0, 1), linewidths=0.7, alpha=0.55)
    axes.add_collection(lines)
    axes.scatter(*paths[0].T.numpy(), s=7, color=MUTED, linewidths=0, zorder=3, label="base, t = 0")
    axes.scatter(*paths[-1].T.numpy(), s=9, color=FLOW, linewidths=0, zorder=4, label="data, t = 1")
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    _plane(axes, "paths of the flow")
    axes.legend(loc="upper right", fontsize=8, framealpha=0.8, edgecolor="none", markerscale=1.5)
    bar = figure.colorbar(lines, ax=axes, label="time t", pad=0.02)
    bar.solids.set_alpha(1)
    tidy(bar.ax)
    return figure


def evolution(
    flow: CNF,
    data: Tensor,
    times: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    num_points: int = 20_000,
    generator: torch.Generator | None = None,
) -> Figure:
    """How the flow turns the base into the data: histograms of its points in the plane at several times."""
    states = draw_paths(flow, num_points, torch.tensor(times), generator)
    low, high = square(data.cpu())
    figure = Figure(figsize=(2.5 * len(times), 2.9), dpi=120, layout="compressed")
    panels = figure.subplots(1, len(times), sharex=True, sharey=True)
    for axes, t, points in zip(panels, times, states, strict=True):
        counts = histogram(points, low, high, bins=56)
        peak = float(np.quantile(counts[counts > 0], 0.98)) if (counts > 0).any() else 1.0
        extent = (low[0], high[0], low[1], high[1])
        axes.imshow(counts, origin="lower", extent=extent, cmap=DENSITY, vmin=0, vmax=peak, interpolation="bilinear")
        axes.set_title(f"t = {t:g}", fontsize=11)
        axes.set(xticks=[], yticks=[])
        tidy(axes)
    return figure


def square(points: Tensor, quantile: float = 0.001, margin: float = 0.12) -> tuple[list[float], list[float]]:
    """The corners of a square that holds nearly all ``points`` (n, 2)."""
    ends = quantiles(points, (quantile, 1 - quantile))
    half = float((ends[1] - ends[0]).max()) * (0.5 + margin)
    centre = (ends[0] + ends[1]) / 2
    return (centre - half).tolist(), (centre + half).tolist()


def histogram(points: Tensor, low: Sequence[float], high: Sequence[float], bins: int) -> np.ndarray:
    """Density per unit area in ``bins`` x ``bins`` cells, rows along the second coordinate."""
    ranges = [(low[i], high[i]) for i in (0, 1)]
    counts, *_ = np.histogram2d(*points.cpu().double().numpy().T, bins=bins, range=ranges)
    return counts.T / (len(points) * (high[0] - low[0]) * (high[1] - low[1]) / bins**2)


def _plane(axes: Axes, title: str, names: Sequence[str] | None = None) -> None:
    first, second = names or ("$x_1$", "$x_2$")
    axes.set(title=title, xlabel=first, ylabel=second, aspect="equal")
    tidy(axes)
