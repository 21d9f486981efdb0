"""Toy densities in closed form: four in the plane, and a Gaussian of any dimension.

The recipes come from the FFJORD code (Grathwohl et al. 2019, arXiv:1810.01367). All draws are independent and
continuous, and all randomness comes from the given generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from flows.arguments import checked
from flows.datasets.densities.density import Density, check_points
from flows.errors import InvalidValueError


@checked
class EightGaussians(Density):
    """Eight round Gaussians on a circle.

    x = (4 (cos, sin)(kπ/4) + 0.5 z) / 1.414 with k uniform on 0, ..., 7 and z ~ N(0, I). Entropy 2.83188 nats.

    Example:
        ```python
        import flows

        data = flows.datasets.EightGaussians()
        x = data.sample(100)  # (100, 2)
        data.log_prob(x).mean(), -data.entropy  # close to each other
        ```
    """

    name = "8gaussians"
    entropy = 2.83188
    radius: ClassVar[float] = 4 / 1.414
    sd: ClassVar[float] = 0.5 / 1.414

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        angle = torch.randint(8, (n,), generator=generator) * (math.pi / 4)
        return self.radius * _direction(angle) + self.sd * torch.randn(n, 2, generator=generator)

    def log_prob(self, x: Tensor) -> Tensor:
        centres = self.radius * _direction(torch.arange(8, dtype=x.dtype, device=x.device) * (math.pi / 4))
        squared = (check_points(x).unsqueeze(-2) - centres).square().sum(-1)
        norm = math.log(8 * 2 * math.pi * self.sd**2)
        return torch.logsumexp(squared / (-2 * self.sd**2), -1) - norm


@checked
class Checkerboard(Density):
    """Uniform on the eight dark squares of a 4 × 4 board.

    The board is [−4, 4]². x = 2u with u1 ~ U(−2, 2) and u2 = U(0, 1) − 2B + (⌊u1⌋ mod 2), B ~ Bernoulli(½).
    Entropy log 32 nats.

    Example:
        ```python
        import flows

        data = flows.datasets.Checkerboard()
        x = data.sample(100)  # (100, 2)
        data.log_prob(x).mean(), -data.entropy  # close to each other
        ```
    """

    name = "checkerboard"
    entropy = math.log(32)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        u1 = 4 * torch.rand(n, generator=generator) - 2
        row = torch.floor(u1) % 2 - 2 * torch.randint(2, (n,), generator=generator)
        return 2 * torch.stack([u1, torch.rand(n, generator=generator) + row], -1)

    def log_prob(self, x: Tensor) -> Tensor:
        u = check_points(x) / 2
        cell = torch.floor(u)
        # Edges count as inside, as rounding can put a sample on one and every edge borders a dark square.
        dark = (cell.sum(-1) % 2 == 0) | (u == cell).any(-1)
        inside = dark & (u.abs() <= 2).all(-1)
        # The zero gives the result a zero gradient, so that callers can differentiate it.
        return torch.where(inside, 0 * x.sum(-1) - math.log(32), -math.inf)


class _NoisyCircles(Density):
    """Circles with Gaussian noise.

    x = R (cos, sin)(a) + sd z with R uniform on `radii`, a ~ U(0, 2π), z ~ N(0, I). Integrating over a gives a Bessel
    function: with r = ‖x‖, p(x) = mean_R exp(−(r² + R²)/(2 sd²)) I₀(rR/sd²) / (2π sd²).
    """

    radii: ClassVar[tuple[float, ...]]
    sd: ClassVar[float]

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        component = torch.randint(len(self.radii), (n, 1), generator=generator)
        angle = 2 * math.pi * torch.rand(n, generator=generator)
        return torch.tensor(self.radii)[component] * _direction(angle) + self.sd * torch.randn(
            n, 2, generator=generator
        )

    def log_prob(self, x: Tensor) -> Tensor:
        radii = torch.tensor(self.radii, dtype=x.dtype, device=x.device)
        r = torch.linalg.vector_norm(check_points(x), dim=-1, keepdim=True)
        # i0e(a) = exp(−a) I₀(a) turns the exponent into −(r − R)², which cannot overflow.
        bessel = torch.log(torch.special.i0e(r * radii / self.sd**2))
        norm = math.log(len(self.radii) * 2 * math.pi * self.sd**2)
        return torch.logsumexp(bessel - (r - radii).square() / (2 * self.sd**2), -1) - norm


@checked
class Rings(_NoisyCircles):
    """Four concentric rings of equal mass.

    x = R (cos, sin)(a) + 0.08 z with R uniform on 3 (1, ¾, ½, ¼), a ~ U(0, 2π), z ~ N(0, I).
    Entropy 2.62318 nats.

    Example:
        ```python
        import flows

        data = flows.datasets.Rings()
        x = data.sample(100)  # (100, 2)
        data.log_prob(x).mean(), -data.entropy  # close to each other
        ```
    """

    name = "rings"
    entropy = 2.62318
    radii = (3.0, 2.25, 1.5, 0.75)
    sd = 0.08


@checked
class Circles(_NoisyCircles):
    """Two concentric circles of equal mass.

    x = R (cos, sin)(a) + 0.24 z with R uniform on (3, 1.5), a ~ U(0, 2π), z ~ N(0, I).
    Entropy 3.26814 nats.

    Example:
        ```python
        import flows

        data = flows.datasets.Circles()
        x = data.sample(100)  # (100, 2)
        data.log_prob(x).mean(), -data.entropy  # close to each other
        ```
    """

    name = "circles"
    entropy = 3.26814
    radii = (3.0, 1.5)
    sd = 0.24


@checked(own=("mean", "covariance"))
class Gaussian(Density):
    """A Gaussian N(mean, covariance) of any dimension d.

    Entropy ½ log det(2πe covariance) nats.

    Args:
        mean: d numbers.
        covariance: d rows of d numbers, symmetric and positive definite.
        num_validation, num_test, num_reference: see `Density`.

    Raises:
        InvalidValueError: the shapes differ, a number is not finite, or `covariance` is no covariance.

    Example:
        ```python
        import torch

        import flows

        density = flows.datasets.Gaussian([1.0, -1.0], [[1.0, 0.8], [0.8, 2.0]])
        x = density.sample(100, torch.Generator().manual_seed(0))  # (100, 2)
        log_p = density.log_prob(x)  # (100,)
        ```
    """

    name = "gaussian"

    def __init__(
        self,
        mean: Sequence[float] | Tensor,
        covariance: Sequence[Sequence[float]] | Tensor,
        num_validation: int = 10_000,
        num_test: int = 100_000,
        num_reference: int = 10_000,
    ):
        try:
            # Number by number, as the lists of a config are not Python lists.
            self.mean = torch.tensor([float(v) for v in mean], dtype=torch.float64)
            rows = [[float(v) for v in row] for row in covariance]
            self.covariance = torch.tensor(rows, dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise InvalidValueError(
                f"mean must be d numbers and covariance d rows of d numbers, got {mean} and {covariance}"
            ) from error
        d = len(self.mean)
        if d == 0 or self.covariance.shape != (d, d):
            raise InvalidValueError(
                f"covariance must be {d} x {d} for a mean of {d} numbers, got {tuple(self.covariance.shape)}"
            )
        super().__init__(num_validation, num_test, num_reference, (d,))
        if not torch.isfinite(self.mean).all() or not torch.isfinite(self.covariance).all():
            raise InvalidValueError(f"mean and covariance must be finite, got {mean} and {covariance}")
        if not torch.allclose(self.covariance, self.covariance.T, rtol=1e-6):
            raise InvalidValueError(f"covariance must be symmetric, got {covariance}")
        self.cholesky, failed = torch.linalg.cholesky_ex(self.covariance)
        if failed:
            smallest = torch.linalg.eigvalsh(self.covariance)[0].item()
            raise InvalidValueError(
                f"covariance must be positive definite, its smallest eigenvalue is {smallest:.3g}; a standard "
                "deviation s gives s² on the diagonal, and |covariance_ij| < s_i s_j elsewhere"
            )
        self.entropy = d / 2 * math.log(2 * math.pi * math.e) + self.cholesky.diagonal().log().sum().item()

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        z = torch.randn(n, *self.event_shape, generator=generator)
        return self.mean.to(z) + z @ self.cholesky.to(z).T

    def log_prob(self, x: Tensor) -> Tensor:
        (d,) = self.event_shape
        centred = (check_points(x, d) - self.mean.to(x)).unsqueeze(-1)
        z = torch.linalg.solve_triangular(self.cholesky.to(x), centred, upper=False).squeeze(-1)
        log_det = self.cholesky.diagonal().log().sum().item()
        return -z.square().sum(-1) / 2 - d / 2 * math.log(2 * math.pi) - log_det


def _direction(angle: Tensor) -> Tensor:
    """Return (cos, sin) of angles: (*batch,) → (*batch, 2)."""
    return torch.stack([angle.cos(), angle.sin()], -1)
