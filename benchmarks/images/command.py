"""`scripts/benchmark.py images`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.densities import spline_flow
from benchmarks.images import classes, comparison
from benchmarks.images.fitting import BASELINES
from flows.training.rebuild import build_dataset

DATASETS = ("digits", "photo_patches")
CLASSES = "digits_by_class"
Compose = Callable[..., dict[str, Any]]  # command-line overrides of train.py -> plain settings


def add_command(benchmarks: Any, compose: Compose) -> None:
    """Add "images" to the subparsers of a program."""
    description = "Bits per dimension of the recipes for images beside a spline flow, a mixture and a Gaussian."
    part = benchmarks.add_parser("images", help=description, description=description)
    part.add_argument("--datasets", nargs="*", choices=DATASETS, default=DATASETS, help="default: all")
    part.add_argument("--baselines", nargs="*", choices=BASELINES, default=list(BASELINES), help="default: all")
    part.add_argument("--minutes", type=float, default=10.0, help="for each baseline, at most (%(default)s)")
    part.add_argument("--draws", type=int, default=16, help="of the noise, for the tighter bound (%(default)s)")
    part.add_argument("--set", nargs="*", default=[], metavar="SETTING", help="of the recipes, as for train.py")
    part.add_argument("--classes", action="store_true", help=f"train {CLASSES}, and classify its samples")
    part.add_argument("--each", type=int, default=200, help="samples a class, with --classes (%(default)s)")
    part.set_defaults(run=lambda arguments: run(arguments, compose))


def run(arguments: argparse.Namespace, compose: Compose) -> None:
    """Print a table for each data set, and what a classifier says of samples by class."""
    if "nsf" in arguments.baselines and not arguments.classes:
        spline_flow()  # tell before the recipe has been trained for minutes that something is missing
    threads = torch.get_num_threads()
    for name in [] if arguments.classes else arguments.datasets:
        config = compose(f"experiment={name}", *arguments.set)
        plain = compose(f"data={name}")["transform"]
        rows = [comparison.recipe(config, arguments.draws)]
        rows += comparison.baselines(config, plain, arguments.baselines, 60 * arguments.minutes, arguments.draws)
        dataset = build_dataset(config)
        shape = " × ".join(map(str, dataset.event_shape))
        print(f"\n{name}, {shape}, {dataset.num_test:,} test images, {threads} threads")
        print("\n".join(comparison.table(rows, dataset.event_shape)), flush=True)
    if arguments.classes:
        print("\n".join(classes.report(compose(f"experiment={CLASSES}", *arguments.set), arguments.each)))
