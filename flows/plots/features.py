"""Points with more than two features, in pairs of features."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from flows.arguments import checked
from flows.checks import whole_number
from flows.plots.style import DATA, FLOW, check_names, points_to_plot, quantiles, tidy


@checked
def pairs(drawn: Tensor, data: Tensor | None, names: Sequence[str] | None = None, num_features: int = 4) -> Figure:
    """Plot the first features in pairs, with histograms on the diagonal.

    Example:
        ```python
        import torch

        import flows

        flows.plots.pairs(torch.randn(200, 3), torch.randn(200, 3), names=["a", "b", "c"])
        ```
    """
    whole_number("num_features", num_features)
    drawn = points_to_plot("drawn", drawn, None)
    data = None if data is None else points_to_plot("data", data, drawn.shape[1])
    size = min(num_features, drawn.shape[1])
    names = [f"feature {i}" for i in range(size)] if names is None else names
    check_names(names, size)
    shown = [(drawn, FLOW, "flow samples")] if data is None else [(data, DATA, "data"), (drawn, FLOW, "flow samples")]
    count = min(2000, *(len(points) for points, _, _ in shown))
    ranges = [_range(shown[0][0][:, i]) for i in range(size)]
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
                for points, colour, label in shown:
                    edges = np.linspace(*ranges[row], 41).tolist()
                    axes.hist(points[:, row].numpy(), edges, density=True, color=colour, alpha=0.45, label=label)
                axes.set_yticks([])
            else:
                axes.set_ylim(*ranges[row])
                for points, colour, _ in shown:
                    axes.scatter(*points[:count, [column, row]].T.numpy(), s=5, color=colour, alpha=0.4, linewidths=0)
            if row == size - 1:
                axes.set_xlabel(names[column])
            if column == 0 and row > 0:
                axes.set_ylabel(names[row])
            tidy(axes)
    if drawn.shape[1] > size:
        figure.suptitle(f"the first {size} of {drawn.shape[1]} features", fontsize=11)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="upper right", frameon=False)
    return figure


def _range(values: Tensor) -> tuple[float, float]:
    low, high = quantiles(values, (0.002, 0.998)).tolist()
    margin = 0.15 * (high - low) or 1.0
    return low - margin, high + margin
