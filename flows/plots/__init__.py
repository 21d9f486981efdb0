"""Pictures of flows as matplotlib figures, in data space; nothing here touches pyplot or shows a window."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from flows.datasets import Dataset
from flows.models.cnf import CNF
from flows.plots.classes import class_densities, class_samples
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
from flows.plots.metrics import curves
from flows.plots.plane import density, evolution, scatter, trajectories
from flows.plots.sheet import contact_sheet
from flows.plots.solve import steps

__all__ = [
    "class_densities",
    "class_samples",
    "contact_sheet",
    "curves",
    "density",
    "evolution",
    "figures",
    "image_classes",
    "image_samples",
    "image_trajectories",
    "interpolations",
    "neighbours",
    "pairs",
    "samples",
    "save_samples",
    "scatter",
    "steps",
    "trajectories",
]


def figures(flow: CNF, dataset: Dataset, generator: torch.Generator | None = None) -> dict[str, Figure]:
    """The pictures that suit the data.

    Points of the plane get ``density``, ``samples``, ``trajectories`` and ``evolution``, images ``samples``,
    ``trajectories``, ``neighbours``, ``interpolations`` and, with classes, ``classes``, anything else
    ``samples`` of its first features. A conditional flow gets ``samples``, under the contexts of the data, and for
    classes in the plane ``class_samples`` and ``class_densities``; nothing where the data has no contexts,
    or no points.
    """
    if not dataset.has_samples or (
        dataset.context_shape is None and getattr(flow.field, "context_shape", None) is not None
    ):
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
        pictures = {"samples": samples(drawn, reference, getattr(dataset, "columns", None))}
        if flow.event_shape == (2,) and context is None:
            pictures["density"] = density(flow, dataset)
            pictures["trajectories"] = trajectories(flow, reference, generator=generator)
            pictures["evolution"] = evolution(flow, reference, generator=generator)
        elif flow.event_shape == (2,) and dataset.num_classes is not None:
            pictures["class_samples"] = class_samples(flow, dataset, generator=generator)
            pictures["class_densities"] = class_densities(flow, dataset)
    return pictures


def samples(
    drawn: Tensor,  # (n, *event)
    data: Tensor | None,  # (m, *event); None: there is nothing to compare with
    names: Sequence[str] | None = None,  # of the features
) -> Figure:
    """Samples of the flow beside the data: images, points of the plane, or the first four features in pairs."""
    drawn, data = drawn.cpu(), None if data is None else data.cpu()
    if is_image(drawn.shape[1:]):
        return image_samples(drawn, data)
    drawn, data = drawn.flatten(1), None if data is None else data.flatten(1)
    return scatter(drawn, data, names) if drawn.shape[1] == 2 else pairs(drawn, data, names)


def save_samples(
    path: str | os.PathLike[str],
    drawn: Tensor,  # (n, *event)
    data: Tensor | None,  # (m, *event); None: there is nothing to compare with
    names: Sequence[str] | None = None,  # of the features
) -> None:
    """Write a picture of samples: a grid of images in the shades of the data, or :func:`samples` of anything else."""
    if is_image(drawn.shape[1:]):
        save_grid(path, drawn.cpu(), (drawn if data is None else data).cpu())
    else:
        samples(drawn, data, names).savefig(path)
