"""Error against cost, with the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox

from flows.arguments import checked
from flows.compare.measure import Comparison, Row
from flows.plots.style import MUTED, tidy

MARKERS = "osD^vP*Xp<>hd"
Cost = Callable[[Row], float | None]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the Pareto-optimal (cost, error) pairs, by rising cost."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[index][1] < points[front[-1]][1]:
            front.append(index)
    return front


@checked
def error_against_cost(comparison: Comparison) -> Figure:
    """Plot the error of each setting against its time.

    Settings of one estimator share a marker and a line. Those of the Pareto front, than which nothing measured is
    both cheaper and better, are ringed, joined by a dashed line, and carry the number of products (the name where
    there are none). Exact ones lie on the lowest line.
    """
    figure = Figure(figsize=(13.5, 5.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    noisy = [row.accuracy.rmse for row in comparison.rows if not row.exact and row.accuracy.rmse > 0]
    exact_line = min(noisy, default=1.0) / 4
    titles = ("an evaluation without gradients", "an evaluation in training, forward and backward")
    costs: tuple[Cost, Cost] = (lambda row: row.ratio, lambda row: row.training_ratio)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    fronts = [_panel(axes, comparison.rows, cost, exact_line) for axes, cost in zip(panels, costs, strict=True)]
    for axes, title in zip(panels, titles, strict=True):
        axes.set(title=title, xlabel="time, in bare evaluations of the field")
    panels[0].set_ylim(exact_line / 1.8, max(noisy, default=1.0) * 2.5)
    panels[0].set_ylabel("error of the divergence (root mean square)")
    _readable_ticks(panels[0], exact_line)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
    figure.draw_without_rendering()  # finds the layout
    for axes, front in zip(panels, fronts, strict=True):
        _name(axes, front)
    return figure


def _panel(axes: Axes, rows: Sequence[Row], cost: Cost, exact_line: float) -> list[tuple[str, float, float]]:
    """Draw one panel; returns the label and the place of each setting on the front."""
    axes.set(xscale="log", yscale="log")
    axes.axhline(exact_line, color=MUTED, linewidth=0.8)
    colours = matplotlib.color_sequences["tab10"]
    shown = [(row, cost(row), exact_line if row.exact else max(row.accuracy.rmse, exact_line)) for row in rows]
    shown = [(row, x, y) for row, x, y in shown if x is not None and math.isfinite(y)]
    for index, kind in enumerate(dict.fromkeys(row.kind for row in rows)):
        own = [(x, y) for row, x, y in shown if row.kind == kind]
        xs, ys = zip(*own, strict=True) if own else ((), ())
        style = {"color": colours[index % 10], "marker": MARKERS[index % len(MARKERS)]}
        axes.plot(xs, ys, label=kind, linewidth=1, markersize=6, alpha=0.9, **style)
    front = [shown[index] for index in pareto_front([(x, y) for _, x, y in shown])]
    xs, ys = [x for _, x, _ in front], [y for _, _, y in front]
    axes.plot(xs, ys, color="black", linestyle="--", linewidth=1, zorder=1, alpha=0.6)
    label = "Pareto front, with the products\nof an evaluation"
    axes.scatter(xs, ys, s=130, facecolors="none", edgecolors="black", linewidths=1.3, zorder=4, label=label)
    axes.grid(alpha=0.2)
    axes.margins(x=0.1)
    tidy(axes)
    return [(str(row.products or row.kind), x, y) for row, x, y in front]


def _readable_ticks(axes: Axes, exact_line: float) -> None:
    """Plain numbers for times, and "exact" at the exact estimators."""
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    top = axes.get_ylim()[1]
    decades = range(math.ceil(math.log10(exact_line * 1.5)), math.floor(math.log10(top)) + 1)
    places = [exact_line, *(10.0**decade for decade in decades)]
    axes.set_yticks(places, ["exact", *(f"{place:g}" for place in places[1:])])
    axes.yaxis.set_minor_locator(NullLocator())


def _name(axes: Axes, places: Sequence[tuple[str, float, float]]) -> None:
    """Put labels beside their points, without overlaps."""
    canvas = axes.figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    renderer = canvas.get_renderer()
    pixels = axes.figure.dpi / 72
    lines = [line for line in axes.lines if line.get_marker() not in ("None", "")]
    around = 6 * pixels
    taken = [
        Bbox.from_extents(x - around, y - around, x + around, y + around)
        for line in lines
        for x, y in axes.transData.transform(line.get_xydata())
    ]
    frame = axes.get_window_extent(renderer)
    for label, x, y in places:
        note = axes.annotate(label, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=9, zorder=6)
        note.set(ha="center", va="center")
        note.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5})
        centred = note.get_window_extent(renderer).padded(1)
        half_width = centred.width / 2 / pixels
        offsets = [
            ((distance + half_width) * math.cos(turn * math.pi / 4), distance * math.sin(turn * math.pi / 4))
            for distance in (14, 20, 28, 38, 50, 64)
            for turn in (1, 3, 7, 5, 2, 6, 0, 4)
        ]
        boxes = [centred.translated(dx * pixels, dy * pixels) for dx, dy in offsets]
        conflicts = [
            sum(map(box.overlaps, taken)) + 100 * (not frame.containsx(box.x0) or not frame.containsx(box.x1))
            for box in boxes
        ]
        best = conflicts.index(min(conflicts))
        note.set_position(offsets[best])
        taken.append(boxes[best])
