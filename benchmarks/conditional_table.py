"""How close the defaults get to the known entropy H(y | x) of a generated table of numbers and categories."""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy as np
import torch

from benchmarks.recipes import settings
from benchmarks.time_budget import train
from flows.datasets import Table
from flows.evaluation import DensityEvaluator
from flows.training import build_flow
from flows.training.settings import instantiate

KINDS = {  # of noise, with its entropy in nats at unit scale
    "normal": (lambda generator, n: generator.normal(size=n), 0.5 * math.log(2 * math.pi * math.e)),
    "gumbel": (lambda generator, n: generator.gumbel(size=n), 1 + np.euler_gamma),
    "laplace": (lambda generator, n: generator.laplace(size=n), 1 + math.log(2)),
}


def conditional_table(rows: int = 20_000, seed: int = 0) -> Table:
    """A table y | u, w, kind with y = sin(u) + w + s e, s = (1 + u) / 4, and noise e of the kind.

    Here u is uniform on [0, 5], w is N(0, 1), and the kind is normal, Gumbel or Laplace. H(y | u, w, kind) is the mean
    of log s + H(e | kind) over the test part.
    """
    generator = np.random.default_rng(seed)
    u, w = generator.uniform(0, 5, rows), generator.normal(size=rows)
    kind = generator.choice(list(KINDS), rows)
    scale, noise, entropy = (1 + u) / 4, np.empty(rows), np.empty(rows)
    for name, (draw, value) in KINDS.items():
        own = kind == name
        noise[own], entropy[own] = draw(generator, int(own.sum())), value
    y = np.sin(u) + w + scale * noise
    context = {"u": 1000 + 100 * u, "w": w, "kind": kind}  # in units that need scaling
    table = Table(y[:, None], ["y"], "conditional_table", context=context, test_fraction=0.2, quiet=True)
    rows_of_test = table.split["test"].numpy()
    table.entropy = float((np.log(scale) + entropy)[rows_of_test].mean())
    return table


def add_command(benchmarks: Any) -> None:
    """Add `conditional_table` to the commands."""
    description = (
        "Train a flow by the default settings on a generated table with numeric and categorical conditions, and print "
        "how far its test NLL is above the known entropy of the column given the conditions."
    )
    part = benchmarks.add_parser("conditional_table", help="Gap to H(y | x) of a table.", description=description)
    part.add_argument("--rows", type=int, default=20_000, help="of the table (%(default)s)")
    part.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    part.add_argument("--set", nargs="*", default=[], help="settings, such as experiment=conditional_table")
    part.set_defaults(run=_print_report)


def _print_report(arguments: argparse.Namespace) -> None:
    table = conditional_table(arguments.rows, arguments.seed)
    config = settings(*arguments.set)
    torch.manual_seed(arguments.seed)
    flow = build_flow(config, table.event_shape, table)
    stages = {name: instantiate(stage, f"objective.{name}") for name, stage in config["objective"].items()}
    evaluator = DensityEvaluator(table, progress_bar=False)
    train(flow, table, stages, progress=False, seed=arguments.seed)
    print(f"H(y | x)      {table.entropy:.4f} nats, of the conditions of {table.num_test:,} test rows")
    print(evaluator.test(flow))
