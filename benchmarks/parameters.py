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
    """A system, where its fit starts, and the stages of multiple shooting.

    A stage is the number of intervals of its pieces, `None` for whole series, and its iterations.
    """

    data: Callable[[int], DynamicalSystem]
    known: Callable[..., Tensor]
    truth: Mapping[str, float]
    start: Mapping[str, float]
    stages: Sequence[tuple[int | None, int]]


PROBLEMS = {
    "Lotka-Volterra": Problem(
        lambda seed: LotkaVolterra(
            num_series=10, num_times=50, span=12.0, beyond=1.0, noise=0.02, irregular=True, seed=seed
        ),
        equations.lotka_volterra,
        {"alpha": 1.5, "beta": 1.0, "gamma": 3.0, "delta": 1.0},
        {"alpha": 1.0, "beta": 0.6, "gamma": 1.5, "delta": 0.5},
        ((5, 15), (None, 15)),
    ),
    "Lorenz": Problem(
        lambda seed: Lorenz(num_series=8, num_times=200, span=4.0, beyond=0.1, noise=0.01, irregular=True, seed=seed),
        equations.lorenz,
        {"sigma": 10.0, "rho": 28.0, "beta": 8 / 3},
        {"sigma": 7.0, "rho": 20.0, "beta": 2.0},
        ((10, 20), (50, 10)),  # longer ones are chaotic: errors grow e-fold in 55 intervals
    ),
}
SINGLE = ((None, 30),)
SMOOTHING = 5  # observations, for the states where pieces start
GOOD = 1.5  # residuals of a fit that has converged, in standard deviations of the noise


def add_command(commands: Any) -> None:
    """Add `parameters` to the benchmarks."""
    parser = commands.add_parser("parameters", help="parameters of known equations by single and multiple shooting")
    parser.add_argument("--seeds", type=int, default=3, help="data sets of each system")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the fitted parameters of each system, and their worst relative error.

    Standard errors suppose a fit to whole series that has converged. Elsewhere none are printed.
    """
    for name, problem in PROBLEMS.items():
        for seed in range(arguments.seeds):
            data = problem.data(seed)
            series = data.part("train")
            print(f"\n{name}, seed {seed}: {len(series)} series of {series.x.shape[1]} observations, start", end=" ")
            print(", ".join(f"{key} {value:g}" for key, value in problem.start.items()))
            for label, stages in (("single shooting", SINGLE), ("multiple shooting", problem.stages)):
                report(label, problem, series, data.noise_scale, stages)


def report(
    label: str, problem: Problem, series: SeriesBatch, noise: Tensor, stages: Sequence[tuple[int | None, int]]
) -> None:
    """Fit the system by the stages and print where that ends."""
    field = Physics(problem.known, series.x.shape[2:], dict(problem.start)).double()
    ode = flows.NeuralODE(field, flows.ODESolver(rtol=1e-6, atol=1e-6, max_steps=5000))
    began = time.process_time()
    for length, iterations in stages:
        fit(ode, series, matching(length), iterations)
    seconds = time.process_time() - began
    length = stages[-1][0]
    residual = misfit(ode, series, matching(length), noise)
    found: Mapping[str, Any] = {key: f"{one.item():.6g}" for key, one in field.values().items()}
    if length is None and residual < GOOD:
        found = parameter_estimates(ode, series)
    worst = max(abs(field.values()[key].item() / value - 1) for key, value in problem.truth.items())
    values = ", ".join(f"{key} {one}" for key, one in found.items())
    of = "" if length is None else f" over pieces of {length}"
    print(f"  {label:17} {values}; worst error {worst:.2%}; residuals{of} {residual:.3g} times the noise", end="")
    print(f"; {seconds:.0f} s of CPU time", flush=True)


def matching(length: int | None) -> TrajectoryMatching:
    """The objective of a stage."""
    return TrajectoryMatching() if length is None else TrajectoryMatching(segment_length=length, smoothing=SMOOTHING)


@torch.no_grad()
def misfit(ode: flows.NeuralODE, series: SeriesBatch, objective: TrajectoryMatching, noise: Tensor) -> float:
    """The root mean square residual, in standard deviations of the noise; infinite where nothing can be solved."""
    try:
        return float((objective(ode, series).loss / noise.square().mean()).sqrt())
    except SolverError:
        return float("inf")


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
