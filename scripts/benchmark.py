"""Measure: `python scripts/benchmark.py divergence` prints the cost of every estimator, as ratios."""

from __future__ import annotations

import argparse

import torch
from tqdm import tqdm

from flows.benchmarks.divergence import EVALUATIONS, measure, table
from flows.divergence import Analytic, Exact, Hutchinson
from flows.fields import MLP

SIZES = {2: 64, 64: 256, 512: 1024}  # dimension: width of the two hidden layers


def divergence(arguments: argparse.Namespace) -> None:
    """The cost of each estimator in bare field evaluations, and against a plain reverse-mode loop."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    estimators = {
        "Analytic": Analytic(),
        "Hutchinson, reverse": Hutchinson(),
        "Hutchinson, forward": Hutchinson(mode="forward"),
        "Exact, reverse": Exact(),
        "Exact, reverse, chunks": Exact(chunk_size=16),
        "Exact, forward, chunks": Exact("forward", chunk_size=16),
    }
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; cost of one evaluation in bare")
    print(f"field evaluations (median of alternating runs of {EVALUATIONS}), and how many times cheaper than the loop")
    for dimension in tqdm(arguments.dimensions, desc="dimensions", leave=False):
        torch.manual_seed(0)
        field = MLP((dimension,), [SIZES.get(dimension, 2 * dimension)] * 2, "tanh")
        costs = measure(
            field,
            (dimension,),
            estimators,
            arguments.forward_batch,
            arguments.training_batch,
            arguments.seconds,
            device,
        )
        widths = f"{field.hidden[0]} wide, batch {arguments.forward_batch} forward, {arguments.training_batch} training"
        tqdm.write(f"\nd = {dimension}, two hidden layers {widths}\n" + "\n".join(table(costs)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    benchmarks = parser.add_subparsers(required=True, metavar="BENCHMARK")
    part = benchmarks.add_parser("divergence", help=divergence.__doc__, description=divergence.__doc__)
    part.add_argument("--dimensions", type=int, nargs="+", default=list(SIZES), help="default: %(default)s")
    part.add_argument("--forward-batch", type=int, default=1024, help="points, without gradients (%(default)s)")
    part.add_argument("--training-batch", type=int, default=256, help="points, with gradients (%(default)s)")
    part.add_argument("--seconds", type=float, default=1.0, help="to spend on each case, at least (%(default)s)")
    part.set_defaults(run=divergence)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
