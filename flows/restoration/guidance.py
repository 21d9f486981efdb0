"""Where a chain starts: a guided draw that explains the observation, taken back to its latent.

From a point on the way, the flow tells where its path leads: x̂ = x + (1 − t) v(t, x). The observation corrects x̂, and
noise of the base takes it back to its time, x_t = t x̂ + (1 − t) x₀, in part the noise x̂₀ = x − t v that the flow sees,
in part new noise. Each time is visited more than once, so that what is known and what is drawn come to agree. No
gradient of the field is needed. The result is near p(x | y) and not exact; the chain corrects it.

Sources: correction of the estimate (Wang et al. 2023, arXiv:2212.00490), its weight (Song et al. 2023, ΠGDM; for flows
Pokle et al. 2024, arXiv:2310.04432), repeated times (Lugmayr et al. 2022, arXiv:2201.09865), new noise for flows
(Martin et al. 2025, arXiv:2410.02423).
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from flows.models.inputs import features_of
from flows.restoration.target import Target
from flows.solvers import SolverError
from flows.transforms.dequantise import uniform_like

STEPS = 50  # of time
VISITS = 4  # of each time
RENEWED = 0.7  # share of the noise that is new; one step of Langevin dynamics, which keeps the spread if it is small
TRUSTED = 4.0  # times the noise: variance of an entry from which an observation decides it
INVERSIONS = 4  # most corrections of a latent
FRACTIONS = (1.0, 0.5, 0.25)  # of a correction, until the transform is defined there
CONJUGATE_STEPS = 10


def guided_cost(nfe: int) -> int:
    """Evaluations of the field for one start, where a solve takes `nfe`."""
    return STEPS * VISITS + (2 * INVERSIONS + 1) * nfe


@torch.no_grad()
def guided_latents(
    target: Target,
    z: Tensor,  # (chains, *event), draws from the base
    generator: torch.Generator | None,
) -> Tensor:  # (chains, *event)
    """Latents of guided draws; NaN where they cannot be found."""
    try:
        return _latents(target, _guided(target, z, generator))
    except SolverError:
        return torch.full_like(z, torch.nan)


def _guided(target: Target, x: Tensor, generator: torch.Generator | None) -> Tensor:  # (chains, *event), flow space
    """Approximate draws from p(x | y)."""
    flow, chains = target.flow, (target.chains,)
    field = flow.bind(features_of(flow, target.context, chains))
    times = torch.linspace(0, 1, STEPS + 1, dtype=flow.dtype, device=flow.device)
    correct = _Correction(target, x, generator)
    # Noise of another base would not keep its distribution, and points that remember a noisy y would count it again.
    # Where several entries share an observation, old noise keeps the differences between them that the flow would mend.
    keeps = flow.base.is_standard and target.noise_variance <= target.level_variance and target.operator.averaged == 1
    renewed = RENEWED if keeps else 1.0
    for now, after in itertools.pairwise(times):
        width = (1 - now) / (now.square() + (1 - now).square()).sqrt()
        for visit in range(VISITS):
            velocity = field(now, x)
            ahead, noise = correct(x + (1 - now) * velocity, width), x - now * velocity
            time = after if visit == VISITS - 1 else now
            noise = math.sqrt(1 - renewed**2) * noise + renewed * flow.base.sample(chains, generator)
            x = time * ahead + (1 - time) * noise
    return x


class _Correction:
    """Moves points of flow space, known up to N(0, width² I), to where an observation is likely.

    The gain is that of a Kalman filter, whose moments are those of three points (Gauss-Hermite). Where a transform is
    steep, as between a dark pixel and a bright one, it may lead too far: no entry moves beyond the point that the
    observation asks for in data space. Where the noise is small, an entry goes to that point. A transform that mixes
    entries, such as a whitening, has no variances by entry, and always takes that point.
    """

    def __init__(self, target: Target, z: Tensor, generator: torch.Generator | None) -> None:
        self.target, self.generator = target, generator
        self.observed = target.dequantised(generator)
        half = uniform_like(z, generator) < 0.5
        moved = target.data(torch.where(half, 0.5 * z, z))
        self.by_entry = bool(torch.isclose(moved, target.data(z), equal_nan=True)[~half].all())

    def __call__(self, y: Tensor, width: Tensor) -> Tensor:  # (chains, *event)
        target = self.target
        reach = math.sqrt(3) * width * (2.0 * (uniform_like(y, self.generator) < 0.5) - 1)
        middle, above, below = target.data(y), target.data(y + reach), target.data(y - reach)
        mean = (4 * middle + above + below) / 6
        variance = (4 * (middle - mean).square() + (above - mean).square() + (below - mean).square()) / 6
        noise = target.sd**2
        pulled = (variance + noise) * _pull(target, middle, self.observed, variance + noise)
        asked = self._moved(y, middle, pulled) - y
        if not self.by_entry:
            return y + asked
        gain = reach * (above - below) / 6 * _pull(target, mean, self.observed, variance)
        careful = torch.where(asked > 0, gain.clamp_min(0).minimum(asked), gain.clamp_max(0).maximum(asked))
        return y + torch.where(variance + target.level_variance > TRUSTED * target.noise_variance, asked, careful)

    def _moved(self, y: Tensor, x: Tensor, step: Tensor) -> Tensor:
        """Flow space of x + step, or of a part of the step where the transform is not defined there."""
        moved, pending = y, torch.ones(len(y), dtype=torch.bool, device=y.device)
        for fraction in FRACTIONS:
            tried = self.target.flow_space(x + fraction * step, self.generator)
            usable = pending & tried.isfinite().flatten(1).all(1)
            moved, pending = torch.where(_beside(usable, y), tried, moved), pending & ~usable
            if not pending.any():
                break
        return moved


def _pull(target: Target, x: Tensor, observed: Tensor, variance: Tensor) -> Tensor:  # (chains, *event)
    """Aᵀ (A V Aᵀ + s²)⁻¹ (y − A x) by conjugate gradients; the differences of A stand for its Jacobian."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        seen = target.operator(x)

    def lifted(w: Tensor) -> Tensor:  # Aᵀ w
        if not seen.requires_grad:
            return torch.zeros_like(x)
        (found,) = torch.autograd.grad(seen, x, w, retain_graph=True, allow_unused=True)
        return torch.zeros_like(x) if found is None else found

    def product(w: Tensor) -> Tensor:
        return target.operator(x.detach() + variance * lifted(w)) - seen.detach() + target.sd**2 * w

    # Rows of A V Aᵀ summed: its diagonal, if no two observed entries depend on the same entry of a point.
    scale = product(torch.ones_like(seen)).abs().clamp_min(target.sd**2)
    residual = observed - seen.detach()
    solution, direction = torch.zeros_like(residual), residual / scale
    size = first = _inner(residual, direction)
    for _ in range(CONJUGATE_STEPS):
        image = product(direction)
        rate = size / _inner(direction, image).clamp_min(torch.finfo(size.dtype).tiny)
        solution = solution + _beside(rate, direction) * direction
        residual = residual - _beside(rate, image) * image
        before, size = size, _inner(residual, residual / scale)
        if (size <= 1e-6 * first).all():
            break
        rate = size / before.clamp_min(torch.finfo(size.dtype).tiny)
        direction = residual / scale + _beside(rate, direction) * direction
    return lifted(solution)


