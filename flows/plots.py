"""Pictures of flows as matplotlib figures, in data space; nothing here touches pyplot or shows a window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from flows.cnf import CNF
from flows.datasets import Dataset

DATA, FLOW, MUTED = "#3b5b92", "#e8684a", "#9aa3b2"  # colours of the data, the flow, and the rest
DENSITY, TIME = "magma", "plasma"  # colour maps
Curves = Mapping[str, Sequence[tuple[int, float]]]  # for each metric its (step, value) pairs


def figures(flow: CNF, dataset: Dataset, generator: torch.Generator | None = None) -> dict[str, Figure]:
    """The pictures of an unconditional flow that suit its data.

    Points of the plane get ``density``, ``samples``, ``trajectories`` and ``evolution``, anything else
    ``samples`` of its first features. A conditional flow has no picture of its own: there are none.
    """
    if getattr(flow.field, "context_shape", None) is not None:
        return {}
    reference = dataset.reference()
    with torch.no_grad():
        drawn = flow.sample((min(len(reference), 5000),), generator=generator)
        pictures = {"samples": samples(drawn, reference, getattr(dataset, "columns", None))}
        if flow.event_shape == (2,):
            pictures["density"] = density(flow, dataset)
            pictures["trajectories"] = trajectories(flow, reference, generator=generator)
            pictures["evolution"] = evolution(flow, reference, generator=generator)
    return pictures


def density(flow: CNF, dataset: Dataset, resolution: int = 128) -> Figure:
    """The density of the data in the plane beside that of the flow, on one colour scale.

    Where the data's density is not known, a histogram of its training points stands for it.

    Args:
        resolution: pixels along each side; the flow is evaluated at ``resolution ** 2`` points.
    """
    reference = dataset.reference()
    low, high = _square(reference)
    extent = (low[0], high[0], low[1], high[1])
    axes_of_grid = [torch.linspace(low[i], high[i], 2 * resolution + 1)[1::2] for i in (0, 1)]  # centres of pixels
    grid = torch.cartesian_prod(*axes_of_grid)
    with torch.no_grad():
        modelled = flow.log_prob(grid.to(_like(flow))).exp().cpu().reshape(resolution, resolution).T.numpy()
    if getattr(dataset, "has_log_prob", False):
        title, known = "data density", dataset.log_prob(grid).exp().reshape(resolution, resolution).T.numpy()
    else:
        title, known = f"{len(reference):,} data points", _histogram(reference, low, high, bins=64)
    peak = max(float(np.quantile(known, 0.998)), float(np.quantile(modelled, 0.998)))
    figure = Figure(figsize=(9.6, 4.6), dpi=120, layout="compressed")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, name, values in zip(panels, (title, "flow density"), (known, modelled), strict=True):
        image = axes.imshow(
            values, origin="lower", extent=extent, cmap=DENSITY, vmin=0, vmax=peak, interpolation="bilinear"
        )
        _plane(axes, name)
    panels[1].set_ylabel("")
    _tidy(figure.colorbar(image, ax=panels, label="density per unit area", pad=0.02).ax)
    return figure


def samples(
    drawn: Tensor,  # (n, *event)
    data: Tensor,  # (m, *event)
    names: Sequence[str] | None = None,  # of the features
) -> Figure:
    """Samples of the flow against points of the data; of more than two features, the first four in pairs."""
    drawn, data = drawn.cpu().flatten(1), data.cpu().flatten(1)
    if drawn.shape[1] != 2:
        return pairs(drawn, data, names)
    low, high = _square(data)
    figure = Figure(figsize=(9, 4.8), dpi=120, layout="compressed")
    count = min(len(drawn), len(data), 5000)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, name, points, colour in zip(panels, ("data", "flow samples"), (data, drawn), (DATA, FLOW), strict=True):
        axes.scatter(*points[:count].T.numpy(), s=4, color=colour, alpha=0.35, linewidths=0)
        axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
        _plane(axes, name, names)
    panels[1].set_ylabel("")
    return figure


def pairs(drawn: Tensor, data: Tensor, names: Sequence[str] | None = None, num_features: int = 4) -> Figure:
    """The first features in pairs, samples over data, with their histograms on the diagonal."""
    size = min(num_features, drawn.shape[1])
    names = [f"feature {i}" for i in range(size)] if names is None else names
    count = min(len(drawn), len(data), 2000)
    ranges = [_range(data[:, i]) for i in range(size)]
    figure = Figure(figsize=(1 + 2.3 * size, 0.8 + 2.2 * size), dpi=110, layout="constrained")
    panels = figure.subplots(size, size, squeeze=False)
    for row in range(size):
        for column in range(size):
            axes: Axes = panels[row][column]
            if column > row:
                axes.axis("off")
                continue
            axes.set_xlim(*ranges[column])
            if row == column:
                for points, colour, label in ((data, DATA, "data"), (drawn, FLOW, "flow samples")):
                    edges = np.linspace(*ranges[row], 41)
                    axes.hist(points[:, row].numpy(), edges, density=True, color=colour, alpha=0.45, label=label)
                axes.set_yticks([])
            else:
                axes.set_ylim(*ranges[row])
                axes.scatter(*data[:count, [column, row]].T.numpy(), s=5, color=DATA, alpha=0.4, linewidths=0)
                axes.scatter(*drawn[:count, [column, row]].T.numpy(), s=5, color=FLOW, alpha=0.4, linewidths=0)
            if row == size - 1:
                axes.set_xlabel(names[column])
            if column == 0 and row > 0:
                axes.set_ylabel(names[row])
            _tidy(axes)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="upper right", frameon=False)
    return figure


def trajectories(
    flow: CNF, data: Tensor, num_paths: int = 250, num_times: int = 41, generator: torch.Generator | None = None
) -> Figure:
    """The paths of points in the plane from the base, t = 0, to the data, t = 1, in data space."""
    paths = _paths(flow, num_paths, torch.linspace(0, 1, num_times), generator)  # (T, n, 2)
    low, high = _square(torch.cat([data.cpu(), paths.flatten(0, 1).to(data)]), quantile=0.002)
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
    _tidy(bar.ax)
    return figure


def evolution(
    flow: CNF,
    data: Tensor,
    times: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    num_points: int = 20_000,
    generator: torch.Generator | None = None,
) -> Figure:
    """How the flow turns the base into the data: histograms of its points in the plane at several times."""
    states = _paths(flow, num_points, torch.tensor(times), generator)
    low, high = _square(data.cpu())
    figure = Figure(figsize=(2.5 * len(times), 2.9), dpi=120, layout="compressed")
    panels = figure.subplots(1, len(times), sharex=True, sharey=True)
    for axes, t, points in zip(panels, times, states, strict=True):
        counts = _histogram(points, low, high, bins=56)
        peak = float(np.quantile(counts[counts > 0], 0.98)) if (counts > 0).any() else 1.0
        extent = (low[0], high[0], low[1], high[1])
        axes.imshow(counts, origin="lower", extent=extent, cmap=DENSITY, vmin=0, vmax=peak, interpolation="bilinear")
        axes.set_title(f"t = {t:g}", fontsize=11)
        axes.set(xticks=[], yticks=[])
        _tidy(axes)
    return figure


def curves(metrics: Curves, entropy: float | None = None) -> Figure:
    """Loss, negative log-likelihood and evaluations of the field over the steps of a run.

    Of the losses, that of flow matching and the likelihood have panels; any other is shown where both are missing.
    """
    panels = {
        "loss of flow matching": [("train/velocity_error", DATA, "training")],
        "NLL in nats": [("train/nll", DATA, "training"), ("validation/nll", FLOW, "validation")],
        "evaluations of the field": [
            ("train/nfe_forward", DATA, "training, forward"),
            ("train/nfe_backward", MUTED, "training, backward"),
            ("validation/nfe", FLOW, "validation"),
        ],
    }
    present = {title: [line for line in lines if line[0] in metrics] for title, lines in panels.items()}
    present = {title: lines for title, lines in present.items() if lines}
    if "train/velocity_error" not in metrics and "train/nll" not in metrics and "train/loss" in metrics:
        present = {"loss": [("train/loss", DATA, "training")], **present}
    figure = Figure(figsize=(4.2 * max(1, len(present)), 3.4), dpi=120, layout="constrained")
    if not present:
        return figure
    for axes, (title, lines) in zip(figure.subplots(1, len(present), squeeze=False)[0], present.items(), strict=True):
        for name, colour, label in lines:
            steps, values = zip(*metrics[name], strict=True)
            marker = "o" if len(steps) < 30 else None
            axes.plot(steps, values, color=colour, label=label, linewidth=1.4, marker=marker, markersize=3)
        if title.startswith("NLL") and entropy is not None:
            axes.axhline(entropy, color=MUTED, linestyle="--", linewidth=1, label="entropy of the data")
        axes.set(xlabel="step", title=title)
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.25)
        _tidy(axes)
    return figure


def _paths(flow: CNF, num_points: int, times: Tensor, generator: torch.Generator | None) -> Tensor:  # (T, n, *event)
    """Points of the base carried through ``times``, in data space, on the CPU."""
    with torch.no_grad():
        base = flow.base.sample((num_points,), generator)
        states = flow.transport(base, times.tolist(), generator=generator, log_density=False).x
        return torch.stack([flow.transform.inverse(state)[0] for state in states]).cpu()


def _square(points: Tensor, quantile: float = 0.001, margin: float = 0.12) -> tuple[list[float], list[float]]:
    """The corners of a square that holds nearly all ``points`` (n, 2)."""
    ends = torch.quantile(points.double(), torch.tensor([quantile, 1 - quantile]).double(), dim=0)
    half = float((ends[1] - ends[0]).max()) * (0.5 + margin)
    centre = (ends[0] + ends[1]) / 2
    return (centre - half).tolist(), (centre + half).tolist()


def _range(values: Tensor) -> tuple[float, float]:
    low, high = torch.quantile(values.double(), torch.tensor([0.002, 0.998]).double()).tolist()
    margin = 0.15 * (high - low) or 1.0
    return low - margin, high + margin


def _histogram(points: Tensor, low: Sequence[float], high: Sequence[float], bins: int) -> np.ndarray:
    """Density per unit area in ``bins`` x ``bins`` cells, rows along the second coordinate."""
    ranges = [(low[i], high[i]) for i in (0, 1)]
    counts, *_ = np.histogram2d(*points.cpu().double().numpy().T, bins=bins, range=ranges)
    return counts.T / (len(points) * (high[0] - low[0]) * (high[1] - low[1]) / bins**2)


def _plane(axes: Axes, title: str, names: Sequence[str] | None = None) -> None:
    first, second = names or ("$x_1$", "$x_2$")
    axes.set(title=title, xlabel=first, ylabel=second, aspect="equal")
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.tick_params(labelsize=8, color=MUTED)
    for spine in axes.spines.values():
        spine.set_color(MUTED)


def _like(flow: CNF) -> Tensor:
    return next(iter([*flow.parameters(), *flow.buffers()]))
