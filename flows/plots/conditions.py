"""Flows conditional on columns of a table: predictive intervals along numbers, samples by category."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from flows.arguments import checked
from flows.checks import whole_number
from flows.conditions import Conditions
from flows.datasets import Batch, Dataset
from flows.errors import InvalidValueError
from flows.models.cnf import CNF
from flows.plots.style import DATA, FLOW, quantiles, tidy

MAX_COLUMNS = 6  # condition columns that are shown
MAX_VALUES = 2  # entries of a point that are shown
MAX_CATEGORIES = 8
MAX_HELD = 12  # conditions that the line below names
LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
PIXELS = 48  # of a predictive density along the values


@checked
def predictive_intervals(
    flow: CNF, dataset: Dataset, num_draws: int = 500, resolution: int = 33, generator: torch.Generator | None = None
) -> Figure:
    """Plot predictive intervals against each numeric condition, over the density of a single value.

    The other conditions have their median, or the most frequent category, in the training part; the line below names
    them. The lines enclose 50 %
    and 90 % of the draws. Points are those of the validation part, whose other conditions differ.

    Args:
        num_draws: at each place.
        resolution: places along each condition.

    Raises:
        InvalidValueError: the data have no conditions that are numbers, or points of more than two values.
    """
    conditions = _conditions_of(flow, dataset)
    whole_number("num_draws", num_draws, 2)
    whole_number("resolution", resolution, 2)
    shown = conditions.numbers[:MAX_COLUMNS]
    if not shown:
        raise InvalidValueError("predictive_intervals needs a condition that is a number; use samples_by_category")
    known, centre = _training_contexts(dataset), _typical(conditions, _training_contexts(dataset))
    names = list(dataset.columns or [])
    figure = Figure(figsize=(1 + 3.2 * len(shown), 0.6 + 2.8 * len(names)), dpi=110, layout="constrained")
    panels = figure.subplots(len(names), len(shown), squeeze=False, sharey="row")
    points = dataset.held_out("validation")
    for place, axes in zip(shown, panels.T, strict=True):
        low, high = quantiles(known[:, place], (0.01, 0.99)).tolist()
        contexts = centre.repeat(resolution, 1)
        contexts[:, place] = torch.linspace(low, high, resolution, dtype=contexts.dtype)
        with torch.no_grad():
            drawn = flow.sample((num_draws,), contexts.to(flow.device), generator).cpu().double()
        for value, own in enumerate(axes):
            _intervals(own, contexts[:, place], drawn[..., value], points, place, value)
            own.set(xlabel=conditions.columns[place], ylabel=names[value] if place == shown[0] else "")
            tidy(own)
        if len(names) == 1 and flow.base.has_density:
            _shade(axes[0], flow, contexts, place)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper right", frameon=False, ncols=4)
    if held := _held(conditions, centre):
        figure.supxlabel(held, fontsize=9)
    if len(shown) < len(conditions.numbers):
        figure.suptitle(f"the first {len(shown)} of {len(conditions.numbers)} numeric conditions", fontsize=10, x=0.3)
    return figure


@checked
def samples_by_category(
    flow: CNF, dataset: Dataset, num_points: int = 2000, generator: torch.Generator | None = None
) -> Figure:
    """Plot data and samples of the flow for each category, one row of panels for each condition that has some.

    Samples take the other conditions from the points of that category.

    Raises:
        InvalidValueError: no condition holds categories, or points have more than two values.

    Example:
        ```python
        import flows

        data = flows.datasets.MoonsByClass()
        flow = flows.CNF(flows.fields.MLP((2,), hidden=(8,), context_shape=(2,)))
        flows.plots.class_samples(flow, data, num_points=100).savefig("classes.png")
        ```
    """
    conditions = _conditions_of(flow, dataset)
    whole_number("num_points", num_points)
    if not conditions.categories:
        raise InvalidValueError("samples_by_category needs a condition that holds categories")
    batch, names = _whole(dataset), list(dataset.columns or [])
    rows = list(conditions.categories)[:MAX_COLUMNS]
    widest = min(MAX_CATEGORIES, max(len(conditions.categories[name]) for name in rows))
    figure = Figure(figsize=(1 + 2.4 * widest, 0.6 + 2.4 * len(rows)), dpi=110, layout="constrained")
    panels = figure.subplots(len(rows), widest, squeeze=False, sharex=True)
    low, high = (quantiles(batch.x[:, i], (0.002, 0.998)).tolist() for i in (0, -1))
    for name, axes in zip(rows, panels, strict=True):
        place = conditions.columns.index(name)
        levels = conditions.levels(name).tolist()
        for category, level, own in zip(conditions.categories[name], levels, axes, strict=False):
            assert batch.context is not None  # as the data have conditions
            same = batch[batch.context[:, place] == level]
            assert same.context is not None
            chosen = torch.arange(num_points) % len(same)
            with torch.no_grad():
                drawn = flow.sample((), same.context[chosen].to(flow.device), generator).cpu().double()
            _compare(own, same.x, drawn, (low, high))
            own.set_title(f"{name}: {category if isinstance(category, str) else f'{category:g}'}", fontsize=9)
            own.set_xlabel(names[0])
            tidy(own)
        for own in axes[len(levels) :]:
            own.axis("off")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper right", frameon=False, ncols=2)
    return figure


def condition_figures(flow: CNF, dataset: Dataset, generator: torch.Generator | None = None) -> dict[str, Figure]:
    """Plot all that suits a flow on one or two values given columns of a table."""
    conditions = dataset.conditions
    if conditions is None or len(flow.event_shape) != 1 or flow.event_shape[0] > MAX_VALUES:
        return {}
    found = {}
    if conditions.numbers:
        found["predictive_intervals"] = predictive_intervals(flow, dataset, generator=generator)
    if conditions.categories:
        found["samples_by_category"] = samples_by_category(flow, dataset, generator=generator)
    return found


def _conditions_of(flow: CNF, dataset: Dataset) -> Conditions:
    if dataset.conditions is None or len(flow.event_shape) != 1 or flow.event_shape[0] > MAX_VALUES:
        raise InvalidValueError(
            f"this plot needs one or two values given columns of a table, got {dataset.name!r} with points of shape "
            f"{flow.event_shape} and {'no conditions' if dataset.conditions is None else 'conditions'}"
        )
    return dataset.conditions


def _training_contexts(dataset: Dataset) -> Tensor:  # (n, k)
    found = dataset.reference_contexts()
    assert found is not None  # as the data have conditions
    return found


def _whole(dataset: Dataset) -> Batch:
    """Training points with their contexts."""
    return Batch(dataset.reference(), _training_contexts(dataset))


def _typical(conditions: Conditions, known: Tensor) -> Tensor:  # (k,)
    """The median of each number, and the most frequent of each category."""
    typical = known.median(0).values
    for name in conditions.categories:
        place = conditions.columns.index(name)
        values, counts = known[:, place].unique(return_counts=True)
        typical[place] = values[counts.argmax()]
    return typical


def _held(conditions: Conditions, centre: Tensor) -> str:
    """Where the conditions are that a panel does not vary, categories first, as a line of text."""
    values = {name: column[0] for name, column in conditions.decode(centre[None]).items()}
    varied = [conditions.columns[place] for place in conditions.numbers]
    names = [*conditions.categories, *(varied if len(varied) > 1 else ())]  # a single one is never held
    parts = [f"{name} {value if isinstance((value := values[name]), str) else f'{value:.3g}'}" for name in names]
    more = f", and {len(parts) - MAX_HELD} more" if len(parts) > MAX_HELD else ""
    return textwrap.fill("other conditions: " * bool(parts) + ", ".join(parts[:MAX_HELD]) + more, 100)


def _intervals(axes: Axes, places: Tensor, drawn: Tensor, points: Batch, place: int, value: int) -> None:
    """Draw the points and quantiles of draws (S, n)."""
    assert points.context is not None
    axes.scatter(points.context[:, place], points.x[:, value], s=6, color=DATA, alpha=0.5, linewidths=0, label="data")
    lowest, low, middle, high, highest = np.quantile(drawn.numpy(), LEVELS, axis=0)
    x = places.numpy()
    for ends, style, label in (((lowest, highest), ":", "90 %"), ((low, high), "--", "50 %")):
        axes.plot(x, ends[0], style, color=FLOW, linewidth=1, label=label)
        axes.plot(x, ends[1], style, color=FLOW, linewidth=1)
    axes.plot(x, middle, color=FLOW, linewidth=1.5, label="median")


def _shade(axes: Axes, flow: CNF, contexts: Tensor, place: int) -> None:
    """Draw the predictive density of a single value behind, at each place by its own maximum."""
    low, high = axes.get_ylim()
    values = torch.linspace(low, high, PIXELS, dtype=flow.dtype, device=flow.device)
    points = values[:, None, None].expand(PIXELS, len(contexts), 1)
    with torch.no_grad():
        density = flow.log_prob(points, contexts.to(flow.device)).double().exp().cpu()
    left, right = contexts[0, place].item(), contexts[-1, place].item()
    relative = (density / density.max(0).values.clamp_min(1e-300)).numpy()
    picture = np.empty((*relative.shape, 4))
    picture[..., :3], picture[..., 3] = to_rgb(FLOW), 0.4 * relative
    extent = (left, right, low, high)
    axes.imshow(picture, origin="lower", extent=extent, aspect="auto", interpolation="bilinear", zorder=0)


def _compare(axes: Axes, data: Tensor, drawn: Tensor, ends: tuple[Sequence[float], Sequence[float]]) -> None:
    """Draw histograms of one value, or points of two."""
    if data.shape[1] == 1:
        edges = np.linspace(ends[0][0], ends[0][1], 31).tolist()
        for points, colour, label in ((data, DATA, "data"), (drawn, FLOW, "flow samples")):
            axes.hist(points[:, 0].numpy(), edges, density=True, color=colour, alpha=0.45, label=label)
        axes.set_yticks([])
        return
    for points, colour, label in ((data, DATA, "data"), (drawn[: len(data)], FLOW, "flow samples")):
        axes.scatter(*points.T.numpy(), s=4, color=colour, alpha=0.4, linewidths=0, label=label)
    axes.set(xlim=ends[0], ylim=ends[1])
