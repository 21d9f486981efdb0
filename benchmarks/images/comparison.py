"""Bits per dimension of a recipe of this project beside baselines: same split, same noise, same account."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.images.fitting import BASELINES, TITLES
from flows.datasets import Dataset
from flows.evaluation import Likelihood, likelihood, part_batches
from flows.training.compose import build_trainer
from flows.training.rebuild import build_dataset, build_flow

SEED = 2  # of the noise that all models are tested with


@dataclass(frozen=True)
class Row:
    """A model, tested."""

    title: str
    setting: str
    one: Likelihood  # with one draw of the dequantisation noise
    many: Likelihood  # with several
    seconds: float  # of training, validation included
    parameters: int


def recipe(config: Mapping[str, Any], num_draws: int) -> Row:
    """Train what ``config`` describes, and test it; validation has chosen its weights."""
    trainer = build_trainer(config)
    summary = trainer.fit()
    stages = " + ".join(
        f"{stage['steps']} steps of {name.replace('_', ' ')}" for name, stage in config["objective"].items()
    )
    one, many = tested(trainer.flow, trainer.dataset, num_draws)
    title = f"flows, {type(trainer.flow.field).__name__}"
    setting = f"{stages}, solver error {summary.test.solver_error or 0:.0e} nats; {summary.output_dir}"
    return Row(title, setting, one, many, summary.position.seconds, summary.parameters)


def baselines(
    config: Mapping[str, Any], plain: Mapping[str, Any], names: Sequence[str], seconds: float, num_draws: int
) -> Iterator[Row]:
    """Fit each baseline in the flow space of ``config`` and in that of ``plain`` (settings of a transform)."""
    dataset, seed = build_dataset(config), config["seed"]
    spaces = {"as the recipe": config["transform"], "as the data say": plain}
    for name in names:
        for space, settings in spaces.items():
            if space != "as the recipe" and settings == config["transform"]:
                continue
            transform = build_flow({**config, "transform": settings}, dataset.event_shape, dataset).transform
            found = BASELINES[name](dataset, transform, seconds, seed)
            one, many = tested(found.model, dataset, num_draws)
            setting = f"transform {space}, {found.setting}"
            yield Row(TITLES[name], setting, one, many, found.seconds, found.model.num_parameters)


def tested(model: Any, dataset: Dataset, num_draws: int) -> tuple[Likelihood, Likelihood]:
    """On the test part, with one draw and with several, the same noise for every model."""
    results = []
    for draws in (1, num_draws):
        batches, _ = part_batches(model, dataset, "test", 1_000)
        results.append(likelihood(model, batches, torch.Generator().manual_seed(SEED), num_draws=draws))
    return tuple(results)


def table(rows: Sequence[Row], event_shape: Sequence[int]) -> Iterator[str]:
    """A line for each model; under each bound, how much more it is than the first model's, image by image."""
    draws = f"{rows[0].many.num_draws} draws"
    yield (
        f"{'test bits/dim':28}{'one draw':>17}{'beyond the first':>19}{draws:>17}{'beyond the first':>19}{'seconds':>9}"
        f"{'parameters':>12}  chosen on validation"
    )
    unit = math.prod(event_shape) * math.log(2)
    for row in rows:
        bounds = ""
        for result, first in ((row.one, rows[0].one), (row.many, rows[0].many)):
            bits, gap = result.bits_per_dim, (result.values - first.values) / unit
            paired = "" if row is rows[0] else f"{gap.mean():+.4f} ± {gap.std() / math.sqrt(len(gap)):.4f}"
            bounds += f"{f'{bits.value:.4f} ± {bits.standard_error:.4f}':>17}{paired:>19}"
        yield f"{row.title:28}{bounds}{row.seconds:9.0f}{row.parameters:12,}  {row.setting}"
