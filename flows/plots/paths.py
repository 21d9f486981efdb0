"""Points of the base on their way to the data."""

from __future__ import annotations

import torch
from torch import Tensor

from flows.models.cnf import CNF


def draw_paths(
    flow: CNF,
    num_points: int,
    times: Tensor,
    generator: torch.Generator | None,
    context: Tensor | None = None,  # (num_points, *context)
) -> Tensor:  # (T, n, *event)
    """Points of the base carried through ``times``, in data space, on the CPU."""
    with torch.no_grad():
        base = flow.base.sample((num_points,), generator)
        states = flow.transport(base, times.tolist(), context, generator, log_density=False).x
        return torch.stack([flow.transform.inverse(state)[0] for state in states]).cpu()
