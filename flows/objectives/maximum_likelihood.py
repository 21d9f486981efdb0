"""Training by maximum likelihood."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flows.cnf import CNF
from flows.datasets import Batch
from flows.objectives.base import LossOutput, Objective


@dataclass(frozen=True)
class MaximumLikelihood(Objective):
    """−mean log p(x), in nats an example in data space, through one solve a step."""

    def __call__(self, flow: CNF, batch: Batch, generator: torch.Generator | None = None) -> LossOutput:
        estimate = flow.estimate_log_prob(batch.x, batch.context, generator, solver_error=False)
        loss = -estimate.value.mean()
        metrics = {
            "nll": loss.detach(),
            "divergence_standard_error": estimate.standard_error.square().mean().sqrt(),
        }
        return LossOutput(loss, metrics, estimate.statistics)
