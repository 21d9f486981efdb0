"""Measure: `python scripts/benchmark.py divergence` prints the cost of every estimator, as ratios."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from flows.benchmarks import compilation, gradients, probing_likelihood, probing_noise, subjects
from flows.benchmarks import divergence as costs
from flows.benchmarks.images import command as images
from flows.training.console import readable_errors
from flows.training.settings import plain_settings

CONF = Path(__file__).resolve().parents[1] / "conf"
PARTS = ("mlp", "bottleneck", "structured", "conv", "noise")


def divergence(arguments: argparse.Namespace) -> None:
    """The cost of each estimator in bare field evaluations, and against a plain reverse-mode loop."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = torch.get_num_threads()
    print(f"{device}, {threads} threads, torch {torch.__version__}; the cost of one evaluation in bare evaluations of")
    print(f"the field (median of alternating runs of {costs.EVALUATIONS}), and how many times cheaper than the loop")
    groups = {
        "mlp": lambda: [subjects.perceptron(dimension) for dimension in arguments.dimensions],
        "bottleneck": lambda: [subjects.bottleneck()],
        "structured": subjects.structured,
        "conv": subjects.convolutional,
    }
    for subject in (subject for part in arguments.parts if part in groups for subject in groups[part]()):
        torch.manual_seed(0)
        field = subject.build(subject.event_shape)
        rows = costs.measure(
            field,
            subject.event_shape,
            subject.estimators,
            *subject.batches,
            arguments.seconds,
            device,
            loop=subject.loop,
            progress=subject.title.split(",")[0],
        )
        print(f"\n{subject.title}; batch {subject.batches[0]} forward, {subject.batches[1]} with backward")
        print("\n".join(costs.table(rows)), flush=True)
    if "noise" in arguments.parts:
        flow, digits = probing_noise.trained_on_digits(device=device)
        print("\nstandard deviation on a ConvNet trained on 8 × 8 digits, as many products each")
        print("\n".join(probing_noise.table(probing_noise.measure_noise(flow, digits[:128]))))


def settings(*overrides: str) -> dict[str, Any]:
    """What train.py would be run with."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return plain_settings(compose("train", overrides=list(overrides)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    benchmarks = parser.add_subparsers(required=True, metavar="BENCHMARK")
    part = benchmarks.add_parser("divergence", help=divergence.__doc__, description=divergence.__doc__)
    part.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    part.add_argument("--dimensions", type=int, nargs="+", default=list(subjects.WIDTHS), help="default: %(default)s")
    part.add_argument("--seconds", type=float, default=1.0, help="to spend on each case, at least (%(default)s)")
    part.set_defaults(run=divergence)
    probing_likelihood.add_command(benchmarks)
    gradients.add_command(benchmarks)
    compilation.add_command(benchmarks)
    images.add_command(benchmarks, settings)
    arguments = parser.parse_args()
    with readable_errors():
        arguments.run(arguments)


if __name__ == "__main__":
    main()
