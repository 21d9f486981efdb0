"""What gradients through a solve cost: memory and time of backprop, checkpoints and the adjoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from flows.benchmarks.memory import peak_bytes
from flows.benchmarks.timing import alternating_medians
from flows.cnf import CNF
from flows.divergence import DivergenceEstimator
from flows.solvers import ODESolver

GRADIENTS = ("backprop", "checkpoint", "adjoint")


@dataclass(frozen=True)
class GradientCost:
    """What one maximum-likelihood gradient costs with so many steps."""

    steps: int
    peak: dict[str, int]  # bytes, by the way to the gradient
    seconds: dict[str, float]


def measure(
    field: nn.Module,
    divergence: DivergenceEstimator,
    batch_size: int,
    steps: Sequence[int],
    seconds_each: float = 1.0,
    device: torch.device | str = "cpu",
    method: str = "rk4",
) -> Iterator[GradientCost]:
    """Peak memory and time (in turns) of the gradient of the mean log-likelihood, for each number of steps."""
    field = field.to(device)
    x = torch.randn(batch_size, *field.event_shape, device=device)
    for count in steps:
        cases = {gradient: _step(field, divergence, method, count, gradient, x) for gradient in GRADIENTS}
        peak = {gradient: peak_bytes(case, device) for gradient, case in cases.items()}
        yield GradientCost(count, peak, alternating_medians(cases, seconds_each))


def table(costs: Sequence[GradientCost]) -> Iterator[str]:
    """A line for each number of steps; growth of memory beside that of √steps, and times as ratios to backprop."""
    first = costs[0]
    yield f"{'':>6}{'peak memory, MB':^33}{'growth since first':>26}{'time / backprop':>22}"
    yield f"{'steps':>6}" + "".join(f"{name:>11}" for name in GRADIENTS) + (
        f"{'backprop':>10}{'checkpoint':>11}{'√':>5}{'checkpoint':>13}{'adjoint':>9}"
    )
    for cost in costs:
        growth = {name: cost.peak[name] / first.peak[name] for name in GRADIENTS}
        ratio = {name: cost.seconds[name] / cost.seconds["backprop"] for name in GRADIENTS}
        yield (
            f"{cost.steps:>6}"
            + "".join(f"{cost.peak[name] / 1e6:11.2f}" for name in GRADIENTS)
            + f"{growth['backprop']:10.1f}{growth['checkpoint']:11.1f}{(cost.steps / first.steps) ** 0.5:5.1f}"
            + f"{ratio['checkpoint']:13.2f}{ratio['adjoint']:9.2f}"
        )


def _step(
    field: nn.Module,
    divergence: DivergenceEstimator,
    method: str,
    steps: int,
    gradient: str,
    x: torch.Tensor,
) -> Callable[[], None]:
    flow = CNF(field, divergence, ODESolver(method, step_size=1 / steps, gradient=gradient)).to(x.device)

    def case() -> None:
        (-flow.log_prob(x).mean()).backward()
        field.zero_grad()

    return case
