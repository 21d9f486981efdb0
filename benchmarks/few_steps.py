"""Samples in 1 to 16 evaluations: even steps, a fitted grid, reflow and distillation; on toy densities and images."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import image_steps
from benchmarks.time_budget import train
from benchmarks.work_precision import TOYS, trained
from flows.datasets import Dataset
from flows.evaluation.metrics import Wasserstein2
from flows.models.cnf import CNF
from flows.models.few_steps import fit_grid
from flows.objectives import Distillation, Objective, Reflow
from flows.solvers import ODESolver
from flows.training import Stage

EVALUATIONS = (1, 2, 4, 8, 16)
DISTILLED = (1, 2, 4)
TEACHER = ODESolver(rtol=1e-3, atol=1e-3)


def add_command(benchmarks: Any) -> None:
    """Add `few_steps` to the commands."""
    description = (
        "Samples by evaluations of the field. Toy densities: Wasserstein distance to the data, by even steps, fitted "
        "grids, reflow and distillation. Images: class, boosting on the pixels, Fréchet distance, nearest neighbours."
    )
    part = benchmarks.add_parser("few_steps", help=description, description=description)
    part.add_argument("--data", default="8gaussians", choices=[*TOYS, *image_steps.RECIPES])
    part.add_argument("--steps", type=int, default=800, help="of flow matching before, in batches of 512")
    part.add_argument("--more", type=int, default=600, help="of reflow, and of each distillation, in batches of 256")
    part.add_argument("--runs", type=Path, help="a folder of runs NAME, which are loaded instead of trained")
    part.add_argument("--points", type=int, default=1000, help="samples and test points")
    part.add_argument("--run", dest="run_folder", help="images: a run of them by class; default: the recipe is trained")
    part.add_argument("--set", nargs="*", default=[], metavar="SETTING", help="images: overrides of the recipe")
    part.add_argument("--weights", nargs="*", type=float, default=[1.0], help="images: of guidance (%(default)s)")
    part.add_argument("--grid-points", type=int, default=64, help="images: that grids are fitted to (%(default)s)")
    part.add_argument("--fit", type=int, default=0, help="images: steps of a grid's fit; 0: the best even one")
    part.set_defaults(run=_print_report)


def _print_report(arguments: argparse.Namespace) -> None:
    from benchmarks.recipes import settings
    from flows.training import build_dataset

    if arguments.data in image_steps.RECIPES:
        image_steps.print_report(arguments)
        return
    flow, points = trained(arguments.data, arguments.steps, 2 * arguments.points, arguments.runs)
    flow, points = flow.float(), points.float()
    data, other = points[: arguments.points], points[arguments.points :]
    dataset = build_dataset({"data": settings(f"experiment={arguments.data}")["data"]})
    distance = Wasserstein2(max_points=arguments.points)
    print(f"W2 to data of {arguments.data}, {arguments.points} points each; evaluations:")
    print(f"{'':>28}" + "".join(f"{number:>8}" for number in EVALUATIONS))

    def figures(name: str, model: CNF, solver: Callable[[int], ODESolver | None]) -> None:
        cells = []
        for number in EVALUATIONS:
            model.solver = chosen = solver(number) or model.solver
            fits = chosen.is_fixed_step
            cells.append(f"{distance(draw(model, len(data)), data).value:8.3f}" if fits else f"{'':>8}")
        print(f"{name:>28}" + "".join(cells), flush=True)

    flow.solver = ODESolver()
    print(f"{'other data':>28}{distance(other, data).value:8.3f}")
    print(f"{'accurate solve':>28}{distance(draw(flow, len(data)), data).value:8.3f}", flush=True)
    figures("euler, even", flow, even)
    figures("fitted grid", flow, lambda number: fitted(flow, number))
    teacher = copy.deepcopy(flow)
    teacher.solver = TEACHER
    straight = continued(teacher, dataset, Reflow(teacher), arguments.more)
    straight.solver = ODESolver()
    print(f"{'reflow, accurate solve':>28}{distance(draw(straight, len(data)), data).value:8.3f}", flush=True)
    figures("reflow, euler, even", straight, even)
    figures("reflow, fitted grid", straight, lambda number: fitted(straight, number))
    cells = []
    for number in DISTILLED:
        student = continued(teacher, dataset, Distillation(teacher, even(number)), arguments.more)
        student.solver = even(number)
        cells.append(f"{distance(draw(student, len(data)), data).value:8.3f}")
    print(f"{'distilled':>28}" + "".join(cells))


def even(number: int) -> ODESolver:
    """Euler's method with equal steps."""
    return ODESolver("euler", step_size=1 / number)


def fitted(flow: CNF, number: int) -> ODESolver:
    """The best method and grid for so many evaluations."""
    return fit_grid(flow, number, generator=torch.Generator().manual_seed(1))


def continued(flow: CNF, dataset: Dataset, objective: Objective, steps: int) -> CNF:
    """A copy of the flow after a stage with this objective."""
    model = copy.deepcopy(flow)
    train(model, dataset, {"stage": Stage(objective, steps, batch_size=256, learning_rate=1e-3)}, progress=False)
    return model


@torch.no_grad()
def draw(flow: CNF, number: int) -> Tensor:
    """Samples, of the same base points each time."""
    return flow.sample((number,), generator=torch.Generator().manual_seed(0))
