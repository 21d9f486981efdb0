"""Fields on a periodic lattice: a free one with a known density, and one that interacts, known up to Z."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flows.datasets.density import Density
from flows.datasets.energies import Energy
from flows.errors import InvalidValueError


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
        size = _checked_size(size)
        if not 0 < mass < math.inf:
            raise InvalidValueError(f"mass must be a positive number, got {mass}")
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
        power = torch.fft.fftn(_checked_fields(x, self.event_shape), dim=self._axes, norm="ortho").abs().square()
        return self._log_normaliser - 0.5 * (self._precision.to(x) * power).flatten(-len(self.event_shape)).sum(-1)


class Phi4(Energy):
    r"""The scalar field with a quartic interaction on a periodic lattice, p(x) proportional to exp(-S) with

        S = sum_sites (m^2 x^2 / 2 + lambda x^4 + 1/2 sum_axes (x(site + axis) - x(site))^2).

    With m^2 < 0 and weak coupling the field is magnetised, with two signs equally likely that a flow may tell apart
    by seeing only one. Without coupling it is `FreeField`. log Z is not known otherwise, and there are no samples.
    The events have one channel, (1, *size).
    [As a test of flows: Albergo, Kanwar & Shanahan 2019, arXiv:1904.12072]

    Args:
        size: sites along each axis; one to three axes.
        mass_squared: m^2, in units of one over the lattice spacing, squared.
        coupling: lambda >= 0; with 0, m^2 > 0.
        num_validation, num_test: samples of the flow for the importance weights, see `Energy`.
    """

    name = "phi4"

    def __init__(
        self,
        size: Sequence[int] = (6, 6),
        mass_squared: float = 0.25,
        coupling: float = 0.25,
        num_validation: int = 2_000,
        num_test: int = 20_000,
    ):
        super().__init__(num_validation, num_test)
        size = _checked_size(size)
        if not (coupling > 0 or (coupling == 0 and mass_squared > 0)):
            raise InvalidValueError(
                f"coupling must be > 0, or 0 with mass_squared > 0, or Z would be infinite; got {coupling} and "
                f"{mass_squared}"
            )
        self.event_shape = (1, *size)
        self.mass_squared, self.coupling = mass_squared, coupling
        self._axes = tuple(range(-len(size), 0))
        if coupling == 0:
            free = FreeField(size, math.sqrt(mass_squared))
            self.log_z, self.entropy = -free._log_normaliser, free.entropy

    def log_density(self, x: Tensor) -> Tensor:
        x = _checked_fields(x, self.event_shape)
        squares = x.square()
        action = self.mass_squared / 2 * squares + self.coupling * squares.square()
        for axis in self._axes:
            action = action + (torch.roll(x, -1, axis) - x).square() / 2
        return -action.flatten(-len(self.event_shape)).sum(-1)


def _checked_size(size: Sequence[int]) -> tuple[int, ...]:
    size = tuple(size)
    if not 1 <= len(size) <= 3 or min(size) < 2:
        raise InvalidValueError(
            f"size must hold the sites, >= 2, along one to three axes, such as [8, 8], got {list(size)}"
        )
    return size


def _checked_fields(x: Tensor, event_shape: tuple[int, ...]) -> Tensor:
    if tuple(x.shape[-len(event_shape) :]) != event_shape:
        expected = ", ".join(map(str, event_shape))
        raise InvalidValueError(f"expected fields of shape (*batch, {expected}), got {tuple(x.shape)}")
    return x
