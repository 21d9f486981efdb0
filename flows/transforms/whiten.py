"""A linear map to identity covariance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from flows.errors import InvalidValueError
from flows.transforms.base import Transform

ROUNDS = 10  # of weighing; each takes most of what is left of the way


class Whiten(Transform):
    r"""y = C^(−1/2) (x − mean), with the mean and the covariance C of the training data and its symmetric root.

    A flow that leaves y as it is, is the Gaussian of these moments. The likelihood of a linear map of the data is the
    same, but flow matching is not: its squares count an error in a direction by the variance there, the likelihood by
    the variance relative to that of the data. Pixels of natural images differ by factors of thousands in this.
    C^(−1/2) is the whitening that changes an image least; with ``axes="principal"`` it is Λ^(−1/2) Uᵀ for C = U Λ Uᵀ,
    whose entries are principal components from the least variance to the most. [Kessy, Lewin & Strimmer 2018,
    arXiv:1512.00809]

    It is the identity until :meth:`fit`; the moments are buffers, so a checkpoint carries them.

    Args:
        event_shape: shape of a point; memory grows with the square of its size.
        shrinkage: s in [0, 1): C is taken as (1 − s) C + s diag(C), for data that are few.
        robust: weigh every point by the inverse square of its radius after whitening, so that a few points far out do
            not decide how the many others are scaled. The points of an elliptical density all count the same then, but
            C has an arbitrary factor. [Tyler 1987, Annals of Statistics 15, 234]
        axes: ``"pixels"`` or ``"principal"``.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        shrinkage: float = 0.0,
        robust: bool = False,
        axes: Literal["pixels", "principal"] = "pixels",
    ) -> None:
        super().__init__()
        if not 0 <= shrinkage < 1:
            raise InvalidValueError(f"shrinkage must be in [0, 1), got {shrinkage}")
        if axes not in ("pixels", "principal"):
            raise InvalidValueError(f"axes must be 'pixels' or 'principal', got {axes!r}")
        self.axes = axes
        self.event_shape = tuple(event_shape)
        self.shrinkage = shrinkage
        self.robust = robust
        size = math.prod(self.event_shape)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("root", torch.eye(size))  # C^(1/2), or Λ^(1/2) Uᵀ
        self.register_buffer("inverse_root", torch.eye(size))
        self.register_buffer("log_det", torch.zeros(()))  # of the inverse root

    def fit(self, points: Tensor) -> Whiten:
        """Take both moments from ``points`` (n, *event).

        Raises:
            ValueError: wrong shape, or the points do not span the space.
        """
        if tuple(points.shape[1:]) != self.event_shape or len(points) < 2:
            raise InvalidValueError(
                f"expected at least two points of shape {self.event_shape} to whiten by, got {tuple(points.shape)}"
            )
        exact = points.flatten(1).double()
        mean, covariance = self._moments(exact, torch.ones_like(exact[:, 0]))
        variances, directions = _spectrum(covariance, len(points))
        if self.robust:
            for _ in range(ROUNDS):
                centred = exact - mean
                radii = (torch.linalg.solve(covariance, centred.T).T * centred).sum(1)
                radii = radii.clamp(min=1e-9 * radii.mean())  # a point may lie in the mean
                mean, covariance = self._moments(exact, exact.shape[1] / radii)
            variances, directions = _spectrum(covariance, len(points))
        self.mean.copy_(mean)
        rotation = directions.T if self.axes == "pixels" else torch.eye(len(variances)).to(directions)
        self.inverse_root.copy_((directions * variances**-0.5) @ rotation)
        self.root.copy_((rotation.T * variances**0.5) @ directions.T)
        self.log_det.copy_(-0.5 * variances.log().sum())
        return self

    def _moments(self, points: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted mean, and the covariance around it."""
        mean = (weights.unsqueeze(1) * points).sum(0) / weights.sum()
        centred = points - mean
        covariance = (weights.unsqueeze(1) * centred).T @ centred / (len(points) - 1)
        return mean, torch.lerp(covariance, covariance.diagonal().diag(), self.shrinkage)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):  # data need all their digits
            return ((x.flatten(1) - self.mean) @ self.inverse_root).view_as(x), self.log_det.expand(len(x))

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(y.device.type, enabled=False):
            return (y.flatten(1) @ self.root + self.mean).view_as(y), -self.log_det.expand(len(y))


def _spectrum(covariance: Tensor, num_points: int) -> tuple[Tensor, Tensor]:  # (d,) and (d, d)
    """Its eigenvalues, rising, and eigenvectors; ``ValueError`` unless the points vary in all directions."""
    variances, directions = torch.linalg.eigh(covariance)
    flat = int((variances <= 1e-12 * variances[-1]).sum())
    if flat:
        raise InvalidValueError(
            f"{num_points} points do not vary in {flat} of {len(variances)} directions, so that they have no "
            "covariance to whiten by; bring more points, drop entries that follow from others, or set shrinkage"
        )
    return variances, directions
