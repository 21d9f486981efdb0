"""Paths from the base to the data, in the plane."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from flows.arguments import checked
from flows.checks import whole_number
from flows.models.cnf import CNF
from flows.plots.plane import histogram, label_plane, square
from flows.plots.style import DENSITY, FLOW, MUTED, TIME, check_in_the_plane, points_to_plot, tidy


def draw_paths(
    flow: CNF,
    num_points: int,
    times: Tensor,
    generator: torch.Generator | None,
    context: Tensor | None = None,  # (num_points, *context)
) -> Tensor:  # (T, n, *event)
    """Carry base points through `times`; return them in data space on the CPU."""
    with torch.no_grad():
        base = flow.base.sample((num_points,), generator)
        states = flow.transport(base, times.tolist(), context, generator, log_density=False).x
        return torch.stack([flow.to_data_space(state, context) for state in states]).cpu()


@checked
def trajectories(
    flow: CNF, data: Tensor, num_paths: int = 250, num_times: int = 41, generator: torch.Generator | None = None
) -> Figure:
    """Plot paths from the base (t = 0) to the data (t = 1), in data space.

    Example:
        ```python
        import flows

        data, flow = flows.datasets.Moons(), flows.CNF(flows.fields.MLP((2,), hidden=(8,)))
        flows.plots.trajectories(flow, data.sample(200)).savefig("trajectories.png")
        ```
    """
    check_in_the_plane(flow, "trajectories")
    whole_number("num_paths", num_paths)
    whole_number("num_times", num_times, 2)
    data = points_to_plot("data", data, 2)
    paths = draw_paths(flow, num_paths, torch.linspace(0, 1, num_times), generator)  # (T, n, 2)
    low, high = square(torch.cat([data.cpu(), paths.flatten(0, 1).to(data)]), quantile=0.002)
    figure = Figure(figsize=(6.2, 5.2), dpi=120, layout="compressed")
    axes = figure.subplots()
    segments = torch.stack([paths[:-1], paths[1:]], dim=2).transpose(0, 1).reshape(-1, 2, 2).numpy()
    times = np.tile((np.arange(num_times - 1) + 0.5) / (num_times - 1), num_paths)
    lines = LineCollection(list(segments), array=times, cmap=TIME, norm=Normalize(0, 1), linewidths=0.7, alpha=0.55)
    axes.add_collection(lines)
    axes.scatter(*paths[0].T.numpy(), s=7, color=MUTED, linewidths=0, zorder=3, label="base, t = 0")
    axes.scatter(*paths[-1].T.numpy(), s=9, color=FLOW, linewidths=0, zorder=4, label="data, t = 1")
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    label_plane(axes, "paths of the flow")
    axes.legend(loc="upper right", fontsize=8, framealpha=0.8, edgecolor="none", markerscale=1.5)
    bar = figure.colorbar(lines, ax=axes, label="time t", pad=0.02)
    if bar.solids is not None:
        bar.solids.set_alpha(1)
    tidy(bar.ax)
    return figure


@checked
def evolution(
    flow: CNF,
    data: Tensor,
    times: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    num_points: int = 20_000,
    generator: torch.Generator | None = None,
) -> Figure:
    """Plot histograms of flow samples at several times from base to data.

    Example:
        ```python
        import flows

        data, flow = flows.datasets.Moons(), flows.CNF(flows.fields.MLP((2,), hidden=(8,)))
        flows.plots.evolution(flow, data.sample(200)).savefig("evolution.png")
        ```
    """
    check_in_the_plane(flow, "evolution")
    whole_number("num_points", num_points)
    data = points_to_plot("data", data, 2)
    states = draw_paths(flow, num_points, torch.tensor(times), generator)
    low, high = square(data.cpu())
    figure = Figure(figsize=(2.5 * len(times), 2.9), dpi=120, layout="compressed")
    figure.suptitle("samples on their way from the base (t = 0) to the data (t = 1)", fontsize=11)
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
