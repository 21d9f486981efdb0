"""Bits per dimension of the image recipes beside baselines: same split, same noise, same account."""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from flows.training import Stage, Trainer
from flows.training.building import build_dataset, build_flow
from flows.training.loading import load_run
from flows.training.runs import build_trainer

DATASETS = ("digits", "photo_patches", "mnist")
CLASSES = "digits_by_class"
UNIFORM = ("transform.dequantise.noise._target_=flows.transforms.UniformNoise", "~transform.dequantise.noise.stride")
LEARNED = ("transform.dequantise.noise._target_=flows.transforms.VariationalNoise", *UNIFORM[1:])
LIKELIHOOD = ("objective=flow_matching_then_likelihood", "objective.maximum_likelihood.batch_size=64")
WHITENED = (
    "transform.whiten={_target_: flows.transforms.Whiten, shrinkage: 0.02}",
    "objective.flow_matching.objective.path=cosine",
)
STAGE = "objective.maximum_likelihood"
CONVOLUTIONS = (
    "experiment=digits_conv",
    "~objective.flow_matching",
    f"{STAGE}.learning_rate=2e-3",
    "evaluation.points=100",
    "reporting.plot_every=null",
)
PARTS = {  # what each part of a recipe gives: settings that leave it out, put something else there, or add to it
    "digits": {
        "uniform noise": UNIFORM,
        "whitened, cosine paths": WHITENED,
        "field not at rest": ("field.at_rest=false",),
        "times by likelihood": ("objective.flow_matching.objective.time_weighting=likelihood",),
        "and likelihood": LIKELIHOOD,
        "and 4 draws of it": (*LIKELIHOOD, f"{STAGE}.objective.importance_samples=4", f"{STAGE}.batch_size=16"),
        "uniform, and likelihood": (*UNIFORM, *LIKELIHOOD),
        "learned, and likelihood": (*LEARNED, *LIKELIHOOD),
        "convolutions, likelihood": CONVOLUTIONS,
        "multiscale, likelihood": (*CONVOLUTIONS, "field=multiscale", "~field.hidden"),
    },
    "photo_patches": {
        "no shrinkage of the mixture": ("base.shrinkage=0",),
        "no mixture": ("base=normal", "~base.num_components", "~base.shrinkage"),
    },
    "mnist": {
        "uniform noise": (*UNIFORM, "~transform.dequantise.noise.pseudo_count", "~transform.dequantise.noise.rounds"),
        "whitened, cosine paths": WHITENED,
        "times by likelihood": ("objective.flow_matching.objective.time_weighting=likelihood",),
    },
}
LEAST_STEPS, MOST_STEPS = 5, 20  # that are timed
TEST_NUMBERS = 100_000  # in a batch of test images
TEST_SEED = 2  # of the dequantisation noise, the same for all models


@dataclass(frozen=True)
class Row:
    """A model and its test results."""

    title: str
    setting: str
    one: Likelihood  # one draw of the dequantisation noise
    many: Likelihood  # several draws
    seconds: float  # of training: of the CPU for baselines, and by the clock, with validation, for recipes
    parameters: int


