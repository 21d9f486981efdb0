"""How close posteriors from ten thousand simulations come to reference posteriors."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.recipes import settings
from flows.errors import InvalidValueError
from flows.training.runs import build_trainer

TASKS = {  # of sbibm: the recipe, and the mean C2ST of neural posterior estimation at 10⁴ simulations as published
    "two_moons": ("two_moons", 0.606),
    "slcp": ("slcp", 0.901),
    "gaussian_mixture": ("gaussian_mixture_posterior", 0.661),
    "sir": ("sir", 0.680),
    "bernoulli_glm": ("bernoulli_glm", 0.678),
    "lotka_volterra": ("lotka_volterra_posterior", 0.999),
}


def add_command(benchmarks: Any) -> None:
    """Add `sbi` to the commands."""
    description = (
        "Train the recipe of each task and print the mean C2ST over the reference posteriors in DATA/TASK (as sbibm "
        "writes them), beside that of neural posterior estimation as published. 0.5 is perfect."
    )
    part = benchmarks.add_parser("sbi", help="Posteriors beside reference posteriors.", description=description)
    part.add_argument("data", type=Path, help="folder with a folder of reference posteriors for each task")
    part.add_argument("--tasks", nargs="+", default=list(TASKS)[:5], metavar="TASK", help="%(default)s")
    part.add_argument("--simulations", type=int, default=10_000, help="for training and validation (%(default)s)")
    part.add_argument("--points", type=int, default=10_000, help="of each posterior in a C2ST (%(default)s)")
    part.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    part.add_argument("--output", type=Path, default=Path("runs/benchmarks/sbi"), help="folder (%(default)s)")
    part.add_argument(
        "--set", nargs="+", default=[], dest="overrides", metavar="SETTING=VALUE", help="of `flows train`"
    )
    part.set_defaults(run=_print_report)


def _print_report(arguments: argparse.Namespace) -> None:
    unknown = sorted(set(arguments.tasks) - set(TASKS))
    if unknown:
        raise InvalidValueError(f"there is no task {unknown[0]!r}; there are {', '.join(TASKS)}")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; {arguments.simulations:,} simulations, seed "
          f"{arguments.seed}")  # fmt: skip
    print(f"{'task':<18}{'C2ST':<18}{'published':<11}{'training':<11}{'test':<8}each")
    for task in arguments.tasks:
        print(_line(task, arguments), flush=True)


def _line(task: str, arguments: argparse.Namespace) -> str:
    recipe, published = TASKS[task]
    config = settings(
        f"experiment={recipe}",
        f"data.num_simulations={arguments.simulations}",
        f"seed={arguments.seed}",
        f"output_dir={arguments.output}/{task}_{time.strftime('%Y-%m-%d_%H-%M-%S')}",
        f"evaluation.reference={arguments.data}/{task}",
        f"evaluation.reference_points={arguments.points}",
        "evaluation.calibration_points=0",
        "reporting.plot_every=null",
        "reporting.progress_bar=false",
        *arguments.overrides,
    )
    summary = build_trainer(config).fit()
    mean, error = (summary.metrics[name] for name in ("reference_c2st", "reference_c2st_se"))
    each = " ".join(f"{value:.3f}" for value in summary.metrics["reference_c2st_each"])
    times = f"{summary.position.seconds:.0f} s", f"{summary.evaluation_seconds:.0f} s"
    return f"{task:<18}{f'{mean:.3f} ± {error:.3f}':<18}{published:<11.3f}{times[0]:<11}{times[1]:<8}{each}"
