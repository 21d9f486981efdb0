"""Plots of flows as matplotlib figures, in data space; none uses pyplot or opens a window."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from flows.arguments import checked
from flows.datasets import Dataset
from flows.models.cnf import CNF
from flows.plots.calibration import expected_coverage, ranks
from flows.plots.classes import class_densities, class_samples
from flows.plots.conditions import condition_figures, predictive_intervals, samples_by_category
from flows.plots.features import pairs
from flows.plots.images import (
    image_classes,
    image_figures,
    image_samples,
    image_trajectories,
    interpolations,
    is_image,
    neighbours,
    save_grid,
)
from flows.plots.metrics import contact_sheet, curves
from flows.plots.outliers import outlier_scores
from flows.plots.paths import evolution, trajectories
from flows.plots.plane import density, scatter
from flows.plots.series import (
    SeriesPrediction,
    errors_over_time,
    phase_portraits,
    predict_curves,
    series_figures,
    time_series,
    vector_field,
)
from flows.plots.solve import steps
from flows.plots.style import points_to_plot
from flows.writing import write_result

__all__ = [
    "SeriesPrediction",
    "class_densities",
    "class_samples",
    "contact_sheet",
    "curves",
    "density",
    "errors_over_time",
    "evolution",
    "expected_coverage",
    "figures",
    "image_classes",
    "image_samples",
    "image_trajectories",
    "interpolations",
    "neighbours",
    "outlier_scores",
    "pairs",
    "phase_portraits",
    "predict_curves",
    "predictive_intervals",
    "ranks",
    "samples",
    "samples_by_category",
    "save_samples",
    "scatter",
    "series_figures",
    "steps",
    "time_series",
    "trajectories",
    "vector_field",
]


@checked
def figures(
    flow: CNF, dataset: Dataset, generator: torch.Generator | None = None, evaluated_with: str | None = None
) -> dict[str, Figure]:
    """Plot everything that suits the data.

    Points in the plane get `samples`, `density`, `trajectories` and `evolution`. Images get `samples`, `trajectories`,
    `neighbours`, `interpolations` and, with classes, `classes`. Other data get `samples` of their first features. A
    conditional flow gets `samples` under the contexts of the data and, for classes in the plane, `class_samples` and
    `class_densities`. One or two values given columns of a table get `predictive_intervals` and `samples_by_category`.
    Densities are left out if the base has none. Without points, or if the data lack the contexts of
    the flow, there are no plots.

    Args:
        generator: of samples and noise. Default: torch's.
        evaluated_with: name of the divergence estimator, shown below densities. Default: not shown.

    Example:
        ```python
        import flows

        data, flow = flows.datasets.Moons(), flows.CNF(flows.fields.MLP((2,), hidden=(8,)))
        for name, figure in flows.plots.figures(flow, data).items():
            figure.savefig(f"{name}.png")
        ```
    """
    lacks_contexts = dataset.context_shape is None and flow.bind().context_shape is not None
    if not dataset.has_samples or lacks_contexts:
        return {}
    if is_image(flow.event_shape):
        return image_figures(flow, dataset, generator)
    reference = dataset.reference()
    count = min(len(reference), 5000)
    context = dataset.contexts(count)
    with torch.no_grad():
        if context is not None:
            drawn = flow.sample((), context.to(flow.device, flow.dtype), generator)
        else:
            drawn = flow.sample((count,), generator=generator)
        pictures = {"samples": samples(drawn, reference, dataset.columns)}
        if flow.event_shape == (2,) and context is None:
            if flow.base.has_density:
                pictures["density"] = density(flow, dataset, evaluated_with=evaluated_with)
            pictures["trajectories"] = trajectories(flow, reference, generator=generator)
            pictures["evolution"] = evolution(flow, reference, generator=generator)
        elif flow.event_shape == (2,) and dataset.num_classes is not None:
            pictures["class_samples"] = class_samples(flow, dataset, generator=generator)
            if flow.base.has_density:
                pictures["class_densities"] = class_densities(flow, dataset, evaluated_with=evaluated_with)
        pictures |= condition_figures(flow, dataset, generator)
    return pictures


@checked
def samples(
    drawn: Tensor,  # (n, *event)
    data: Tensor | None,  # (m, *event); None: no data to compare with
    names: Sequence[str] | None = None,  # of the features
) -> Figure:
    """Plot samples beside data: images, points in the plane, or four features in pairs.

    Example:
        ```python
        import flows

        data, flow = flows.datasets.Moons(), flows.CNF(flows.fields.MLP((2,), hidden=(8,)))
        flows.plots.samples(flow.sample((200,)), data.sample(200)).savefig("samples.png")
        ```
    """
    drawn = points_to_plot("drawn", drawn, *[None] * max(1, drawn.ndim - 1))
    data = None if data is None else points_to_plot("data", data, *drawn.shape[1:])
    if is_image(drawn.shape[1:]):
        return image_samples(drawn, data)
    drawn, data = drawn.flatten(1), None if data is None else data.flatten(1)
    return scatter(drawn, data, names) if drawn.shape[1] == 2 else pairs(drawn, data, names)


@checked
def save_samples(
    path: str | os.PathLike[str],
    drawn: Tensor,  # (n, *event)
    data: Tensor | None,  # (m, *event); None: no data to compare with
    names: Sequence[str] | None = None,  # of the features
) -> None:
    """Write samples to an image file: a grid of images, or the plot `samples`.

    Raises:
        FileError: the file cannot be written.

    Example:
        ```python
        import torch

        import flows

        flows.plots.save_samples("samples.png", torch.randn(200, 2), None)
        ```
    """
    if is_image(drawn.shape[1:]):
        save_grid(path, drawn.cpu(), (drawn if data is None else data).cpu())
    else:
        write_result(path, samples(drawn, data, names))
