"""Posterior of x₁ given x_t = a x₁ + b x₀, for x₁ from a pool of points and x₀ from a base with a density."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from flows.bases import Base, Mixture, Normal

MOST_NUMBERS = 2**20  # of pairs of a query and a point of the pool that a base is asked about at once
MAX_DIMENSION_TO_SUM = 8  # up to here, one pass over queries × pool per dimension is faster than a float64 product


def base_posterior(
    base: Base,
    noise: Tensor,  # (Q, *event), x₀
    ends: Tensor,  # (Q, *event), x₁
    a: Tensor,  # (Q, 1, ...)
    b: Tensor,  # (Q, 1, ...), > 0
    pool: Tensor | None,  # (P, *event), equally likely values of x₁; None: the own end alone
    possible: Tensor | None = None,  # (Q, P), at least one in each row; which of the pool it can be, all if None
    offset: Tensor | None = None,  # (Q, *event), m − x₁ for a mean m
) -> tuple[Tensor, Tensor | None]:  # (Q, *event), (Q,)
    """Return E[x₁ | x_t], and the curvature E[(x₁ − m)·(s(x₁) − s(m)) | x_t] if there is a mean m.

    The weights are w_j ∝ p₀((x_t − a x_j)/b), and s(x₁) = ∇_x log p₀((x − a x₁)/b). If m is E[x₁ | x_t], the curvature
    is the divergence of E[x₁ | x_t = x]: ∇w_j = w_j (s_j − s̄), and E[(x₁ − m)·s(m)] = 0. For N(0, I) it is
    a E‖x₁ − m‖²/b². For other normal bases the same holds after whitening; any other base is asked for its `log_prob`
    at all pairs of a query and a point of the pool.
    """
    with torch.autocast(noise.device.type, enabled=False):  # the target is divided by 1 − t, which costs digits
        return _base_posterior(base, noise, ends, a, b, pool, possible, offset)


def _base_posterior(
    base: Base,
    noise: Tensor,
    ends: Tensor,
    a: Tensor,
    b: Tensor,
    pool: Tensor | None,
    possible: Tensor | None,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    if is_own(base, Normal):
        return _normal_posterior(base, noise, ends, a, b, pool, possible, offset)
    if is_own(base, Mixture) and pool is not None:
        return _mixture_posterior(base, noise, ends, a, b, pool, possible, offset)
    if pool is None:
        return ends, None if offset is None else _curvature(base, noise, a, b, -offset.unsqueeze(1), None, offset)[:, 0]
    size = max(1, MOST_NUMBERS // pool.numel())
    means, curvatures = [], []
    for start in range(0, len(noise), size):
        rows = slice(start, start + size)
        away = pool.to(ends) - ends[rows].unsqueeze(1)  # x_j − x₁, exactly 0 for the own end
        z = noise[rows].unsqueeze(1) - (a[rows] / b[rows]).unsqueeze(1) * away
        with torch.no_grad():
            logits = base.log_prob(z)
        if possible is not None:
            logits = logits.masked_fill(~possible[rows], -torch.inf)
        weights = logits.softmax(1)
        means.append(torch.einsum("qp,pd->qd", weights, pool.to(ends).flatten(1)))
        if offset is not None:
            differences = away - offset[rows].unsqueeze(1)
            pairs = _curvature(base, noise[rows], a[rows], b[rows], differences, z, offset[rows])
            curvatures.append((weights * pairs).sum(1))
    return torch.cat(means).view_as(ends), torch.cat(curvatures) if offset is not None else None


def is_own(base: Base, kind: type[Base]) -> bool:
    """Return whether a base is of a kind, and no subclass has changed what it draws."""
    own = type(base)
    return isinstance(base, kind) and own.sample is kind.sample and own.log_prob is kind.log_prob


def _normal_posterior(
    base: Base,
    noise: Tensor,
    ends: Tensor,
    a: Tensor,
    b: Tensor,
    pool: Tensor | None,
    possible: Tensor | None,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    assert isinstance(base, Normal)
    with torch.no_grad():
        if not base.is_standard:
            noise = noise - base.mean.view(base.event_shape)
        noise, ends = base.whitened(noise), base.whitened(ends)
        offset, pool = (None if part is None else base.whitened(part) for part in (offset, pool))
        if pool is None:
            mean, spread = ends, None if offset is None else offset.flatten(1).square().sum(1)
        else:
            centre = None if offset is None else (ends, offset)
            mean, spread = posterior_moments(a * ends + b * noise, a, b, pool, possible, centre)
        scale = (a / b**2).flatten()
        return base.coloured(mean), None if spread is None else scale * spread


@torch.no_grad()
def _mixture_posterior(
    base: Base,
    noise: Tensor,
    ends: Tensor,
    a: Tensor,
    b: Tensor,
    pool: Tensor,
    possible: Tensor | None,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Sum over pairs of a point of the pool and a component, of weights π_k N((x_t − a x_j)/b; μ_k, Σ_k)."""
    assert isinstance(base, Mixture)
    shape, (whitening, centres), constant = ends.shape, base.whitening(), base.log_constant().unsqueeze(1)
    noise, ends, pool, ratio = (part.flatten(1) for part in (noise, ends, pool.to(ends), a / b))
    columns = torch.einsum("kij,pj->ikp", whitening, pool)  # (d, K, P)
    size = max(1, MOST_NUMBERS // columns.numel())
    means, curvatures = [], []
    for start in range(0, len(noise), size):
        rows = slice(start, start + size)
        own = torch.einsum("kij,qj->iqk", whitening, noise[rows] + ratio[rows] * ends[rows])
        white = [
            torch.addcmul((own[i] - centres[:, i]).unsqueeze(2), ratio[rows].unsqueeze(2), column, value=-1)
            for i, column in enumerate(columns)
        ]  # d of (Q, K, P)
        logits = constant - 0.5 * sum(part.square() for part in white)
        if possible is not None:
            logits = logits.masked_fill(~possible[rows].unsqueeze(1), -torch.inf)
        weights = logits.flatten(1).softmax(1).view_as(logits)
        mean = weights.sum(1) @ pool
        means.append(mean)
        if offset is not None:
            flat = offset[rows].flatten(1)
            away = torch.einsum("kij,qj->iqk", whitening, ends[rows] + flat).unsqueeze(3)  # m
            products = sum(part * (column - mid) for part, column, mid in zip(white, columns, away, strict=True))
            at_mean = _score(base, (noise[rows] - ratio[rows] * flat).view(-1, *shape[1:])).flatten(1)
            total = (weights * products).flatten(1).sum(1) + ((mean - ends[rows] - flat) * at_mean).sum(1)
            curvatures.append(-total / b[rows].flatten())
    return torch.cat(means).view(shape), torch.cat(curvatures) if offset is not None else None


def _curvature(
    base: Base,
    noise: Tensor,  # (Q, *event)
    a: Tensor,
    b: Tensor,
    differences: Tensor,  # (Q, P, *event), x_j − m
    z: Tensor | None,  # (Q, P, *event), (x_t − a x_j)/b; None: the noise, for P = 1
    offset: Tensor,  # (Q, *event), m − x₁
) -> Tensor:  # (Q, P)
    """Return (x_j − m)·(s(x_j) − s(m))."""
    z = noise.unsqueeze(1) if z is None else z
    at_mean = _score(base, noise - a / b * offset)
    change = (_score(base, z) - at_mean.unsqueeze(1)) / b.unsqueeze(1)
    return (differences * change).flatten(2).sum(2)


def _score(base: Base, z: Tensor) -> Tensor:
    """Return ∇ log p₀(z), without a graph."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        (score,) = torch.autograd.grad(base.log_prob(z).sum(), z)
    return score


def posterior_moments(
    position: Tensor,  # (Q, *event), x_t
    a: Tensor,  # (Q, 1, ...)
    b: Tensor,  # (Q, 1, ...), > 0
    pool: Tensor,  # (P, *event), equally likely values of x₁
    possible: Tensor | None = None,  # (Q, P), at least one in each row; which of the pool it can be, all if None
    centre: tuple[Tensor, Tensor] | None = None,  # (Q, *event) each; a likely value of x₁, and what to add to it
) -> tuple[Tensor, Tensor | None]:  # (Q, *event), (Q,)
    """Return E[x₁ | x_t], and E[‖x₁ − c‖² | x_t] if there is a centre c, for x₀ ~ N(0, I).

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
        # `addcmul` of numbers that are repeated takes four times as long.
        difference = column - point if scale is None else (scale * column).sub_(point)
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
