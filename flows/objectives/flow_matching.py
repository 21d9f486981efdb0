"""Training by flow matching: regression on velocities, without a solve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flows.cnf import CNF
from flows.datasets import Batch
from flows.divergence.base import checked_value
from flows.objectives.base import LossOutput, Objective


@dataclass(frozen=True)
class FlowMatching(Objective):
    r"""E ‖v(t, x_t) − u‖² / d on the linear path x_t = (1 − t) x₀ + t x₁.

    x₁ is data in flow space, x₀ an independent draw from the base and t uniform on [0, 1]. With
    ``target="sampled"``, u = x₁ − x₀. The minimiser is the marginal velocity E[x₁ − x₀ | x_t], whose flow
    carries the base to the data, but single targets scatter around it and the loss does not reach zero.
    [Lipman et al. 2023, arXiv:2210.02747]

    With ``target="marginal"``, u is that expectation over the points of the batch,

        u = (Σ_j w_j x_j − x_t)/(1 − t),   w_j ∝ N(x_t; t x_j, (1 − t)² I),

    a far less noisy target, slightly biased since the batch is finite; it costs one product of queries × batch.
    With contexts, w_j is zero for points of another context than the query's: an expectation over the class where
    contexts are classes, and the sampled target where no two are equal. For low-dimensional data, whose batches
    cover the density.
    [Xu, Tong & Jaakkola 2023, arXiv:2302.00670; Ryzhakov et al. 2024, arXiv:2402.03232]

    Args:
        target: ``"sampled"`` or ``"marginal"``.
        num_queries: with the marginal target, the number of points x_t at which the field is evaluated; by
            default one for each point of the batch.
    """

    target: Literal["sampled", "marginal"] = "sampled"
    num_queries: int | None = None

    def __post_init__(self) -> None:
        if self.target not in ("sampled", "marginal"):
            raise ValueError(f"target must be 'sampled' or 'marginal', got {self.target!r}")
        if self.num_queries is not None and (self.target == "sampled" or self.num_queries < 1):
            raise ValueError(
                f"num_queries must be >= 1 and goes with target='marginal', got {self.num_queries} with "
                f"target={self.target!r}"
            )

    def __call__(self, flow: CNF, batch: Batch, generator: torch.Generator | None = None) -> LossOutput:
        with torch.no_grad():  # noise that is learned is learned by the likelihood, whose bound it tightens
            data, _ = flow.transform(batch.x, generator)
        ends = data[: self.num_queries]
        noise = flow.base.sample((len(ends),), generator)
        device = data.device if generator is None else generator.device
        t = torch.rand(len(ends), generator=generator, dtype=data.dtype, device=device).to(data.device)
        fraction = t.view(-1, *[1] * (data.ndim - 1))
        position = torch.lerp(noise, ends, fraction)
        context = None if batch.context is None else batch.context[: self.num_queries]
        if self.target == "marginal":
            ends = posterior_mean(position, fraction, data, same_context(batch.context, len(ends)))
            noise = (position - fraction * ends) / (1 - fraction)
        arguments = (t, position) if context is None else (t, position, context)
        velocity = checked_value(flow.field(*arguments), position)
        loss = (velocity - (ends - noise)).square().mean()
        return LossOutput(loss, {"velocity_error": loss.detach()})


def posterior_mean(
    position: Tensor,  # (Q, *event), x_t
    fraction: Tensor,  # (Q, 1, ...), t < 1
    pool: Tensor,  # (P, *event), equally likely values of x₁
    possible: Tensor | None = None,  # (Q, P), at least one in each row; which of the pool it can be, all if None
) -> Tensor:  # (Q, *event)
    """E[x₁ | x_t] when x₁ is one of the pool and x₀ standard normal."""
    flat = pool.flatten(1)
    # log w_j = −‖x_t − t x_j‖² / 2(1 − t)² up to what does not depend on j, as one product. Its terms are large
    # where t nears 1, so their difference takes float64.
    points, points_j, t = (tensor.flatten(1).double() for tensor in (position, pool, fraction))
    precision = (1 - t).square().reciprocal()
    queries = torch.cat([precision * t * points, -0.5 * precision * t.square()], dim=1)
    keys = torch.cat([points_j, points_j.square().sum(1, keepdim=True)], dim=1)
    logits = queries @ keys.T
    if possible is not None:
        logits = logits.masked_fill(~possible, -torch.inf)
    weights = (logits - logits.amax(1, keepdim=True)).to(flat.dtype).softmax(1)
    return (weights @ flat).view_as(position)


def same_context(context: Tensor | None, num_queries: int) -> Tensor | None:
    """(Q, P): which examples of a batch have the context of each of its first ``num_queries``."""
    if context is None:
        return None
    group = context.flatten(1).unique(dim=0, return_inverse=True)[1]
    return group[:num_queries, None] == group
