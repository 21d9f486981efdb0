"""A transform that gives points the radii of a normal distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from flows.arguments import checked
from flows.checks import as_shape, check_number, whole_number
from flows.errors import InvalidValueError
from flows.transforms.base import Transform

MIN_Z = -4.0  # the cube-root law is used above this z; a probability of 3e-5 lies below
NEWTON_STEPS = 7  # enough for Φ⁻¹ in float64


@checked
class NormalRadius(Transform):
    """Normal radii: y = ρ(‖x‖) x/‖x‖ with a monotone ρ.

    ρ maps the radii of the training data to those of N(0, I); directions do not change. Patches of natural images are
    smooth or textured as a whole. After whitening their radii differ by factors of fifty, while those of normal points
    hardly differ, and a flow would need a stiff field for that. With u = log ‖x‖, z = Φ⁻¹(F(u)) and the cube-root law
    of χ² (Wilson & Hilferty 1931),

        ρ = √d w^{3/2},   w = 1 − 2/(9d) + z √(2/(9d)).

    F is a mixture of logistic distributions at quantiles of u, so points beyond the training data keep a positive
    density. Below z = −4, w is replaced by an exponential with the same value and slope, which keeps ρ positive. The
    image is ℝᵈ without the origin. Far points keep their digits, as z is computed from log F and log(1 − F).
    log|det ∂y/∂x| = log ρ′ + (d − 1) log(ρ/‖x‖). [Lyu & Simoncelli 2009, radial Gaussianization]

    Use it after `Whiten(robust=True)`. With several groups, the entries are cut in order into groups of equal size,
    each with its own radius; after `Whiten(axes="principal")` these are bands from fine to coarse. Before `fit`, F is a
    single logistic distribution.

    Args:
        event_shape: shape of a point.
        num_groups: number of groups, each of at least five entries.
        num_quantiles: number of logistic distributions.
        bandwidth: their scale, relative to the standard deviation of u.

    Raises:
        InvalidTypeError, InvalidValueError: a setting is no number, or out of range.

    Example:
        ```python
        import torch

        import flows

        points = torch.distributions.StudentT(3.0).sample((1000, 8))
        y, log_det = flows.transforms.NormalRadius((8,)).fit(points)(points)
        ```
    """

    term = "radius"
    centres: Tensor
    scale: Tensor

    def __init__(
        self, event_shape: int | Sequence[int], num_groups: int = 1, num_quantiles: int = 64, bandwidth: float = 0.1
    ) -> None:
        super().__init__()
        self.event_shape = as_shape("event_shape", event_shape)
        entries = math.prod(self.event_shape)
        num_groups = whole_number("num_groups", num_groups)
        num_quantiles = whole_number("num_quantiles", num_quantiles)
        check_number("bandwidth", bandwidth, above=0)
        if entries < 5:
            raise InvalidValueError(f"NormalRadius needs points of at least 5 entries, got {self.event_shape}")
        if entries % num_groups or entries // num_groups < 5:
            raise InvalidValueError(
                f"num_groups must cut {entries} entries into equal groups of at least 5, got {num_groups}; choose a "
                "smaller divisor, such as 1"
            )
        self.size = entries // num_groups
        self.bandwidth = bandwidth
        self.register_buffer("centres", torch.full((num_groups, num_quantiles), 0.5 * math.log(self.size)))  # of u
        self.register_buffer("scale", torch.ones(num_groups, 1))

    @property
    def is_defined_everywhere(self) -> bool:
        return True  # but in the origin

    def check(self, x: Tensor) -> None:
        if not self._groups(x).any(-1).all():
            raise InvalidValueError(
                "a point, or a group of its entries, lies in the origin, which has no direction; drop such points"
            )

    def fit(self, points: Tensor) -> NormalRadius:
        """Compute the quantiles of `points` (n, *event)."""
        if tuple(points.shape[1:]) != self.event_shape or len(points) < 2:
            raise InvalidValueError(
                f"expected at least two points of shape {self.event_shape}, got {tuple(points.shape)}"
            )
        self.check(points)
        u = self._groups(points.double()).norm(dim=-1).log()  # (n, G)
        count = self.centres.shape[1]
        steps = (torch.arange(count, dtype=u.dtype, device=u.device) + 0.5) / count
        self.centres.copy_(u.quantile(steps, dim=0).T)
        self.scale.copy_(self.bandwidth * u.std(0).unsqueeze(1))
        return self

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        groups = self._groups(x)
        log_ratio, log_det = self._move(groups.norm(dim=-1).log())
        return (groups * log_ratio.exp().unsqueeze(-1)).view_as(x), log_det.sum(1)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        groups = self._groups(y)
        v = groups.norm(dim=-1).log()
        z = self._normal_of(v)
        log_odds = torch.special.log_ndtr(z) - torch.special.log_ndtr(-z)
        with torch.no_grad():
            # The log-odds of a logistic distribution are linear. Those of the mixture lie between the outermost two.
            ends = self.centres.amin(1), self.centres.amax(1)
            low, high = (self.scale[:, 0] * log_odds + end for end in ends)
            for _ in range(50):  # halvings
                middle = (low + high) / 2
                log_cdf, log_survival, _ = self._mixture(middle)
                above = log_cdf - log_survival > log_odds
                low, high = torch.where(above, low, middle), torch.where(above, middle, high)
            u = (low + high) / 2
            log_cdf, log_survival, log_density = self._mixture(u)
            slope = (log_density - log_cdf - log_survival).exp()
        u = u + (log_odds - (log_cdf - log_survival)) / slope  # a Newton step with gradients
        return (groups * (u - v).exp().unsqueeze(-1)).view_as(y), -self._move(u)[1].sum(1)

    def _groups(self, x: Tensor) -> Tensor:  # (B, *event) -> (B, G, size)
        return x.flatten(1).unflatten(1, (-1, self.size))

    def _move(self, u: Tensor) -> tuple[Tensor, Tensor]:  # (B, G) each
        """Return log(ρ/r) and log|det| at u = log r."""
        log_cdf, log_survival, log_density = self._mixture(u)
        z = _quantile(log_cdf, log_survival)
        spread, lowest = self._cube_root()
        w = (1 - spread**2 + spread * z).clamp(min=lowest)
        log_w = w.log() + spread / lowest * (z - MIN_Z).clamp(max=0)
        log_ratio = 0.5 * math.log(self.size) + 1.5 * log_w - u
        log_rate = log_density + 0.5 * z.square() + 0.5 * math.log(2 * math.pi)  # dz/du
        # d log ρ/du = 1.5 spread/w · dz/du, and ρ′ = ρ/r · d log ρ/du
        return log_ratio, math.log(1.5 * spread) - w.log() + log_rate + self.size * log_ratio

    def _normal_of(self, v: Tensor) -> Tensor:  # (B, G)
        """Return z where log ρ = v."""
        spread, lowest = self._cube_root()
        log_w = (v - 0.5 * math.log(self.size)) / 1.5
        w = log_w.clamp(min=math.log(lowest)).exp()
        return (w - 1 + spread**2) / spread + lowest / spread * (log_w - math.log(lowest)).clamp(max=0)

    def _cube_root(self) -> tuple[float, float]:
        """Return √(2/(9d)), and w at z = −4."""
        spread = math.sqrt(2 / (9 * self.size))
        return spread, 1 - spread**2 + spread * MIN_Z

    def _mixture(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (B, G) each
        """Return log F, log(1 − F) and log F′ at u."""
        distance = (u.unsqueeze(-1) - self.centres) / self.scale
        below, above = functional.logsigmoid(distance), functional.logsigmoid(-distance)
        terms = (below, above, below + above - self.scale.log())
        log_cdf, log_survival, log_density = (term.logsumexp(-1) - math.log(self.centres.shape[1]) for term in terms)
        return log_cdf, log_survival, log_density


def _quantile(log_cdf: Tensor, log_survival: Tensor) -> Tensor:
    """Return Φ⁻¹(p) from log p and log(1 − p), accurate in both tails."""
    tail = torch.minimum(log_cdf, log_survival)
    with torch.no_grad():
        # log Φ is concave and log Φ(z) <= −z²/2 for z <= 0, so no step from here overshoots the root.
        z = -(-2 * tail).sqrt()
        for _ in range(NEWTON_STEPS):
            z = _newton(z, tail)
    z = _newton(z, tail)  # with gradients
    return torch.where(log_cdf < log_survival, z, -z)


def _newton(z: Tensor, tail: Tensor) -> Tensor:
    """Take a Newton step towards log Φ(z) = tail."""
    value = torch.special.log_ndtr(z)
    return z + (tail - value) * (value + 0.5 * z.square() + 0.5 * math.log(2 * math.pi)).exp()