def _latents(target: Target, y: Tensor) -> Tensor:  # (chains, *event)
    """z with x(z) = y, also by a coarse solver: z ← z + G(y) − G(x(z)), where G solves backwards.

    Of all z, the one that comes nearest; NaN where none is finite.
    """
    safe = torch.where(_finite(y), y, 0.0)
    back = target.latents(safe)
    z, found, least = back, torch.full_like(y, torch.nan), torch.full_like(y.flatten(1)[:, 0], torch.inf)
    for _ in range(INVERSIONS):
        z = torch.where(_finite(z), z, 0.0)
        there = target.points(z)[0]
        error = (there - y).square().flatten(1).sum(1)
        nearer = error < least  # not if it is NaN
        found, least = torch.where(_beside(nearer, z), z, found), torch.where(nearer, error, least)
        there = torch.where(_finite(there), there, safe)
        z = z + back - target.latents(there)
    return found


def _finite(x: Tensor) -> Tensor:  # (chains, 1, ...)
    return _beside(x.isfinite().flatten(1).all(1), x)


def _inner(a: Tensor, b: Tensor) -> Tensor:  # (chains,)
    return (a * b).flatten(1).sum(1)


def _beside(values: Tensor, like: Tensor) -> Tensor:  # (chains, 1, ...)
    return values.view(-1, *[1] * (like.ndim - 1))
