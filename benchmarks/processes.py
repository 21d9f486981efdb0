"""How much faster do several processes train?

Each run is `scripts/train.py` with `hardware.devices=N` on the same batches; the runs of 1 and N processes alternate.
On a machine whose cores are shared, processes wait for each other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

DENSITY = ("data=pinwheel", "data.num_test=100", "data.num_validation=100", "evaluation.solver_error_points=0")
WORKLOADS = {
    "likelihood, FFJORD": (*DENSITY, "experiment=ffjord", "objective.maximum_likelihood.batch_size=2048"),
    "flow matching, MLP": (
        *DENSITY,
        "objective=flow_matching",
        "field.hidden=[512,512,512]",
        "objective.flow_matching.objective.target=sampled",
        "objective.flow_matching.batch_size=8192",
    ),
    "trajectory matching": (  # a neural ODE
        *("data=oscillator", "data.num_series=1500", "data.num_times=50", "evaluation.solver_error_series=0"),
        *("objective=trajectory_matching", "objective.trajectory_matching.batch_size=1024"),
        "field.hidden=[256,256]",
    ),
}
STEPS = {"likelihood, FFJORD": 12, "flow matching, MLP": 20, "trajectory matching": 12}
COMMON = ("hardware.accelerator=cpu", "reporting.progress_bar=false", "reporting.plot_every=null")


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add `processes` to the benchmarks."""
    parser = commands.add_parser("processes", help="steps a second in one process and in several")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=[*WORKLOADS], help="one workload")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print a table."""
    numbers = (1, options.processes)
    print(f"{os.cpu_count()} cores, one thread a process, medians of {options.repeats} alternating runs")
    print(f"{'workload':<22}{'1 process':>14}{f'{numbers[1]} processes':>16}{'ratio':>8}")
    for name in [options.only] if options.only else [*WORKLOADS]:
        settings = WORKLOADS[name]
        found: dict[int, list[float]] = {number: [] for number in numbers}
        for _ in range(options.repeats):
            for number in numbers:
                found[number].append(steps_per_second((*settings, f"steps={STEPS[name]}"), number, STEPS[name]))
        one, several = (statistics.median(found[number]) for number in numbers)
        print(f"{name:<22}{one:>10.2f} st/s{several:>11.2f} st/s{several / one:>8.2f}", flush=True)


def steps_per_second(settings: tuple[str, ...], number: int, steps: int) -> float:
    """Train, and return the speed of the second half of the steps."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "scripts/train.py", *settings, *COMMON, f"hardware.devices={number}"]
        command += [f"reporting.log_every={steps // 2}", "reporting.validate_every=100000", f"output_dir={folder}/run"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    speeds = [value for row in rows for name, value in row.items() if name.endswith("steps_per_second")]
    return speeds[-1]
