"""Training by flow matching: regression on velocities, without a solve."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flows.cnf import CNF
from flows.datasets import Batch
from flows.divergence.base import checked_value
from flows.objectives.base import LossOutput, Objective


@dataclass(frozen=True)
class FlowMatching(Objective):
    r"""E ‖v(t, x_t) − (x₁ − x₀)‖² / d on the linear path x_t = (1 − t) x₀ + t x₁.

    x₁ is data in flow space, x₀ an independent draw from the base and t uniform on [0, 1]. The minimiser is the
    marginal velocity E[x₁ − x₀ | x_t], whose flow carries the base to the data; the loss does not reach
    zero, since single targets scatter around it. [Lipman et al. 2023, arXiv:2210.02747]
    """

    def __call__(self, flow: CNF, batch: Batch, generator: torch.Generator | None = None) -> LossOutput:
        data, _ = flow.transform(batch.x)
        noise = flow.base.sample((len(data),), generator)
        device = data.device if generator is None else generator.device
        t = torch.rand(len(data), generator=generator, dtype=data.dtype, device=device).to(data.device)
        fraction = t.view(-1, *[1] * (data.ndim - 1))
        position = torch.lerp(noise, data, fraction)
        arguments = (t, position) if batch.context is None else (t, position, batch.context)
        velocity = checked_value(flow.field(*arguments), position)
        loss = (velocity - (data - noise)).square().mean()
        return LossOutput(loss, {"velocity_error": loss.detach()})
