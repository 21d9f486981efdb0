"""Train any model for a given time with the package's own trainer, and look at it on the way."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from flows.datasets import Dataset
from flows.evaluation import Evaluation, Evaluator, Report
from flows.training import Hardware, Optimization, Reporting, Stage, Summary, Trainer


@dataclass(frozen=True)
class Look:
    """A figure of the model during training."""

    seconds: float  # of training so far
    steps: int
    value: float


class LastWeights(Evaluator):
    """Prefers later weights, so that a run ends with its last averaged weights."""

    def __init__(self) -> None:
        self.validations = 0

    def validate(self, model: nn.Module) -> Evaluation:
        self.validations += 1
        return Evaluation(-float(self.validations), {})

    def test(self, model: nn.Module) -> Report:
        return Report({}, [])


class Looks:
    """A callback that looks at the averaged model after given seconds of training.

    Args:
        look: returns a figure of a model; the time that it takes does not count.
        moments: in seconds.
    """

    def __init__(self, look: Callable[[nn.Module], float], moments: Sequence[float]) -> None:
        self.look = look
        self.due = sorted(moments)
        self.seen: list[Look] = []
        self.seconds = 0.0  # of training so far
        self.steps = 0
        self._earlier_stages = 0.0

    def on_step_end(self, run: Any) -> None:
        position = run.position
        self.seconds, self.steps = self._earlier_stages + position.seconds_in_stage, position.step
        while self.due and self.seconds >= self.due[0]:
            self.due.pop(0)
            self.seen.append(Look(self.seconds, self.steps, self.look(run.state.ema.module)))
        if run.stage_is_over:
            self._earlier_stages = self.seconds


class CpuBudget:
    """A schedule and callback: ends a stage after `seconds` of CPU time in its steps, along a cosine.

    On a shared machine, models that train one after another get the same time only if it is counted like this.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.used, self.steps = seconds, 0.0, 0
        self._begun = time.process_time()

    @property
    def done(self) -> float:
        """The share of the time that is used, up to 1."""
        return min(1.0, self.used / self.seconds)

    def __call__(self, done: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * self.done))

    def on_validation_end(self, run: Any, evaluation: Evaluation | None, is_best: bool) -> None:
        self._begun = time.process_time()

    def on_optimizer_step(self, run: Any) -> None:
        self.used += time.process_time() - self._begun
        self.steps = run.position.step
        run.stage_is_over = run.stage_is_over or self.done == 1

    def on_step_end(self, run: Any) -> None:
        self._begun = time.process_time()


def train(
    model: nn.Module,
    dataset: Dataset,
    stages: Mapping[str, Stage],
    *,
    evaluator: Evaluator | None = None,
    ema_decay: float = 0.999,
    validate_every: int = 0,
    callbacks: Sequence[Any] = (),
    progress: bool = True,
    seed: int = 0,
) -> Summary:
    """Train `model` in place, on its device, and leave no files.

    It ends with the averaged weights that `evaluator` scores best; by default the last ones.
    """
    device = next(model.parameters()).device
    with tempfile.TemporaryDirectory() as folder:
        return Trainer(
            model,
            dataset,
            stages,
            evaluator=evaluator or LastWeights(),
            optimization=Optimization(ema_decay=ema_decay),
            hardware=Hardware(accelerator=device.type, devices=1 if device.index is None else [device.index]),
            reporting=Reporting(
                log_every=0,
                validate_every=validate_every,
                plot_every=None,
                checkpoint_every=0,
                progress_bar=progress,
                callbacks=callbacks,
            ),
            output_dir=Path(folder) / "run",
            seed=seed,
        ).fit()


def train_and_look(
    model: nn.Module,
    dataset: Dataset,
    stages: Mapping[str, Stage],
    look: Callable[[nn.Module], float] = lambda model: math.nan,
    moments: Sequence[float] = (),
    **options: Any,
) -> list[Look]:
    """Train as `train` does; return the looks at the given moments and one at the end."""
    looks = Looks(look, moments)
    train(model, dataset, stages, callbacks=[looks], **options)
    return [*looks.seen, Look(looks.seconds, looks.steps, look(model))]
