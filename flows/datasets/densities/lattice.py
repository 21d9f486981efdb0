"""Fields on a periodic lattice: a free one, and one with interaction."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from flows.arguments import checked
from flows.checks import check_number, whole_number
from flows.datasets.densities.density import Density, check_points
from flows.datasets.densities.energies import Energy
from flows.errors import InvalidTypeError, InvalidValueError


@checked
class FreeField(Density):
    """The Gaussian free field of mass m on a periodic lattice.

    Its samples are smooth random images; neighbours are correlated over about 1/m sites. p(x) ∝ exp(−S) with
    S = ½ Σ_sites (m² x² + Σ_axes (x(site + axis) − x(site))²). The Fourier modes k are independent with precision
    λ_k = m² + Σ_axes 4 sin²(π k_axis/L_axis), so sampling is exact. With d sites,

        log p(x) = −½ Σ_k λ_k |x_k|² + ½ Σ_k log λ_k − d/2 log 2π,

    and the entropy is d/2 log(2πe) − ½ Σ_k log λ_k nats. An event has one channel, (1, *size).

    Args:
        size: number of sites along each of one to three axes, at least 2.
        mass: m > 0, in units of one over the lattice spacing.
        num_validation, num_test, num_reference: see `Density`.

    Raises:
        InvalidTypeError, InvalidValueError: a setting is no number, out of range, or too large for the memory.

    Example:
        ```python
        import flows

        data = flows.datasets.FreeField(size=(4, 4), num_validation=10, num_test=10)
        x = data.sample(100)
        data.log_prob(x)  # (100,)
        ```
    """

    name = "free_field"

    def __init__(
        self,
        size: Sequence[int] = (8, 8),
        mass: float = 0.5,
        num_validation: int = 2_000,
        num_test: int = 10_000,
        num_reference: int = 10_000,
    ):
        size = _checked_size(size)
        check_number("mass", mass, above=0)
        super().__init__(num_validation, num_test, num_reference, (1, *size))
        self._axes = tuple(range(-len(size), 0))
        waves = [torch.arange(sites, dtype=torch.float64) * (math.pi / sites) for sites in size]
        momenta = torch.meshgrid(*[4 * wave.sin().square() for wave in waves], indexing="ij")
        self._precision = mass**2 + torch.stack(momenta).sum(0)  # (*size), λ
        d = self._precision.numel()
        self.log_normaliser = 0.5 * self._precision.log().sum().item() - d / 2 * math.log(2 * math.pi)
        self.entropy = d / 2 - self.log_normaliser

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        z = torch.randn(n, *self.event_shape, generator=generator)
        modes = torch.fft.fftn(z, dim=self._axes) / self._precision.sqrt().to(z)
        return torch.fft.ifftn(modes, dim=self._axes).real

    def log_prob(self, x: Tensor) -> Tensor:
        power = torch.fft.fftn(check_points(x, *self.event_shape), dim=self._axes, norm="ortho").abs().square()
        return self.log_normaliser - 0.5 * (self._precision.to(x) * power).flatten(-len(self.event_shape)).sum(-1)


@checked
class Phi4(Energy):
    """The scalar field with a quartic interaction on a periodic lattice.

    p(x) ∝ exp(−S) with S = Σ_sites (m² x²/2 + λ x⁴ + ½ Σ_axes (x(site + axis) − x(site))²). For m² < 0 and weak
    coupling λ the field is magnetised, and both signs are equally likely. A flow may miss one of them.

    There are no samples, and log Z is unknown unless λ = 0, which is `FreeField`. An event has one channel,
    (1, *size). [As a test of flows: Albergo, Kanwar & Shanahan 2019, arXiv:1904.12072]

    Args:
        size: number of sites along each of one to three axes, at least 2.
        mass_squared: m², in units of one over the squared lattice spacing.
        coupling: λ ≥ 0. At 0, m² must be positive.
        num_validation, num_test: numbers of flow samples for the importance weights; see `Energy`.

    Raises:
        InvalidTypeError, InvalidValueError: a setting is no number, out of range, or too large for the memory.

    Example:
        ```python
        import torch

        import flows

        energy = flows.datasets.Phi4(size=(4, 4))
        energy.log_density(torch.randn(10, *energy.event_shape))  # (10,)
        ```
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
        size = _checked_size(size)
        super().__init__(num_validation, num_test, event_shape=(1, *size))
        check_number("mass_squared", mass_squared)
        check_number("coupling", coupling, at_least=0)
        if coupling == 0 and mass_squared <= 0:
            raise InvalidValueError(
                f"coupling must be > 0 unless mass_squared > 0, otherwise Z is infinite; got coupling={coupling} and "
                f"mass_squared={mass_squared}"
            )
        self.mass_squared, self.coupling = mass_squared, coupling
        self._axes = tuple(range(-len(size), 0))
        if coupling == 0:
            free = FreeField(size, math.sqrt(mass_squared))
            self.log_z, self.entropy = -free.log_normaliser, free.entropy

    def log_density(self, x: Tensor) -> Tensor:
        x = check_points(x, *self.event_shape)
        squares = x.square()
        action = self.mass_squared / 2 * squares + self.coupling * squares.square()
        for axis in self._axes:
            action = action + (torch.roll(x, -1, axis) - x).square() / 2
        return -action.flatten(-len(self.event_shape)).sum(-1)


def _checked_size(size: object) -> tuple[int, ...]:
    advice = "size must hold the number of sites along one to three axes, such as [8, 8]"
    if isinstance(size, str) or not isinstance(size, Iterable):
        raise InvalidTypeError(f"{advice}, got {size!r}")
    sites = tuple(whole_number("each entry of size", value, 2) for value in size)
    if not 1 <= len(sites) <= 3:
        raise InvalidValueError(f"{advice}, got {list(sites)}")
    return sites
