"""How much faster `torch.compile` makes a training step."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.devices import add_device, machine
from flows.compare.timing import alternating_medians
from flows.datasets import Batch
from flows.divergence import Analytic, Exact, Hutchinson
from flows.fields import MLP, ConcatSquashMLP
from flows.models.cnf import CNF
from flows.objectives import FlowMatching, MaximumLikelihood, Objective
from flows.solvers import ODESolver
from flows.training.compile import compiled

SOLVER = ODESolver("dopri5", rtol=1e-5, atol=1e-5)  # as diffrax
CASES: dict[str, Callable[[], tuple[CNF, Objective]]] = {
    "flow matching, MLP 128-128": lambda: (CNF(MLP((2,), (128, 128)), solver=SOLVER), FlowMatching()),
    "flow matching with divergence, MLP 128-128": lambda: (
        CNF(MLP((2,), (128, 128)), Analytic(), SOLVER),
        FlowMatching(divergence_weight=0.1),
    ),
    "likelihood, MLP 128-128, Analytic": lambda: (
        CNF(MLP((2,), (128, 128)), Analytic(), SOLVER),
        MaximumLikelihood(),
    ),
    "likelihood, ConcatSquash 64-64-64, Analytic": lambda: (
        CNF(ConcatSquashMLP((2,), (64, 64, 64)), Analytic(), SOLVER),
        MaximumLikelihood(),
    ),
    "likelihood, MLP 64-64 in 8-d, Exact forward": lambda: (
        CNF(MLP((8,), (64, 64)), Exact("forward"), SOLVER),
        MaximumLikelihood(),
    ),
    "likelihood, MLP 64-64 in 8-d, Hutchinson forward": lambda: (
        CNF(MLP((8,), (64, 64)), Hutchinson(2, mode="forward"), SOLVER),
        MaximumLikelihood(),
    ),
}


def add_command(benchmarks: Any) -> None:
    """Add `compile` to the commands."""
    description = "How much faster hardware.compile=true makes a training step, and how long compiling takes."
    part = benchmarks.add_parser("compile", help=description, description=description)
    part.add_argument("--batch", type=int, default=512, help="points (%(default)s)")
    add_device(part)
    part.add_argument("--seconds", type=float, default=2.0, help="at least, for each case (%(default)s)")
    part.set_defaults(run=_print_report)


def _print_report(arguments: argparse.Namespace) -> None:
    print(f"batch {arguments.batch}; {machine(arguments.device)}")
    for row in report(arguments.batch, arguments.seconds, arguments.device):
        print(row, flush=True)


def report(batch_size: int, seconds_each: float, device: str = "cpu") -> Iterator[str]:
    """One line per case: milliseconds per step without and with compilation, their ratio, seconds to compile."""
    yield f"{'':50}{'eager ms':>10}{'compiled ms':>13}{'times faster':>14}{'to compile, s':>15}"
    for name, build in CASES.items():
        torch.compiler.reset()  # code compiled for other cases counts towards a limit
        torch.manual_seed(0)
        flow, objective = build()
        flow.to(device)
        other = copy.deepcopy(flow)
        x = torch.randn(batch_size, *flow.event_shape, device=device)
        with compiled(other, objective):
            started = time.perf_counter()
            _step(other, objective, x)()
            compiling = time.perf_counter() - started
            cases = {"eager": _step(flow, objective, x), "compiled": _step(other, objective, x)}
            medians = alternating_medians(cases, seconds_each, progress=name)
        eager, fast = medians["eager"], medians["compiled"]
        yield f"{name:50}{1e3 * eager:10.1f}{1e3 * fast:13.1f}{eager / fast:14.2f}{compiling:15.0f}"


def _step(flow: CNF, objective: Objective, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        objective(flow, Batch(x), torch.Generator(x.device).manual_seed(0)).loss.backward()
        flow.zero_grad()

    return step
