"""How many evaluations path costs save, and how much likelihood they cost."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.devices import add_device, machine
from benchmarks.recipes import settings as run_settings
from benchmarks.time_budget import train
from flows.datasets import Dataset
from flows.evaluation import Likelihood, likelihood, part_batches
from flows.models.cnf import CNF
from flows.objectives import MaximumLikelihood
from flows.path_costs import JacobianNorm, KineticEnergy, PathCost
from flows.training import build_dataset, build_flow
from flows.training.files import new_folder
from flows.training.settings import instantiate
from flows.writing import to_json

PLAIN, REGULARISED = "unregularised", "kinetic + Frobenius"


@dataclass(frozen=True)
class Case:
    """A run by likelihood alone, as overrides of train.yaml, and the weight of both costs."""

    overrides: tuple[str, ...]
    weight: float
    allowed: float  # loss of likelihood that the verdict tolerates: nats, or bits/dim of images


# Likelihood from the start, because costs hardly straighten paths that flow matching has already laid. Loose
# tolerances, because between their steps a field without costs can vary unseen.
CASES = {
    "swissroll": Case(
        (
            "data=swissroll",
            "data.num_test=10000",
            "field.sine_frequency=null",
            "field.num_frequencies=2",
            "objective=maximum_likelihood",
            "objective.maximum_likelihood.steps=1200",
            "objective.maximum_likelihood.learning_rate=4e-3",
            "solver.rtol=1e-3",
            "solver.atol=1e-3",
            "optimization.ema_decay=0.99",
        ),
        0.06,
        0.02,
    ),
    "digits": Case(
        (
            "experiment=digits",
            "transform.whiten={_target_: flows.transforms.Whiten, shrinkage: 0.02}",  # likelihood starts at a Gaussian
            "field.hidden=[256,256,256,256]",
            "field.num_frequencies=2",
            "objective=maximum_likelihood",
            "~objective.flow_matching",
            "objective.maximum_likelihood.steps=350",
            "objective.maximum_likelihood.batch_size=256",
            "objective.maximum_likelihood.learning_rate=4e-3",
            "solver=dopri5",
            "solver.rtol=1e-3",
            "solver.atol=1e-3",
            "optimization.ema_decay=0.9",
        ),
        0.4,
        0.01,
    ),
}
TEST_TOLERANCE = 1e-5  # of all flows


@dataclass(frozen=True)
class Outcome:
    """How well a trained flow fits, and what its likelihood costs."""

    name: str
    nll: float  # nats, or bits/dim of images
    standard_error: float
    gap: float | None  # to the entropy in nats, where it is known
    solver_error: float  # nats
    nfe: float
    path_costs: Mapping[str, float]  # mean integrals of ‖v‖² and ‖J‖²
    seconds: float  # of the likelihood stage


def add_command(benchmarks: Any) -> None:
    """Add `regularisation` to the commands."""
    description = (
        "Train a flow by likelihood with and without kinetic energy and squared Jacobian norm in the loss, from the "
        "same weights and for equally many steps; print the evaluations and the NLL of both, solved at 1e-5."
    )
    part = benchmarks.add_parser(
        "regularisation", help="Evaluations that kinetic energy and Jacobian norm save.", description=description
    )
    part.add_argument("--data", nargs="+", choices=list(CASES), default=list(CASES), help="default: both")
    part.add_argument("--weight", type=float, help="of both costs (default: 0.06 for swissroll, 0.4 for digits)")
    part.add_argument("--steps", type=int, help="of training (default: 1200 for swissroll, 350 for digits)")
    part.add_argument("--seed", type=int, default=0, help="of weights and batches (%(default)s)")
    add_device(part)
    part.add_argument("--output", type=Path, default=Path("runs/benchmarks/regularisation"), help="(%(default)s)")
    part.set_defaults(run=_print_report)


def _print_report(arguments: argparse.Namespace) -> None:
    print(machine(arguments.device))
    folder = new_folder(arguments.output)
    for name in arguments.data:
        case = CASES[name] if arguments.weight is None else replace(CASES[name], weight=arguments.weight)
        steps = [] if arguments.steps is None else [f"objective.maximum_likelihood.steps={arguments.steps}"]
        config = run_settings(*case.overrides, f"seed={arguments.seed}", *steps)
        *outcomes, error = compare(config, case.weight, arguments.device)
        (folder / f"{name}.json").write_text(to_json({outcome.name: asdict(outcome) for outcome in outcomes}))
        print("\n".join(table(name, case, *outcomes, error)), flush=True)
    print(f"\nfigures in {folder}")


def compare(
    settings: Mapping[str, Any], weight: float, device: str = "cpu", progress: bool = True
) -> tuple[Outcome, Outcome, float]:
    """Train without and with the costs, from the same weights on the same batches; test on the same points.

    Both are tested with tolerances of 1e-5, whatever the training tolerances are.

    Returns:
        Both outcomes, and the standard error of the difference of their NLL, paired by point.
    """
    torch.manual_seed(settings["seed"])
    dataset = build_dataset(settings)
    start = build_flow(settings, dataset.event_shape, dataset).to(device)
    (stage,) = (instantiate(stage, f"objective.{name}") for name, stage in settings["objective"].items())
    optimizer = instantiate(settings["optimizer"], "optimizer")
    ema_decay = instantiate(settings["optimization"], "optimization").ema_decay
    outcomes, values = [], []
    for name, costs in {PLAIN: (), REGULARISED: (KineticEnergy(weight), JacobianNorm(weight))}.items():
        stages = {"likelihood": replace(stage, objective=MaximumLikelihood(costs), optimizer=optimizer)}
        flow = copy.deepcopy(start)
        training = train(flow, dataset, stages, ema_decay=ema_decay, progress=progress, seed=settings["seed"])
        test = tested(flow, dataset, "test" if progress else None)
        bits = test.bits_per_dim
        nll, error = (bits.value, bits.standard_error) if bits else (test.nll, test.standard_error)
        values.append(test.values * (nll / test.nll))
        outcomes.append(
            Outcome(
                name,
                nll,
                error,
                None if dataset.entropy is None else nll - dataset.entropy,
                test.solver_error,
                test.nfe,
                path_costs(flow, dataset),
                training.position.seconds,
            )
        )
    difference = values[1] - values[0]
    return outcomes[0], outcomes[1], float(difference.std() / len(difference) ** 0.5)


def tested(flow: CNF, dataset: Dataset, progress: str | None) -> Likelihood:
    """Test on all test points; this also sets the tolerances of `flow`."""
    flow.solver = replace(flow.solver, rtol=TEST_TOLERANCE, atol=TEST_TOLERANCE)
    batches, num_points = part_batches(flow, dataset, "test", 10_000)
    generator = torch.Generator(flow.device).manual_seed(0)
    return likelihood(flow, batches, generator, solver_error_points=2000, progress=progress, num_points=num_points)


def path_costs(flow: CNF, dataset: Dataset, points: int = 1000) -> dict[str, float]:
    """Mean integrals of ‖v‖² and ‖J‖² along the paths of test points."""
    costs: Sequence[PathCost] = (KineticEnergy(), JacobianNorm())
    generator = torch.Generator(flow.device).manual_seed(0)
    with torch.no_grad():
        batch = next(iter(part_batches(flow, dataset, "test", points)[0]))
        estimate = flow.estimate_log_prob(batch.x, batch.context, generator, solver_error=False, path_costs=costs)
    return {name: float(integral.mean()) for name, integral in estimate.path_costs.items()}


def table(data: str, case: Case, plain: Outcome, regularised: Outcome, standard_error: float) -> Iterator[str]:
    """One line per flow, and one with the evaluations saved and the likelihood lost."""
    unit = "bits/dim" if data == "digits" else "nats"
    costs = f"{'∫‖v‖²':>9}{'∫‖J‖²':>9}"
    yield f"\n{data + ', ' + unit:22}{'NLL':>17}{'gap':>8}{'solver error':>14}{'NFE':>6}{costs}{'seconds':>9}"
    for flow in (plain, regularised):
        yield (
            f"{flow.name:22}{flow.nll:8.4f} ± {flow.standard_error:.4f}"
            f"{'' if flow.gap is None else f'{flow.gap:.4f}':>8}{flow.solver_error:14.1e}{flow.nfe:6.0f}"
            f"{flow.path_costs['kinetic_energy']:9.2f}{flow.path_costs['jacobian_norm']:9.1f}{flow.seconds:9.0f}"
        )
    difference = regularised.nll - plain.nll
    verdict = "within" if difference <= case.allowed else "more than"
    yield (
        f"{plain.nfe / regularised.nfe:.1f} times fewer evaluations with weights {case.weight:g}; "
        f"NLL {difference:+.4f} ± {standard_error:.4f} {unit}, {verdict} {case.allowed:g}"
    )
