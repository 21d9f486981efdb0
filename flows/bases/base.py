"""The contract of a base: the distribution of a flow at t = 0."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flows.arguments import CheckedMethods, checked
from flows.checks import as_shape


@checked
class Base(CheckedMethods, nn.Module, ABC, checks=("sample", "log_prob")):
    """A distribution over points of one event shape.

    It follows `.to(device, dtype)` like any module, and draws on its device and in its dtype.

    Args:
        event_shape: shape of a point.
    """

    _like: Tensor  # has the device and the dtype

    def __init__(self, event_shape: int | Sequence[int]) -> None:
        super().__init__()
        self.event_shape = as_shape("event_shape", event_shape)
        self.register_buffer("_like", torch.zeros(()), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where points are drawn."""
        return self._like.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the points."""
        return self._like.dtype

    @abstractmethod
    def sample(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """Draw points of shape (*shape, *event)."""

    @abstractmethod
    def log_prob(
        self,
        z: Tensor,  # (*batch, *event)
    ) -> Tensor:  # (*batch)
        """The log-density in nats."""
