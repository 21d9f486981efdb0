"""Pictures of flows as matplotlib figures, in data space; nothing here touches pyplot or shows a window."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure

from flows.cnf import CNF
from flows.datasets import Dataset
from flows.plots.classes import class_densities, class_samples
from flows.plots.features import pairs
from flows.plots.metrics import curves
from flows.plots.plane import density, evolution, samples, trajectories

__all__ = [
    "class_densities",
    "class_samples",
    "curves",
    "density",
    "evolution",
    "figures",
    "pairs",
    "samples",
    "trajectories",
]


def figures(flow: CNF, dataset: Dataset, generator: torch.Generator | None = None) -> dict[str, Figure]:
    """The pictures that suit the data.

    Points of the plane get ``density``, ``samples``, ``trajectories`` and ``evolution``, anything else
    ``samples`` of its first features. A conditional flow gets ``samples``, under the contexts of the data, and for
    classes in the plane ``class_samples`` and ``class_densities``; nothing where the data has no contexts.
    """
    if dataset.context_shape is None and getattr(flow.field, "context_shape", None) is not None:
        return {}
    reference = dataset.reference()
    count = min(len(reference), 5000)
    context = dataset.contexts(count)
    with torch.no_grad():
        if context is not None:
            drawn = flow.sample((), context.to(flow.base.zero), generator)
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
