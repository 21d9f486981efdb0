"""Toy densities around curves in the plane.

Each log-density is a one-dimensional integral or a sum over roots. The recipes come from the FFJORD code (Grathwohl
et al. 2019, arXiv:1810.01367) and from scikit-learn's `make_moons` and `make_swiss_roll`. All draws are independent and
continuous.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from flows.arguments import checked
from flows.datasets.densities.density import Density, check_points

# Error against 4,000 nodes on [-4.5, 4.5]²: 2spirals 1e-8 in log p where p > 1e-9 and 2e-5 everywhere, the other two
# 1e-9. Far from a curve the integrand is narrower, so too few nodes would fail there first.
NUM_NODES = 384
POINTS_AT_ONCE = 512  # limits the memory of (points, nodes)


@checked
class Moons(Density):
    """Two interleaved half circles.

    u = (cos a, sin a) or (1 − cos a, ½ − sin a), equally likely, with a ~ U(0, π). x = 2 (u + 0.1 z) − (1, 0.2) with
    z ~ N(0, I). Entropy 2.39388 nats.

    Example:
        ```python
        import flows

        data = flows.datasets.Moons()
        x = data.sample(100)  # (100, 2)
        data.log_prob(x).mean(), -data.entropy  # close to each other
        ```
    """

    name = "moons"
    entropy = 2.39388
    shift: ClassVar[tuple[float, float]] = (-1.0, -0.2)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        lower = torch.randint(2, (n,), generator=generator, dtype=torch.bool)
        return self.sample_arc(lower, generator)

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.logaddexp(*(self.log_prob_of_arc(x, lower) for lower in (False, True))) - math.log(2)

    def sample_arc(self, lower: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw points of the lower half circle where `lower` (n,) is true, otherwise of the upper one."""
        angle = math.pi * torch.rand(len(lower), generator=generator)
        u = self._arc(angle, lower) + 0.1 * torch.randn(len(lower), 2, generator=generator)
        return 2 * u + torch.tensor(self.shift)

    def log_prob_of_arc(self, x: Tensor, lower: bool) -> Tensor:
        """Return log p(x | half circle) in nats: (*batch, 2) → (*batch,)."""
        angle, weight = _nodes(0, math.pi, like=x)
        arc = self._arc(angle, torch.full_like(angle, lower, dtype=torch.bool))
        centres = 2 * arc + torch.tensor(self.shift, dtype=x.dtype, device=x.device)
        return _noisy_curve_log_prob(x, centres, weight / math.pi, sd=0.2)

    @staticmethod
    def _arc(angle: Tensor, lower: Tensor) -> Tensor:
        cos, sin = angle.cos(), angle.sin()
        return torch.stack([torch.where(lower, 1 - cos, cos), torch.where(lower, 0.5 - sin, sin)], -1)


@checked
class SwissRoll(Density):
    """A spiral with noise of constant width.

    x = (a (cos a, sin a) + z) / 5 with a ~ U(1.5π, 4.5π), z ~ N(0, I). Entropy 2.66965 nats.

    Example:
        ```python
        import flows

        data = flows.datasets.SwissRoll()
        x = data.sample(100)  # (100, 2)
        data.log_prob(x).mean(), -data.entropy  # close to each other
        ```
    """

    name = "swissroll"
    entropy = 2.66965

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        angle = math.pi * (1.5 + 3 * torch.rand(n, generator=generator))
        return self._curve(angle) + 0.2 * torch.randn(n, 2, generator=generator)

    def log_prob(self, x: Tensor) -> Tensor:
        angle, weight = _nodes(1.5 * math.pi, 4.5 * math.pi, like=x)
        return _noisy_curve_log_prob(x, self._curve(angle), weight / (3 * math.pi), sd=0.2)

    @staticmethod
    def _curve(angle: Tensor) -> Tensor:
        return (angle / 5).unsqueeze(-1) * torch.stack([angle.cos(), angle.sin()], -1)


