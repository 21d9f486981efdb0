"""The contract of a training objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from flows.datasets import Batch
from flows.divergence import DivergenceEstimator
from flows.models.cnf import CNF
from flows.path_costs import PathCost
from flows.solvers import SolverStatistics


@dataclass(frozen=True)
class LossOutput:
    """A loss to differentiate and what is worth logging beside it."""

    loss: Tensor  # 0-d
    metrics: Mapping[str, Tensor] = field(default_factory=dict)  # 0-d each, detached
    statistics: SolverStatistics | None = None  # of the solve, if there was one; complete after backward


class Objective(ABC):
    """What a training step minimises.

    To add one: subclass it, and add a yaml with a stage that names it to ``conf/objective``.
    """

    uses_data: ClassVar[bool] = True  # False: of a batch only the size counts; it holds no points, (B, 0)
    solves: ClassVar[bool] = True  # whether a call solves the ODE, with its divergence

    @abstractmethod
    def __call__(
        self,
        flow: CNF,
        batch: Batch,  # x: (B, *event) in data space
        generator: torch.Generator | None = None,
    ) -> LossOutput:
        """The loss on a batch; every random number comes from ``generator``."""

    def divergence(self, flow: CNF) -> DivergenceEstimator | None:
        """What a call takes the divergence of the flow's field with, if it takes it."""
        return flow.divergence if self.solves else None


def active_costs(costs: Sequence[PathCost] | Mapping[str, PathCost]) -> tuple[PathCost, ...]:
    """The path costs of a setting whose weight is not 0."""
    given = costs.values() if isinstance(costs, Mapping) else costs
    return tuple(cost for cost in given if cost.weight)


def regularized(
    loss: Tensor,
    costs: Sequence[PathCost],
    integrals: Mapping[str, Tensor],  # (*batch) each, by the names of the costs
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss with the weighted means of the path costs added, and these means as metrics."""
    means = {cost.name: integrals[cost.name].mean() for cost in costs}
    for cost in costs:
        loss = loss + cost.weight * means[cost.name]
    return loss, {name: mean.detach() for name, mean in means.items()}
