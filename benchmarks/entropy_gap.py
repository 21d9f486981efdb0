"""How close a flow gets to the entropy in a given time, beside a spline flow that trains equally long."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.densities import NegativeLogLikelihood, Spline
from benchmarks.entropy_gap_report import FLOWS, HEADER, SPLINE, Outcome, Pair, line, save
from benchmarks.recipes import recipe
from benchmarks.time_budget import Look, train_and_look
from flows.datasets import Density
from flows.errors import InvalidValueError
from flows.evaluation import Likelihood, likelihood
from flows.models.cnf import CNF
from flows.training import Stage, build_dataset, build_flow
from flows.training.settings import instantiate

DENSITIES = ("8gaussians", "checkerboard", "rings", "circles", "moons", "pinwheel", "2spirals", "swissroll")


# The best of a few learning rates from 1e-3 to 8e-3, after 30 s on checkerboard
SPLINE_LEARNING_RATE = 5e-3


def add_command(benchmarks: Any) -> None:
    """Add `entropy_gap` to the commands."""
    description = (
        "Train this project's recipe and zuko's neural spline flow for the same time, and print how far the test NLL "
        "of each is above the entropy of the data, which no model can beat. Needs zuko: pip install -e '.[bench]'"
    )
    part = benchmarks.add_parser(
        "entropy_gap", help="Gaps to the entropy beside a neural spline flow.", description=description
    )
    part.add_argument("--data", nargs="+", default=list(DENSITIES), help="densities (default: all eight)")
    part.add_argument(
        "--seconds", type=float, nargs="+", default=[60.0, 300.0], help="of training time (default: 60 and 300)"
    )
    part.add_argument(
        "--likelihood",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of the time for stages that solve the ODE, if there are other stages; the few likelihood steps that "
        "fit into a minute on one core add more noise than they remove (%(default)s)",
    )
    part.add_argument("--test-points", type=int, default=100_000, help="of the final NLL (%(default)s)")
    part.add_argument("--looks", type=int, default=8, help="points of each curve (%(default)s)")
    part.add_argument("--output", type=Path, default=Path("runs/benchmarks/entropy_gap"), help="folder (%(default)s)")
    part.set_defaults(run=_print_report)


def _print_report(arguments: argparse.Namespace) -> None:
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; nats above the entropy ± standard error on")
    print(f"{arguments.test_points:,} points; ahead: spline flow − flow, ± standard error from the same points")
    print(HEADER, flush=True)
    pairs = []
    arguments.output.mkdir(parents=True, exist_ok=True)
    for seconds in arguments.seconds:
        for name in arguments.data:
            pairs.append(compare(recipe(name), seconds, arguments.likelihood, arguments.test_points, arguments.looks))
            print(line(pairs[-1]), flush=True)
            save(pairs, arguments.output)
        done = [pair for pair in pairs if pair.flow.budget == seconds]
        print(f"after {seconds:g} s the flow is ahead on {sum(pair.difference > 0 for pair in done)} of {len(done)}")
    print(f"figures, curves and picture in {arguments.output}")


def compare(
    settings: Mapping[str, Any],
    seconds: float,
    likelihood_share: float = 0.0,
    test_points: int = 100_000,
    looks: int = 8,
    progress: bool = True,
) -> Pair:
    """Train both models on the density of `settings` and test them on the same points.

    Raises:
        InvalidValueError: the data have no entropy to compare with.
    """
    dataset = build_dataset(settings)
    if not isinstance(dataset, Density) or dataset.entropy is None or len(dataset.event_shape) != 1:
        raise InvalidValueError(
            f"entropy_gap needs a density of vectors with a known entropy, such as 8gaussians; got {dataset.name}"
        )
    dataset = build_dataset({"data": {**settings["data"], "num_test": test_points}})
    torch.manual_seed(0)
    flow = build_flow(settings, dataset.event_shape, dataset)
    spline = Spline(flow.transform, dataset.event_shape, num_transforms=4, hidden=128, bins=16)
    stages = {name: instantiate(stage, f"objective.{name}") for name, stage in settings["objective"].items()}
    ema_decay = instantiate(settings["optimization"], "optimization").ema_decay
    spline_stage = Stage(NegativeLogLikelihood(), seconds=seconds, batch_size=512, learning_rate=SPLINE_LEARNING_RATE)
    look, moments = partial(_gap, dataset=dataset), _moments(seconds, looks)
    curves = {
        FLOWS: train_and_look(
            flow,
            dataset,
            timed(stages, seconds, likelihood_share),
            look,
            moments,
            ema_decay=ema_decay,
            progress=progress,
        ),
        SPLINE: train_and_look(spline, dataset, {"likelihood": spline_stage}, look, moments, progress=progress),
    }
    tested = {
        name: likelihood(model, dataset.test_batches(10_000)) for name, model in ((FLOWS, flow), (SPLINE, spline))
    }
    differences = tested[SPLINE].values - tested[FLOWS].values
    outcomes = {name: _outcome(name, dataset, seconds, curves[name], tested[name]) for name in tested}
    with torch.no_grad():
        solver_error = flow.estimate_log_prob(next(iter(dataset.test_batches(1000))).x).solver_error
    error = float(differences.std() / len(differences) ** 0.5)
    return Pair(outcomes[FLOWS], outcomes[SPLINE], float(differences.mean()), error, float(solver_error.mean()))


def timed(stages: Mapping[str, Stage], seconds: float, likelihood_share: float) -> dict[str, Stage]:
    """Stages that end by time; those that solve the ODE share `likelihood_share` of the seconds."""
    solving = [getattr(stage.objective, "solves", True) for stage in stages.values()]
    share = likelihood_share if any(solving) and not all(solving) else float(all(solving))
    seconds_of = {
        True: share * seconds / max(1, sum(solving)),
        False: (1 - share) * seconds / max(1, solving.count(False)),
    }
    return {
        name: replace(stage, steps=None, seconds=seconds_of[solves])
        for (name, stage), solves in zip(stages.items(), solving, strict=True)
        if seconds_of[solves] > 0
    }


def _moments(seconds: float, count: int) -> list[float]:
    """Times from an eighth of the whole on, in geometric progression."""
    return [seconds * 8 ** (k / max(1, count - 1) - 1) for k in range(count - 1)]


def _gap(model: CNF | Spline, dataset: Density, points: int = 4000) -> float:
    """The gap on validation points; by paired log p − log q, ten times less noisy, where p is known."""
    x = next(iter(dataset.validation_batches(points))).x
    with torch.no_grad():
        value = model.estimate_log_prob(x, solver_error=False).value.double().mean()
        lowest = -dataset.log_prob(x).double().mean() if dataset.has_log_prob else dataset.entropy
    return float(-value - lowest)


def _outcome(model: str, dataset: Density, budget: float, curve: list[Look], test: Likelihood) -> Outcome:
    return Outcome(
        dataset.name,
        model,
        budget,
        curve[-1].seconds,
        curve[-1].steps,
        test.nll - dataset.entropy,
        test.standard_error,
        test.nfe,
        curve,
    )
