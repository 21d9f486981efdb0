"""Measure: `python scripts/benchmark.py divergence` prints the cost of every estimator, as ratios."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import (
    compilation,
    divergence,
    floor,
    gradients,
    probing_likelihood,
    regularisation,
    training,
)
from benchmarks.images import command as images
from flows.training.console import readable_errors
from flows.training.settings import plain_settings

CONF = Path(__file__).resolve().parents[1] / "conf"


def settings(*overrides: str) -> dict[str, Any]:
    """What train.py would be run with."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return plain_settings(compose("train", overrides=list(overrides)))


def recipe(data: str) -> dict[str, Any]:
    """The settings of a run on a density: those of the experiment called like it, or else the default ones."""
    own = [f"experiment={data}"] if (CONF / "experiment" / f"{data}.yaml").exists() else []
    return settings(f"data={data}", *own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    benchmarks = parser.add_subparsers(required=True, metavar="BENCHMARK")
    for part in (divergence, probing_likelihood, gradients, compilation, training):
        part.add_command(benchmarks)
    floor.add_command(benchmarks, recipe)
    regularisation.add_command(benchmarks, settings)
    images.add_command(benchmarks, settings)
    arguments = parser.parse_args()
    with readable_errors():
        arguments.run(arguments)


if __name__ == "__main__":
    main()
