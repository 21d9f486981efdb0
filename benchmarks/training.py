"""Training beside other packages: the same network, batch and tolerance, in turns in one process."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines import (
    COUPLINGS,
    LIKELIHOODS,
    MATCHINGS,
    CompiledFlows,
    LikelihoodMethod,
    MatchingLoss,
)
from benchmarks.devices import add_device, machine
from benchmarks.diffrax_baseline import Diffrax
from benchmarks.time_budget import train, train_and_look
from benchmarks.training_report import EVALUATION, PAIRED, STEP, Report, nll_table, picture, timing_table
from flows.compare.timing import alternating_medians
from flows.datasets import Batch, Density, EightGaussians
from flows.evaluation import likelihood
from flows.fields import ConcatSquashMLP, Field
from flows.models.cnf import CNF
from flows.objectives import FlowMatching, LossOutput, MaximumLikelihood
from flows.solvers import ODESolver, compilations
from flows.training import Stage
from flows.transforms import Standardise, Transform
from flows.writing import to_json

TOLERANCE = 1e-5


def add_command(benchmarks: Any) -> None:
    """Add `training` to the commands."""
    description = (
        "Time of a likelihood step, a flow-matching step and log_prob, evaluations of the field, and NLL after equal "
        "time: of this project, FFJORD's own method, and zuko, torchdyn and torchcfm where installed. All train the "
        "same network (FFJORD's 64-64-64) on eight Gaussians."
    )
    part = benchmarks.add_parser(
        "training", help="Steps, log_prob and NLL beside zuko, torchdyn and torchcfm.", description=description
    )
    part.add_argument("--seconds", type=float, default=60.0, help="of training for the NLL; 0 skips it (%(default)s)")
    add_device(part)
    part.add_argument("--batch", type=int, default=512, help="points per step (%(default)s)")
    part.add_argument("--points", type=int, default=10_000, help="of the timed log_prob (%(default)s)")
    part.add_argument("--test-points", type=int, default=20_000, help="of the NLL (%(default)s)")
    part.add_argument(
        "--pretrain",
        type=int,
        default=500,
        help="steps of flow matching before timing, as untrained networks take fewer evaluations (%(default)s)",
    )
    part.add_argument("--each", type=float, default=5.0, help="seconds per timing, at least (%(default)s)")
    part.add_argument(
        "--compile", action="store_true", help="also time this project with solver.compile=true, and diffrax"
    )
    part.add_argument(
        "--cpu-time", action="store_true", help="measure CPU time, which other programs on the machine do not disturb"
    )
    part.add_argument("--output", type=Path, default=Path("runs/benchmarks/training"), help="folder (%(default)s)")
    part.set_defaults(run=_print_report)


def _print_report(arguments: argparse.Namespace) -> None:
    print(
        f"ConcatSquash 64-64-64, batch {arguments.batch}, dopri5 at {TOLERANCE:g}; {machine(arguments.device)}",
        flush=True,
    )
    dataset = EightGaussians(num_test=arguments.test_points)
    report = measure(
        dataset,
        arguments.batch,
        arguments.points,
        arguments.pretrain,
        arguments.each,
        arguments.compile,
        device=arguments.device,
        clock=time.process_time if arguments.cpu_time else time.perf_counter,
    )
    print("\n".join(timing_table(report)), flush=True)
    if arguments.compile:
        print(f"compiled: {compilations()}")
    if arguments.seconds:
        report.nll.update(after_equal_time(dataset, arguments.seconds, arguments.batch, device=arguments.device))
        print("\n".join(nll_table(report, dataset.entropy, arguments.seconds)))
    for name, reason in report.missing.items():
        print(f"without {name}: {reason}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "training.json").write_text(to_json(asdict(report)))
    picture(report, dataset.entropy).savefig(arguments.output / "training.png")
    print(f"figures and picture in {arguments.output}")


def installed(field: Field) -> tuple[list[LikelihoodMethod], dict[str, str]]:
    """Every likelihood method that can be imported, each on its own copy of the field, and why others cannot."""
    found, missing = [], {}
    for method in LIKELIHOODS:
        try:
            found.append(method(copy.deepcopy(field), TOLERANCE))
        except ImportError as error:
            missing[method.name] = str(error)
    return found, missing


def matchings(field: Field, coupling: str) -> tuple[dict[str, tuple[Field, MatchingLoss]], dict[str, str]]:
    """Every flow-matching loss that can be imported, with its own copy of the field, and why others cannot."""
    found, missing = {}, {}
    for name, build in MATCHINGS.items():
        own = copy.deepcopy(field)
        try:
            found[name] = own, build(own, coupling)
        except ImportError as error:
            missing[name] = str(error)
    return found, missing


def measure(
    dataset: Density,
    batch_size: int,
    points: int,
    pretrain: int,
    seconds_each: float,
    compile: bool = False,
    hidden: Sequence[int] = (64, 64, 64),
    progress: bool = True,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> Report:
    """Measure times of steps and of evaluations, and how far the log-densities agree."""
    report = Report()
    start, transform = beginning(dataset, hidden, device)
    _pretrain(start, dataset, transform, pretrain, progress)
    x = transform(dataset.train_stream(batch_size, torch.Generator().manual_seed(1), device).next().x)[0]
    many = transform(dataset.train_stream(points, torch.Generator().manual_seed(2), device).next().x)[0]
    methods, report.missing = installed(start)
    exact = precise(start, many)
    if compile:
        methods.append(CompiledFlows(copy.deepcopy(start), TOLERANCE))
    reference = methods[0](x).detach()
    for method in methods:
        report.agreement[method.name] = float((method(x).detach() - reference).abs().max())
        report.errors[method.name] = mean_error(method, many, exact)
        report.evaluations[method.name] = method.evaluations_of_a_step(x)
    title = (lambda text: text) if progress else (lambda text: None)
    steps = {method.name: _gradient(method.field, lambda m=method: -m(x).mean()) for method in methods}
    evaluations = {method.name: torch.no_grad()(lambda m=method: m(many)) for method in methods}
    if compile and torch.device(device).type == "cpu":
        try:
            other = Diffrax(start, TOLERANCE)
        except ImportError as error:
            report.missing[Diffrax.name] = str(error)
        else:
            few, rest = other.asarray(x.numpy()), other.asarray(many.numpy())
            report.agreement[other.name] = float((other.log_prob(x) - reference).abs().max())
            report.errors[other.name] = float((other.log_prob(many) - exact).abs().mean())
            report.evaluations[other.name] = other.evaluations(few), 0
            steps[other.name], evaluations[other.name] = lambda: other.step(few), lambda: other.evaluate(rest)
    report.times[STEP] = alternating_medians(steps, seconds_each, progress=title(STEP), clock=clock)
    name = EVALUATION.format(points)
    report.times[name] = alternating_medians(evaluations, seconds_each, progress=title(name), clock=clock)
    for coupling in COUPLINGS:
        found, missing = matchings(start, coupling)
        report.missing |= missing
        cases = {name: _gradient(own, lambda loss=loss: loss(x)) for name, (own, loss) in found.items()}
        report.times[PAIRED[coupling]] = alternating_medians(
            cases, seconds_each / 2, 500, title(PAIRED[coupling]), clock
        )
    return report


@torch.no_grad()
def precise(field: Field, points: Tensor) -> Tensor:
    """log p in flow space, to far more digits than anything here is compared to."""
    flow = CNF(copy.deepcopy(field).double(), solver=ODESolver("dopri8", rtol=1e-9, atol=1e-9))
    return flow.log_prob(points.double())


@torch.no_grad()
def mean_error(method: LikelihoodMethod, points: Tensor, exact: Tensor) -> float:
    """The mean |error| of log p, in nats."""
    return float((method(points) - exact).abs().mean())


def beginning(dataset: Density, hidden: Sequence[int] = (64, 64, 64), device: str = "cpu") -> tuple[Field, Transform]:
    """The untrained field that all methods start from, and the transform of the data."""
    torch.manual_seed(0)
    transform = Standardise(dataset.event_shape).fit(dataset.reference())
    return ConcatSquashMLP(dataset.event_shape, hidden).to(device), transform.to(device)


def _pretrain(field: Field, dataset: Density, transform: Transform, steps: int, progress: bool) -> None:
    stage = Stage(FlowMatching("marginal"), steps, batch_size=512, learning_rate=4e-3, schedule="constant")
    train(CNF(field, transform=transform), dataset, {"pretraining": stage}, ema_decay=0.0, progress=progress)


def _gradient(field: Field, loss: Callable[[], Tensor]) -> Callable[[], None]:
    def step() -> None:
        loss().backward()
        field.zero_grad()

    return step


def after_equal_time(
    dataset: Density,
    seconds: float,
    batch_size: int,
    hidden: Sequence[int] = (64, 64, 64),
    progress: bool = True,
    device: str = "cpu",
) -> dict[str, tuple[float, float, int]]:
    """NLL, its standard error and the steps done, of each method after `seconds` of training."""
    start, transform = beginning(dataset, hidden, device)
    results = {}

    def run(name: str, own: Field, model: nn.Module, **stages: Stage) -> None:
        end = train_and_look(model, dataset, stages, progress=progress)[-1]
        test = likelihood(CNF(own, transform=transform), dataset.test_batches(10_000))
        results[name] = (test.nll, test.standard_error, end.steps)

    def stage(
        objective: Callable[..., LossOutput], learning_rate: float, share: float = 1.0, size: int = batch_size
    ) -> Stage:
        return Stage(objective, seconds=share * seconds, batch_size=size, learning_rate=learning_rate, warmup_steps=0)

    flow = CNF(copy.deepcopy(start), transform=transform)
    matching = stage(FlowMatching("marginal", min(512, batch_size)), 4e-3, 0.7, 2 * batch_size)
    likelihood_stage = stage(MaximumLikelihood(), 5e-4, 0.3)
    run("flows, matching then likelihood", flow.field, flow, matching=matching, likelihood=likelihood_stage)
    for method in installed(start)[0]:
        own = method.field
        objective = _mean_loss(lambda x, m=method: -m(x).mean(), transform)
        run(f"{method.name}, likelihood", own, own, likelihood=stage(objective, 2e-3))
    for name, (own, loss) in matchings(start, "independent")[0].items():
        run(f"{name}, flow matching", own, own, matching=stage(_mean_loss(loss, transform), 4e-3))
    return results


def _mean_loss(loss: MatchingLoss, transform: Transform) -> Callable[..., LossOutput]:
    """An objective from a loss of points in flow space."""

    def objective(model: nn.Module, batch: Batch, generator: torch.Generator | None = None) -> LossOutput:
        return LossOutput(loss(transform(batch.x)[0]))

    return objective
