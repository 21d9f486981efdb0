"""Fixed transforms from data space to the space of the flow, with their log-determinants."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Transform(nn.Module, ABC):
    """An invertible map from data space to flow space."""

    @abstractmethod
    def forward(
        self,
        x: Tensor,  # (B, *event), data space
    ) -> tuple[Tensor, Tensor]:  # (B, *event) and (B,)
        """y and log|det ∂y/∂x| in nats."""

    @abstractmethod
    def inverse(
        self,
        y: Tensor,  # (B, *event), flow space
    ) -> tuple[Tensor, Tensor]:  # (B, *event) and (B,)
        """x and log|det ∂x/∂y| in nats."""

    def fit(
        self,
        points: Tensor,  # (n, *event), data space
    ) -> Transform:
        """Set what the transform takes from the training data, if anything; returns itself."""
        return self


class Identity(Transform):
    """Data space is flow space."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x.new_zeros(len(x))

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y, y.new_zeros(len(y))


class Standardise(Transform):
    """y = (x − mean) / sd, entry by entry, with the mean and the sd of the training data.

    It is the identity until :meth:`fit`; both moments are buffers, so a checkpoint carries them.

    Args:
        event_shape: shape of a point.
    """

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(tuple(event_shape)))
        self.register_buffer("sd", torch.ones(tuple(event_shape)))

    def fit(self, points: Tensor) -> Standardise:
        """Take both moments from ``points``.

        Raises:
            ValueError: wrong shape, fewer than two points, or an entry that never varies.
        """
        if points.shape[1:] != self.mean.shape or len(points) < 2:
            raise ValueError(
                f"expected at least two points of shape {tuple(self.mean.shape)} to standardise by, "
                f"got {tuple(points.shape)}"
            )
        exact = points.double()
        sd = exact.std(0)
        constant = (sd <= 1e-12 * exact.abs().amax(0)).nonzero()
        if len(constant):
            raise ValueError(
                f"entry {tuple(constant[0].tolist())} of the data has the same value in every point, so it has no "
                f"density; drop it ({len(constant)} such entries)"
            )
        self.mean.copy_(exact.mean(0))
        self.sd.copy_(sd)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x - self.mean) / self.sd, -self.sd.log().sum().expand(len(x))

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y * self.sd + self.mean, self.sd.log().sum().expand(len(y))
