"""How often the true error of a predicted state lies within three reported errors."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flows.models.neural_ode import NeuralODE
from flows.solvers import ODESolver

WITHIN = 3.0  # reported errors
TOLERANCES = {  # of adaptive methods; those of low order take many steps
    "dopri5": (1e-3, 1e-5, 1e-7),
    "dopri8": (1e-3, 1e-5, 1e-7),
    "bosh3": (1e-3, 1e-5, 1e-7),
    "fehlberg2": (1e-4, 1e-6),
    "adaptive_heun": (1e-3, 1e-5),
    "scipy_solver": (1e-3, 1e-5, 1e-7),
}
STEP_SIZES = (0.1, 0.02)  # of methods with fixed steps
FIXED = ("rk4", "midpoint", "heun3", "euler", "explicit_adams", "implicit_adams")
END, NUM_STATES, NUM_TIMES = 5.0, 64, 41


class Linear(nn.Module):
    """dx/dt = A x with a matrix A whose eigenvectors are far from orthogonal."""

    event_shape = (2,)

    def __init__(self, matrix: Sequence[Sequence[float]]) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor(matrix))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return x @ self.matrix.T

    def solution(self, x0: Tensor, times: Tensor) -> Tensor:  # (B, 2), (T,) -> (B, T, 2)
        return torch.einsum("tij,bj->bti", torch.linalg.matrix_exp(times[:, None, None] * self.matrix), x0)

    def starts(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, 2, generator=generator)


class Logistic(nn.Module):
    """dx/dt = 2 x (1 − x) in each of two entries."""

    event_shape = (2,)

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(2.0))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.rate * x * (1 - x)

    def solution(self, x0: Tensor, times: Tensor) -> Tensor:
        return 1 / (1 + (1 / x0 - 1)[:, None] * (-self.rate * times)[:, None].exp())

    def starts(self, n: int, generator: torch.Generator) -> Tensor:
        return 0.05 + 1.5 * torch.rand(n, 2, generator=generator)


class Forced(nn.Module):
    """dx/dt = sin 2t − x in each of two entries."""

    event_shape = (2,)

    def __init__(self) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.tensor(2.0))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.sin(self.frequency * t) - x

    def solution(self, x0: Tensor, times: Tensor) -> Tensor:
        driven = (torch.sin(2 * times) - 2 * torch.cos(2 * times)) / 5
        return (x0[:, None] + 0.4) * (-times)[:, None].exp() + driven[:, None]

    def starts(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, 2, generator=generator)


SYSTEMS: Mapping[str, Callable[[], Any]] = {
    "linear": lambda: Linear([[-0.5, 4.0], [0.0, -0.7]]),
    "rotation": lambda: Linear([[-0.1, -2.0], [2.0, -0.1]]),
    "logistic": Logistic,
    "forced": Forced,
}


@dataclass(frozen=True)
class ErrorBars:
    """How the reported errors of one solver compare with the true ones, on one system."""

    system: str
    inside: float  # the share of values within three reported errors
    true_error: float  # root mean square
    reported: float  # root mean square


def add_command(benchmarks: Any) -> None:
    """Add `error_bars` to the commands."""
    description = "How often the true error of a predicted state lies within three reported errors."
    part = benchmarks.add_parser("error_bars", help=description, description=description)
    part.add_argument("--dtype", choices=("float32", "float64"), nargs="+", default=["float64", "float32"])
    part.set_defaults(run=_print_report)


def _print_report(arguments: argparse.Namespace) -> None:
    worst = 1.0
    print(
        f"share of predicted values whose true error is within {WITHIN:g} reported errors; in brackets, the root mean "
        f"square of the true error\n{'':>32}" + "".join(f"{name:>19}" for name in SYSTEMS)
    )
    for dtype in arguments.dtype:
        for name, solver in solvers():
            found = [measure(solver, system, getattr(torch, dtype)) for system in SYSTEMS]
            worst = min(worst, *(bars.inside for bars in found))
            cells = "".join(f"{bars.inside:9.1%} ({bars.true_error:.0e})" for bars in found)
            print(f"{dtype:>8} {name:>23}{cells}", flush=True)
    print(f"lowest share: {worst:.1%}")


def solvers() -> Iterator[tuple[str, ODESolver]]:
    """All methods, each at several tolerances or step sizes."""
    for method, tolerances in TOLERANCES.items():
        for tolerance in tolerances:
            yield f"{method} {tolerance:g}", ODESolver(method, rtol=tolerance, atol=tolerance, max_steps=100_000)
    for method in FIXED:
        for step in STEP_SIZES:
            yield f"{method} step {step:g}", ODESolver(method, step_size=step)


def measure(solver: ODESolver, system: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> ErrorBars:
    """Compare reported with true errors at all values after the first time."""
    field = SYSTEMS[system]().to(dtype)
    x0 = field.starts(NUM_STATES, torch.Generator().manual_seed(seed)).to(dtype)
    times = torch.linspace(0, END, NUM_TIMES, dtype=torch.float64)
    with torch.no_grad():
        path = NeuralODE(field, solver).trajectory(x0, times)
        exact = field.double().solution(x0.double(), times)
    assert path.solver_error is not None  # as asked for
    error = (path.states.double() - exact).abs()[:, 1:]
    told = path.solver_error.double()[:, 1:]
    inside = float((error <= WITHIN * told).double().mean())
    true_error, reported = (float(each.square().mean().sqrt()) for each in (error, told))
    return ErrorBars(system, inside, true_error, reported)
