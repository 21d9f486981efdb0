"""Training by maximum likelihood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from flows.datasets import Batch
from flows.errors import InvalidValueError
from flows.models.cnf import CNF
from flows.objectives.base import LossOutput, Objective, active_costs, regularized
from flows.path_costs import PathCost


@dataclass(frozen=True)
class MaximumLikelihood(Objective):
    """−mean log p(x) + Σ weight · mean path cost, in nats an example in data space, through one solve a step.

    Args:
        regularizers: path costs, in a list or by any names, such as ``[KineticEnergy(0.01), JacobianNorm(0.01)]``;
            those of weight 0 are left out. Their integrals are metrics, beside the bare ``nll``.
        steer: b: training solves end at a base time drawn from U(−b, b) instead of 0, so that no part of the
            dynamics can be squeezed into a sliver of time; evaluation is at 0. [Ghosh et al. 2020, arXiv:2006.10711]

    Raises:
        ValueError: ``steer`` is not in [0, 1).
    """

    regularizers: Sequence[PathCost] | Mapping[str, PathCost] = ()
    steer: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "regularizers", active_costs(self.regularizers))
        if not 0 <= self.steer < 1:
            raise InvalidValueError(
                f"steer must be in [0, 1), a part of the unit of time that a flow runs, got {self.steer}"
            )

    def __call__(self, flow: CNF, batch: Batch, generator: torch.Generator | None = None) -> LossOutput:
        base_time = 0.0
        if self.steer:
            device = None if generator is None else generator.device
            base_time = self.steer * (2 * torch.rand((), generator=generator, device=device).item() - 1)
        estimate = flow.estimate_log_prob(
            batch.x, batch.context, generator, solver_error=False, path_costs=self.regularizers, base_time=base_time
        )
        nll = -estimate.value.mean()
        metrics = {
            "nll": nll.detach(),
            "divergence_standard_error": estimate.standard_error.square().mean().sqrt(),
        }
        loss, costs = regularized(nll, self.regularizers, estimate.path_costs)
        return LossOutput(loss, metrics | costs, estimate.statistics)
