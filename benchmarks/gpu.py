"""Steps and log-densities on a GPU, compiled and not, in a few minutes."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.devices import add_device, machine
from flows.compare.timing import alternating_medians, synchronise
from flows.datasets import Batch
from flows.divergence import Analytic, DivergenceEstimator, Exact
from flows.fields import ConcatSquashMLP, UNet
from flows.models.cnf import CNF
from flows.objectives import FlowMatching
from flows.solvers import ODESolver, compilations

ESTIMATORS: dict[str, DivergenceEstimator] = {"closed form": Analytic(), "forward mode": Exact("forward")}


def add_command(benchmarks: Any) -> None:
    """Add `gpu` to the commands."""
    description = (
        "Milliseconds of a likelihood step of FFJORD's network and of log_prob, with closed-form and forward-mode "
        "divergence, eager and compiled, and of a flow-matching step of CIFAR-10's U-Net in bf16 beside a bare "
        "forward and backward pass. Takes less than six minutes on a GPU."
    )
    part = benchmarks.add_parser("gpu", help="Steps and log_prob on a GPU.", description=description)
    add_device(part)
    part.add_argument("--batch", type=int, default=512, help="points per likelihood step (%(default)s)")
    part.add_argument("--points", type=int, default=10_000, help="of log_prob (%(default)s)")
    part.add_argument("--images", type=int, default=128, help="of 3 × 32 × 32 per matching step (%(default)s)")
    part.add_argument("--channels", type=int, default=128, help="of the U-Net (%(default)s)")
    part.add_argument("--seconds", type=float, default=5.0, help="for each case, at least (%(default)s)")
    part.set_defaults(run=_print_report)


def _print_report(arguments: argparse.Namespace) -> None:
    print(machine(arguments.device))
    if arguments.device == "cpu":
        print("this is no GPU: the figures say that the benchmark runs, and nothing else")
    for row in report(
        arguments.device,
        arguments.batch,
        arguments.points,
        arguments.images,
        arguments.channels,
        arguments.seconds,
    ):
        print(row, flush=True)


def report(
    device: str,
    batch: int,
    points: int,
    images: int,
    channels: int,
    seconds: float,
    hidden: tuple[int, ...] = (64,) * 3,
) -> Iterator[str]:
    """One line per measurement; a case that fails is told and the others go on."""
    parts: list[Callable[[], Iterator[str]]] = [
        lambda: _matching(device, images, channels, seconds),
        *(lambda name=name: _likelihood(name, device, batch, points, seconds, hidden) for name in ESTIMATORS),
    ]
    for part in parts:
        started = time.perf_counter()
        try:
            yield from part()
        except Exception as error:  # one part that fails must not end the others
            yield f"failed: {type(error).__name__}: {str(error).splitlines()[0]}"
        yield f"({time.perf_counter() - started:.0f} s)"
    yield f"compiled: {compilations()}"


def _likelihood(
    name: str, device: str, batch: int, points: int, seconds: float, hidden: tuple[int, ...]
) -> Iterator[str]:
    torch.manual_seed(0)
    field = ConcatSquashMLP((2,), hidden)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.mul_(1.6)  # as curved as a trained field
    eager = CNF(field, ESTIMATORS[name], ODESolver()).to(device)
    fast = copy.deepcopy(eager)
    fast.solver = replace(fast.solver, compile=True)
    x, many = torch.randn(batch, 2, device=device), torch.randn(points, 2, device=device)
    steps: dict[str, Callable[[], object]] = {"eager": _step(eager, x), "compiled": _step(fast, x)}
    looks: dict[str, Callable[[], object]] = {"eager": _look(eager, many), "compiled": _look(fast, many)}
    for what, cases in ((f"likelihood step of {batch}", steps), (f"log_prob of {points:,}", looks)):
        started = time.perf_counter()
        cases["compiled"]()
        synchronise()
        first = time.perf_counter() - started
        medians = alternating_medians(cases, seconds)
        ratio = medians["compiled"] / medians["eager"]
        yield (
            f"{what}, {name}: eager {1e3 * medians['eager']:.1f} ms, compiled {1e3 * medians['compiled']:.1f} ms "
            f"({ratio:.2f} of it), first call {first:.0f} s"
        )
    with torch.no_grad():
        difference = float((eager.log_prob(many) - fast.log_prob(many)).abs().max())
        nfe = eager.estimate_log_prob(x, solver_error=False).nfe
    yield f"largest difference of log p {difference:.1e} nats; {nfe} evaluations a step"


def _step(flow: CNF, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        (-flow.log_prob(x).mean()).backward()
        flow.zero_grad()

    return step


def _look(flow: CNF, x: Tensor) -> Callable[[], Tensor]:
    return torch.no_grad()(lambda: flow.log_prob(x))


def _matching(device: str, images: int, channels: int, seconds: float) -> Iterator[str]:
    """A flow-matching step of a U-Net beside a bare forward and backward pass, both in bf16."""
    torch.manual_seed(0)
    field = UNet((3, 32, 32), channels=channels)
    flow = CNF(field).to(device)
    objective, batch = FlowMatching("sampled"), Batch(torch.randn(images, 3, 32, 32, device=device))
    t = torch.rand(images, device=device)
    kind = torch.device(device).type

    def bare() -> None:
        with torch.autocast(kind, torch.bfloat16):
            loss = flow.field(t, batch.x).square().mean()
        loss.backward()
        flow.zero_grad()

    def matching() -> None:
        with torch.autocast(kind, torch.bfloat16):
            loss = objective(flow, batch).loss
        loss.backward()
        flow.zero_grad()

    medians = alternating_medians({"bare": bare, "matching": matching}, seconds)
    yield (
        f"flow-matching step of {images} images, bf16: {1e3 * medians['matching']:.1f} ms, bare forward and backward "
        f"{1e3 * medians['bare']:.1f} ms (ratio {medians['matching'] / medians['bare']:.2f})"
    )
