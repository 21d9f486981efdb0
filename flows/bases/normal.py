"""The base of a flow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class StandardNormal(nn.Module):
    """N(0, I) on an event shape; its samples take an explicit generator and the module's dtype and device.

    Args:
        event_shape: shape of a point.
    """

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.register_buffer("zero", torch.zeros(()), persistent=False)  # follows .to(dtype, device)

    def sample(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """Draw points of shape (*shape, *event), on the generator's device first where one is given."""
        device = self.zero.device if generator is None else generator.device
        size = (*shape, *self.event_shape)
        return torch.randn(size, generator=generator, dtype=self.zero.dtype, device=device).to(self.zero.device)

    def log_prob(
        self,
        z: Tensor,  # (*batch, *event)
    ) -> Tensor:  # (*batch)
        """log N(z; 0, I) in nats."""
        squares = z.square().flatten(z.ndim - len(self.event_shape)).sum(-1)
        return -0.5 * (squares + math.prod(self.event_shape) * math.log(2 * math.pi))
