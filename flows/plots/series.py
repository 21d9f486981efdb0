"""Time series: predictions beside observations, phase portraits, vector fields, errors over time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from flows.arguments import checked
from flows.checks import whole_number
from flows.datasets import DynamicalSystem, Series, SeriesBatch
from flows.models.neural_ode import NeuralODE
from flows.plots.plane import label_plane, square
from flows.plots.style import DATA, FLOW, MUTED, tidy
from flows.predictions import Predictions, model_device, predict, predictive_sd
from flows.solvers import SolverError

FINE = 300  # times of a curve
MAX_COLUMNS, MAX_ROWS, MAX_PATHS = 3, 4, 4  # series and entries of a figure; series of a phase portrait
TRUTH_WIDTH = 5.0  # of lines, so that the truth shows beside a prediction on top of it
WITHIN = 3.0  # solver errors in a band
INTERVAL = 1.645  # standard deviations of noise in a 90 % interval
ERRORS = 32  # series of the errors over time
SPEED = "viridis"  # colour map
BINS = 24  # of the errors over time


@checked
@dataclass(frozen=True)
class SeriesPrediction:
    """Curves that a model predicts, and what is known of the same series; all on the CPU.

    Example:
        ```python
        import flows

        data = flows.datasets.Spiral(num_series=10, num_times=20)
        ode = flows.NeuralODE(flows.fields.MLP((2,), hidden=(8,)))
        drawn = flows.plots.predict_curves(ode, data)  # a `SeriesPrediction`
        drawn.times, drawn.states, drawn.truth
        ```
    """

    times: Tensor  # (N, G)
    states: Tensor  # (N, G, d), the entries of a state flattened
    solver_error: Tensor  # (N, G, d)
    sd: Tensor | None = None  # (N, G, d), of observations; None: the model knows no noise
    observed_times: Tensor | None = None  # (N, T)
    observed: Tensor | None = None  # (N, T, d), NaN where nothing was observed
    truth: Tensor | None = None  # (N, G, d), the states without noise
    names: Sequence[str] | None = None  # of the entries
    labels: Sequence[str] | None = None  # of the series
    span: float | None = None  # how long training series go on


@checked
def series_figures(model: NeuralODE, dataset: Series, part: str = "test") -> dict[str, Figure]:
    """Plot predictions of a part: `series`, `errors`, `phase` from two entries on, `field` in the plane.

    Where predictions stop beyond the training span, they are shown up to it.

    Example:
        ```python
        import flows

        data = flows.datasets.Spiral(num_series=10, num_times=20)
        ode = flows.NeuralODE(flows.fields.MLP((2,), hidden=(8,)))
        flows.plots.series_figures(ode, data)
        ```
    """
    drawn = predict_curves(model, dataset, part, MAX_PATHS)
    until = None
    try:
        found = predict(model, dataset, part, ERRORS, ERRORS, ERRORS)
    except SolverError:
        until = dataset.training_span
        found = predict(model, dataset, part, ERRORS, ERRORS, ERRORS, until)
    pictures = {"series": time_series(drawn), "errors": errors_over_time(found)}
    if drawn.states.shape[-1] > 1:
        pictures["phase"] = phase_portraits(drawn)
    if model.event_shape == (2,):
        pictures["field"] = vector_field(model, dataset)
    return pictures


@checked
def predict_curves(model: NeuralODE, dataset: Series, part: str = "test", num_series: int = 4) -> SeriesPrediction:
    """Predict the first series of a part at close times.

    Example:
        ```python
        import flows

        data = flows.datasets.Spiral(num_series=10, num_times=20)
        ode = flows.NeuralODE(flows.fields.MLP((2,), hidden=(8,)))
        flows.plots.predict_curves(ode, data)
        ```
    """
    whole_number("num_series", num_series)
    device = model_device(model)
    batches = dataset.test_batches if part == "test" else dataset.validation_batches
    batch = next(iter(batches(num_series, device, model.dtype if device.type == "mps" else torch.float64)))
    assert isinstance(batch, SeriesBatch)  # those of a `Series` are
    span = dataset.training_span
    try:
        times, states, error = _curves(model, batch)
    except SolverError:
        times, states, error = _curves(model, batch.until(span))
    size = states.shape[-1]
    observed = batch.x.where(batch.observed, torch.nan).flatten(2)
    truth = None
    if isinstance(dataset, DynamicalSystem):
        truth = dataset.solve(batch.x[:, 0].double().cpu(), times.double().cpu()).flatten(2)
    spread = predictive_sd(model, states.view(*states.shape[:2], *model.event_shape))
    return SeriesPrediction(
        times=times.cpu(),
        states=states.cpu(),
        solver_error=error.cpu(),
        sd=None if spread is None else spread.flatten(2).cpu(),
        observed_times=batch.times.cpu(),
        observed=observed.cpu(),
        truth=truth,
        names=dataset.columns or [f"x{i}" for i in range(size)],
        labels=[f"series {i + 1}" for i in range(len(observed))],
        span=span,
    )


def _curves(model: NeuralODE, batch: SeriesBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Close times (N, G), states and solver errors (N, G, d)."""
    start, end = batch.times[:, :1], batch.times[:, -1:]
    times = start + (end - start) * torch.linspace(0, 1, FINE, dtype=start.dtype, device=start.device)
    with torch.no_grad():
        path = model.trajectory(batch.x[:, 0], times, batch.context)
    assert path.solver_error is not None  # as asked for
    return times, path.states.flatten(2), path.solver_error.flatten(2)


