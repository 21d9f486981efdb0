"""Systems of identical particles with a known density."""

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from flows.datasets.density import Density
from flows.errors import InvalidValueError


class Particles(Density):
    r"""N identical particles in D dimensions, held together by springs of one of several strengths.

    x_i = c + s (z_i - mean z) with z_i ~ N(0, I), the centre c ~ N(0, I / N) and the spread s drawn from `spreads`,
    all equally likely: the Boltzmann density of springs between all pairs, sum_{i<j} |x_i - x_j|^2 / (2 N s^2), and
    with several spreads a mixture of phases, from tight to loose clusters. It does not change under permutations and
    rotations, and its centre is that of N particles drawn from N(0, I), which equivariant fields do not move.

    With rho^2 = sum_i |x_i - c|^2 and m = (N - 1) D,

        p(x) = N(sqrt(N) c; 0, I_D) mean_s (2 pi s^2)^(-m/2) exp(-rho^2 / (2 s^2)).

    Entropy in nats by quadrature over rho, to nine digits; D/2 log(2 pi e) + m/2 log(2 pi e s^2) for one spread.

    Args:
        num_particles: N >= 2.
        dimensions: D >= 1.
        spreads: s > 0, at least one.
        num_validation, num_test, num_reference: see `Density`.
    """

    name = "particles"

    def __init__(
        self,
        num_particles: int = 4,
        dimensions: int = 2,
        spreads: Sequence[float] = (0.5, 1.5),
        num_validation: int = 10_000,
        num_test: int = 100_000,
        num_reference: int = 10_000,
    ):
        super().__init__(num_validation, num_test, num_reference)
        if num_particles < 2 or dimensions < 1:
            raise InvalidValueError(
                f"num_particles must be >= 2 and dimensions >= 1, got {num_particles} particles in {dimensions}"
            )
        self.spreads = tuple(float(spread) for spread in spreads)
        if not self.spreads or not all(0 < spread < math.inf for spread in self.spreads):
            raise InvalidValueError(f"spreads must hold at least one positive number, got {list(spreads)}")
        self.event_shape = (num_particles, dimensions)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        z = torch.randn(n, *self.event_shape, generator=generator)
        phase = torch.randint(len(self.spreads), (n, 1, 1), generator=generator)
        centre = z.mean(1, keepdim=True)
        return centre + torch.tensor(self.spreads)[phase] * (z - centre)

    def log_prob(self, x: Tensor) -> Tensor:
        particles, dimensions = self.event_shape
        if tuple(x.shape[-2:]) != self.event_shape:
            raise InvalidValueError(
                f"log_prob expects points of shape (*batch, {particles}, {dimensions}), got {tuple(x.shape)}"
            )
        centre = x.mean(-2, keepdim=True)
        squared = (x - centre).square().sum((-2, -1))
        normal = -particles / 2 * centre.square().sum((-2, -1)) - dimensions / 2 * math.log(2 * math.pi)
        return normal + self._relative_log_prob(squared)

    @cached_property
    def entropy(self) -> float:
        size = self._relative_size
        reach = max(self.spreads) * (math.sqrt(size) + 9)
        rho = torch.linspace(0, reach, 200_001, dtype=torch.float64)[1:]
        log_density = self._relative_log_prob(rho.square())
        # the area of the sphere of radius rho in as many dimensions
        log_area = math.log(2) + size / 2 * math.log(math.pi) - math.lgamma(size / 2) + (size - 1) * rho.log()
        integral = torch.trapezoid((log_density + log_area).exp() * -log_density, rho)
        return self.event_shape[1] / 2 * math.log(2 * math.pi * math.e) + integral.item()

    @property
    def _relative_size(self) -> int:
        """m, the number of coordinates relative to the centre."""
        return (self.event_shape[0] - 1) * self.event_shape[1]

    def _relative_log_prob(self, squared: Tensor) -> Tensor:
        """Log-density of the m relative coordinates, which depends on rho^2 alone."""
        phases = [
            -squared / (2 * spread**2) - self._relative_size / 2 * math.log(2 * math.pi * spread**2)
            for spread in self.spreads
        ]
        return torch.stack(phases).logsumexp(0) - math.log(len(phases))