def add_command(benchmarks: Any) -> None:
    """Add `images` to the commands."""
    description = "Bits per dimension of the image recipes beside a spline flow, a Gaussian mixture and a Gaussian."
    part = benchmarks.add_parser("images", help=description, description=description)
    part.add_argument("--datasets", nargs="*", choices=DATASETS, default=DATASETS[:2], help="default: %(default)s")
    part.add_argument("--data", metavar="PATH", help="file of the data set, for mnist")
    part.add_argument(
        "--baselines", nargs="*", choices=BASELINES, default=["nsf", "mixture", "gaussian"], help="default: %(default)s"
    )
    part.add_argument(
        "--minutes", type=float, default=10.0, help="of the CPU, at most, for each baseline (%(default)s)"
    )
    part.add_argument("--same-time", action="store_true", help="train the recipes for as many minutes, too")
    part.add_argument("--same-transform", action="store_true", help="baselines after the transform of the recipe alone")
    part.add_argument("--draws", type=int, default=16, help="noise draws of the tighter bound; 1: none (%(default)s)")
    part.add_argument("--trained", metavar="FOLDER", help="a trained run of the recipe, tested instead")
    part.add_argument("--images", type=int, help="test on the first so many images; default: all")
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
    where = [] if arguments.data is None else [f"data.path={arguments.data}"]
    for name in arguments.datasets:
        given = [f"experiment={name}", *where, *arguments.set]
        config = settings(*given)
        if arguments.trained is not None:
            rows = iter([tested(arguments.trained, build_dataset(config), arguments.draws, arguments.images)])
        else:
            if arguments.same_time:
                config = shortened(config, 60 * arguments.minutes)
            rows = iter(train_recipe(config, arguments.draws, arguments.images))
        if arguments.parts:
            rows = itertools.chain(rows, changed_parts(name, given, arguments))
        else:
            plain = config["transform"] if arguments.same_transform else settings(f"data={name}", *where)["transform"]
            fits = fit_baselines(
                config, plain, arguments.baselines, 60 * arguments.minutes, arguments.draws, arguments.images
            )
            rows = itertools.chain(rows, fits)
        dataset = build_dataset(config)
        shape = " × ".join(map(str, dataset.event_shape))
        print(f"\n{name}, {shape}, {dataset.num_test:,} test images, {torch.get_num_threads()} threads")
        for line in table(rows, dataset.event_shape):
            print(line, flush=True)  # the others may take an hour


def changed_parts(name: str, given: Sequence[str], arguments: argparse.Namespace) -> Iterator[Row]:
    """Train the recipe without each of its parts, or with others."""
    for part, changes in PARTS[name].items():
        config = settings(*(() if changes[0].startswith("experiment=") else given), *changes)
        if arguments.same_time:
            config = shortened(config, 60 * arguments.minutes)
        yield replace(train_recipe(config, arguments.draws, arguments.images)[0], title=part)


