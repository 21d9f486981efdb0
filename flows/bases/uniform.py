"""The uniform distribution on a box."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from flows.arguments import checked
from flows.bases.base import Base
from flows.bases.normal import entries
from flows.checks import check_points
from flows.errors import InvalidValueError

HALF_WIDTH = math.sqrt(3)  # of variance one


@checked(own=("low", "high"))
class Uniform(Base):
    """The uniform distribution on a box, of mean 0 and variance 1 by default.

    Its density is 1/volume inside and 0 outside. A flow that leads a point back to the outside gives it the density 0,
    so the likelihood cannot train or judge such a flow: train it with flow matching, and judge it by a distance.

    Args:
        event_shape: shape of a point.
        low, high: corners of the box, one number for all entries or numbers of the event shape. Default: ∓√3.

    Raises:
        InvalidValueError: a shape is wrong, or `low` is not below `high`.

    Example:
        ```python
        import flows

        flow = flows.CNF(flows.fields.MLP((2,)), base=flows.bases.Uniform((2,), low=-1.0, high=1.0))
        ```
    """

    low: Tensor  # (*event)
    high: Tensor  # (*event)

    def __init__(
        self,
        event_shape: int | Sequence[int],
        low: float | Sequence[Any] | Tensor = -HALF_WIDTH,
        high: float | Sequence[Any] | Tensor = HALF_WIDTH,
    ) -> None:
        super().__init__(event_shape)
        corners = [entries(name, value, self.event_shape) for name, value in (("low", low), ("high", high))]
        if not corners[0].is_meta and not bool((corners[0] < corners[1]).all()):
            raise InvalidValueError(f"low must lie below high, got {low} and {high}")
        self.hold(False, low=corners[0], high=corners[1])

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.interval(self.low, self.high), len(self.event_shape))

    def sample(self, shape: int | Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        return self.low + (self.high - self.low) * self.uniform(shape, generator)

    def log_prob(
        self,
        z: Tensor,  # (*batch, *event)
    ) -> Tensor:  # (*batch)
        """−log volume in the box, −∞ outside."""
        check_points("z", z, self.event_shape, batched=False)
        inside = ((z >= self.low) & (z <= self.high)).flatten(z.ndim - len(self.event_shape)).all(-1)
        log_volume = (self.high - self.low).log().sum()
        zero = 0 * z.flatten(z.ndim - len(self.event_shape)).sum(-1)  # with a gradient, which is 0
        return torch.where(inside, zero - log_volume, -math.inf)
