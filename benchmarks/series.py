"""Neural ODEs on time series: beside torchdiffeq and diffrax, the cost of own times, and a start without solves."""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchdiffeq import odeint

import flows
from benchmarks import diffrax_example
from benchmarks.devices import machine
from flows.datasets import Batch, DynamicalSystem, SeriesBatch
from flows.objectives import DerivativeMatching, TrajectoryMatching

POINTS, SPAN, WINDOW, BATCH = 1000, 25.0, 10, 20  # of torchdiffeq's demonstration
RTOL, ATOL = 1e-7, 1e-9


def add_command(benchmarks: Any) -> None:
    """Add `series` to the commands."""
    description = (
        "Neural ODEs: the demonstrations of torchdiffeq and diffrax, times of one's own, derivative matching first."
    )
    part = benchmarks.add_parser("series", help=description, description=description)
    part.add_argument("parts", nargs="*", metavar="PART", default=[], help=f"of {', '.join(PARTS)}; default: all")
    part.add_argument("--steps", type=int, default=500, help="of the spiral (%(default)s)")
    part.add_argument("--seeds", type=int, default=3, help="of the spiral and of neural_ode (%(default)s)")
    part.add_argument(
        "--compile", action="store_true", help="the spiral by compiled steps, whose compilation is not counted"
    )
    part.set_defaults(run=_print_report)


def _print_report(arguments: argparse.Namespace) -> None:
    print(machine("cpu"))
    for name in arguments.parts or PARTS:
        for row in PARTS[name](arguments):
            print(row, flush=True)


class Cube(nn.Module):
    """The network of torchdiffeq's demonstration: two layers on x³."""

    event_shape = (2,)

    def __init__(self) -> None:
        super().__init__()
        first, last = nn.Linear(2, 50), nn.Linear(50, 2)
        self.layers = nn.Sequential(first, nn.Tanh(), last)
        for layer in (first, last):
            nn.init.normal_(layer.weight, std=0.1)
            nn.init.zeros_(layer.bias)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.layers(x**3)


def spiral(arguments: argparse.Namespace) -> Iterator[str]:
    """Train both on the same batches from the same weights, step by step in turn."""
    times = torch.linspace(0, SPAN, POINTS)
    truth = _spiral_states(times)
    rows = [_train_both(seed, arguments.steps, times, truth, arguments.compile) for seed in range(arguments.seeds)]
    ours, theirs = ([row[i] for row in rows] for i in range(2))
    ratios = [row[2] for row in rows]
    spread = statistics.stdev(theirs) if len(theirs) > 1 else float("nan")
    yield (
        f"spiral{', compiled' * arguments.compile}, {arguments.steps} steps at rtol {RTOL:g}, atol {ATOL:g}: "
        f"mean absolute error {statistics.mean(ours):.4f} (torchdiffeq {statistics.mean(theirs):.4f}, standard "
        f"deviation over seeds {spread:.4f}); CPU time / torchdiffeq's {', '.join(f'{ratio:.2f}' for ratio in ratios)}"
    )


def _by_torchdiffeq(field: Callable[[Tensor, Tensor], Tensor], x0: Tensor, times: Tensor) -> Tensor:  # (T, B, 2)
    states = odeint(field, x0, times, rtol=RTOL, atol=ATOL)
    assert isinstance(states, Tensor)
    return states


def _spiral_states(times: Tensor) -> Tensor:
    matrix = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])
    with torch.no_grad():
        return _by_torchdiffeq(lambda t, x: x**3 @ matrix, torch.tensor([[2.0, 0.0]]), times)[:, 0]


def _train_both(seed: int, steps: int, times: Tensor, truth: Tensor, compiles: bool) -> tuple[float, float, float]:
    """Errors over the whole spiral, ours first, and the ratio of the CPU times."""
    torch.manual_seed(seed)
    theirs = Cube()
    ode = flows.NeuralODE(copy.deepcopy(theirs), flows.ODESolver(rtol=RTOL, atol=ATOL, compile=compiles))
    optimizers = [torch.optim.RMSprop(model.parameters(), lr=1e-3) for model in (ode, theirs)]
    objective, seconds = TrajectoryMatching(loss="mae"), [0.0, 0.0]
    window = times[:WINDOW].double().expand(BATCH, WINDOW)
    everywhere = torch.ones(BATCH, WINDOW, dtype=torch.bool)
    seen = everywhere[..., None].expand(-1, -1, 2)
    for step in range(-1, steps):  # the first one is not counted
        starts = torch.randperm(POINTS - WINDOW)[:BATCH]
        x = truth[starts[:, None] + torch.arange(WINDOW)]
        batch = SeriesBatch(x, times=window, mask=everywhere, observed=seen)
        losses: list[Callable[[], Tensor]] = [
            lambda batch=batch: objective(ode, batch).loss,
            lambda x=x: (_by_torchdiffeq(theirs, x[:, 0], times[:WINDOW]).transpose(0, 1) - x).abs().mean(),
        ]
        for i, loss in enumerate(losses):
            begin = time.process_time()
            optimizers[i].zero_grad()
            loss().backward()
            optimizers[i].step()
            seconds[i] += (time.process_time() - begin) * (step >= 0)
    with torch.no_grad():
        errors = [
            float((_by_torchdiffeq(field, truth[:1], times)[:, 0] - truth).abs().mean())
            for field in (ode.field, theirs)
        ]
    return errors[0], errors[1], seconds[0] / seconds[1]


