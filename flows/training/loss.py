"""The loss of a step as Lightning Fabric wants it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flows.cnf import CNF
from flows.datasets import Batch
from flows.objectives import LossOutput, Objective
from flows.solvers import SolverStatistics
from flows.training.metrics import Metric


class NonFiniteLossError(ArithmeticError):
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
            metrics |= solver_metrics(self.output.statistics)
        return metrics


def solver_metrics(statistics: SolverStatistics) -> dict[str, float]:
    """What a solve has to tell, as numbers for curves over training."""
    metrics = {
        "nfe_forward": statistics.nfe_forward,
        "nfe_backward": statistics.nfe_backward,
        "steps_accepted": statistics.accepted,
        "steps_rejected": statistics.rejected,
    }
    if statistics.limited_by:  # an adaptive method
        metrics |= {f"limited_by_{name}": share for name, share in statistics.limited_by.items()}
        metrics |= {"shortest_step": abs(statistics.shortest.dt), "steps_forced": statistics.forced}
    return metrics
