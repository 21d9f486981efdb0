"""How far a flow from one sample to another ends from its target, and how straight its paths are.

The three tasks of OT-CFM in the plane: N(0, I) → 8gaussians, N(0, I) → moons, 8gaussians → moons, by the recipes and in
the units of its code (torchcfm): eight Gaussians on a circle of radius 5 with variance √0.1, and moons with one uniform
noise for both coordinates, times 3, minus 1.

The Wasserstein-2 distance of two samples of one distribution is far from 0: with 4,000 points it is about 0.49 for
8gaussians and 0.17 for moons. Therefore both sides are low-discrepancy points (Sobol), which stand for their
distribution far better than random ones; the distance of two such sets of the target is printed beside it.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor

import flows
from flows.bases import Empirical, Normal
from flows.datasets import Density
from flows.evaluation import DistanceEvaluator
from flows.evaluation.metrics import Wasserstein2
from flows.objectives import FlowMatching
from flows.training import Hardware, Reporting, Stage, Trainer

SCALE = 3.0  # units of the recipes in one unit of the flow, whose field is made for points of about that size
PUBLISHED = {"N → 8gaussians": 0.303, "N → moons": 0.130, "8gaussians → moons": None}  # OT-CFM, arXiv:2307.03672


def normal(u: Tensor) -> Tensor:
    """N(0, I) from uniform numbers (n, 4)."""
    return torch.special.ndtri(u[:, :2].clamp(1e-6, 1 - 1e-6))


def eight_gaussians(u: Tensor) -> Tensor:
    """The 8gaussians of torchcfm."""
    angle = torch.floor(8 * u[:, 2]) * (math.pi / 4)
    return 5 * torch.stack([angle.cos(), angle.sin()], 1) + 0.1**0.25 * normal(u)


def moons(u: Tensor) -> Tensor:
    """The moons of torchcfm."""
    angle, outer = math.pi * u[:, 0], u[:, 2] < 0.5
    first = torch.stack([angle.cos(), angle.sin()], 1)
    second = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], 1)
    return 3 * (torch.where(outer[:, None], first, second) + 0.2 * u[:, 3:]) - 1


class Recipe(Density):
    """Points made of uniform numbers, in units of the flow."""

    def __init__(self, name: str, recipe: Callable[[Tensor], Tensor]) -> None:
        super().__init__(num_validation=2_000, num_test=4_000, num_reference=20_000)
        self.name, self.recipe = name, recipe

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self.recipe(torch.rand(n, 4, generator=generator)) / SCALE

    def even(self, n: int, seed: int) -> Tensor:
        """Low-discrepancy points."""
        u = torch.quasirandom.SobolEngine(4, scramble=True, seed=seed).draw(n).to(torch.get_default_dtype())
        return self.recipe(u) / SCALE


SOURCES = {"N": normal, "8gaussians": eight_gaussians}
TARGETS = {"8gaussians": eight_gaussians, "moons": moons}


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add `data_to_data` to the benchmarks."""
    parser = commands.add_parser("data_to_data", help="distance and path energy of flows between two samples")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--points", type=int, default=4096, help="low-discrepancy points on each side, a power of two")
    parser.add_argument("--tasks", nargs="+", choices=PUBLISHED, default=list(PUBLISHED))
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Train and measure each task."""
    rows = []
    for name in arguments.tasks:
        source, target = name.split(" → ")
        rows.append([name, *measure(source, target, arguments.steps, arguments.points)])
    head = ["task", "W2", "W2 of two target samples", "published W2", "path energy", "exact cost", "excess", "seconds"]
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |")


def measure(source: str, target: str, steps: int, points: int) -> list[str]:
    """Train a flow from source to target; return what the table shows of it."""
    start, data = Recipe(source, SOURCES[source]), Recipe(target, TARGETS[target])
    torch.manual_seed(0)
    base = Normal(2, covariance=1 / SCALE**2) if source == "N" else Empirical(dataset=start)
    flow = flows.CNF(flows.fields.MLP((2,), hidden=(96, 96, 96)), base=base).fit_ends(data.reference())
    stage = Stage(FlowMatching(coupling="optimal_transport", num_queries=None), steps, batch_size=512)
    evaluator = DistanceEvaluator(data, progress_bar=False)
    reporting = Reporting(progress_bar=False, plot_every=None)
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            flow,
            data,
            {"flow_matching": stage},
            evaluator=evaluator,
            hardware=Hardware(accelerator="cpu"),
            reporting=reporting,
            output_dir=f"{folder}/run",
        )
        trainer.fit()
    seconds = time.process_time() - begun
    with torch.no_grad():
        ends = flow.transport(start.even(points, 1), (0.0, 1.0), log_density=False).x
    distance = Wasserstein2(max_points=points)
    found = distance(ends, data.even(points, 2)).value * SCALE
    floor = distance(data.even(points, 3), data.even(points, 2)).value * SCALE
    energy = evaluator.path_energy(flow)
    published = PUBLISHED[f"{source} → {target}"]
    return [
        f"{found:.3f}",
        f"{floor:.3f}",
        "" if published is None else f"{published:.3f}",
        f"{energy.path_energy.value * SCALE**2:.2f} ± {energy.path_energy.standard_error * SCALE**2:.2f}",
        f"{energy.transport_cost.value * SCALE**2:.2f} ± {energy.transport_cost.standard_error * SCALE**2:.2f}",
        f"{energy.path_energy.value / energy.transport_cost.value - 1:+.1%}",
        f"{seconds:.0f}",
    ]
