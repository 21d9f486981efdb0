"""The tables and the picture of training beside other packages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from benchmarks.baselines import Flows
from flows.plots.style import DATA, FLOW, MUTED, tidy

STEP, EVALUATION = "likelihood step", "log_prob of {:,} points"
PAIRED = {"independent": "flow-matching step", "optimal_transport": "with optimal transport"}


@dataclass
class Report:
    """The measurements; seconds are medians of alternating runs."""

    times: dict[str, dict[str, float]] = field(default_factory=dict)  # seconds, by task and by package
    evaluations: dict[str, tuple[int, int]] = field(default_factory=dict)  # per step, forward and backward
    agreement: dict[str, float] = field(default_factory=dict)  # largest difference of log p from this package's, nats
    errors: dict[str, float] = field(default_factory=dict)  # mean error of log p, nats
    nll: dict[str, tuple[float, float, int]] = field(default_factory=dict)  # NLL, its standard error, steps
    missing: dict[str, str] = field(default_factory=dict)  # the reason why a package was left out


def timing_table(report: Report) -> Iterator[str]:
    """One block per task: milliseconds, and the ratio to this package."""
    for what, times in report.times.items():
        yield f"\n{what:26}{'ms':>10}{'/ flows':>9}" + (
            f"{'NFE':>10}{'|Δ log p|':>12}{'error':>10}" if what == STEP else ""
        )
        for name, seconds in times.items():
            row = f"{name:26}{1e3 * seconds:10.1f}{seconds / times[Flows.name]:9.2f}"
            if what == STEP:
                row += f"{'{} + {}'.format(*report.evaluations[name]):>10}{report.agreement[name]:12.1e}"
                row += f"{report.errors[name]:10.1e}"
            yield row


def nll_table(report: Report, entropy: float, seconds: float) -> Iterator[str]:
    """One row per training method."""
    yield f"\n{f'after {seconds:g} s of training':34}{'NLL':>17}{'gap':>9}{'steps':>8}"
    for name, (nll, error, steps) in report.nll.items():
        yield f"{name:34}{nll:8.4f} ± {error:.4f}{nll - entropy:9.4f}{steps:8}"


def picture(report: Report, entropy: float) -> Figure:
    """Bars: times relative to this package, and gaps after equal time."""
    panels: dict[str, Mapping[str, float]] = {
        f"{what}, times as long": {name: value / times[Flows.name] for name, value in times.items()}
        for what, times in report.times.items()
    }
    if report.nll:
        panels["nats above the entropy after equal time"] = {
            name: nll - entropy for name, (nll, _, _) in report.nll.items()
        }
    figure = Figure(
        figsize=(7.5, 0.7 + sum(0.55 + 0.25 * len(bars) for bars in panels.values())), dpi=120, layout="constrained"
    )
    heights = [2 + len(bars) for bars in panels.values()]
    axes_of = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, bars) in zip(axes_of, panels.items(), strict=True):
        colours = [FLOW if name.startswith(Flows.name) else DATA for name in bars]
        drawn = axes.barh(list(bars), list(bars.values()), color=colours)
        axes.bar_label(drawn, fmt="%.3g", padding=3, fontsize=8, color=MUTED)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_title(title, fontsize=9, loc="left")
        tidy(axes)
    return figure
