"""Evaluations for a given error of log p, by solver, on flows of the toy recipes."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import flows
from benchmarks.recipes import settings
from benchmarks.time_budget import train
from flows.models.cnf import CNF
from flows.objectives import FlowMatching
from flows.solvers import ODESolver
from flows.training import Stage, build_dataset, build_flow

TOYS = ("8gaussians", "2spirals", "moons", "checkerboard", "rings", "pinwheel", "circles", "swissroll")
TOLERANCES = tuple(10 ** (-k / 4) for k in range(12, 25, 2))  # 1e-3 to 1e-6
BATCH = 512  # a fourth of the recipes', whose shape of the flow it keeps
REFERENCE = ODESolver("dopri8", rtol=1e-11, atol=1e-11, max_steps=10_000)
SOLVERS: Mapping[str, Mapping[str, Any]] = {
    "dopri5": {"method": "dopri5"},
    "flow5": {"method": "flow5"},
    "flow5, pi": {"method": "flow5", "controller": "pi"},
    "flow5, pid": {"method": "flow5", "controller": "pid"},
    "tsit5": {"method": "tsit5"},
    "bosh3": {"method": "bosh3"},
    "dopri8": {"method": "dopri8"},
}


@dataclass(frozen=True)
class Point:
    """One solve of all points."""

    evaluations: int
    error: float  # mean |error| of log p, nats


def add_command(benchmarks: Any) -> None:
    """Add `work_precision` to the commands."""
    description = "Evaluations of the field at equal error of log p, for methods and controllers."
    part = benchmarks.add_parser("work_precision", help=description, description=description)
    part.add_argument("--data", nargs="+", default=list(TOYS), choices=TOYS, help="toy densities, by recipe")
    part.add_argument("--solvers", nargs="+", default=list(SOLVERS), choices=list(SOLVERS))
    part.add_argument("--steps", type=int, default=800, help="of training, in batches of 512")
    part.add_argument("--runs", type=Path, help="a folder of runs NAME, which are loaded instead of trained")
    part.add_argument("--points", type=int, default=500, help="test points")
    part.add_argument("--error", type=float, default=1e-4, help="of log p in nats, in the table")
    part.add_argument("--picture", type=Path, help="a .png file")
    part.set_defaults(run=_print_report)


def _print_report(arguments: argparse.Namespace) -> None:
    print(f"evaluations for a mean error of {arguments.error:g} nats in log p, {arguments.points} points, float64")
    print(f"{'':>14}" + "".join(f"{name:>13}" for name in arguments.solvers), flush=True)
    curves: dict[str, dict[str, list[Point]]] = {name: {} for name in arguments.solvers}
    for name in arguments.data:
        flow, points = trained(name, arguments.steps, arguments.points, arguments.runs)
        reference = log_density(flow, points, REFERENCE)[0]
        for solver in arguments.solvers:
            curves[solver][name] = curve(flow, points, reference, SOLVERS[solver])
        row = [evaluations_for(curves[solver][name], arguments.error) for solver in arguments.solvers]
        print(f"{name:>14}" + "".join(f"{value:13.0f}" for value in row), flush=True)
    means = [
        math.exp(np.mean([math.log(evaluations_for(found, arguments.error)) for found in curves[solver].values()]))
        for solver in arguments.solvers
    ]
    print(f"{'mean':>14}" + "".join(f"{value:13.1f}" for value in means))
    print(f"{'to the first':>14}" + "".join(f"{value / means[0]:13.3f}" for value in means))
    if arguments.picture:
        save_picture(curves, arguments.picture)
        print(f"picture in {arguments.picture}")


def trained(name: str, steps: int, num_points: int, runs: Path | None = None) -> tuple[CNF, Tensor]:
    """A flow in float64, trained by the recipe for fewer steps or loaded, and points of the test part."""
    config = settings(f"experiment={name}")
    dataset = build_dataset({"data": {**config["data"], "num_test": num_points}})
    if runs is not None:
        flow = flows.load(runs / name)
    else:
        torch.manual_seed(0)
        flow = build_flow(config, dataset.event_shape, dataset)
        stage = config["objective"]["flow_matching"]
        options = {key: value for key, value in stage["objective"].items() if key != "_target_"}
        objective = FlowMatching(**options)
        stages = {"flow_matching": Stage(objective, steps, batch_size=BATCH, learning_rate=stage["learning_rate"])}
        train(flow, dataset, stages, progress=False)
    return flow.double(), dataset.held_out("test").x.double()


@torch.no_grad()
def log_density(flow: CNF, points: Tensor, solver: ODESolver) -> tuple[Tensor, int]:
    """log p in nats, and the evaluations of the field."""
    flow.solver = solver
    estimate = flow.estimate_log_prob(points, solver_error=False)
    return estimate.value, estimate.nfe


def curve(flow: CNF, points: Tensor, reference: Tensor, options: Mapping[str, Any]) -> list[Point]:
    """The errors at all tolerances."""
    found = []
    for tolerance in TOLERANCES:
        value, evaluations = log_density(flow, points, ODESolver(rtol=tolerance, atol=tolerance, **options))
        found.append(Point(evaluations, float((value - reference).abs().mean())))
    return found


def evaluations_for(points: Sequence[Point], error: float, nearest: int = 4) -> float:
    """Evaluations for an error, by a straight line through the nearest points of a curve, in logarithms."""
    chosen = sorted(points, key=lambda point: abs(math.log(point.error / error)))[:nearest]
    logs = np.log([(point.error, point.evaluations) for point in chosen])
    slope, offset = np.polyfit(logs[:, 0], logs[:, 1], 1)
    return math.exp(slope * math.log(error) + offset)


def save_picture(curves: Mapping[str, Mapping[str, Sequence[Point]]], path: Path) -> None:
    """Error against evaluations: the mean over the data sets at each tolerance, in logarithms."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for (solver, found), marker in zip(curves.items(), "osv^Dx+*", strict=False):
        logs = np.log([[(point.evaluations, point.error) for point in points] for points in found.values()]).mean(0)
        axes.loglog(*np.exp(logs).T, marker=marker, markersize=4, linewidth=1.2, label=solver)
    axes.axhline(1e-4, color="0.6", linewidth=0.8, linestyle=":")
    axes.set(xlabel="evaluations of the field", ylabel="mean error of log p in nats")
    ticks = [30, 50, 100, 200, 400]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
