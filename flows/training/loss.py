"""The loss of a stage as a module, which Fabric sets up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flows.datasets import Batch
from flows.evaluation import fitted_parameters
from flows.fields import Physics
from flows.objectives import LossOutput, Objective
from flows.shares import Share
from flows.solvers import SolverStatistics
from flows.solvers.products import graph_nodes
from flows.training.loggers import Metric


class LossModule(nn.Module):
    """The loss as the forward pass of a module, where Fabric brings in precision and several devices.

    Objective and batch are attributes, and the whole output stays here: Fabric copies what passes through a forward
    pass, and under mixed precision would round the data.
    """

    objective: Objective
    batch: Batch
    output: LossOutput  # of the last step

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.has_physics = any(isinstance(module, Physics) for module in model.modules())
        self.generator: torch.Generator | None = None
        self._together: Share | None = None
        self._unused: list[nn.Parameter] | None = None  # here in this stage; None: not known yet
        self._idle: list[nn.Parameter] = []  # those of them that no process uses

    def begin(self, objective: Any, generator: torch.Generator | None, together: Share | None) -> None:
        """Compute the loss of this objective from now on; `together`: with other processes, whose gradients join."""
        self.objective, self.generator, self._together = objective, generator, together
        self._unused, self._idle = None, []

    def forward(self) -> Tensor:
        self.output = self.objective(self.model, self.batch, self.generator)
        loss = self.output.loss * self.output.weight if self.output.weight != 1 else self.output.loss
        return loss if self._together is None else self._with_all_parameters(loss, self._together)

    def leave_idle(self) -> None:
        """Take the gradients away from parameters that the objective does not train, as one process has none."""
        for parameter in self._idle:
            parameter.grad = None

    def metrics(self) -> dict[str, Metric]:
        """Return what the last step reports; read it after the backward pass, which the solver's counts include."""
        metrics: dict[str, Metric] = {"loss": self.output.loss.detach(), **self.output.metrics}
        if self.output.statistics is not None:
            solve = self.output.statistics
            metrics |= {"nfe_forward": solve.nfe_forward, "nfe_backward": solve.nfe_backward, **step_metrics(solve)}
        if self.has_physics:
            metrics |= {f"parameter/{name}": value for name, value in fitted_parameters(self.model).items()}
        return metrics

    def _with_all_parameters(self, loss: Tensor, together: Share) -> Tensor:
        """The loss with a gradient, of 0, for parameters that it does not depend on.

        Processes wait for the gradient of each parameter, and an objective may leave some alone, as flow matching does
        with those of a base. Which they are is found in the first step of a stage.
        """
        if self._unused is None:
            given = [parameter for parameter in self.parameters() if parameter.requires_grad]
            reached = _leaves(loss)
            used = torch.tensor([float(id(parameter) in reached) for parameter in given])
            anywhere = together.gather(used).any(0)
            self._unused = [parameter for parameter, here in zip(given, used.tolist(), strict=True) if not here]
            self._idle = [parameter for parameter, there in zip(given, anywhere.tolist(), strict=True) if not there]
        for parameter in self._unused:
            loss = loss + parameter.flatten()[:0].sum()
        return loss


def _leaves(loss: Tensor) -> set[int]:
    """The identities of the leaves that the gradient of the loss reaches."""
    return {id(node.variable) for node in graph_nodes([loss.grad_fn]) if type(node).__name__ == "AccumulateGrad"}


def step_metrics(statistics: SolverStatistics) -> Mapping[str, float]:
    """Return what the steps of a solve tell; nothing for a method that keeps them to itself."""
    if not statistics.attempts:
        return {}
    metrics: dict[str, float] = {"steps_accepted": statistics.accepted, "steps_rejected": statistics.rejected}
    if statistics.limited_by:  # an adaptive method
        metrics |= {f"limited_by_{name}": share for name, share in statistics.limited_by.items()}
        metrics["steps_forced"] = statistics.forced
        if statistics.shortest is not None:
            metrics["shortest_step"] = abs(statistics.shortest.dt)
    return metrics
