"""Scaling to the unit interval, or to mean zero and variance one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flows.arguments import checked
from flows.checks import as_shape
from flows.errors import InvalidValueError
from flows.transforms.base import Transform, in_data_units
from flows.transforms.dequantise import checked_levels


@checked
class UnitInterval(Transform):
    """Scaling of dequantised levels: y = x/L from [0, L) to [0, 1).

    Args:
        num_levels: L.

    Example:
        ```python
        import torch

        import flows

        y, log_det = flows.transforms.UnitInterval(num_levels=256)(256 * torch.rand(10, 3))
        ```
    """

    is_affine = True

    def __init__(self, num_levels: int | None) -> None:
        super().__init__()
        self.scale = checked_levels(num_levels)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        return x / self.scale, self._log_det(x)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y * self.scale, -self._log_det(y)

    def push_velocity(self, velocity: Tensor) -> Tensor:
        return velocity / self.scale

    def _log_det(self, x: Tensor) -> Tensor:
        return x.new_full((x.shape[0],), -math.prod(x.shape[1:]) * math.log(self.scale))


@checked
class Standardise(Transform):
    """Standardisation: y = (x − mean)/sd for each entry.

    Mean and standard deviation are those of the training data. Before `fit` it is the identity. Both are buffers, so
    checkpoints hold them. They stay in float64, so that (x − mean)/sd of float64 points keeps their digits far from 0.
    y has the dtype of x. `inverse` returns float64 if |mean|/sd > 64, where float32 could not tell points apart.

    Args:
        event_shape: shape of a point.
        per: "entry" for one mean and sd an entry, or "channel" for one a channel (the first dimension). "channel" keeps
            an image's look and treats all pixels alike.

    Raises:
        InvalidValueError: `per` is neither.

    Example:
        ```python
        import torch

        import flows

        points = 5 + 3 * torch.randn(1000, 2)
        y, log_det = flows.transforms.Standardise((2,)).fit(points)(points)  # mean 0, variance 1
        ```
    """

    exact_buffers: ClassVar[tuple[str, ...]] = ("mean", "sd")
    is_affine = True
    mean: Tensor
    sd: Tensor

    def __init__(self, event_shape: int | Sequence[int], per: Literal["entry", "channel"] = "entry") -> None:
        super().__init__()
        if per not in ("entry", "channel"):
            raise InvalidValueError(f"per must be 'entry' or 'channel', got {per!r}")
        self.per = per
        self.event_shape = as_shape("event_shape", event_shape)
        self.register_buffer("mean", torch.zeros(self.event_shape, dtype=torch.float64))
        self.register_buffer("sd", torch.ones_like(self.mean))

    def fit(self, points: Tensor) -> Standardise:
        """Compute mean and standard deviation of `points` (n, *event).

        Raises:
            InvalidValueError: the shape is wrong, there are fewer than two points, or an entry never varies.
        """
        if points.shape[1:] != self.mean.shape or len(points) < 2:
            raise InvalidValueError(
                f"expected at least two points of shape {tuple(self.mean.shape)} to standardise by, "
                f"got {tuple(points.shape)}"
            )
        exact = points.double()
        over = (0,) if self.per == "entry" else (0, *range(2, exact.ndim))
        mean, sd = (
            moment.expand(1, *self.mean.shape)[0] for moment in (exact.mean(over, True), exact.std(over, keepdim=True))
        )
        constant = (sd <= 1e-12 * exact.abs().amax(0)).nonzero()
        if len(constant):
            raise InvalidValueError(
                f"entry {tuple(constant[0].tolist())} of the data has the same value in every point, so it has no "
                f"density; drop it ({len(constant)} such entries)"
            )
        return self.fit_moments(mean, sd)

    def fit_moments(self, mean: Tensor, sd: Tensor) -> Standardise:
        """Take the mean and the standard deviation of each entry as they are, for data that do not fit into memory."""
        self.mean.copy_(mean)
        self.sd.copy_(sd)
        return self

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        return ((x - self.mean) / self.sd).to(x.dtype), -self._log_sd(x)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x = in_data_units(y * self.sd + self.mean, y.dtype, self.mean.abs() / self.sd)
        return x, self._log_sd(y)

    def push_velocity(self, velocity: Tensor) -> Tensor:
        return (velocity / self.sd).to(velocity.dtype)

    def _log_sd(self, y: Tensor) -> Tensor:
        return self.sd.log().sum().to(y.dtype).expand(y.shape[0])
