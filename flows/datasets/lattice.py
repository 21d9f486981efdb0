"""Fields on a periodic lattice with a known density."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flows.datasets.density import Density


class FreeField(Density):
    r"""The Gaussian free field of a mass m on a periodic lattice: smooth random images with a closed-form density.

    p(x) is proportional to exp(-S) with S = 1/2 sum_sites (m^2 x^2 + sum_axes (x(site + axis) - x(site))^2). In Fourier
    space its modes k are independent with precision lambda_k = m^2 + sum_axes 4 sin^2(pi k_axis / L_axis), so with d
    sites, drawing is exact and

        log p(x) = -1/2 sum_k lambda_k |x_k|^2 + 1/2 sum_k log lambda_k - d/2 log 2 pi,

    the entropy d/2 log(2 pi e) - 1/2 sum_k log lambda_k nats. Neighbours are correlated over about 1/m sites. The
    events have one channel, (1, *size).

    Args:
        size: sites along each axis; one to three axes.
        mass: m > 0, in units of one over the lattice spacing.
        num_validation, num_test, num_reference: see `Density`.
    """

    name = "free_field"

    def __init__(
        self,
        size: Sequence[int] = (8, 8),
        mass: float = 0.5,
        num_validation: int = 10_000,
        num_test: int = 100_000,
        num_reference: int = 10_000,
    ):
        super().__init__(num_validation, num_test, num_reference)
        size = tuple(size)
        if not 1 <= len(size) <= 3 or min(size) < 2:
            raise ValueError(
                f"size must hold the sites, >= 2, along one to three axes, such as [8, 8], got {list(size)}"
            )
        if not 0 < mass < math.inf:
            raise ValueError(f"mass must be a positive number, got {mass}")
        self.event_shape = (1, *size)
        self._axes = tuple(range(-len(size), 0))
        waves = [torch.arange(sites, dtype=torch.float64) * (math.pi / sites) for sites in size]
        momenta = torch.meshgrid(*[4 * wave.sin().square() for wave in waves], indexing="ij")
        self._precision = mass**2 + sum(momenta)  # (*size), lambda
        d = self._precision.numel()
        self._log_normaliser = 0.5 * self._precision.log().sum().item() - d / 2 * math.log(2 * math.pi)
        self.entropy = d / 2 - self._log_normaliser

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        z = torch.randn(n, *self.event_shape, generator=generator)
        modes = torch.fft.fftn(z, dim=self._axes) / self._precision.sqrt().to(z)
        return torch.fft.ifftn(modes, dim=self._axes).real

    def log_prob(self, x: Tensor) -> Tensor:
        if tuple(x.shape[-len(self.event_shape) :]) != self.event_shape:
            expected = ", ".join(map(str, self.event_shape))
            raise ValueError(f"log_prob expects points of shape (*batch, {expected}), got {tuple(x.shape)}")
        power = torch.fft.fftn(x, dim=self._axes, norm="ortho").abs().square()
        return self._log_normaliser - 0.5 * (self._precision.to(x) * power).flatten(-len(self.event_shape)).sum(-1)
