"""The contract of a training objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flows.arguments import CheckedMethods
from flows.datasets import Batch, Dataset
from flows.divergence import DivergenceEstimator
from flows.models.cnf import CNF
from flows.objectives.checks import check_samples
from flows.path_costs import PathCost
from flows.solvers import SolverStatistics


@dataclass(frozen=True)
class LossOutput:
    """A loss to differentiate, with what to log beside it.

    Example:
        ```python
        import torch

        import flows

        data, flow = flows.datasets.Moons(), flows.CNF(flows.fields.MLP((2,)))
        output = flows.objectives.MaximumLikelihood()(flow, data.train_stream(16, torch.Generator()).next())
        output.loss, output.metrics["nll"], output.statistics.nfe_forward
        ```
    """

    loss: Tensor  # 0-d
    metrics: Mapping[str, Tensor] = field(default_factory=dict)  # 0-d each, detached
    statistics: SolverStatistics | None = None  # of the solve, if there was one; complete after backward
    weight: float = 1.0  # of the own rows, where several processes share the batch; see `flows.shares`


class Objective(CheckedMethods, ABC, checks=("__call__", "check", "divergence")):
    """What a training step minimises.

    The model may be any module that the objective knows how to call. To add one: subclass it, and add a yaml with a
    stage that names it to `conf/objective`.

    Example:
        ```python
        import torch

        import flows


        class SquareOfTheNorm(flows.objectives.Objective):
            '''Flow matching that also keeps velocities short.'''

            def __call__(self, flow, batch, generator=None):
                output = flows.objectives.FlowMatching()(flow, batch, generator)
                length = flow.field(torch.tensor(0.5), batch.x).square().mean()
                return flows.objectives.LossOutput(output.loss + 0.01 * length, {"length": length.detach()})
        ```
    """

    uses_data: ClassVar[bool] = True  # False: only the size of a batch counts; it holds no points, (B, 0)
    solves: ClassVar[bool] = True  # whether a call solves the ODE, with its divergence
    recommended: ClassVar[Mapping[str, Any]] = {}  # batch_size, learning_rate, warmup_steps of a `Stage` without
    shares: ClassVar[bool] = False  # whether a call computes `own_rows` alone; else every process takes the whole batch

    @abstractmethod
    def __call__(
        self,
        model: Any,  # nn.Module
        batch: Batch,  # x: (B, *event) in data space
        generator: torch.Generator | None = None,
    ) -> LossOutput:
        """Return the loss on a batch; every random number comes from `generator`."""

    def check(self, model: nn.Module, dataset: Dataset) -> None:
        """Raise `InvalidValueError` if model and data do not suit the objective; called before training."""
        del model
        if self.uses_data:
            check_samples(dataset)

    def divergence(self, flow: CNF) -> DivergenceEstimator | None:
        """Return what a call takes the divergence of the flow's field with, if it takes it."""
        return flow.divergence if self.solves else None


def active_costs(costs: Sequence[PathCost] | Mapping[str, PathCost]) -> tuple[PathCost, ...]:
    """Return the path costs whose weight is not 0."""
    given = costs.values() if isinstance(costs, Mapping) else costs
    return tuple(cost for cost in given if cost.weight)


def regularized(
    loss: Tensor,
    costs: Sequence[PathCost],
    integrals: Mapping[str, Tensor],  # (*batch) each, by the names of the costs
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add the weighted means of the path costs to the loss; return it and these means as metrics."""
    means = {cost.name: integrals[cost.name].mean() for cost in costs}
    for cost in costs:
        loss = loss + cost.weight * means[cost.name]
    return loss, {name: mean.detach() for name, mean in means.items()}
