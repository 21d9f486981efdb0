"""Training for so many seconds: schedules follow the time spent, not a number of steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from flows.compare.timing import synchronise
from flows.datasets import Dataset
from flows.training.stage import Stage
from flows.training.state import ExponentialMovingAverage


@dataclass(frozen=True)
class Look:
    """What was seen of a model on the way."""

    seconds: float  # of training so far
    steps: int
    value: float


def train_for(
    model: nn.Module,
    stages: Sequence[tuple[Stage, float]],
    dataset: Dataset,
    look: Callable[[nn.Module], float] = lambda model: math.nan,
    looks: Sequence[float] = (),
    ema_decay: float = 0.999,
    gradient_clip: float = 10.0,
    seed: int = 0,
    progress: str | None = None,
) -> list[Look]:
    """Train ``model`` in place through ``stages``, each for so many seconds; it ends with its averaged weights.

    Adam, the norm of the gradient clipped, an exponential moving average from which each stage starts, as in
    :class:`flows.training.Trainer`. ``stage.steps`` is what its schedule divides the time into, not a number of
    optimiser steps.

    Args:
        model: what the objectives of the stages are called with.
        look: a figure of the averaged model, taken after each of ``looks`` seconds and at the end; the clock stands
            still meanwhile.
        progress: the title of a bar; None: none.

    Returns:
        The looks, the last one at the end (NaN without ``look``).
    """
    generator, seen, spent, steps = torch.Generator().manual_seed(seed), [], 0.0, 0
    due = sorted(looks)
    with tqdm(
        total=round(sum(seconds for _, seconds in stages)),
        desc=progress,
        unit="s",
        leave=False,
        disable=progress is None,
        bar_format="{l_bar}{bar}| {n:.0f}/{total} s",
    ) as bar:
        for stage, seconds in stages:
            average, last = ExponentialMovingAverage(model, ema_decay), 0.0
            for elapsed in _steps(model, average, stage, seconds, dataset, generator, gradient_clip):
                steps += 1
                bar.update(min(spent + elapsed, bar.total) - bar.n)
                while due and spent + elapsed >= due[0]:
                    seen.append(Look(spent + elapsed, steps, look(average.module)))
                    due.pop(0)
                last = elapsed
            spent += last
            model.load_state_dict(average.module.state_dict())  # of a stage without time it is the model itself
    return [*seen, Look(spent, steps, look(model))]


def _steps(
    model: nn.Module,
    average: ExponentialMovingAverage,
    stage: Stage,
    seconds: float,
    dataset: Dataset,
    generator: torch.Generator,
    gradient_clip: float,
) -> Iterator[float]:
    """Do a step after the other, and say after each how many seconds all have taken."""
    stream = dataset.train_stream(stage.batch_size, generator, next(model.parameters()).device)
    optimizer = (stage.optimizer or torch.optim.Adam)(model.parameters(), lr=stage.learning_rate)
    elapsed = 0.0
    while elapsed < seconds:
        start = time.perf_counter()
        factor = stage.learning_rate_factor(int(stage.steps * elapsed / seconds))
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * factor
        optimizer.zero_grad()
        stage.objective(model, stream.next(), generator).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), gradient_clip)
        optimizer.step()
        average.update_parameters(model)
        synchronise()
        elapsed += time.perf_counter() - start
        yield elapsed
