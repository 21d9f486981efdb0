"""The table, files and picture of the entropy_gap benchmark."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.time_budget import Look
from flows.plots.style import DATA, FLOW, MUTED, tidy
from flows.writing import to_json

FLOWS, SPLINE = "flows", "spline flow"


@dataclass(frozen=True)
class Outcome:
    """A model after training for a given time; gaps are nats above the entropy."""

    data: str
    model: str
    budget: float  # seconds allowed
    seconds: float  # seconds used
    steps: int
    gap: float
    standard_error: float
    nfe: float  # evaluations of the field per likelihood
    curve: list[Look]  # gaps on validation points


@dataclass(frozen=True)
class Pair:
    """Both models after the same training time, tested on the same points."""

    flow: Outcome
    spline: Outcome
    difference: float  # gap of the spline flow minus gap of the flow
    standard_error: float  # of the difference
    solver_error: float  # of the flow's log p, nats


HEADER = (
    f"{'':13}{'seconds':>8}{'flows':>19}{'spline flow':>21}{'ahead':>20}{'steps':>14}{'NFE':>5}{'solver error':>14}"
)


def line(pair: Pair) -> str:
    """One row of the table."""
    flow, spline = pair.flow, pair.spline
    return (
        f"{flow.data:13}{flow.budget:8g}{flow.gap:10.4f} ± {flow.standard_error:.4f}"
        f"{spline.gap:12.4f} ± {spline.standard_error:.4f}{pair.difference:+11.4f} ± {pair.standard_error:.4f}"
        f"{flow.steps:7}/{spline.steps:<6}{flow.nfe:5.0f}{pair.solver_error:14.1e}"
    )


def save(pairs: Sequence[Pair], folder: Path) -> None:
    """Write entropy_gap.json (all figures), entropy_gap.csv (the curves) and entropy_gap.png (their picture)."""
    (folder / "entropy_gap.json").write_text(to_json({"pairs": [asdict(pair) for pair in pairs]}))
    with open(folder / "entropy_gap.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["data", "model", "budget", "seconds", "steps", "gap"])
        for outcome in _outcomes(pairs):
            head = (outcome.data, outcome.model, outcome.budget)
            rows.writerows([*head, f"{look.seconds:.2f}", look.steps, f"{look.value:.5f}"] for look in outcome.curve)
    picture(pairs).savefig(folder / "entropy_gap.png")


def _outcomes(pairs: Sequence[Pair]) -> Iterator[Outcome]:
    for pair in pairs:
        yield from (pair.flow, pair.spline)


def picture(pairs: Sequence[Pair]) -> Figure:
    """The gaps over training time, one panel per density."""
    names = list(dict.fromkeys(pair.flow.data for pair in pairs))
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3.0 * columns, 2.6 * rows), dpi=120, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.set_visible(False)
    for name, axes in zip(names, panels, strict=False):
        axes.set_visible(True)
        for outcome in (outcome for outcome in _outcomes(pairs) if outcome.data == name):
            colour = FLOW if outcome.model == FLOWS else DATA
            seconds = [look.seconds for look in outcome.curve]
            gaps = [max(look.value, 1e-3) for look in outcome.curve]
            axes.plot(seconds, gaps, color=colour, linewidth=1.2, marker=".", markersize=3, label=outcome.model)
            axes.plot(seconds[-1], gaps[-1], "o", color=colour, markersize=5)
        axes.set(xscale="log", yscale="log", xlabel="seconds", ylabel="nats above the entropy")
        axes.set_title(name, fontsize=9)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
            axis.label.set_size(8)
        axes.grid(alpha=0.25, color=MUTED)
        tidy(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique, loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    return figure
