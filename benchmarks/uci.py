"""Regression tables of the UCI repository: a flow beside a Gaussian network and a mixture density network."""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.recipes import settings
from benchmarks.time_budget import train
from flows.datasets import Batch, Table, UCIRegression
from flows.encoders import Standardised
from flows.evaluation import Evaluation, Evaluator, Report
from flows.evaluation.metrics import CRPS, Coverage
from flows.models.cnf import CNF
from flows.objectives import LossOutput, Objective
from flows.training import Stage, build_flow
from flows.training.settings import instantiate
from flows.transforms import Standardise
from flows.writing import to_json

TABLES = ("power-plant", "concrete", "energy", "kin8nm", "wine-quality-red", "yacht")
MODELS = ("flow", "Gaussian network", "mixture network")
COMPONENTS = 5
NUM_DRAWS = 200


class PredictiveNetwork(nn.Module):
    """A mixture of Gaussians whose weights, means and standard deviations are a perceptron of the context.

    With one component it is a heteroscedastic Gaussian network. [Nix & Weigend 1994; Bishop 1994, Mixture density
    networks]
    """

    def __init__(self, dataset: Table, components: int, hidden: tuple[int, ...] = (64, 64)) -> None:
        super().__init__()
        assert dataset.conditions is not None
        self.event_shape = (1,)
        self.encoder = Standardised(dataset.conditions.shape, conditions=dataset.conditions)
        self.encoder.fit(dataset.reference_contexts())  # type: ignore[arg-type]
        self.transform = Standardise((1,))
        self.transform.fit(dataset.reference())
        widths = [*self.encoder.features_shape, *hidden]
        layers = [[nn.Linear(a, b), nn.SiLU()] for a, b in itertools.pairwise(widths)]
        last = nn.Linear(widths[-1], 3 * components)
        self.network = nn.Sequential(*itertools.chain(*layers), last)
        if components > 1:  # means that begin apart
            with torch.no_grad():
                last.bias[:components] = torch.linspace(-1, 1, components)

    def mixture(self, context: Tensor) -> torch.distributions.MixtureSameFamily:
        """The distribution of the standardised value."""
        mean, width, weight = self.network(self.encoder(context)).chunk(3, 1)
        normal = torch.distributions.Normal(mean, nn.functional.softplus(width + 0.5) + 1e-4)
        return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=weight), normal)

    def log_prob(self, x: Tensor, context: Tensor) -> Tensor:
        """log p(x | context) in data units, (B,)."""
        y, log_det = self.transform(x)
        return self.mixture(context).log_prob(y[:, 0].float()) + log_det.float()

    def sample(self, shape: tuple[int, ...], context: Tensor) -> Tensor:
        """Draws (*shape, B, 1)."""
        y = self.mixture(context).sample(shape)
        return self.transform.inverse(y.reshape(-1, 1))[0].reshape(*y.shape, 1)


class NegativeLogLikelihood(Objective):
    """−mean log p(x | context)."""

    def __call__(self, model: Any, batch: Batch, generator: torch.Generator | None = None) -> LossOutput:
        assert batch.context is not None
        return LossOutput(-model.log_prob(batch.x, batch.context).mean(), {})

    def check(self, model: nn.Module, dataset: Any) -> None:
        del model, dataset


class HeldOut(Evaluator):
    """The NLL of a part in data units."""

    def __init__(self, dataset: Table) -> None:
        self.dataset = dataset

    def validate(self, model: nn.Module) -> Evaluation:
        return Evaluation(-float(log_densities(model, self.dataset.held_out("validation")).mean()), {})

    def test(self, model: nn.Module) -> Report:
        batch = self.dataset.held_out("test")
        generator_state = torch.random.get_rng_state()
        torch.manual_seed(0)
        with torch.no_grad():
            draws = model.sample((NUM_DRAWS,), batch.context).double()  # type: ignore[operator]
        torch.random.set_rng_state(generator_state)
        options = {"num_draws": NUM_DRAWS, "max_points": len(batch)}
        figures = {
            "nll": -float(log_densities(model, batch).mean()),
            "crps": CRPS(**options)(draws, batch.x).value,
            "coverage": Coverage(**options)(draws, batch.x).value,
        }
        return Report(figures, [])


def log_densities(model: Any, batch: Batch) -> Tensor:
    """log p of each point."""
    with torch.no_grad():
        return model.log_prob(batch.x.float() if isinstance(model, CNF) else batch.x, batch.context).double()