@checked
def time_series(drawn: SeriesPrediction) -> Figure:
    """Plot the entries of up to three series over time: predictions as lines, observations as points.

    A wide band is the interval that should hold 90 % of observations, if the model knows noise; a narrow dark one is
    three solver errors. The dashed line is the end of the training span.

    Example:
        ```python
        import flows

        data = flows.datasets.Spiral(num_series=10, num_times=20)
        ode = flows.NeuralODE(flows.fields.MLP((2,), hidden=(8,)))
        drawn = flows.plots.predict_curves(ode, data)  # a `SeriesPrediction`
        flows.plots.time_series(drawn)
        ```
    """
    columns, rows = min(MAX_COLUMNS, len(drawn.states)), min(MAX_ROWS, drawn.states.shape[-1])
    figure = Figure(figsize=(max(4.4, 2.9 * columns), 1.1 + 1.6 * rows), dpi=120, layout="constrained")
    panels = figure.subplots(rows, columns, sharex="col", sharey="row", squeeze=False)
    for i in range(columns):
        for k in range(rows):
            _draw_entry(panels[k, i], drawn, i, k)
        panels[-1, i].set_xlabel("t", fontsize=12)
        if drawn.labels is not None:
            panels[0, i].set_title(drawn.labels[i], fontsize=12)
    for k in range(rows):
        panels[k, 0].set_ylabel("" if drawn.names is None else drawn.names[k], fontsize=12)
        _sensible_limits(panels[k, :], drawn, k)
    figure.legend(handles=_legend(drawn), loc="outside upper center", ncols=1 + columns, frameon=False, fontsize=11)
    return figure


def _draw_entry(axes: Axes, drawn: SeriesPrediction, i: int, k: int) -> None:
    times, states = drawn.times[i].numpy(), drawn.states[i, :, k].numpy()
    if drawn.truth is not None:
        axes.plot(times, drawn.truth[i, :, k].numpy(), color=DATA, linewidth=TRUTH_WIDTH, alpha=0.4)
    if drawn.observed is not None and drawn.observed_times is not None:
        axes.plot(drawn.observed_times[i].numpy(), drawn.observed[i, :, k].numpy(), "o", color=DATA, ms=3)
    if drawn.sd is not None:
        half = INTERVAL * drawn.sd[i, :, k].numpy()
        axes.fill_between(times, states - half, states + half, color=FLOW, alpha=0.22, linewidth=0)
    half = WITHIN * drawn.solver_error[i, :, k].numpy()
    axes.fill_between(times, states - half, states + half, color=FLOW, alpha=0.55, linewidth=0)
    axes.plot(times, states, color=FLOW, linewidth=1.8)
    _mark_span(axes, drawn.times[i, 0].item(), drawn.span, drawn.times[i, -1].item())
    axes.grid(alpha=0.25)
    tidy(axes)
    axes.tick_params(labelsize=10)


def _legend(drawn: SeriesPrediction) -> list[Line2D]:
    handles = [Line2D([], [], color=FLOW, linewidth=1.8, label="prediction")]
    if drawn.observed is not None:
        handles.append(Line2D([], [], color=DATA, marker="o", ms=4, linewidth=0, label="observed"))
    if drawn.truth is not None:
        handles.append(Line2D([], [], color=DATA, linewidth=TRUTH_WIDTH, alpha=0.4, label="truth"))
    if drawn.sd is not None:
        handles.append(Line2D([], [], color=FLOW, linewidth=7, alpha=0.3, label="90 % interval"))
    if drawn.span is not None and bool((drawn.times[:, -1] - drawn.times[:, 0] > drawn.span * (1 + 1e-6)).any()):
        handles.append(Line2D([], [], color=MUTED, linestyle="--", label="end of training span"))
    return handles


