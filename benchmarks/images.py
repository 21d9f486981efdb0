"""Bits per dimension of the image recipes beside baselines: same split, same noise, same account."""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import image_classes
from benchmarks.densities import spline_flow
from benchmarks.image_baselines import BASELINES, TITLES
from benchmarks.recipes import settings
from flows.datasets import Dataset
from flows.evaluation import Likelihood, likelihood, part_batches
from flows.fields import Linear
from flows.models.cnf import CNF
from flows.solvers import ODESolver
from flows.training.runs import build_dataset, build_flow, build_trainer

DATASETS = ("digits", "photo_patches")
CLASSES = "digits_by_class"
UNIFORM = ("transform.dequantise.noise._target_=flows.transforms.UniformNoise", "~transform.dequantise.noise.stride")
WITHOUT = {  # what each part of a recipe gives: settings that leave it out
    "digits": {
        "uniform noise": UNIFORM,
        "straight paths": ("objective.flow_matching.objective.path=linear",),
        "field not at rest": ("field.at_rest=false",),
    },
    "photo_patches": {
        "no shrinkage of the mixture": ("base.shrinkage=0",),
        "no mixture": ("base=normal", "~base.num_components", "~base.shrinkage"),
    },
}
TEST_SEED = 2  # of the dequantisation noise, the same for all models


@dataclass(frozen=True)
class Row:
    """A model and its test results."""

    title: str
    setting: str
    one: Likelihood  # one draw of the dequantisation noise
    many: Likelihood  # several draws
    seconds: float  # of training, validation included
    parameters: int


