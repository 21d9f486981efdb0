"""Features of time."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flows.arguments import checked
from flows.errors import InvalidValueError


@checked
class SinusoidalTime(nn.Module):
    r"""t ↦ (cos πkt / k, sin πkt / k) for k = 1, ..., K: smooth, bounded, and not periodic on [0, 1].

    With K = 0 there is one feature, the constant 1, and a field does not depend on time.

    All features change at most at the rate π. Without 1/k a field starts with changes as fast as the K-th frequency,
    which it never needs and hardly unlearns, and a solve takes up to twice the steps.

    Args:
        num_frequencies: K >= 0; the features number 2K, or 1 if K = 0.

    Example:
        ```python
        import torch

        import flows

        features = flows.fields.SinusoidalTime(num_frequencies=4)
        features(torch.tensor([0.0, 0.5]))  # (2, 8)
        ```
    """

    frequencies: Tensor  # (K,)
    amplitudes: Tensor  # (2K,)

    def __init__(self, num_frequencies: int = 8) -> None:
        super().__init__()
        if num_frequencies < 0:
            raise InvalidValueError(f"num_frequencies must be >= 0, got {num_frequencies}")
        self.num_features = 2 * num_frequencies or 1
        count = torch.arange(1, num_frequencies + 1).to(torch.get_default_dtype())
        self.register_buffer("frequencies", math.pi * count, persistent=False)
        self.register_buffer("amplitudes", (1 / count).repeat(2), persistent=False)

    def forward(
        self,
        t: Tensor,  # 0-d or (B,)
    ) -> Tensor:  # (1, 2K) or (B, 2K)
        if not len(self.frequencies):
            return t.new_ones(1, 1)  # one row serves all samples
        phase = t.reshape(-1, 1) * self.frequencies
        return self.amplitudes * torch.cat([phase.cos(), phase.sin()], dim=1)