def _mark_span(axes: Axes, start: float, span: float | None, end: float) -> None:
    if span is not None and end - start > span * (1 + 1e-6):
        axes.axvline(start + span, color=MUTED, linestyle="--", linewidth=1.3)
        axes.axvspan(start + span, end, color=MUTED, alpha=0.09, linewidth=0)


def _sensible_limits(panels: Iterable[Axes], drawn: SeriesPrediction, k: int) -> None:
    """Keep the range of what was observed, so that a prediction that explodes does not flatten all else."""
    known = drawn.truth if drawn.truth is not None else drawn.observed
    if known is None:
        return
    values = known[:, :, k][known[:, :, k].isfinite()]
    low, high = values.min().item(), values.max().item()
    room = 0.6 * (high - low) or 1.0
    for axes in panels:
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(bottom, low - room), min(top, high + room))


@checked
def phase_portraits(drawn: SeriesPrediction) -> Figure:
    """Plot pairs of entries against each other, for up to four series.

    Predictions are dashed beyond the training span. Circles are the initial states.

    Example:
        ```python
        import flows

        data = flows.datasets.Spiral(num_series=10, num_times=20)
        ode = flows.NeuralODE(flows.fields.MLP((2,), hidden=(8,)))
        drawn = flows.plots.predict_curves(ode, data)  # a `SeriesPrediction`
        flows.plots.phase_portraits(drawn)
        ```
    """
    size = drawn.states.shape[-1]
    pairs = [(0, 1), (0, 2), (1, 2)] if size == 3 else [(k, k + 1) for k in range(0, size - 1, 2)][:3]
    names = drawn.names or [f"x{i}" for i in range(size)]
    figure = Figure(figsize=(max(4.8, 3.6 * len(pairs)), 4.6), dpi=120, layout="constrained")
    for axes, pair in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        for i in range(min(MAX_PATHS, len(drawn.states))):
            _draw_path(axes, drawn, i, pair)
        known = drawn.truth if drawn.truth is not None else drawn.observed
        points = (drawn.states if known is None else known)[:, :, list(pair)].flatten(0, 1)
        points = points[points.isfinite().all(1)]
        low, high = points.min(0).values, points.max(0).values
        room = 0.15 * (high - low).clamp(min=1e-12)
        axes.set(xlim=(float(low[0] - room[0]), float(high[0] + room[0])))
        axes.set(ylim=(float(low[1] - room[1]), float(high[1] + room[1])))
        axes.set_xlabel(names[pair[0]], fontsize=11)
        axes.set_ylabel(names[pair[1]], fontsize=11)
        tidy(axes)
    compared = "observed" if drawn.truth is None else "truth"
    handles = [handle for handle in _legend(drawn) if handle.get_label() in ("prediction", compared)]
    if drawn.span is not None and bool((drawn.times[:, -1] - drawn.times[:, 0] > drawn.span * (1 + 1e-6)).any()):
        handles.append(Line2D([], [], color=FLOW, linestyle=":", linewidth=1.8, label="beyond the span"))
    figure.legend(handles=handles, loc="outside upper center", ncols=2 * len(pairs), frameon=False, fontsize=11)
    return figure


def _draw_path(axes: Axes, drawn: SeriesPrediction, i: int, pair: tuple[int, int]) -> None:
    if drawn.truth is not None:
        axes.plot(*drawn.truth[i][:, list(pair)].T.numpy(), color=DATA, linewidth=TRUTH_WIDTH, alpha=0.4)
    elif drawn.observed is not None:
        axes.plot(*drawn.observed[i][:, list(pair)].T.numpy(), "o", color=DATA, ms=2.5, alpha=0.7)
    path = drawn.states[i][:, list(pair)]
    span = float("inf") if drawn.span is None else drawn.span * (1 + 1e-6)
    inside = drawn.times[i] - drawn.times[i, 0] <= span
    axes.plot(*path[inside].T.numpy(), color=FLOW, linewidth=1.5)
    axes.plot(*path[~inside].T.numpy(), color=FLOW, linewidth=1.5, linestyle=":")
    axes.plot(*path[0].numpy(), "o", color=FLOW, ms=5, markeredgecolor="white")


