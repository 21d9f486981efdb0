"""Memory and time of gradients through a solve: backprop, checkpoints and the adjoint."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.devices import add_device, machine
from flows.compare.memory import peak_memory
from flows.compare.timing import alternating_medians
from flows.divergence import Analytic, DivergenceEstimator
from flows.fields import ConcatSquashMLP
from flows.models.cnf import CNF
from flows.solvers import ODESolver

GRADIENTS = ("backprop", "checkpoint", "adjoint")


@dataclass(frozen=True)
class GradientCost:
    """The cost of one maximum-likelihood gradient."""

    steps: int  # of the solver
    peak: dict[str, int]  # bytes, by solver.gradient
    seconds: dict[str, float]  # by solver.gradient


def add_command(benchmarks: Any) -> None:
    """Add `gradients` to the commands."""
    description = "Memory and time of gradients through a solve: backprop, checkpoints and the adjoint."
    part = benchmarks.add_parser("gradients", help=description, description=description)
    part.add_argument("--steps", type=int, nargs="+", default=[20, 100, 500], help="solver steps (%(default)s)")
    part.add_argument("--batch", type=int, default=512, help="points (%(default)s)")
    part.add_argument("--seconds", type=float, default=0.5, help="at least, for each case (%(default)s)")
    add_device(part)
    part.set_defaults(run=_print_report)


def _print_report(arguments: argparse.Namespace) -> None:
    print(f"log-likelihood by FFJORD's 64-64-64, midpoint rule; {machine(arguments.device)}")
    for row in report(arguments.steps, arguments.batch, arguments.seconds, arguments.device):
        print(row, flush=True)


def report(steps: Sequence[int], batch_size: int, seconds_each: float, device: str = "cpu") -> Iterator[str]:
    """Measure FFJORD's network in the plane; yields each line of the table when it is measured."""
    torch.manual_seed(0)
    field = ConcatSquashMLP((2,), (64, 64, 64))
    first = None
    for cost in measure(field, Analytic(), batch_size, steps, seconds_each, device):
        yield from () if first else HEADER
        first = first or cost
        yield line(cost, first)


def measure(
    field: nn.Module,
    divergence: DivergenceEstimator,
    batch_size: int,
    steps: Sequence[int],
    seconds_each: float = 1.0,
    device: torch.device | str = "cpu",
    method: str = "midpoint",
) -> Iterator[GradientCost]:
    """Peak memory and time of the gradient of the mean log-likelihood, for each number of steps."""
    field = field.to(device)
    x = torch.randn(batch_size, *field.event_shape, device=device)
    for count in steps:
        cases = {gradient: _step(field, divergence, method, count, gradient, x) for gradient in GRADIENTS}
        peak = {gradient: peak_memory(case, torch.device(device)) for gradient, case in cases.items()}
        seconds = alternating_medians(cases, seconds_each, progress=f"{count} steps")
        yield GradientCost(count, peak, seconds)


HEADER = (
    f"{'':>6}{'peak memory in MB':^33}{'growth of the peak':^27}{'time / backprop':^21}",
    f"{'steps':>6}{'backprop':>11}{'checkpoint':>11}{'adjoint':>11}{'backprop':>11}{'checkpoint':>11}{'√':>5}"
    f"{'checkpoint':>12}{'adjoint':>9}",
)


def line(cost: GradientCost, first: GradientCost) -> str:
    """One row of the table; growth is relative to `first`, beside that of √steps."""
    growth = {name: cost.peak[name] / first.peak[name] for name in GRADIENTS}
    ratio = {name: cost.seconds[name] / cost.seconds["backprop"] for name in GRADIENTS}
    return (
        f"{cost.steps:>6}"
        + "".join(f"{cost.peak[name] / 1e6:11.2f}" for name in GRADIENTS)
        + f"{growth['backprop']:11.1f}{growth['checkpoint']:11.1f}{(cost.steps / first.steps) ** 0.5:5.1f}"
        + f"{ratio['checkpoint']:12.2f}{ratio['adjoint']:9.2f}"
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
