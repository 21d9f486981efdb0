"""Points of more than two features, two features at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from flows.plots.style import DATA, FLOW, tidy


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
            tidy(axes)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="upper right", frameon=False)
    return figure


def _range(values: Tensor) -> tuple[float, float]:
    low, high = torch.quantile(values.double(), torch.tensor([0.002, 0.998]).double()).tolist()
    margin = 0.15 * (high - low) or 1.0
    return low - margin, high + margin
