"""Quantiles of N(0, 1) from logarithms of probabilities, which reach far into its tails."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flows.bases.normal import LOG_TWO_PI

LEAST_LOG = -600.0  # below, exp would leave the range of float64 or lose digits
NEWTON_STEPS = 3


class LogNormalQuantile(torch.autograd.Function):
    """u with log Φ(u) = log p, for p up to ½.

    Example:
        ```python
        import torch

        from flows.bases.quantiles import LogNormalQuantile

        u = LogNormalQuantile.apply(torch.tensor([-0.6931, -5e5], dtype=torch.float64))  # 0 and −1000
        ```
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(log_p: Tensor) -> Tensor:
        far = -torch.sqrt((-2 * log_p - LOG_TWO_PI).clamp_min(1.0))
        far = -torch.sqrt((-2 * log_p - LOG_TWO_PI - 2 * (-far).log()).clamp_min(1.0))  # as Φ(u) ≈ φ(u)/|u|
        u = torch.where(log_p > LEAST_LOG, torch.special.ndtri(log_p.exp()), far)
        for _ in range(NEWTON_STEPS):
            u = u - (torch.special.log_ndtr(u) - log_p) * _rate(u)
        return u

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        del inputs
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (u,) = ctx.saved_tensors
        return gradient * _rate(u)


def _rate(u: Tensor) -> Tensor:
    """du/d log Φ = Φ(u)/φ(u)."""
    return torch.exp(torch.special.log_ndtr(u) + 0.5 * (u.square() + LOG_TWO_PI))
