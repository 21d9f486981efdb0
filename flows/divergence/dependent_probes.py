"""Families whose K probes exclude each other, so that K = d of them leave no noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flows.divergence.probes import ProbeFamily, deviatoric_norm2, draw_like


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
            raise ValueError(
                f"{name} has at most d = {dimension} probes for an event of dimension {dimension}, got "
                f"num_probes = {num_probes}; with d of them it is already exact"
            )


@dataclass(frozen=True)
class Orthonormal(WithoutReplacement):
    r"""A random orthonormal K-frame, times √d. Exact at K = d.

    Variance 2d(d − K)/(K(d − 1)(d + 2)) (‖S‖²_F − tr²/d): that of :class:`Sphere`, times (d − K)/(d − 1).
    Frames are uniform (Haar), by QR of Gaussian matrices with the signs of R's diagonal [Mezzadri 2007,
    arXiv:math-ph/0609050]. Cost beside the products: one QR of a (d, K) matrix for each sample, once a solve.
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


@dataclass(frozen=True)
class Coordinates(WithoutReplacement):
    r"""K distinct axes, times √d: d/K times K diagonal entries of J. Exact at K = d, or on an equal diagonal.

    Variance (d²/K)(1 − K/d) var(diag J) with d − 1 in the sample variance: the only family that the off-diagonal
    entries leave alone, and the worst of them where the diagonal is uneven.
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
