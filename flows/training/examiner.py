"""How good the weights of a run are, on its validation or test part."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from flows.datasets import Dataset, Energy
from flows.evaluation import ImportanceWeights, Likelihood, importance_weights, likelihood, part_batches
from flows.models.cnf import CNF
from flows.training.state import seeded


@dataclass(frozen=True)
class Examiner:
    """Evaluates flows on the parts of a data set, with the same random numbers at each call.

    Args:
        dataset: whose parts "validation" and "test" are looked at.
        device: of the generators.
        seed: of noise and probes.
        batch_size: points a solve.
        most_points: of either part; ``None``: all.
        solver_error_points: test points with a solver error.
        progress_bar: whether a test shows one.
    """

    dataset: Dataset
    device: torch.device
    seed: int
    batch_size: int
    most_points: int | None
    solver_error_points: int
    progress_bar: bool

    def likelihood(self, flow: CNF, part: str) -> Likelihood:
        """Of the points of the part."""
        batches, num_points = part_batches(flow, self.dataset, part, self.batch_size, self.most_points)
        return likelihood(
            flow,
            batches,
            generator=self.generator(part),
            solver_error_points=self.solver_error_points if part == "test" else 0,
            progress=self._progress(part),
            num_points=num_points,
        )

    def importance_weights(self, flow: CNF, energy: Energy, part: str) -> ImportanceWeights:
        """Of as many samples as the part of an energy asks for."""
        size = energy.num_test if part == "test" else energy.num_validation
        num_samples = min(size, self.most_points or math.inf)
        return importance_weights(
            flow, energy, num_samples, self.batch_size, self.generator(part), self._progress(part)
        )

    def generator(self, purpose: str) -> torch.Generator:
        """The same for the same purpose."""
        return seeded(torch.Generator(self.device), self.seed, purpose)

    def _progress(self, part: str) -> str | None:
        return part if part == "test" and self.progress_bar else None
