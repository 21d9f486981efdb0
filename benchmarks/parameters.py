"""Parameters of known equations from noisy, irregular observations: single and multiple shooting."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import flows
from flows import equations
from flows.datasets import DynamicalSystem, Lorenz, LotkaVolterra, SeriesBatch
from flows.evaluation import parameter_estimates
from flows.fields import Physics
from flows.objectives import TrajectoryMatching
from flows.solvers import SolverError


@dataclass(frozen=True)
class Problem:
    """A system, where its fit starts, and how many intervals the pieces of multiple shooting have."""

    data: Callable[[int], DynamicalSystem]
    known: Callable[..., Tensor]
    truth: Mapping[str, float]
    start: Mapping[str, float]
    pieces: Sequence[int]


PROBLEMS = {
    "Lotka-Volterra": Problem(
        lambda seed: LotkaVolterra(
            num_series=10, num_times=50, span=12.0, beyond=1.0, noise=0.02, irregular=True, seed=seed
        ),
        equations.lotka_volterra,
        {"alpha": 1.5, "beta": 1.0, "gamma": 3.0, "delta": 1.0},
        {"alpha": 1.0, "beta": 0.6, "gamma": 1.5, "delta": 0.5},
        (5,),
    ),
    "Lorenz": Problem(
        lambda seed: Lorenz(num_series=6, num_times=300, span=6.0, beyond=0.5, noise=0.01, irregular=True, seed=seed),
        equations.lorenz,
        {"sigma": 10.0, "rho": 28.0, "beta": 8 / 3},
        {"sigma": 7.0, "rho": 20.0, "beta": 2.0},
        (10, 30),
    ),
}
ITERATIONS = 60  # of L-BFGS, for all stages together


def add_command(commands: Any) -> None:
    """Add `parameters` to the benchmarks."""
    parser = commands.add_parser("parameters", help="parameters of known equations by single and multiple shooting")
    parser.add_argument("--seeds", type=int, default=3, help="data sets of each system")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the fitted parameters of each system, with their standard errors and the worst relative error."""
    for name, problem in PROBLEMS.items():
        for seed in range(arguments.seeds):
            series = problem.data(seed).part("train")
            print(f"\n{name}, seed {seed}: {len(series)} series of {series.x.shape[1]} observations, start", end=" ")
            print(", ".join(f"{key} {value:g}" for key, value in problem.start.items()))
            whole = TrajectoryMatching()
            in_pieces = [TrajectoryMatching(segment_length=length, smoothing=5) for length in problem.pieces]
            for label, stages in (("single shooting", [whole]), ("multiple, then single", [*in_pieces, whole])):
                report(label, problem, series, stages)


def report(label: str, problem: Problem, series: SeriesBatch, stages: Sequence[TrajectoryMatching]) -> None:
    """Fit the system by the stages and print where that ends."""
    field = Physics(problem.known, series.x.shape[2:], dict(problem.start)).double()
    ode = flows.NeuralODE(field, flows.ODESolver(rtol=1e-6, atol=1e-6, max_steps=5000))
    began = time.perf_counter()
    for stage in stages:
        fit(ode, series, stage, ITERATIONS // len(stages))
    seconds = time.perf_counter() - began
    found = parameter_estimates(ode, series)
    worst = max(abs(found[key].value / value - 1) for key, value in problem.truth.items())
    values = ", ".join(f"{key} {one}" for key, one in found.items())
    print(f"  {label:22} {values}; worst error {worst:.2%}, {seconds:.0f} s", flush=True)


def fit(ode: flows.NeuralODE, series: SeriesBatch, objective: TrajectoryMatching, iterations: int) -> None:
    """Minimise the objective on all series by L-BFGS; a trial step that cannot be solved counts as infinite."""
    optimiser = torch.optim.LBFGS(ode.parameters(), max_iter=iterations, line_search_fn="strong_wolfe", history_size=20)

    def closure() -> Tensor:
        optimiser.zero_grad()
        try:
            loss = objective(ode, series).loss
            loss.backward()
        except SolverError:
            return torch.tensor(float("inf"), dtype=torch.float64)
        return loss

    optimiser.step(closure)  # pyright: ignore[reportArgumentType]