@checked
class TwoSpirals(Density):
    """Two spiral arms; each is the other's reflection in the origin.

    x = s (−a cos a + U1/2, a sin a + U2/2) / 3 + 0.1 z with a = 3π √U0, s = ±1 equally likely, independent U0, U1,
    U2 ~ U(0, 1) and z ~ N(0, I). Entropy 2.64545 nats.

    Given a, each coordinate is a uniform plus a Gaussian. The density of such a sum is a difference of two normal
    distribution functions. `log_prob` integrates over a by quadrature, exact to 1e-8 near the arms. It computes in
    float64 and returns the dtype of x.

    Example:
        ```python
        import flows

        data = flows.datasets.TwoSpirals()
        x = data.sample(100)  # (100, 2)
        data.log_prob(x).mean(), -data.entropy  # close to each other
        ```
    """

    name = "2spirals"
    entropy = 2.64545
    width: ClassVar[float] = 1 / 6
    sd: ClassVar[float] = 0.1

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        angle = 3 * math.pi * torch.rand(n, generator=generator).sqrt()
        arm = self._arm(angle) + self.width * torch.rand(n, 2, generator=generator)
        sign = 2 * torch.randint(2, (n, 1), generator=generator) - 1
        return sign * arm + self.sd * torch.randn(n, 2, generator=generator)

    def log_prob(self, x: Tensor) -> Tensor:
        angle, weight = _nodes(0, 3 * math.pi, like=x.double())
        weight = weight * angle / (9 * math.pi**2)  # p(a) = 2a/(3π)², half of it for each arm
        middle = self._arm(angle) + self.width / 2
        middle, weight = torch.cat([middle, -middle]), torch.cat([weight, weight])
        return _in_chunks(lambda part: self._log_mixture(part, middle, weight), check_points(x).double()).to(x)

    def _log_mixture(self, x: Tensor, middle: Tensor, weight: Tensor) -> Tensor:
        """Return log Σ_j weight_j Π_i [Φ(b_ij) − Φ(a_ij)] / width, where a and b are the ends of an interval.

        Each factor is symmetric about the middle of its interval. On the upper side, a difference of erfc keeps all
        digits until it underflows, nearly four units away. Beyond that, the sum is taken in logarithms.
        """
        product = torch.ones_like(middle[:, 0])
        for i in range(2):
            distance = (x[:, i, None] - middle[:, i]).abs() / (math.sqrt(2) * self.sd)
            half = self.width / 2 / (math.sqrt(2) * self.sd)
            factor = (torch.erfc(distance - half) - torch.erfc(distance + half)) / (2 * self.width)
            product = product * factor
        density = product @ weight
        floor = 1e-250
        log_p = density.clamp_min(floor).log()
        tail = torch.nonzero(density.detach() < floor).squeeze(-1)
        if len(tail) == 0:
            return log_p
        log_terms = weight.log()
        for i in range(2):
            distance = (x[tail, i, None] - middle[:, i]).abs()
            upper = torch.special.log_ndtr((self.width / 2 - distance) / self.sd)
            lower = torch.special.log_ndtr((-self.width / 2 - distance) / self.sd)
            log_terms = log_terms + upper + torch.log1p(-torch.exp(lower - upper)) - math.log(self.width)
        return log_p.index_put((tail,), torch.logsumexp(log_terms, -1))

    @staticmethod
    def _arm(angle: Tensor) -> Tensor:
        return (angle / 3).unsqueeze(-1) * torch.stack([-angle.cos(), angle.sin()], -1)


