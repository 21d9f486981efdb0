"""The mark of a density that cannot be right."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flows.models.cnf import CNF
from flows.models.mass import ALLOWED, mass
from flows.models.resolution import CHECKED_POINTS, solver_fault


def doubt(
    flow: CNF,
    grid_mass: float,
    low: Sequence[float],
    high: Sequence[float],
    points: Tensor,  # (n, 2), of the data
    context: Tensor | None = None,  # (*context)
) -> str | None:
    """Return "unresolved" with the reason, for a title; None if nothing speaks against the density.

    Takes a solver error on a few points of the data. A mass that seems off is checked with random points and samples:
    the grid may cut the density, or be too coarse for it.

    Args:
        grid_mass: the sum of the drawn density times the area of a pixel.
        low, high: corners of the picture.
    """
    few = points[:CHECKED_POINTS].to(flow.device, torch.promote_types(points.dtype, flow.dtype))
    own = None if context is None else context.to(flow.device)
    if len(few):
        with torch.no_grad():
            estimate = flow.estimate_log_prob(few, own)
        assert estimate.solver_error is not None  # as asked for
        error = float(estimate.solver_error.double().mean())
        spread = float(estimate.value.double().std()) / len(few) ** 0.5 if len(few) > 1 else 0.0
        if solver_fault(error, spread, flow.solver) is not None:
            return "unresolved: solver error " + ("unknown" if math.isnan(error) else f"{error:.2g} nats")
    if abs(grid_mass - 1) <= ALLOWED:
        return None
    generator = torch.Generator(flow.device).manual_seed(0)
    found = mass(flow, low, high, context, generator)
    return None if found.fault is None else f"unresolved: mass {found.total:.2f}"


def marked(title: str, mark: str | None) -> str:
    """Return the title, with the mark below if there is one."""
    return title if mark is None else f"{title}\n({mark})"