def shortened(config: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Give the first stage as many steps as the CPU takes in `seconds`, less those of the other stages."""
    trainer = build_trainer({**config, "output_dir": None})
    times = {name: seconds_per_step(trainer, stage) for name, stage in trainer.stages.items()}
    first, *others = times
    left = seconds - sum((trainer.stages[name].steps or 0) * times[name] for name in others)
    changed = {**config["objective"][first], "steps": max(1, round(left / times[first]))}
    return {**config, "objective": {**config["objective"], first: changed}}


def seconds_per_step(trainer: Trainer, stage: Stage) -> float:
    """CPU time of a step, the median of some."""
    objective = stage.objective
    assert stage.batch_size is not None, "a stage that is built has one"
    assert not isinstance(objective, str), "nor has it a name instead"
    generator = torch.Generator().manual_seed(0)
    stream, times = trainer.dataset.train_stream(stage.batch_size, generator), []
    optimizer = torch.optim.Adam(trainer.model.parameters(), 0.0)
    while len(times) < LEAST_STEPS or (len(times) < MOST_STEPS and sum(times) < 1):
        begun = time.process_time()
        with trainer.fabric.autocast():
            loss = objective(trainer.model, stream.next(), generator).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - begun)
    return statistics.median(times)


def train_recipe(config: Mapping[str, Any], num_draws: int, most_images: int | None = None) -> list[Row]:
    """Train what `config` describes and test the weights that validation chose; test a fitted base alone, too."""
    trainer = build_trainer(config)
    assert isinstance(trainer.model, CNF), "the recipes train one"
    begun = alone(trainer.model)  # a stage of likelihood may train the base
    summary = trainer.fit()
    stages = " + ".join(
        f"{stage['steps']} steps of {name.replace('_', ' ')}" for name, stage in config["objective"].items()
    )
    one, many = evaluate(trainer.model, trainer.dataset, num_draws, most_images)
    title = f"flows, {type(trainer.model.field).__name__}"
    setting = f"{stages}, solver error {summary.metrics.get('solver_error') or 0:.0e} nats; {summary.output_dir}"
    rows = [Row(title, setting, one, many, summary.position.seconds, summary.parameters)]
    if begun.base.needs_fit:
        parameters = sum(buffer.numel() for buffer in begun.base.buffers()) - 1
        results = evaluate(begun, trainer.dataset, num_draws, most_images)
        rows.append(Row("its base alone", f"{type(begun.base).__name__}, fitted", *results, 0.0, parameters))
    return rows


def tested(folder: str, dataset: Dataset, num_draws: int, most_images: int | None) -> Row:
    """Test the flow of a run."""
    run = load_run(folder)
    parameters = sum(parameter.numel() for parameter in run.flow.parameters())
    title, setting = f"flows, {type(run.flow.field).__name__}", f"weights of step {run.step} of {folder}"
    return Row(title, setting, *evaluate(run.flow, dataset, num_draws, most_images), math.nan, parameters)


def alone(flow: CNF) -> CNF:
    """Return the base of a flow under the same transform, as the flow of a field that is 0."""
    d = math.prod(flow.event_shape)
    parts = copy.deepcopy({"base": flow.base, "transform": flow.transform})
    return CNF(Linear(flow.event_shape, torch.zeros(d, d)), solver=ODESolver("euler", step_size=1.0), **parts)


def fit_baselines(
    config: Mapping[str, Any],
    plain: Mapping[str, Any],
    names: Sequence[str],
    seconds: float,
    num_draws: int,
    most_images: int | None = None,
) -> Iterator[Row]:
    """Fit each baseline after the transform of `config`, then after `plain` (the settings of a transform)."""
    data = {**config["data"], "conditional": False} if "conditional" in config["data"] else config["data"]
    config = {**config, "data": data}
    dataset, seed = build_dataset(config), config["seed"]
    transforms = {"of the recipe": config["transform"], "of the data": plain}
    for name in names:
        for whose, transform_settings in transforms.items():
            if whose != "of the recipe" and transform_settings == config["transform"]:
                continue
            flow = build_flow({**config, "transform": transform_settings}, dataset.event_shape, dataset)
            fitted = BASELINES[name](dataset, flow.transform, seconds, seed)
            counts = [count for count in (fitted.most_images, most_images) if count is not None]
            one, many = evaluate(fitted.model, dataset, num_draws, min(counts, default=None))
            setting = f"transform {whose}, {fitted.setting}"
            parameters = sum(parameter.numel() for parameter in fitted.model.parameters())
            parameters = getattr(fitted.model, "num_parameters", parameters)
            yield Row(TITLES[name], setting, one, many, fitted.seconds, parameters)


def evaluate(
    model: Any, dataset: Dataset, num_draws: int, most_images: int | None = None
) -> tuple[Likelihood, Likelihood]:
    """Test with one noise draw and with several; the noise is the same for every model."""
    results, batch_size = [], min(1_000, TEST_NUMBERS // math.prod(dataset.event_shape))
    for draws in sorted({1, num_draws}):
        batches, _ = part_batches(model, dataset, "test", batch_size, most_images)
        generator = torch.Generator().manual_seed(TEST_SEED)
        results.append(likelihood(model, batches, generator, num_draws=draws))
    return results[0], results[-1]


def table(rows: Iterable[Row], event_shape: Sequence[int]) -> Iterator[str]:
    """One line per model: both bounds, and how much worse each is than the first model's, paired by image."""
    nats_per_bit, best, numbers = math.prod(event_shape) * math.log(2), None, [1]
    for row in rows:
        if best is None:
            best = row
            numbers = [1, row.many.num_draws] if row.many.num_draws > 1 else [1]
            columns = "".join(f"{'one draw' if n == 1 else f'{n} draws':>17}{'above the first':>19}" for n in numbers)
            yield f"{'test bits/dim':28}{columns}{'seconds':>9}{'parameters':>12}  chosen on validation"
        bounds = ""
        for result, first in ((row.one, best.one), (row.many, best.many))[: len(numbers)]:
            bits, gap = result.bits_per_dim, (result.values - first.values[: len(result.values)]) / nats_per_bit
            assert bits is not None, "images are whole numbers"
            paired = "" if row is best else f"{gap.mean():+.4f} ± {gap.std() / math.sqrt(len(gap)):.4f}"
            bounds += f"{f'{bits.value:.4f} ± {bits.standard_error:.4f}':>17}{paired:>19}"
        few = "" if row.one.num_points == best.one.num_points else f", the first {row.one.num_points} images"
        yield f"{row.title:28}{bounds}{row.seconds:9.0f}{row.parameters:12,}  {row.setting}{few}"
