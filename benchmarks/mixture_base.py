"""Is a flow that starts at a fitted mixture ever worse than that mixture?

Runs of `experiment=mixture_base` on toy densities and on two data sets of scikit-learn. Flow and mixture get the same
test points and the same dequantisation noise, so their difference is paired. Toy densities also show the gap of both to
the entropy: the mean of log p − log q where log p is known, NLL − entropy elsewhere.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.recipes import settings
from flows.datasets import Dataset
from flows.evaluation import likelihood, part_batches
from flows.models.cnf import CNF
from flows.training import build_dataset
from flows.training.runs import build_trainer

TOYS = ("8gaussians", "pinwheel", "moons", "checkerboard")
TABLES = ("breast_cancer", "digits")
SETTINGS_OF_TABLES = (
    "base.num_components=2",  # with some hundred rows, more than a few full covariances overfit
    "field.hidden=[64,64]",  # as in experiment=breast_cancer
    "field.activation=silu",
    "field.sine_frequency=null",
)
REFERENCE = 100_000  # points of a toy density that EM looks at
HEADER = ("data", "base", "flow", "flow − base", "gap of the base", "gap of the flow", "best step", "seconds")


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add `mixture_base` to the benchmarks."""
    parser = commands.add_parser("mixture_base", help="flows that start at a fitted mixture, beside that mixture")
    parser.add_argument("--data", nargs="+", choices=(*TOYS, *TABLES), default=[*TOYS, *TABLES])
    parser.add_argument("--settings", nargs="*", default=[], help="more settings of the runs, such as steps=200")
    parser.add_argument("--points", type=int, default=20_000, help="test points of the toy densities (%(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Train and compare on each data set."""
    for row in (HEADER, ["---"] * len(HEADER)):
        print(f"| {' | '.join(row)} |", flush=True)
    for name in arguments.data:
        print(f"| {' | '.join(measure(name, arguments.settings, arguments.points))} |", flush=True)


def measure(name: str, chosen: Sequence[str], points: int) -> list[str]:
    """Train a flow from a mixture; return a row of the table."""
    own = [f"data={name}", "experiment=mixture_base"]
    if name in TABLES:
        own += SETTINGS_OF_TABLES
    else:
        own += [f"data.num_reference={REFERENCE}", "data.num_validation=4000", f"data.num_test={points}"]
    quiet = ["reporting.progress_bar=false", "reporting.plot_every=null", "hardware.accelerator=cpu"]
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        config = settings(*own, *quiet, *chosen, f"output_dir={folder}/run")
        dataset = build_dataset(config)
        trainer = build_trainer(config, dataset=dataset)
        start = copy.deepcopy(trainer.model)  # at rest, so its density is that of the mixture
        summary = trainer.fit()
    base, flow = (test(model, dataset) for model in (start, trainer.model))
    gaps = [""] * 2 if name in TABLES else [shown(*gap(values, dataset)) for values in (base, flow)]
    return [
        name,
        f"{float(base.mean()):.4f}",
        f"{float(flow.mean()):.4f}",
        shown(*mean_and_error(flow - base)),
        *gaps,
        str(summary.position.best_step),
        f"{time.process_time() - begun:.0f}",
    ]


def test(flow: nn.Module, dataset: Dataset) -> Tensor:
    """The NLL of each test point, in nats."""
    assert isinstance(flow, CNF), "the recipe trains one"
    batches, _ = part_batches(flow, dataset, "test", 10_000)
    return likelihood(flow, batches, torch.Generator().manual_seed(0)).values


def gap(values: Tensor, dataset: Dataset) -> tuple[float, float]:
    """The mean distance to the entropy, with its standard error."""
    if not dataset.has_log_prob:
        entropy = getattr(dataset, "entropy", None)
        return mean_and_error(values - (torch.nan if entropy is None else entropy))
    truth = torch.cat([dataset.log_prob(batch.x) for batch in dataset.test_batches(10_000)])
    return mean_and_error(truth.double() + values)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean, and its standard error."""
    return float(values.mean()), float(values.std()) / len(values) ** 0.5


def shown(mean: float, error: float) -> str:
    """Both in one cell of the table."""
    return f"{mean:.4f} ± {error:.4f}"
