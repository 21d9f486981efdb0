"""Families of random probe vectors for stochastic trace estimation.

With J = ∂v/∂x, S = (J + Jᵀ)/2 and d = dim(event), a probe ε with E[εεᵀ] = I gives E[εᵀJε] = tr J. What
differs between the families is the variance, which each states as a function of J.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flows.arguments import CheckedMethods, checked
from flows.checks import fits_in_memory
from flows.errors import InvalidValueError

MANY = 1 << 28  # numbers that may not fit into memory


class ProbeFamily(CheckedMethods, ABC, checks=("draw", "variance", "spread_factor")):
    """Draws K probes a sample, such that mean_k ε_kᵀ J ε_k is unbiased.

    To add one: subclass it; `Hutchinson(probes=...)` takes an instance or the lower-case class name.

    Example:
        ```python
        import torch

        from flows.divergence import Hutchinson, ProbeFamily, divergence


        class Uniform(ProbeFamily):
            '''Uniform entries of variance 1.'''

            def draw(self, num_probes, x, generator=None):
                noise = torch.rand((num_probes, *x.shape), generator=generator, dtype=x.dtype, device=x.device)
                return 3**0.5 * (2 * noise - 1)

            def variance(self, jacobian, num_probes):  # 2 ‖S‖² − 1.2 Σ S_ii², since E ε⁴ = 1.8
                symmetric = (jacobian + jacobian.mT) / 2
                diagonal = symmetric.diagonal(dim1=-2, dim2=-1).square().sum(-1)
                return (2 * symmetric.square().sum((-2, -1)) - 1.2 * diagonal) / num_probes


        divergence(torch.tanh, torch.randn(10, 3), estimator=Hutchinson(num_probes=4, probes=Uniform()))
        ```
    """

    @abstractmethod
    def draw(
        self,
        num_probes: int,
        x: Tensor,  # (B, *event); gives shape, dtype and device
        generator: torch.Generator | None = None,
    ) -> Tensor:  # (K, B, *event)
        """Draw `num_probes` probes a sample."""

    @abstractmethod
    def variance(
        self,
        jacobian: Tensor,  # (..., d, d)
        num_probes: int,
    ) -> Tensor:  # (...)
        """The variance of mean_k ε_kᵀ J ε_k."""

    def spread_factor(self, num_probes: int, dimension: int) -> float:
        """Standard error of the mean, as a multiple of (spread of the K estimates)/√K.

        1 for independent probes, less for probes drawn without replacement, 0 where these fill the space.

        Raises:
            ValueError: the dimension allows fewer probes.
        """
        return 1.0


@checked
@dataclass(frozen=True)
class Rademacher(ProbeFamily):
    """Independent signs. Variance 2(‖S‖²_F − Σᵢ J_ii²)/K: no noise where S is diagonal. [Hutchinson 1990]

    Example:
        ```python
        import torch

        from flows.divergence import Hutchinson, Rademacher, divergence

        x = torch.randn(10, 3)
        signs = divergence(torch.tanh, x, estimator=Hutchinson(probes=Rademacher()))
        torch.testing.assert_close(signs, divergence(torch.tanh, x))  # no noise: the Jacobian is diagonal
        ```
    """

    def draw(self, num_probes: int, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        def signs(shape: tuple[int, ...], **options: Any) -> Tensor:
            return torch.randint(0, 2, shape, **options).mul_(2).sub_(1)

        return draw_like(signs, num_probes, x, generator)

    def variance(self, jacobian: Tensor, num_probes: int) -> Tensor:
        diagonal = jacobian.diagonal(dim1=-2, dim2=-1).square().sum(-1)
        return 2 * (symmetric_norm2(jacobian) - diagonal) / num_probes


@checked
@dataclass(frozen=True)
class Sphere(ProbeFamily):
    """Uniform on the sphere of radius √d. Variance (2d/(d+2)) (‖S‖²_F − tr²/d)/K: no noise where S = cI.

    A normal probe without the noise of its length. [Marsaglia 1972; Epperly, Tropp & Webber 2024]

    Example:
        ```python
        import torch

        from flows.divergence import Hutchinson, Sphere, divergence

        x = torch.randn(10, 3)
        noiseless = divergence(lambda x: 2 * x, x, estimator=Hutchinson(probes=Sphere()))
        torch.testing.assert_close(noiseless, torch.full((10,), 6.0))
        ```
    """

    def draw(self, num_probes: int, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        normal = draw_like(torch.randn, num_probes, x, generator).flatten(2)
        length = torch.linalg.vector_norm(normal, dim=2, keepdim=True)
        return (normal / length * normal.shape[2] ** 0.5).view(num_probes, *x.shape)

    def variance(self, jacobian: Tensor, num_probes: int) -> Tensor:
        d = jacobian.shape[-1]
        return 2 * d / (d + 2) * deviatoric_norm2(jacobian) / num_probes


@checked
@dataclass(frozen=True)
class Gaussian(ProbeFamily):
    """Independent standard normals. Variance 2‖S‖²_F/K: never below that of the signs. [Skilling 1989]

    Example:
        ```python
        import torch

        from flows.divergence import Gaussian, Hutchinson, divergence

        divergence(torch.tanh, torch.randn(10, 3), estimator=Hutchinson(num_probes=8, probes=Gaussian()))
        ```
    """

    def draw(self, num_probes: int, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return draw_like(torch.randn, num_probes, x, generator)

    def variance(self, jacobian: Tensor, num_probes: int) -> Tensor:
        return 2 * symmetric_norm2(jacobian) / num_probes


def symmetric_norm2(
    jacobian: Tensor,  # (..., d, d)
) -> Tensor:  # (...)
    """‖S‖²_F of the symmetric part S = (J + Jᵀ)/2."""
    return (0.5 * (jacobian + jacobian.mT)).square().sum((-2, -1))


def deviatoric_norm2(
    jacobian: Tensor,  # (..., d, d)
) -> Tensor:  # (...)
    """‖S − (tr S/d) I‖²_F = ‖S‖²_F − tr²/d."""
    trace = jacobian.diagonal(dim1=-2, dim2=-1).sum(-1)
    return symmetric_norm2(jacobian) - trace.square() / jacobian.shape[-1]


def draw_like(
    sampler: Callable[..., Tensor],
    num_probes: int,
    x: Tensor,  # (B, *event)
    generator: torch.Generator | None,
) -> Tensor:  # (K, B, *event)
    """Draw on the generator's device, with the dtype and device of `x`."""
    device = x.device if generator is None else generator.device
    shape = (num_probes, *x.shape)
    if math.prod(shape) > MANY:
        num_bytes = math.prod(shape) * x.dtype.itemsize
        fits_in_memory(f"num_probes: {num_probes:,} probes of shape {tuple(x.shape)}", num_bytes)
    return sampler(shape, generator=generator, dtype=x.dtype, device=device).to(x.device)


