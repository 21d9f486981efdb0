"""The mass of a density in a box: an integral that a true density makes 1."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flows.divergence import Auto
from flows.models.cnf import CNF

ALLOWED = 0.02  # how far the mass may be off
CERTAINTY = 4.0  # standard errors by which it must be further off
MAX_DIMENSION = 2  # of points: an integral over more is expensive
MOST = 32_000  # points after refining twice
NUM_SAMPLES = 2_000  # of the flow, to tell how many lie in the box
NUM_DENSITIES = 500  # of these, to tell how thin the density is
CHUNK = 10_000  # points in one solve


@dataclass(frozen=True)
class Mass:
    """The integral of a density over a box, beside the share of samples in there."""

    inside: float  # ∫ p over the box
    standard_error: float  # of both together
    share: float | None = None  # of the samples; None if none were drawn
    largest_error: float = 0.0  # what the standard error may be where the density is thinner than the points see

    @property
    def total(self) -> float:
        """The mass of the whole density, if it is right outside of the box.

        Without samples, the mass in the box, but at least 1."""
        return max(self.inside, 1.0) if self.share is None else self.inside + 1 - self.share

    @property
    def fault(self) -> str | None:
        """What is wrong with the density, if its mass is off for sure."""
        error = self.standard_error if self.total > 1 else max(self.standard_error, self.largest_error)
        if not abs(self.total - 1) > ALLOWED + CERTAINTY * error:
            return None
        return (
            f"the density has a mass of {self.total:.3f} ± {self.standard_error:.3f} where 1 is right: the solve "
            "misses something that a solver error does not show, such as a jump of the field; smooth the field "
            "(softplus, tanh or SiLU in place of sign, step or round), or set a smaller solver.max_step or step_size"
        )


def has_mass(flow: CNF) -> bool:
    """Return whether the points of the flow have few enough dimensions, and a density."""
    return len(flow.event_shape) == 1 and flow.event_shape[0] <= MAX_DIMENSION and flow.transform.num_levels is None


def mass(
    flow: CNF,
    low: Sequence[float],
    high: Sequence[float],
    context: Tensor | None = None,  # (*context), the same for all points
    generator: torch.Generator | None = None,
    samples: bool = True,
    most: int = MOST,
) -> Mass:
    """Integrate the density over a box.

    Takes random points in each of many cells, so that thin parts of the density give a standard error instead of a
    wrong integral. Where the mass seems to be off, four times as many are taken, until it is sure. The density is
    an exponential, which noise of probes would bias, so the divergence is exact.

    Args:
        low, high: corners of the box, in data space.
        samples: draw samples to see how much mass lies outside. False: supposes that none does, so only a mass that
            is too large is certain.
        most: about the most points in one integral; it begins with a sixteenth of these without samples, and with a
            quarter of them otherwise.
    """
    with torch.no_grad(), exactly(flow):
        return _refined(flow, low, high, context, generator, samples, most)


@contextlib.contextmanager
def exactly(flow: CNF) -> Iterator[None]:
    """Give the flow an exact divergence while entered: noise of log p would bias its exponential."""
    training = flow.divergence
    if not training.bind(flow.bind()).is_exact:
        flow.divergence = Auto()
    try:
        yield
    finally:
        flow.divergence = training


def box(points: Tensor, margin: float = 0.12) -> tuple[list[float], list[float]]:
    """Return two corners of a box around nearly all points (n, d)."""
    step = -(-len(points) // 1_000_000)
    levels = torch.tensor([0.001, 0.999], dtype=torch.float64)
    low, high = torch.quantile(points[::step].double().cpu(), levels, dim=0)
    room = margin * (high - low).clamp_min(1e-6 * (1 + high.abs()))
    return (low - room).tolist(), (high + room).tolist()


def _refined(
    flow: CNF,
    low: Sequence[float],
    high: Sequence[float],
    context: Tensor | None,
    generator: torch.Generator | None,
    samples: bool,
    most: int,
) -> Mass:
    own = None if context is None else context.to(flow.device)
    corners = torch.tensor([list(low), list(high)], device=flow.device, dtype=torch.float64)
    share, variance, mean_density = None, 0.0, 0.0
    if samples:
        x = flow.sample((NUM_SAMPLES,), own, generator)
        within = ((x >= corners[0]) & (x <= corners[1])).flatten(1).all(1)
        share, smooth = float(within.double().mean()), (float(within.sum()) + 1) / (NUM_SAMPLES + 2)
        variance = smooth * (1 - smooth) / NUM_SAMPLES
        mean_density = float((flow.log_prob(x[:NUM_DENSITIES], own).double().exp() * within[:NUM_DENSITIES]).mean())
    volume = float((corners[1] - corners[0]).prod())
    points = most // 4 if samples else most // 16
    while True:
        inside, error = _integral(lambda x: flow.log_prob(x, own), corners, points, generator, flow.dtype)
        # Were all points independent, the variance would be ∫ p² volume / points, and it is less.
        bound = (volume * mean_density / points) ** 0.5
        found = Mass(inside, (error**2 + variance) ** 0.5, share, bound)
        doubt = ALLOWED if samples else ALLOWED + 2 * found.standard_error  # in training, only what is hardly chance
        if abs(found.total - 1) <= doubt or found.fault or 4 * points > most:
            return found
        points *= 4


def _integral(
    log_density: Callable[[Tensor], Tensor],
    corners: Tensor,  # (2, d)
    num_points: int,
    generator: torch.Generator | None,
    dtype: torch.dtype,
) -> tuple[float, float]:
    """Integrate exp(log_density) over the box; return the value and its standard error.

    Each of equal cells has two pairs of random points. The points of a pair lie opposite each other, so that slopes
    cancel, and the pairs differ by what is left.
    """
    low, size = corners[0], corners[1] - corners[0]
    dimension = len(low)
    cells = max(1, round((num_points / 4) ** (1 / dimension)))
    index = torch.cartesian_prod(*[torch.arange(cells, device=low.device)] * dimension).reshape(-1, dimension)
    device = low.device if generator is None else generator.device
    shift = torch.rand(2, *index.shape, generator=generator, device=device).to(low)
    points = low + size * (index + torch.stack([shift, 1 - shift])) / cells  # (2, 2, cells, d)
    points = points.to(torch.promote_types(dtype, torch.float32)).flatten(0, 2)
    density = torch.cat([log_density(part).double().exp() for part in points.split(CHUNK)])
    pairs = density.view(2, 2, -1).mean(0)
    volume = float(size.prod()) / len(index)
    value = float(pairs.mean(0).sum()) * volume
    return value, float((pairs[0] - pairs[1]).square().sum().sqrt()) / 2 * volume
