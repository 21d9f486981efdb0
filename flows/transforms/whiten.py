"""Whitening: a linear map to identity covariance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flows.arguments import checked
from flows.checks import as_shape, check_number, fits_in_memory
from flows.errors import InvalidValueError
from flows.transforms.base import Transform, in_data_units

REWEIGHTING_ROUNDS = 10  # each round removes most of the remaining error


@checked
class Whiten(Transform):
    """Whitening: y = C^(−1/2) (x − mean).

    Mean and covariance C are those of the training data, so an identity flow is the Gaussian with these moments. A
    linear map does not change the likelihood, but it does change flow matching: its squared error weighs a direction by
    its variance, while the likelihood weighs errors relative to that variance. For pixels of natural images these
    weights differ by factors of thousands.

    The symmetric root C^(−1/2) changes an image least. With `axes="principal"` the map is Λ^(−1/2) Uᵀ for C = U Λ Uᵀ,
    and its entries are principal components, from the least variance to the most. [Kessy, Lewin & Strimmer 2018,
    arXiv:1512.00809]

    Before `fit` it is the identity. The moments are buffers, so checkpoints hold them. The mean stays in float64, so
    that float64 points keep their digits far from 0. y has the dtype of x. `inverse` returns float64 if |mean|/sd > 64,
    where float32 could not tell points apart.

    Args:
        event_shape: shape of a point. Memory grows with the square of its size.
        shrinkage: s in [0, 1), for few data: C is replaced by (1 − s) C + s diag(C).
        robust: weigh each point by the inverse square of its radius after whitening, so that outliers do not set the
            scale of all others. C then has an arbitrary factor. [Tyler 1987, Annals of Statistics 15, 234]
        axes: "pixels" or "principal".
        inner: a transform of the principal components, fitted to them, such as `NormalRadius` in bands. With
            `axes="pixels"` they turn back into pixels after it, where neighbours are neighbours for convolutions.

    Raises:
        InvalidTypeError, InvalidValueError: a setting is out of range, or the matrix does not fit in memory.

    Example:
        ```python
        import torch

        import flows

        points = torch.randn(1000, 2) @ torch.tensor([[2.0, 1.0], [0.0, 1.0]])
        y, log_det = flows.transforms.Whiten((2,)).fit(points)(points)
        y.T.cov()  # the unit matrix
        ```
    """

    exact_buffers: ClassVar[tuple[str, ...]] = ("mean",)
    mean: Tensor
    root: Tensor
    inverse_root: Tensor
    log_det: Tensor
    turn: Tensor  # U, with an inner transform: from pixels to principal components

    def __init__(
        self,
        event_shape: int | Sequence[int],
        shrinkage: float = 0.0,
        robust: bool = False,
        axes: Literal["pixels", "principal"] = "pixels",
        inner: Transform | None = None,
    ) -> None:
        super().__init__()
        check_number("shrinkage", shrinkage, at_least=0, below=1)
        if axes not in ("pixels", "principal"):
            raise InvalidValueError(f"axes must be 'pixels' or 'principal', got {axes!r}")
        self.axes = axes
        self.event_shape = as_shape("event_shape", event_shape)
        self.shrinkage = shrinkage
        self.robust = robust
        size = math.prod(self.event_shape)
        fits_in_memory(f"event_shape: a covariance of {size:,} entries", 4 * size**2)
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("root", torch.eye(size))  # C^(1/2), or Λ^(1/2) Uᵀ
        self.register_buffer("inverse_root", torch.eye(size))
        self.register_buffer("log_det", torch.zeros(()))  # of the inverse root
        self.inner = inner
        if inner is not None:
            self.register_buffer("turn", torch.eye(size))

    @property
    def is_affine(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner is None or self.inner.is_affine

    @property
    def is_defined_everywhere(self) -> bool:
        return self.inner is None or self.inner.is_defined_everywhere

    def fit(self, points: Tensor) -> Whiten:
        """Compute mean and covariance of `points` (n, *event).

        Raises:
            InvalidValueError: the shape is wrong, or the points do not span the space.
        """
        if tuple(points.shape[1:]) != self.event_shape or len(points) < 2:
            raise InvalidValueError(
                f"expected at least two points of shape {self.event_shape} to whiten by, got {tuple(points.shape)}"
            )
        exact = points.flatten(1).double()
        mean, covariance = self._moments(exact, torch.ones_like(exact[:, 0]))
        variances, directions = _spectrum(covariance, len(points))
        if self.robust:
            for _ in range(REWEIGHTING_ROUNDS):
                centred = exact - mean
                radii = (torch.linalg.solve(covariance, centred.T).T * centred).sum(1)
                radii = radii.clamp(min=1e-9 * radii.mean())  # a point may equal the mean
                mean, covariance = self._moments(exact, exact.shape[1] / radii)
            variances, directions = _spectrum(covariance, len(points))
        self.mean.copy_(mean)
        principal = torch.eye(len(variances)).to(directions)
        rotation = directions.T if self.axes == "pixels" and self.inner is None else principal
        self.inverse_root.copy_((directions * variances**-0.5) @ rotation)
        self.root.copy_((rotation.T * variances**0.5) @ directions.T)
        self.log_det.copy_(-0.5 * variances.log().sum())
        if self.inner is not None:
            self.turn.copy_(directions if self.axes == "pixels" else principal)
            self.inner.fit(((exact - mean) @ self.inverse_root.double()).to(points.dtype).view_as(points))
        return self

    def _moments(self, points: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted mean and covariance."""
        mean = (weights.unsqueeze(1) * points).sum(0) / weights.sum()
        centred = points - mean
        covariance = (weights.unsqueeze(1) * centred).T @ centred / (len(points) - 1)
        return mean, torch.lerp(covariance, covariance.diagonal().diag(), self.shrinkage)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):  # a lower precision would round the data
            centred = (x.flatten(1) - self.mean).to(self.inverse_root.dtype)
            y, log_det = (
                (centred @ self.inverse_root).to(x.dtype).view_as(x),
                self.log_det.to(x.dtype).expand(x.shape[0]),
            )
            if self.inner is None:
                return y, log_det
            y, inner_log_det = self.inner(y, generator)
            return (y.flatten(1) @ self.turn.to(y.dtype).T).view_as(x), log_det + inner_log_det

    def push_velocity(self, velocity: Tensor) -> Tensor:
        root = self.inverse_root.to(velocity.dtype)
        pushed = (velocity.flatten(1) @ root).view_as(velocity)
        if self.inner is None:
            return pushed
        return (self.inner.push_velocity(pushed).flatten(1) @ self.turn.to(velocity.dtype).T).view_as(velocity)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(y.device.type, enabled=False):
            inner_log_det = torch.zeros((), dtype=y.dtype, device=y.device)
            if self.inner is not None:
                y, inner_log_det = self.inner.inverse((y.flatten(1) @ self.turn.to(y.dtype)).view_as(y))
            moved = (y.flatten(1).to(self.root.dtype) @ self.root + self.mean).view_as(y)
            x = in_data_units(moved, y.dtype, self.mean.abs() / self.root.norm(dim=0))  # the norm is the sd
            return x, inner_log_det - self.log_det.to(y.dtype).expand(y.shape[0])


def _spectrum(covariance: Tensor, num_points: int) -> tuple[Tensor, Tensor]:  # (d,) and (d, d)
    """Return the eigenvalues in rising order, and the eigenvectors.

    Raises:
        InvalidValueError: the points do not vary in all directions.
    """
    variances, directions = torch.linalg.eigh(covariance)
    flat = int((variances <= 1e-12 * variances[-1]).sum())
    if flat:
        raise InvalidValueError(
            f"{num_points} points do not vary in {flat} of {len(variances)} directions, so their covariance "
            "cannot be inverted; bring more points, drop entries that follow from others, or set shrinkage"
        )
    return variances, directions