def own_times(arguments: argparse.Namespace) -> Iterator[str]:
    """Evaluations with times of one's own, beside those of the union of all times."""
    del arguments
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    ode = flows.NeuralODE(flows.fields.MLP((2,), num_frequencies=0, sine_frequency=None))
    x0 = torch.randn(64, 2, generator=generator)
    later = 10 * torch.rand(64, 19, generator=generator, dtype=torch.float64).sort(1).values
    times = torch.cat([torch.zeros(64, 1, dtype=torch.float64), later], 1)
    union = times.unique()
    own = ode.trajectory(x0, times, solver_error=False)
    shared = ode.trajectory(x0, union, solver_error=False)
    yield (
        f"own times, 64 series of 20: {own.nfe} evaluations and {own.states[..., 0].numel():,} states; the union grid "
        f"takes {shared.nfe} evaluations and {shared.states[..., 0].numel():,} states"
    )


SYSTEMS: dict[str, Callable[[], DynamicalSystem]] = {
    "lotka_volterra": lambda: flows.datasets.LotkaVolterra(num_series=40),
    "pendulum": lambda: flows.datasets.Pendulum(num_series=40),
    "spiral": lambda: flows.datasets.Spiral(num_series=40, num_times=100, span=5.0),
}


def warm_start(arguments: argparse.Namespace) -> Iterator[str]:
    """The CPU time to the error of trajectory matching, with derivative matching first."""
    del arguments
    for name, make in SYSTEMS.items():
        data = make()
        goal, seconds = _trained(data, 0, 150)[-1]
        path = _trained(data, 1000, 60)
        reached = next((at for error, at in path if error <= goal), None)
        share = "not reached" if reached is None else f"{reached / seconds:.2f} of its time"
        yield (
            f"{name}: trajectory matching {goal:.2g} in {seconds:.0f} s; derivative matching first: {share}, "
            f"at the end {path[-1][0]:.2g} in {path[-1][1]:.0f} s"
        )


def _trained(data: DynamicalSystem, without_solve: int, with_solve: int) -> list[tuple[float, float]]:
    """Mean square errors in validation, relative to the variance, and the CPU seconds until then."""
    torch.manual_seed(0)
    field = flows.fields.MLP((2,), (64, 64), num_frequencies=0, sine_frequency=None)
    ode = flows.NeuralODE(field, transform=flows.transforms.Standardise(2).fit(data.reference()))
    held = next(data.validation_batches(100, dtype=ode.dtype))
    stream = data.train_stream(16, torch.Generator().manual_seed(0), dtype=ode.dtype)
    stages = ((DerivativeMatching(), without_solve, 4e-3), (TrajectoryMatching(), with_solve, 2e-3))
    spent, found = 0.0, []
    for objective, steps, rate in stages:
        rate = rate / 4 if without_solve and objective.solves else rate  # so that what is learned stays
        optimizer = torch.optim.Adam(ode.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
        for step in range(steps):
            begin = time.process_time()
            optimizer.zero_grad()
            objective(ode, next(stream)).loss.backward()
            nn.utils.clip_grad_norm_(ode.parameters(), 10.0)
            optimizer.step()
            schedule.step()
            spent += time.process_time() - begin
            if (step + 1) % (200 if not objective.solves else 10) == 0 or step + 1 == steps:
                found.append((_error(ode, held), spent))
    return found


def _error(ode: flows.NeuralODE, held: Batch) -> float:
    """The mean square error in the units of the field; infinite where the solve fails."""
    try:
        with torch.no_grad():
            return float(TrajectoryMatching()(ode, held).loss)
    except flows.SolverError:
        return float("inf")


def neural_ode(arguments: argparse.Namespace) -> Iterator[str]:
    """Diffrax's example `neural_ode`, beside diffrax where it is installed."""
    data = flows.datasets.Oscillator(num_series=366, num_times=100)  # 256 of them in training
    for seed in range(arguments.seeds):
        loss, seconds = _example(data, seed)
        yield f"neural_ode, seed {seed}: loss {loss:.5f} in {seconds:.0f} s of CPU time"
        yield f"  {diffrax_example.beside(data, seed)}"


def _example(data: DynamicalSystem, seed: int) -> tuple[float, float]:
    """The mean square error over all training states at the end, and the CPU seconds of training."""
    torch.manual_seed(seed)
    field = flows.fields.MLP((2,), (64, 64), "softplus", sine_frequency=None, num_frequencies=0)
    ode = flows.NeuralODE(field, flows.ODESolver(rtol=1e-3, atol=1e-6))
    stream = data.train_stream(32, torch.Generator().manual_seed(seed), dtype=ode.dtype)
    begin = time.process_time()
    for horizon in (0.1, 1.0):
        objective = TrajectoryMatching(horizon=horizon)
        optimizer = torch.optim.Adam(ode.parameters(), lr=3e-3)  # anew, since moments of the short pieces are too small
        for _ in range(diffrax_example.STEPS):
            optimizer.zero_grad()
            objective(ode, next(stream)).loss.backward()
            optimizer.step()
    seconds = time.process_time() - begin
    batch = data.part("train").to(None, ode.dtype)
    with torch.no_grad():
        states = ode(batch.x[:, 0], batch.times)
    return float((states - batch.x).square().mean()), seconds


PARTS = {"spiral": spiral, "neural_ode": neural_ode, "own_times": own_times, "warm_start": warm_start}
