"""Run a benchmark: `python -m benchmarks divergence` prints what every estimator costs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks import (
    compilation,
    conditional_table,
    data_to_data,
    divergence,
    entropy_gap,
    error_bars,
    few_steps,
    gpu,
    gradients,
    images,
    large_table,
    mixture_base,
    parameters,
    probing_likelihood,
    processes,
    regularisation,
    restoration,
    sbi,
    series,
    training,
    uci,
    unet_step,
    work_precision,
)
from flows.errors import FlowsError

BENCHMARKS = (
    divergence,
    probing_likelihood,
    gradients,
    compilation,
    gpu,
    training,
    entropy_gap,
    regularisation,
    images,
    restoration,
    data_to_data,
    mixture_base,
    error_bars,
    few_steps,
    parameters,
    sbi,
    series,
    uci,
    unet_step,
    conditional_table,
    processes,
    large_table,
    work_precision,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark that the command line names."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
    for benchmark in BENCHMARKS:
        benchmark.add_command(commands)
    parsed = parser.parse_args(arguments)
    try:
        parsed.run(parsed)
    except FlowsError as error:
        parser.exit(2, f"Error: {error}\n")


if __name__ == "__main__":
    main()
