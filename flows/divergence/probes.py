"""Families of random probe vectors for stochastic trace estimation.

With J = ∂v/∂x, S = (J + Jᵀ)/2 and d = dim(event), a probe ε with E[εεᵀ] = I gives E[εᵀJε] = tr J. What
differs between the families is the variance, which each states as a function of J.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


class ProbeFamily(ABC):
    """Draws probes ε_1, ..., ε_K for every sample of a batch, so that mean_k ε_kᵀ J ε_k is unbiased.

    To add one: subclass it; ``Hutchinson(probes=...)`` takes an instance or the lower-case class name.
    """

    @abstractmethod
    def draw(
        self,
        num_probes: int,
        x: Tensor,  # (B, *event); gives shape, dtype and device
        generator: torch.Generator | None = None,
    ) -> Tensor:  # (K, B, *event)
        """Draw ``num_probes`` probes a sample."""

    @abstractmethod
    def variance(
        self,
        jacobian: Tensor,  # (..., d, d)
        num_probes: int,
    ) -> Tensor:  # (...)
        """The variance of mean_k ε_kᵀ J ε_k."""

    def spread_factor(self, num_probes: int, dimension: int) -> float:
        """What (spread of the K estimates)/√K is to be multiplied by to be the standard error of their mean.

        1 for independent probes, less for probes that exclude each other, and 0 where they exhaust the space.

        Raises:
            ValueError: a family cannot have so many probes in that dimension.
        """
        return 1.0


@dataclass(frozen=True)
class Rademacher(ProbeFamily):
    """Independent signs. Variance 2(‖S‖²_F − Σᵢ J_ii²)/K: no noise where S is diagonal. [Hutchinson 1990]"""

    def draw(self, num_probes: int, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        def signs(shape: tuple[int, ...], **options: object) -> Tensor:
            return torch.randint(0, 2, shape, **options).mul_(2).sub_(1)

        return draw_like(signs, num_probes, x, generator)

    def variance(self, jacobian: Tensor, num_probes: int) -> Tensor:
        diagonal = jacobian.diagonal(dim1=-2, dim2=-1).square().sum(-1)
        return 2 * (symmetric_norm2(jacobian) - diagonal) / num_probes


@dataclass(frozen=True)
class Sphere(ProbeFamily):
    """Uniform on the sphere of radius √d. Variance (2d/(d+2)) (‖S‖²_F − tr²/d)/K: no noise where S = cI.

    A normal probe without the noise of its length. [Marsaglia 1972; Epperly, Tropp & Webber 2024]
    """

    def draw(self, num_probes: int, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        normal = draw_like(torch.randn, num_probes, x, generator).flatten(2)
        length = torch.linalg.vector_norm(normal, dim=2, keepdim=True)
        return (normal / length * normal.shape[2] ** 0.5).view(num_probes, *x.shape)

    def variance(self, jacobian: Tensor, num_probes: int) -> Tensor:
        d = jacobian.shape[-1]
        return 2 * d / (d + 2) * deviatoric_norm2(jacobian) / num_probes


@dataclass(frozen=True)
class Gaussian(ProbeFamily):
    """Independent standard normals. Variance 2‖S‖²_F/K: never below that of the signs. [Skilling 1989]"""

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
    """‖S − (tr S/d) I‖²_F = ‖S‖²_F − tr²/d: what of S is not a multiple of the identity."""
    trace = jacobian.diagonal(dim1=-2, dim2=-1).sum(-1)
    return symmetric_norm2(jacobian) - trace.square() / jacobian.shape[-1]


def draw_like(
    sampler: Callable[..., Tensor],
    num_probes: int,
    x: Tensor,  # (B, *event)
    generator: torch.Generator | None,
) -> Tensor:  # (K, B, *event)
    """Draw with ``sampler`` on the generator's device, for the shape, dtype and device of ``x``."""
    device = x.device if generator is None else generator.device
    shape = (num_probes, *x.shape)
    return sampler(shape, generator=generator, dtype=x.dtype, device=device).to(x.device)
