"""Posterior of x₁ given x_t = a x₁ + b x₀, for x₁ from a pool of points and standard normal x₀."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

MAX_DIMENSION_TO_SUM = 8  # up to here, one pass over queries × pool per dimension is faster than a float64 product


def posterior_moments(
    position: Tensor,  # (Q, *event), x_t
    a: Tensor,  # (Q, 1, ...)
    b: Tensor,  # (Q, 1, ...), > 0
    pool: Tensor,  # (P, *event), equally likely values of x₁
    possible: Tensor | None = None,  # (Q, P), at least one in each row; which of the pool it can be, all if None
    centre: tuple[Tensor, Tensor] | None = None,  # (Q, *event) each; a likely value of x₁, and what to add to it
) -> tuple[Tensor, Tensor | None]:  # (Q, *event), (Q,)
    """Return E[x₁ | x_t], and E[‖x₁ − c‖² | x_t] if there is a centre c.

    The centre is passed as a sum, because its distance to a nearby point of the pool needs more digits than c has.
    """
    flat, points, a, b = (tensor.flatten(1) for tensor in (pool.to(position), position, a, b))
    columns = flat.T.contiguous()
    if len(columns) <= MAX_DIMENSION_TO_SUM or flat.device.type == "mps":  # mps has no float64
        log_weights = partial(_summed_log_weights, columns=columns)
    else:
        keys = torch.cat([columns, columns.double().square().sum(0, keepdim=True)])
        log_weights = partial(_expanded_log_weights, keys=keys)
    # On a CPU, rows that fit into a core's cache are twice as fast. Elsewhere, use some hundred megabytes at a time.
    size = 128 if flat.device.type == "cpu" else max(1, 2**26 // len(flat))
    means, spreads = [], []
    with torch.autocast(flat.device.type, enabled=False):  # the target is divided by 1 − t, which costs digits
        for start in range(0, len(points), size):
            rows = slice(start, start + size)
            logits = log_weights(points[rows], a[rows], b[rows])
            if possible is not None:
                logits = logits.masked_fill(~possible[rows], -torch.inf)
            weights = logits.softmax(1)
            means.append(functional.linear(weights, columns))
            if centre is not None:
                near, offset = (part[rows].flatten(1).to(points) for part in centre)
                spreads.append(torch.linalg.vecdot(weights, _squared_distances(near, columns, offset=offset)))
    return torch.cat(means).view_as(position), None if centre is None else torch.cat(spreads)


def _squared_distances(
    points: Tensor,  # (Q, d)
    columns: Tensor,  # (d, P)
    scale: Tensor | None = None,  # (Q, 1), 1 if None
    offset: Tensor | None = None,  # (Q, d), 0 if None
) -> Tensor:  # (Q, P)
    """Return ‖scale c − x − offset‖² for each point x and column c.

    The sum runs over one dimension at a time, because a matrix product would lose digits.
    """
    total: Tensor | None = None
    for i, (point, column) in enumerate(zip(points.T.unsqueeze(2), columns, strict=True)):
        difference = column - point if scale is None else torch.addcmul(-point, scale, column)
        if offset is not None:
            difference.sub_(offset[:, i : i + 1])
        total = difference.square_() if total is None else total.addcmul_(difference, difference)
    assert total is not None, "events have at least one number"
    return total


def _summed_log_weights(points: Tensor, a: Tensor, b: Tensor, columns: Tensor) -> Tensor:
    """Return −‖x_t − a x_j‖² / 2b² (Q, P) from `columns` (d, P)."""
    return _squared_distances(points, columns, a).mul_(-0.5 * b.square().reciprocal())


def _expanded_log_weights(points: Tensor, a: Tensor, b: Tensor, keys: Tensor) -> Tensor:
    """Return the same up to a term that does not depend on j, as one product with `keys`.

    The keys are x_j and ‖x_j‖² (d + 1, P). The terms are large where b is small, so their difference needs float64.
    """
    points_64, a, b = points.double(), a.double(), b.double()
    precision = b.square().reciprocal()
    logits = torch.cat([precision * a * points_64, -0.5 * precision * a.square()], dim=1) @ keys
    return (logits - logits.amax(1, keepdim=True)).to(points)
