"""Contexts of a batch: group by context; drop at random."""

from __future__ import annotations

import torch
from torch import Tensor


def groups_of(
    context: Tensor,  # (B, *context)
) -> Tensor:  # (B,)
    """Return a number for each example, the same for equal contexts."""
    return context.flatten(1).unique(dim=0, return_inverse=True)[1]


def same_context(context: Tensor | None, num_queries: int) -> Tensor | None:
    """Return which examples of a batch have the context of each of its first `num_queries` examples.

    The result is (Q, B), or `None` without contexts.
    """
    if context is None:
        return None
    groups = groups_of(context)
    return groups[:num_queries, None] == groups


def drop_contexts(
    context: Tensor,  # (B, *context)
    probability: float,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:  # (B, *context) and (B,)
    """Replace each context by zeros with some probability; also return which ones were dropped."""
    device = context.device if generator is None else generator.device
    dropped = (torch.rand(len(context), generator=generator, device=device) < probability).to(context.device)
    return context.masked_fill(dropped.view(-1, *[1] * (context.ndim - 1)), 0), dropped