@checked
class Pinwheel(Density):
    """Five bent blades, each a narrow Gaussian.

    x = 2 R(2πk/5 + exp(s)/4) (s, y) with s ~ N(1, 0.3²), y ~ N(0, 0.1²), k uniform on 0, ..., 4, where R(a) rotates
    counterclockwise by a. Entropy 2.31779 nats.

    The map (s, y) → x/2 has the Jacobian determinant 1 − y exp(s)/4. It folds where that is zero, beyond three
    standard deviations of s and y. So p(x) is a sum over all roots s of the equation: s is the first coordinate of
    R(−angle_k(s)) x/2. `log_prob` finds the roots within 10 standard deviations of s. It is exact unless p(x) is below
    exp(−40).

    Example:
        ```python
        import flows

        data = flows.datasets.Pinwheel()
        x = data.sample(100)  # (100, 2)
        data.log_prob(x).mean(), -data.entropy  # close to each other
        ```
    """

    name = "pinwheel"
    entropy = 2.31779
    mean: ClassVar[float] = 1.0
    radial_sd: ClassVar[float] = 0.3
    tangential_sd: ClassVar[float] = 0.1

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        s = self.mean + self.radial_sd * torch.randn(n, generator=generator)
        y = self.tangential_sd * torch.randn(n, generator=generator)
        angle = self._angle(s, torch.randint(5, (n,), generator=generator))
        cos, sin = angle.cos(), angle.sin()
        return 2 * torch.stack([cos * s - sin * y, sin * s + cos * y], -1)

    def log_prob(self, x: Tensor) -> Tensor:
        return _in_chunks(lambda part: self._sum_over_roots(part / 2) - math.log(4), check_points(x))

    @staticmethod
    def _angle(s: Tensor, k: Tensor) -> Tensor:
        return 2 * math.pi / 5 * k + s.exp() / 4

    def _sum_over_roots(self, z: Tensor) -> Tensor:
        point, k, s = self._roots(z.detach())
        # One Newton step with gradients: it doubles the digits of s, and its derivative is that of the root.
        u, v = self._unrotate(z[point], s, k)
        s = s - (u - s) / (v * s.exp() / 4 - 1).detach()
        _, y = self._unrotate(z[point], s, k)
        log_terms = (
            -((s - self.mean) / self.radial_sd).square() / 2
            - (y / self.tangential_sd).square() / 2
            - math.log(5 * 2 * math.pi * self.radial_sd * self.tangential_sd)
            - (1 - y * s.exp() / 4).abs().log()
        )
        top = torch.full_like(z[:, 0], -math.inf).scatter_reduce(0, point, log_terms.detach(), "amax")
        total = torch.zeros_like(top).index_add(0, point, torch.exp(log_terms - top[point]))
        return top + total.log()

    @torch.no_grad()
    def _roots(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (index of the point, blade k, s) of all roots u(s) = s.

        Signs on a grid bracket the roots; bisection narrows them down.
        """
        reach = 10 * self.radial_sd
        grid = torch.linspace(self.mean - reach, self.mean + reach, 301, dtype=z.dtype, device=z.device)
        angle = self._angle(grid, torch.arange(5, dtype=z.dtype, device=z.device)[:, None])  # (5, grid)
        above = z[:, 0, None, None] * angle.cos() + z[:, 1, None, None] * angle.sin() > grid
        point, k, cell = torch.nonzero(above[..., 1:] != above[..., :-1], as_tuple=True)
        low, high, low_above, k = grid[cell], grid[cell + 1], above[point, k, cell], k.to(z)
        for _ in range(20 if z.dtype == torch.float64 else 10):
            middle = (low + high) / 2
            same = (self._unrotate(z[point], middle, k)[0] > middle) == low_above
            low, high = torch.where(same, middle, low), torch.where(same, high, middle)
        return point, k, (low + high) / 2

    def _unrotate(self, z: Tensor, s: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        angle = self._angle(s, k)
        cos, sin = angle.cos(), angle.sin()
        return cos * z[:, 0] + sin * z[:, 1], cos * z[:, 1] - sin * z[:, 0]


@cache
def _gauss_legendre(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(n)


def _nodes(start: float, end: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return nodes and weights of a Gauss-Legendre quadrature over (start, end)."""
    node, weight = (torch.from_numpy(v) for v in _gauss_legendre(NUM_NODES))
    half = (end - start) / 2
    return (start + half * (node + 1)).to(like), (half * weight).to(like)


def _noisy_curve_log_prob(x: Tensor, centres: Tensor, weight: Tensor, sd: float) -> Tensor:
    """Return log Σ_j weight_j N(x; centres_j, sd² I) for x (*batch, 2), centres (m, 2), weight (m,)."""
    log_weight = weight.log() - math.log(2 * math.pi * sd**2)

    def log_mixture(part: Tensor) -> Tensor:
        squared = (part.unsqueeze(-2) - centres).square().sum(-1)
        return torch.logsumexp(log_weight - squared / (2 * sd**2), -1)

    return _in_chunks(log_mixture, check_points(x))


def _in_chunks(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function (n, 2) → (n,) to x (*batch, 2), some points at a time."""
    parts = [function(part) for part in x.reshape(-1, 2).split(POINTS_AT_ONCE)]
    return torch.cat(parts).reshape(x.shape[:-1])
