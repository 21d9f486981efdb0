"""The loss of a step as Lightning Fabric wants it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flows.datasets import Batch
from flows.errors import FlowsError
from flows.models.cnf import CNF
from flows.objectives import LossOutput, Objective
from flows.training.metrics import Metric, step_metrics


class NonFiniteLossError(FlowsError, ArithmeticError):
    """The loss or its gradient is NaN or infinite; the weights of the step before are kept."""


class LossModule(nn.Module):
    """The loss as a module's forward pass, which is where Fabric brings in precision and several devices.

    Objective and batch are set, not passed, and the whole output stays behind: Fabric copies what passes through,
    and under mixed precision would round the data.
    """

    objective: Objective
    batch: Batch

    def __init__(self, flow: CNF) -> None:
        super().__init__()
        self.flow = flow
        self.output: LossOutput | None = None  # of the last step
        self.generator: torch.Generator | None = None

    def forward(self) -> Tensor:
        self.output = self.objective(self.flow, self.batch, self.generator)
        return self.output.loss

    def metrics(self) -> dict[str, Metric]:
        """What the last step has to report; read after the backward pass, which the solver's counts include."""
        metrics: dict[str, Metric] = {"loss": self.output.loss.detach(), **self.output.metrics}
        if self.output.statistics is not None:
            solve = self.output.statistics
            metrics |= {"nfe_forward": solve.nfe_forward, "nfe_backward": solve.nfe_backward, **step_metrics(solve)}
        return metrics
