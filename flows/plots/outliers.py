"""Scores that should tell outliers from data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from flows.arguments import checked
from flows.errors import InvalidValueError
from flows.plots.style import DATA, FLOW, tidy

BINS = 40


@checked
def outlier_scores(scores: Mapping[str, tuple[Tensor, Tensor, Any]], name: str = "outliers") -> Figure:
    """Plot histograms of scores of data and outliers, one panel a score, with how well it tells them apart.

    Infinite scores count in the outer bars, and the legend says how many there are.

    Args:
        scores: by name, the values of the data (n,), those of the outliers (m,), and the AUROC, as
            `flows.evaluation.OutlierScores.scored` gives them.
        name: of the outliers.

    Example:
        ```python
        import torch

        import flows

        values = torch.randn(200), torch.randn(200) + 2
        flows.plots.outlier_scores({"NLL": (*values, flows.evaluation.AUROC.of(values[1], values[0]))})
        ```
    """
    if not scores:
        raise InvalidValueError("scores must hold at least one score")
    figure = Figure(figsize=(3.4 * len(scores), 3.2), dpi=120, layout="compressed")
    for axes, (title, (data, outliers, score)) in zip(
        figure.subplots(1, len(scores), squeeze=False)[0], scores.items(), strict=True
    ):
        rows = [values.double().numpy() for values in (data, outliers)]
        finite = np.concatenate(rows)
        finite = finite[np.isfinite(finite)]
        low, high = np.quantile(finite, [0.002, 0.998]).tolist() if len(finite) else (0.0, 0.0)
        edges = np.linspace(low, high, BINS + 1)
        if edges[0] == edges[-1]:
            edges = np.linspace(edges[0] - 0.5, edges[0] + 0.5, BINS + 1)
        for values, colour, label in zip(rows, (DATA, FLOW), ("data", name), strict=True):
            shares = np.full(len(values), 1 / len(values))
            infinite = int(np.isinf(values).sum())
            label += f", {infinite:,} of {len(values):,} infinite, in the outer bar" if infinite else ""
            axes.hist(values.clip(edges[0], edges[-1]), edges, weights=shares, color=colour, alpha=0.65, label=label)
        axes.set_title(f"{title}\nAUROC {score}", fontsize=10)
        axes.set_yticks([])
        tidy(axes)
    figure.axes[0].legend(fontsize=9, frameon=False)
    return figure
