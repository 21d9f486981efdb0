"""Systems of identical particles with a known density."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from flows.arguments import checked
from flows.checks import check_number, whole_number
from flows.datasets.densities.density import Density, check_points
from flows.errors import InvalidTypeError, InvalidValueError


@checked
class Particles(Density):
    """N identical particles in D dimensions, held together by springs.

    x_i = c + s (z_i − mean z) with z_i ~ N(0, I), the centre c ~ N(0, I/N), and s drawn from `spreads`, all equally
    likely. This is the Boltzmann density of springs between all pairs, with the energy Σ_{i<j} ‖x_i − x_j‖²/(2N s²).
    Several spreads give a mixture of phases, from tight to loose clusters.

    Permutations and rotations do not change the density. The centre has the density of the centre of N points from
    N(0, I), so an equivariant field need not move it. With ρ² = Σ_i ‖x_i − c‖² and m = (N − 1) D,

        p(x) = N(√N c; 0, I_D) mean_s (2π s²)^(−m/2) exp(−ρ²/(2 s²)).

    The entropy is D/2 log(2πe) + m/2 log(2πe s²) nats for one spread. For several it is a quadrature over ρ, accurate
    to nine digits.

    Args:
        num_particles: N, at least 2.
        dimensions: D, at least 1.
        spreads: at least one s > 0.
        num_validation, num_test, num_reference: see `Density`.

    Raises:
        InvalidTypeError, InvalidValueError: a setting is no number, out of range, or too large for the memory.

    Example:
        ```python
        import flows

        data = flows.datasets.Particles(num_particles=4, dimensions=2)
        data.log_prob(data.sample(10))  # (10,); the points are (10, 4, 2)
        ```
    """

    name = "particles"

    def __init__(
        self,
        num_particles: int = 4,
        dimensions: int = 2,
        spreads: Sequence[float] = (0.5, 1.5),
        num_validation: int = 10_000,
        num_test: int = 20_000,
        num_reference: int = 10_000,
    ):
        num_particles = whole_number("num_particles", num_particles, 2)
        dimensions = whole_number("dimensions", dimensions)
        super().__init__(num_validation, num_test, num_reference, (num_particles, dimensions))
        if isinstance(spreads, str) or not isinstance(spreads, Iterable):
            raise InvalidTypeError(f"spreads must be a list of positive numbers, such as [0.5, 1.5], got {spreads!r}")
        self.spreads = tuple(spreads)
        for spread in self.spreads:
            check_number("each of spreads", spread, above=0)
        if not self.spreads:
            raise InvalidValueError("spreads must hold at least one positive number, got []")

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        z = torch.randn(n, *self.event_shape, generator=generator)
        phase = torch.randint(len(self.spreads), (n, 1, 1), generator=generator)
        centre = z.mean(1, keepdim=True)
        return centre + torch.tensor(self.spreads)[phase] * (z - centre)

    def log_prob(self, x: Tensor) -> Tensor:
        particles, dimensions = self.event_shape
        centre = check_points(x, particles, dimensions).mean(-2, keepdim=True)
        squared = (x - centre).square().sum((-2, -1))
        normal = -particles / 2 * centre.square().sum((-2, -1)) - dimensions / 2 * math.log(2 * math.pi)
        return normal + self._relative_log_prob(squared)

    @cached_property
    def entropy(self) -> float:
        size = self._relative_size
        # Steps in log ρ, so that very different spreads are resolved alike. Less than 1e-12 of the mass lies below.
        start, end = math.log(min(self.spreads)) - 28, math.log(max(self.spreads) * (math.sqrt(size) + 9))
        log_rho = torch.linspace(start, end, 200_001, dtype=torch.float64)
        log_density = self._relative_log_prob((2 * log_rho).exp())
        # Area of the sphere of radius ρ in m dimensions, times dρ/d log ρ.
        log_area = math.log(2) + size / 2 * math.log(math.pi) - math.lgamma(size / 2) + size * log_rho
        integral = torch.trapezoid((log_density + log_area).exp() * -log_density, log_rho)
        return self.event_shape[1] / 2 * math.log(2 * math.pi * math.e) + integral.item()

    @property
    def _relative_size(self) -> int:
        """m, the number of coordinates relative to the centre."""
        return (self.event_shape[0] - 1) * self.event_shape[1]

    def _relative_log_prob(self, squared: Tensor) -> Tensor:
        """Return the log-density of the m relative coordinates, which depends on ρ² alone."""
        phases = [
            -squared / (2 * spread**2) - self._relative_size / 2 * math.log(2 * math.pi * spread**2)
            for spread in self.spreads
        ]
        return torch.stack(phases).logsumexp(0) - math.log(len(phases))
