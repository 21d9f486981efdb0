"""The contract of a training objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flows.cnf import CNF
from flows.datasets import Batch
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

    @abstractmethod
    def __call__(
        self,
        flow: CNF,
        batch: Batch,  # x: (B, *event) in data space
        generator: torch.Generator | None = None,
    ) -> LossOutput:
        """The loss on a batch; every random number comes from ``generator``."""
