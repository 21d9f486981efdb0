"""Vectors of time and context, which scale, shift and gate layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from flows.arguments import checked
from flows.checks import as_shape, whole_number
from flows.fields.time import SinusoidalTime


@checked
class Modulation(nn.Module):
    r"""(t, context) ↦ m_1, ..., m_n: sinusoidal features of t beside the context, one hidden layer, n heads.

    The heads start small, so that a field which uses them as 1 + m, as sigmoid(m) or as an addend starts close
    to one that ignores time.

    Args:
        sizes: of the vectors.
        context_shape: shape of the context, `None` for time alone.
        num_frequencies: of the time features; see `SinusoidalTime`.
        width: of the hidden layer.

    Example:
        ```python
        import torch

        import flows

        modulation = flows.fields.Modulation([16, 32], context_shape=(3,))
        first, second = modulation(torch.tensor(0.5), torch.randn(10, 3))  # (10, 16), (10, 32)
        ```
    """

    def __init__(
        self,
        sizes: Sequence[int],
        context_shape: int | Sequence[int] | None = None,
        num_frequencies: int = 8,
        width: int = 32,
    ) -> None:
        super().__init__()
        self.sizes = [whole_number("sizes", size) for size in sizes]
        width = whole_number("width", width)
        self.time = SinusoidalTime(num_frequencies)
        num_context = 0 if context_shape is None else math.prod(as_shape("context_shape", context_shape))
        self.embed = nn.Linear(self.time.num_features + num_context, width)
        self.heads = nn.Linear(width, sum(self.sizes))
        with torch.no_grad():
            self.heads.weight.mul_(0.1)
            self.heads.bias.zero_()

    def forward(
        self,
        t: Tensor,  # 0-d or (B,)
        context: Tensor | None = None,  # (B, *context)
    ) -> tuple[Tensor, ...]:  # n tensors (1, size), or (B, size) where t or the context has a batch
        features = self.time(t)
        if context is not None:
            features = torch.cat([features.expand(context.shape[0], -1), context.reshape(context.shape[0], -1)], dim=1)
        return self.heads(functional.silu(self.embed(features))).split(self.sizes, dim=1)
