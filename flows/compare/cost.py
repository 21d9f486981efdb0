"""Time and memory of evaluations of a field."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from flows.compare.memory import peak_memory
from flows.compare.timing import alternating_times
from flows.compare.trajectory import Trajectory
from flows.divergence import DivergenceEstimator

Case = Callable[[], object]


def case(
    field: nn.Module,
    trajectory: Trajectory,
    estimator: DivergenceEstimator | None = None,
    probes: Tensor | None = None,  # for the points of the trajectory
    training: bool = False,
) -> Case:
    """A function that evaluates once at each time of the trajectory.

    Evaluations share what is computed once a solve. Without an estimator it evaluates the field alone. In training it
    also runs the backward pass, to the points and the parameters.
    """
    parameters = [p for p in field.parameters() if p.requires_grad]

    def run() -> None:
        with torch.set_grad_enabled(training):
            view = trajectory.bind(field)
            bound = None if estimator is None else estimator.bind(view)
            points = trajectory.x.clone().requires_grad_(training)
            loss = points.new_zeros(())
            for t, x in zip(trajectory.times, points, strict=True):
                if bound is None:
                    loss = loss + view(t, x).sum()
                else:
                    sample = bound(t, x, probes)
                    loss = loss + sample.value.sum() + sample.divergence.sum()
            if training:
                torch.autograd.grad(loss, [points, *parameters], allow_unused=True)

    return run


@dataclass(frozen=True)
class Cost:
    """The time of an evaluation."""

    seconds: float
    ratio: float  # to a bare evaluation of the field
    spread: float  # half the distance of the quartiles of the ratios, from turn to turn


def time_ratio(bare: Case, with_estimator: Case, seconds: float) -> Cost:
    """The time of the second case, also as a multiple of the first.

    The cases take turns, and the shortest run of each counts: other work on the machine can only add time, and on a
    shared machine it adds unevenly to medians. The spread says how much the turns differ.
    """
    times = alternating_times({"bare": bare, "estimator": with_estimator}, seconds, most=200)
    least = {name: min(values) for name, values in times.items()}
    turns = zip(times["estimator"], times["bare"], strict=False)
    low, high = np.quantile([slow / fast for slow, fast in turns], [0.25, 0.75])
    return Cost(least["estimator"], least["estimator"] / least["bare"], float(high - low) / 2)


def affordable(
    field: nn.Module,
    trajectory: Trajectory,
    estimator: DivergenceEstimator,
    memory: float | None,  # bytes that an evaluation in training may take; None: no training
    seconds: float,  # that an evaluation without gradients may take
) -> Trajectory:
    """As many points, at least two, as one evaluation can afford.

    The number is found by trying 2, 8, 32, ... points."""
    tried, most = 2, trajectory.x.shape[1]
    if memory is not None:
        few = trajectory.at(0).first(tried)
        probes = estimator.bind(few.bind(field)).draw_probes(few.x[0])
        peak = peak_memory(case(field, few, estimator, probes, training=True), few.x.device)
        most = max(2, min(most, int(memory / max(peak, 1) * tried)))
    while tried < most:
        few = trajectory.at(0).first(tried)
        probes = estimator.bind(few.bind(field)).draw_probes(few.x[0])
        taken = min(alternating_times({"few": case(field, few, estimator, probes)}, 0.02)["few"])
        if taken / tried * min(4 * tried, most) > seconds:
            return trajectory.first(min(most, max(2, int(tried * seconds / taken))))
        tried *= 4
    return trajectory.first(most)