@dataclass(frozen=True)
class Outcome:
    """The figures of one model on one split."""

    table: str
    split: int
    model: str
    nll: float
    crps: float
    coverage: float
    validation_nll: float
    steps: int
    seconds: float


def add_command(benchmarks: Any) -> None:
    """Add `uci` to the commands."""
    description = (
        "Train a flow (experiment=regression), a heteroscedastic Gaussian network and a mixture density network on the "
        "published splits of UCI regression tables, all in the same loop with early stopping by the same validation "
        "part, and print the test NLL in the units of the data, the CRPS and the coverage of 90 % intervals."
    )
    part = benchmarks.add_parser("uci", help="Regression beside density networks.", description=description)
    part.add_argument("path", type=Path, help="folder with one folder a table: data.txt, test_rows_0.txt, ...")
    part.add_argument("--tables", nargs="+", default=list(TABLES), help="folders (default: all six)")
    part.add_argument("--splits", type=int, nargs="+", default=[0], help="published splits (%(default)s)")
    part.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, help="(default: all three)")
    part.add_argument("--set", nargs="*", default=[], help="settings of the flow, such as field.hidden=[64,64]")
    part.add_argument("--output", type=Path, default=Path("runs/benchmarks/uci.json"), help="(%(default)s)")
    part.set_defaults(run=_print_report)


def _print_report(arguments: argparse.Namespace) -> None:
    print(f"{'table':18}{'model':18}{'NLL':>18}{'CRPS':>10}{'coverage':>10}{'seconds':>9}", flush=True)
    found: list[Outcome] = []
    for table in arguments.tables:
        for split in arguments.splits:
            for model in arguments.models:
                found.append(outcome(arguments.path, table, split, model, arguments.set))
                arguments.output.parent.mkdir(parents=True, exist_ok=True)
                arguments.output.write_text(to_json({"outcomes": [vars(one) for one in found]}))
        for model in arguments.models:
            print(_line([one for one in found if (one.table, one.model) == (table, model)]), flush=True)
    ahead = [table for table in arguments.tables if _is_ahead(found, table)]
    named = f": {', '.join(ahead)}" if ahead else ""
    print(f"{len(arguments.splits)} of the published splits; the flow has the lowest NLL on {len(ahead)}{named}")


def outcome(path: Path, table: str, split: int, model: str, changes: list[str] | None = None) -> Outcome:
    """Train one model on one split and test it."""
    dataset = UCIRegression(path / table, split)
    torch.manual_seed(split)
    evaluator = HeldOut(dataset)
    if model == "flow":
        config = settings("experiment=regression", "data=uci", f"data.path={path / table}", *(changes or []))
        network: nn.Module = build_flow(config, dataset.event_shape, dataset)
        stages = {name: instantiate(stage, f"objective.{name}") for name, stage in config["objective"].items()}
        options = {
            "ema_decay": config["optimization"].get("ema_decay", 0.999),
            "validate_every": config["reporting"]["validate_every"],
        }
        optimizer = instantiate(config["optimizer"], "optimizer")
        stages = {name: replace(stage, optimizer=optimizer) for name, stage in stages.items()}
    else:
        network = PredictiveNetwork(dataset, 1 if model == "Gaussian network" else COMPONENTS)
        stage = Stage(NegativeLogLikelihood(), steps=4000, batch_size=128, learning_rate=2e-3, optimizer=_adamw)
        stages, options = {"likelihood": stage}, {"ema_decay": 0.99, "validate_every": 100}
    summary = train(network, dataset, stages, evaluator=evaluator, progress=False, seed=split, **options)
    validation = evaluator.validate(network).score
    figures: Mapping[str, float] = summary.metrics
    seconds = summary.position.seconds
    steps = summary.position.step
    return Outcome(
        table, split, model, figures["nll"], figures["crps"], figures["coverage"], validation, steps, seconds
    )


def _adamw(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)


def _line(found: list[Outcome]) -> str:
    nll = [one.nll for one in found]
    error = f"({stdev(nll) / math.sqrt(len(nll)):.3f})" if len(nll) > 1 else ""
    return (
        f"{found[0].table:18}{found[0].model:18}{f'{fmean(nll):.3f}{error}':>18}"
        f"{fmean(one.crps for one in found):>10.4f}{fmean(one.coverage for one in found):>10.3f}"
        f"{fmean(one.seconds for one in found):>9.0f}"
    )


def _is_ahead(found: list[Outcome], table: str) -> bool:
    means = {
        model: fmean(one.nll for one in found if (one.table, one.model) == (table, model))
        for model in {one.model for one in found}
    }
    return min(means, key=lambda model: means[model]) == "flow"