def add_command(benchmarks: Any) -> None:
    """Add `images` to the commands."""
    description = "Bits per dimension of the image recipes beside a spline flow, a Gaussian mixture and a Gaussian."
    part = benchmarks.add_parser("images", help=description, description=description)
    part.add_argument("--datasets", nargs="*", choices=DATASETS, default=DATASETS, help="default: all")
    part.add_argument("--baselines", nargs="*", choices=BASELINES, default=list(BASELINES), help="default: all")
    part.add_argument("--minutes", type=float, default=10.0, help="at most, for each baseline (%(default)s)")
    part.add_argument("--draws", type=int, default=16, help="noise draws of the tighter bound (%(default)s)")
    part.add_argument("--set", nargs="*", default=[], metavar="SETTING", help="overrides of the recipes")
    part.add_argument("--parts", action="store_true", help="train the recipes without each of their parts instead")
    part.add_argument("--classes", action="store_true", help=f"train {CLASSES} and classify its samples instead")
    part.add_argument("--each", type=int, default=200, help="samples per class, with --classes (%(default)s)")
    part.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print a table for each data set, or what a classifier says of samples by class."""
    if arguments.classes:
        config = settings(f"experiment={CLASSES}", *arguments.set)
        print("\n".join(image_classes.report(config, arguments.each)))
        return
    if "nsf" in arguments.baselines and not arguments.parts:
        spline_flow()  # fail before minutes of training if zuko is missing
    for name in arguments.datasets:
        config = settings(f"experiment={name}", *arguments.set)
        plain = settings(f"data={name}")["transform"]
        rows = train_recipe(config, arguments.draws)
        for part, changes in WITHOUT[name].items() if arguments.parts else ():
            row = train_recipe(settings(f"experiment={name}", *arguments.set, *changes), arguments.draws)[0]
            rows.append(replace(row, title=part))
        rows += (
            ()
            if arguments.parts
            else fit_baselines(config, plain, arguments.baselines, 60 * arguments.minutes, arguments.draws)
        )
        dataset = build_dataset(config)
        shape = " × ".join(map(str, dataset.event_shape))
        print(f"\n{name}, {shape}, {dataset.num_test:,} test images, {torch.get_num_threads()} threads")
        print("\n".join(table(rows, dataset.event_shape)), flush=True)


def train_recipe(config: Mapping[str, Any], num_draws: int) -> list[Row]:
    """Train what `config` describes and test the weights that validation chose; test a fitted base alone, too."""
    trainer = build_trainer(config)
    assert isinstance(trainer.model, CNF), "the recipes train one"
    begun = alone(trainer.model)  # a stage of likelihood may train the base
    summary = trainer.fit()
    stages = " + ".join(
        f"{stage['steps']} steps of {name.replace('_', ' ')}" for name, stage in config["objective"].items()
    )
    one, many = evaluate(trainer.model, trainer.dataset, num_draws)
    title = f"flows, {type(trainer.model.field).__name__}"
    setting = f"{stages}, solver error {summary.metrics.get('solver_error') or 0:.0e} nats; {summary.output_dir}"
    rows = [Row(title, setting, one, many, summary.position.seconds, summary.parameters)]
    if begun.base.needs_fit:
        parameters = sum(buffer.numel() for buffer in begun.base.buffers()) - 1
        results = evaluate(begun, trainer.dataset, num_draws)
        rows.append(Row("its base alone", f"{type(begun.base).__name__}, fitted", *results, 0.0, parameters))
    return rows


def alone(flow: CNF) -> CNF:
    """Return the base of a flow under the same transform, as the flow of a field that is 0."""
    d = math.prod(flow.event_shape)
    parts = copy.deepcopy({"base": flow.base, "transform": flow.transform})
    return CNF(Linear(flow.event_shape, torch.zeros(d, d)), solver=ODESolver("euler", step_size=1.0), **parts)


def fit_baselines(
    config: Mapping[str, Any], plain: Mapping[str, Any], names: Sequence[str], seconds: float, num_draws: int
) -> Iterator[Row]:
    """Fit each baseline after the transform of `config`, then after `plain` (the settings of a transform)."""
    dataset, seed = build_dataset(config), config["seed"]
    transforms = {"of the recipe": config["transform"], "of the data": plain}
    for name in names:
        for whose, transform_settings in transforms.items():
            if whose != "of the recipe" and transform_settings == config["transform"]:
                continue
            flow = build_flow({**config, "transform": transform_settings}, dataset.event_shape, dataset)
            fitted = BASELINES[name](dataset, flow.transform, seconds, seed)
            one, many = evaluate(fitted.model, dataset, num_draws)
            setting = f"transform {whose}, {fitted.setting}"
            yield Row(TITLES[name], setting, one, many, fitted.seconds, fitted.model.num_parameters)


def evaluate(model: Any, dataset: Dataset, num_draws: int) -> tuple[Likelihood, Likelihood]:
    """Test with one noise draw and with several; the noise is the same for every model."""
    results = []
    for draws in (1, num_draws):
        batches, _ = part_batches(model, dataset, "test", 1_000)
        generator = torch.Generator().manual_seed(TEST_SEED)
        results.append(likelihood(model, batches, generator, num_draws=draws))
    return results[0], results[1]


def table(rows: Sequence[Row], event_shape: Sequence[int]) -> Iterator[str]:
    """One line per model: both bounds, and how much worse each is than the first model's, paired by image."""
    draws = f"{rows[0].many.num_draws} draws"
    yield (
        f"{'test bits/dim':28}{'one draw':>17}{'above the first':>19}{draws:>17}{'above the first':>19}{'seconds':>9}"
        f"{'parameters':>12}  chosen on validation"
    )
    nats_per_bit = math.prod(event_shape) * math.log(2)
    for row in rows:
        bounds = ""
        for result, first in ((row.one, rows[0].one), (row.many, rows[0].many)):
            bits, gap = result.bits_per_dim, (result.values - first.values) / nats_per_bit
            assert bits is not None, "images are whole numbers"
            paired = "" if row is rows[0] else f"{gap.mean():+.4f} ± {gap.std() / math.sqrt(len(gap)):.4f}"
            bounds += f"{f'{bits.value:.4f} ± {bits.standard_error:.4f}':>17}{paired:>19}"
        yield f"{row.title:28}{bounds}{row.seconds:9.0f}{row.parameters:12,}  {row.setting}"
