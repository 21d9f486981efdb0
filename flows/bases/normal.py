"""The standard normal, from which a flow starts by default."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flows.arguments import checked
from flows.bases.base import Base
from flows.checks import as_shape, check_points
from flows.errors import InvalidTypeError


@checked
class Normal(Base):
    """N(0, I)."""

    def sample(self, shape: int | Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """Draw points of shape (*shape, *event); with a generator on its device, then moved."""
        device = self.device if generator is None else generator.device
        size = (*as_shape("shape", shape, at_least=0), *self.event_shape)
        return torch.randn(size, generator=generator, dtype=self.dtype, device=device).to(self.device)

    def log_prob(
        self,
        z: Tensor,  # (*batch, *event)
    ) -> Tensor:  # (*batch)
        """log N(z; 0, I) in nats."""
        check_points("z", z, self.event_shape, batched=False)
        squares = z.square().flatten(z.ndim - len(self.event_shape)).sum(-1)
        return -0.5 * (squares + math.prod(self.event_shape) * math.log(2 * math.pi))


@checked
def require_normal(base: Base, user: str) -> None:
    """Raise `TypeError` if `user`, which supposes N(0, I), was given another base."""
    if not isinstance(base, Normal):
        raise InvalidTypeError(
            f"{user} supposes that the flow starts from flows.bases.Normal, and its base is {type(base).__name__}; "
            "leave out base=, or train by MaximumLikelihood"
        )