@checked
def vector_field(model: NeuralODE, dataset: Series, resolution: int = 24) -> Figure:
    """Plot streamlines of dx/dt in the plane, beside those of the true system if it is known.

    Colour is speed. A field that depends on time or a context is shown at the start of the first test series.

    Example:
        ```python
        import flows

        data = flows.datasets.Spiral(num_series=10, num_times=20)
        ode = flows.NeuralODE(flows.fields.MLP((2,), hidden=(8,)))
        flows.plots.vector_field(ode, data)
        ```
    """
    whole_number("resolution", resolution, 4, 512)
    low, high = square(dataset.reference(), quantile=0.002, margin=0.06)
    device = model_device(model)
    batch = next(iter(dataset.test_batches(1, device, model.dtype)))
    assert isinstance(batch, SeriesBatch)  # those of a `Series` are
    sides = [torch.linspace(low[i], high[i], resolution, dtype=torch.float64) for i in (0, 1)]
    x = torch.cartesian_prod(*sides)
    start = float(batch.times[0, 0])
    shown = {"model": _velocity(model, x, start, batch.context)}
    if isinstance(dataset, DynamicalSystem):
        shown = {"truth": dataset.velocity(torch.tensor(start, dtype=torch.float64), x), **shown}
    norm = Normalize(0, max(float(v.norm(dim=1).max()) for v in shown.values()))
    figure = Figure(figsize=(4.7 * len(shown) + 0.6, 4.8), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, (name, v) in zip(panels, shown.items(), strict=True):
        u, w = (v[:, i].view(resolution, resolution).T.numpy() for i in (0, 1))
        axes.streamplot(
            sides[0].numpy(),
            sides[1].numpy(),
            u,
            w,
            color=np.hypot(u, w),
            cmap=SPEED,
            norm=norm,
            density=1.1,
            linewidth=1.4,
        )
        axes.scatter(*dataset.reference()[:2000].T.numpy(), s=3, color=MUTED, alpha=0.3, linewidths=0, zorder=0)
        label_plane(axes, name, dataset.columns)
        axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    for axes in panels[1:]:
        axes.set_ylabel("")
    tidy(figure.colorbar(ScalarMappable(norm, SPEED), ax=list(panels), label="speed", pad=0.02).ax)
    return figure


def _velocity(model: NeuralODE, x: Tensor, time: float, context: Tensor | None) -> Tensor:
    """dx/dt in data space, (n, 2)."""
    own = None if context is None else context[:1].expand(len(x), *context.shape[1:])
    with torch.no_grad():
        y = model.transform(x.to(model_device(model)))[0].to(model.dtype)
        v = model.bind(own)(torch.tensor(time, dtype=y.dtype, device=y.device), y)
    return torch.func.jvp(lambda y: model.transform.inverse(y)[0], (y,), (v,))[1].detach().double().cpu()


@checked
def errors_over_time(found: Predictions) -> Figure:
    """Plot the error against the time since the start of each series, on a logarithmic scale.

    The line is the median over series, the band from the 10th to the 90th percentile; solver errors are grey.
    """
    counts, horizon = found.counts("all"), found.horizon
    edges = torch.linspace(0, float(horizon.max()), BINS + 1, dtype=torch.float64)
    shown = {"error": (found.relative(found.error), FLOW), "solver error": (found.relative(found.solver_error), MUTED)}
    figure = Figure(figsize=(5.6, 3.9), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, (errors, colour) in shown.items():
        middles, low, middle, high = [], [], [], []
        for left, right in itertools.pairwise(edges):
            inside = (horizon > left) & (horizon <= right * (1 + 1e-9))
            own = counts & inside.view(*inside.shape, *[1] * (counts.ndim - 2))
            own = own[: len(errors)].flatten(1)
            number = own.sum(1)
            roots = (errors.flatten(1).square().where(own, 0.0).sum(1)[number > 0] / number[number > 0]).sqrt()
            roots = roots[roots.isfinite() & (roots > 0)]
            if len(roots):
                found_at = np.quantile(roots.numpy(), [0.1, 0.5, 0.9])
                for values, value in zip((low, middle, high), found_at, strict=True):
                    values.append(value)
                middles.append(float(left + right) / 2)
        if middles:
            axes.fill_between(middles, low, high, color=colour, alpha=0.25, linewidth=0)
            axes.plot(middles, middle, "-o", color=colour, linewidth=1.8, ms=3, label=name)
    _mark_span(axes, 0.0, found.span, float(edges[-1]))
    axes.set(yscale="log", xlabel="time since the start")
    axes.set_ylabel("error / standard deviation", fontsize=10)
    axes.legend(frameon=False, fontsize=10)
    axes.grid(alpha=0.25)
    tidy(axes)
    return figure