class WithoutReplacement(ProbeFamily):
    """Probes that are orthogonal to each other, K <= d = dim(event) of them, each of length √d.

    For K exchangeable estimates whose mean has no variance at K = d, Var(mean) = (spread²/K) (1 − K/d), as in
    sampling from a finite population [Cochran 1977, section 2.6].
    """

    def spread_factor(self, num_probes: int, dimension: int) -> float:
        """√(1 − K/d)."""
        self._check(num_probes, dimension)
        return math.sqrt(1 - num_probes / dimension)

    def _check(self, num_probes: int, dimension: int) -> None:
        if num_probes > dimension:
            name = type(self).__name__
            raise InvalidValueError(
                f"{name} has at most d = {dimension} probes for an event of dimension {dimension}, got "
                f"num_probes = {num_probes}; with d of them it is already exact"
            )


@checked
@dataclass(frozen=True)
class Orthonormal(WithoutReplacement):
    r"""A random orthonormal K-frame, times √d. Exact at K = d.

    Variance 2d(d − K)/(K(d − 1)(d + 2)) (‖S‖²_F − tr²/d): that of `Sphere`, times (d − K)/(d − 1).
    Frames are uniform (Haar), by QR of Gaussian matrices with the signs of R's diagonal [Mezzadri 2007,
    arXiv:math-ph/0609050]. Cost beside the products: one QR of a (d, K) matrix for each sample, once a solve.

    Example:
        ```python
        import torch

        from flows.divergence import Hutchinson, Orthonormal, divergence

        divergence(torch.tanh, torch.randn(10, 3), estimator=Hutchinson(num_probes=2, probes=Orthonormal()))
        ```
    """

    def draw(self, num_probes: int, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        dimension = math.prod(x.shape[1:])
        self._check(num_probes, dimension)
        normal = draw_like(torch.randn, num_probes, x, generator).flatten(2)
        with torch.no_grad():
            frame, triangle = torch.linalg.qr(normal.permute(1, 2, 0))  # (B, d, K), (B, K, K)
            signs = triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(1)
            return (frame * signs * dimension**0.5).permute(2, 0, 1).reshape(num_probes, *x.shape)

    def variance(self, jacobian: Tensor, num_probes: int) -> Tensor:
        d = jacobian.shape[-1]
        left = (d - num_probes) / max(d - 1, 1)  # the only frame of one dimension is exact
        return 2 * d / (d + 2) * left * deviatoric_norm2(jacobian) / num_probes


@checked
@dataclass(frozen=True)
class Coordinates(WithoutReplacement):
    r"""K distinct axes, times √d: d/K times K diagonal entries of J. Exact at K = d, or on an equal diagonal.

    Variance (d²/K)(1 − K/d) var(diag J) with d − 1 in the sample variance: off-diagonal
    entries add no noise, but an uneven diagonal adds more than with any other family.

    Example:
        ```python
        import torch

        from flows.divergence import Coordinates, Hutchinson, divergence

        estimator = Hutchinson(num_probes=3, probes=Coordinates())  # exact: K = d
        divergence(torch.tanh, torch.randn(10, 3), estimator=estimator)
        ```
    """

    def draw(self, num_probes: int, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        dimension = math.prod(x.shape[1:])
        self._check(num_probes, dimension)
        keys = draw_like(torch.rand, 1, x, generator).flatten(2)[0]  # (B, d)
        chosen = keys.topk(num_probes, dim=1).indices.T.unsqueeze(2)  # (K, B, 1)
        probes = x.new_zeros(num_probes, len(x), dimension)
        return probes.scatter_(2, chosen, dimension**0.5).view(num_probes, *x.shape)

    def variance(self, jacobian: Tensor, num_probes: int) -> Tensor:
        d = jacobian.shape[-1]
        if num_probes == d:
            return jacobian.new_zeros(jacobian.shape[:-2])
        spread2 = jacobian.diagonal(dim1=-2, dim2=-1).var(-1)
        return d**2 / num_probes * (1 - num_probes / d) * spread2
