"""The likelihood of a convolutional field by `Probing` at its exact stride, beside `Exact`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.devices import add_device, machine
from benchmarks.probing_noise import trained_on_digits
from flows.compare.timing import alternating_medians
from flows.divergence import DivergenceEstimator, Exact, Probing
from flows.models.cnf import CNF
from flows.solvers import ODESolver


@dataclass(frozen=True)
class Saving:
    """Log-likelihoods of the same images by two exact estimators."""

    event_shape: tuple[int, ...]
    stride: int
    products: tuple[int, int]  # of Exact and of Probing, per evaluation
    seconds: tuple[float, float]  # of Exact and of Probing, per likelihood
    nfe: int
    difference: float  # the largest over the images, nats

    @property
    def speedup(self) -> float:
        return self.seconds[0] / self.seconds[1]


def add_command(benchmarks: Any) -> None:
    """Add `probing_likelihood` to the commands."""
    description = "The likelihood of digits by probing at the exact stride of a ConvNet, beside all products."
    part = benchmarks.add_parser("probing_likelihood", help=description, description=description)
    part.add_argument("--sizes", type=int, nargs="+", default=[8, 28], help="pixels per side (%(default)s)")
    part.add_argument("--steps", type=int, default=100, help="training steps (%(default)s)")
    add_device(part)
    part.set_defaults(run=_print_report)


def _print_report(arguments: argparse.Namespace) -> None:
    print(f"{machine(arguments.device)}, float64")
    savings = [on_digits(size, arguments.steps, arguments.device) for size in arguments.sizes]
    print("\n".join(table(savings)))


def on_digits(size: int, steps: int = 100, device: torch.device | str = "cpu", num_images: int = 1) -> Saving:
    """Measure on digits of size × size pixels, in float64 and five solver steps, so that rounding does not matter."""
    flow, digits = trained_on_digits(steps, device, size=size, batch_size=128)
    flow.solver = ODESolver("rk4", step_size=0.2)
    return measure_saving(flow.double(), digits[:num_images].double())


@torch.no_grad()
def measure_saving(
    flow: CNF,
    images: Tensor,  # (n, C, H, W), data space
    seconds_each: float = 0.0,
) -> Saving:
    """Evaluate both in turns; the field of `flow` must state its receptive radius. The flow keeps its estimator."""
    stride = flow.field.receptive_radius + 1
    estimators: dict[str, DivergenceEstimator] = {"Exact": Exact(), "Probing": Probing(stride)}
    results = {}

    def case(name: str) -> None:
        flow.divergence = estimators[name]
        results[name] = flow.estimate_log_prob(images, solver_error=False)

    before = flow.divergence
    try:
        medians = alternating_medians({name: lambda name=name: case(name) for name in estimators}, seconds_each)
    finally:
        flow.divergence = before
    exact, probing = (results[name] for name in estimators)
    products = tuple(estimator.bind(flow.bind()).cost for estimator in estimators.values())
    difference = (exact.value - probing.value).abs().max().item()
    return Saving(flow.event_shape, stride, products, tuple(medians.values()), exact.nfe, difference)


def table(savings: Sequence[Saving]) -> Iterator[str]:
    """One line per image size."""
    yield f"{'images':>12}{'stride':>8}{'products':>14}{'seconds':>18}{'speedup':>9}{'NFE':>5}{'difference / nats':>19}"
    for row in savings:
        shape = " × ".join(map(str, row.event_shape))
        products = "{} to {}".format(*row.products)
        seconds = "{:.2f} to {:.2f}".format(*row.seconds)
        yield (
            f"{shape:>12}{row.stride:8}{products:>14}{seconds:>18}{row.speedup:9.1f}{row.nfe:5}{row.difference:19.1e}"
        )
