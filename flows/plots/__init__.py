"""Pictures of flows as matplotlib figures, in data space; nothing here touches pyplot or shows a window."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure

from flows.cnf import CNF
from flows.datasets import Dataset
from flows.plots.features import pairs
from flows.plots.metrics import curves
from flows.plots.plane import density, evolution, samples, trajectories

__all__ = ["curves", "density", "evolution", "figures", "pairs", "samples", "trajectories"]


def figures(flow: CNF, dataset: Dataset, generator: torch.Generator | None = None) -> dict[str, Figure]:
    """The pictures of an unconditional flow that suit its data.

    Points of the plane get ``density``, ``samples``, ``trajectories`` and ``evolution``, anything else
    ``samples`` of its first features. A conditional flow has no picture of its own: there are none.
    """
    if getattr(flow.field, "context_shape", None) is not None:
        return {}
    reference = dataset.reference()
    with torch.no_grad():
        drawn = flow.sample((min(len(reference), 5000),), generator=generator)
        pictures = {"samples": samples(drawn, reference, getattr(dataset, "columns", None))}
        if flow.event_shape == (2,):
            pictures["density"] = density(flow, dataset)
            pictures["trajectories"] = trajectories(flow, reference, generator=generator)
            pictures["evolution"] = evolution(flow, reference, generator=generator)
    return pictures
