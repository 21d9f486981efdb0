"""Pictures of calibration: ranks of true parameters, and expected coverage."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from flows.arguments import checked
from flows.errors import InvalidValueError
from flows.plots.style import DATA, FLOW, MUTED, tidy

MAX_SHOWN = 16  # parameters
COLUMNS = 4


@checked
def ranks(
    ranks: Tensor,  # (n, d), whole numbers
    num_draws: int,
    names: Sequence[str] | None = None,
) -> Figure:
    """Histograms of the ranks of true parameters among `num_draws` draws; flat if calibrated.

    The band holds 99 % of the bars of uniform ranks.

    Example:
        ```python
        import torch

        import flows

        flows.plots.ranks(torch.randint(101, (200, 2)), num_draws=100, names=["mass", "rate"])
        ```
    """
    from scipy.stats import binom

    if ranks.ndim != 2 or len(ranks) == 0:
        raise InvalidValueError(f"ranks must be (n, d), got shape {tuple(ranks.shape)}")
    n, shown = len(ranks), min(ranks.shape[1], MAX_SHOWN)
    bins = max(2, min(20, n // 10, num_draws + 1))
    rows, columns = -(-shown // COLUMNS), min(shown, COLUMNS)
    figure = Figure(figsize=(2.4 * columns + 0.6, 1.9 * rows + 0.5), dpi=120, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    low, high = binom.ppf([0.005, 0.995], n, 1 / bins)
    for i, axes in enumerate(panels):
        if i >= shown:
            axes.set_visible(False)
            continue
        axes.axhspan(low, high, color=MUTED, alpha=0.3, linewidth=0)
        edges = torch.linspace(0, num_draws + 1, bins + 1, dtype=torch.float64).round()
        counts = torch.histogram(ranks[:, i].double() + 0.5, edges).hist
        axes.bar(edges[:-1].tolist(), counts.tolist(), width=edges.diff().tolist(), align="edge", color=DATA, alpha=0.8)
        axes.set_title(f"θ{i + 1}" if names is None else names[i], fontsize=8)
        axes.set_xlabel("rank", fontsize=8)
        tidy(axes)
    figure.suptitle("ranks of true parameters (band: 99 % if uniform)", fontsize=9)
    return figure


@checked
def expected_coverage(
    closer: Tensor,  # (n,), shares between 0 and 1
) -> Figure:
    """Expected coverage over the credibility level; the diagonal if calibrated.

    Above it the posterior is too wide, below it too narrow. The band holds 99 % of the curve's points.

    Example:
        ```python
        import torch

        import flows

        flows.plots.expected_coverage(torch.rand(200))
        ```
    """
    if closer.ndim != 1 or len(closer) == 0:
        raise InvalidValueError(f"closer must be (n,), got shape {tuple(closer.shape)}")
    levels = torch.linspace(0, 1, 101, dtype=torch.float64)
    coverage = (closer.double().unsqueeze(1) <= levels).double().mean(0)
    width = 2.576 * (levels * (1 - levels) / len(closer)).sqrt()
    figure = Figure(figsize=(3.4, 3.4), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.fill_between(levels, levels - width, levels + width, color=MUTED, alpha=0.3, linewidth=0)
    axes.plot(levels, levels, color=MUTED, linewidth=1)
    axes.plot(levels, coverage, color=FLOW)
    axes.set(xlabel="credibility", ylabel="expected coverage", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.set_title(f"{len(closer):,} pairs, 1/√n = {1 / math.sqrt(len(closer)):.3f}", fontsize=9)
    tidy(axes)
    return figure
