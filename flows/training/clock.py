"""How long a run still takes: all stages, validation, pictures and the test."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

import torch

from flows.errors import InvalidValueError
from flows.evaluation import Evaluation
from flows.training.stage import Stage
from flows.training.state import Run

FIRST_LOOK = 5.0  # seconds of training before the first estimate; shorter runs need none
LONG = 3600.0  # seconds; a first estimate above it is told
FEW = 4  # examples of a trial
ENOUGH = 0.3  # seconds; a faster trial is repeated with more examples
WINDOW = 20  # steps whose median is that of the stage


class TooLongError(InvalidValueError):
    """A run would take longer than `Hardware.max_cpu_hours`."""


class Clock:
    """A callback that estimates what is left of a run.

    A stage that has begun takes the median of its last steps, for each step that is left. A stage to come is tried with
    one gradient that nothing follows, and the evaluator with a few points, after five seconds of training. A first
    estimate above an hour is told, with ways out.

    Args:
        max_cpu_hours: on a CPU, refuse a longer run before it begins. None: only tell.
        compiles: whether stages are compiled, so that trying another one in between would compile that, too.
    """

    def __init__(self, max_cpu_hours: float | None = None, compiles: bool = False) -> None:
        self.max_cpu_hours = max_cpu_hours
        self.compiles = compiles
        self._steps: dict[str, float] = {}  # seconds of one step by stage
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._parts: dict[str, float] = {}  # seconds of one "validation", one round of "pictures", and the "test"
        self._then = self._began = self._started = 0.0
        self._stage: str | None = None
        self._is_over = False  # whether the first estimate was made

    def on_run_start(self, run: Run) -> None:
        self._started = self._then = time.perf_counter() - run.paused
        if self.max_cpu_hours is not None and run.fabric.device.type == "cpu" and run.fabric.world_size == 1:
            self._try(run, list(run.stages))
            seconds = sum((self._shares(run) or {}).values())
            if seconds > 3600 * self.max_cpu_hours:
                raise TooLongError(
                    f"this run would take {self._in_words(run)}, more than hardware.max_cpu_hours="
                    f"{self.max_cpu_hours:g}. {ways_out(run, self._shares(run), self.max_cpu_hours)}. To go on all "
                    "the same, set hardware.max_cpu_hours=null"
                )

    def on_optimizer_step(self, run: Run) -> None:
        now = time.perf_counter() - run.paused
        if run.position.stage != self._stage:
            self._stage = run.position.stage
            self._recent.clear()
        self._recent.append(now - self._then)
        self._then = now
        if not self._is_over and now - self._started > FIRST_LOOK:
            self._is_over = True
            if run.fabric.world_size == 1 and not self.compiles:
                later = list(run.stages)[list(run.stages).index(str(self._stage)) + 1 :]
                self._try(run, [name for name in later if name not in self._steps])
            seconds = self.remaining(run)
            if seconds is not None and seconds > LONG:
                run.warn(f"this run takes {self._in_words(run)} more. {ways_out(run, self._shares(run))}")

    def on_validation_start(self, run: Run) -> None:
        self._began = time.perf_counter()

    def on_validation_end(self, run: Run, evaluation: Evaluation | None, is_best: bool) -> None:
        self._parts["validation"] = time.perf_counter() - self._began
        self._parts["test"] = self._parts["validation"] * run.evaluator.test_size()

    def on_pictures(self, seconds: float) -> None:
        """Note how long a round of pictures took."""
        self._parts["pictures"] = seconds

    def remaining(self, run: Run) -> float | None:
        """Return the seconds that the run still takes; None where too little is known."""
        if self._recent:
            self._steps[str(self._stage)] = median(self._recent)
        shares = self._shares(run) if self._is_over else None
        return None if shares is None else sum(shares.values())

    def _shares(self, run: Run) -> dict[str, float] | None:
        """Return the seconds that each stage and each other part still takes."""
        names, position, reporting = list(run.stages), run.position, run.reporting
        first = 0 if position.stage is None else names.index(position.stage)
        shares: dict[str, float] = {}
        rounds = {"validation": 0, "pictures": 0}
        for index, name in list(enumerate(names))[first:]:
            stage, begun = run.stages[name], index == first and position.stage is not None
            steps = position.step_in_stage if begun else 0
            if stage.steps is None:
                shares[name] = max(0.0, (stage.seconds or 0.0) - (position.seconds_in_stage if begun else 0.0))
                left = shares[name] / self._steps[name] if self._steps.get(name) else 0.0
            elif name not in self._steps:
                return None
            else:
                left = stage.steps - steps
                shares[name] = left * self._steps[name]
            for part, every in (("validation", reporting.validate_every), ("pictures", reporting.plot_every)):
                rounds[part] += 0 if every is None or not left else 1 + (int(left / every) if every else 0)
        for part, count in rounds.items():
            shares[part] = count * self._parts.get(part, 0.0)
        shares["test"] = self._parts.get("test", 0.0)
        return shares

    def _try(self, run: Run, stages: list[str]) -> None:
        """Time what has not begun; what fails stays unknown."""
        with _as_it_was(run):
            for name in stages:
                with contextlib.suppress(Exception):  # training says what is wrong with a stage
                    self._steps[name] = _step_seconds(run, run.stages[name])
            if "validation" not in self._parts:
                with contextlib.suppress(Exception):
                    seconds = run.evaluator.trial_seconds(run.state.ema.module)
                    if seconds is not None:
                        self._parts |= {"validation": seconds, "test": seconds * run.evaluator.test_size()}

    def _in_words(self, run: Run) -> str:
        shares = self._shares(run) or {}
        parts = []
        for name, seconds in shares.items():
            stage = run.stages.get(name)
            each = "" if stage is None or stage.steps is None else f" for {stage.steps:,} steps"
            if seconds >= 0.01 * sum(shares.values()):
                parts.append(f"{name} {duration(seconds)}{each}")
        return f"about {duration(sum(shares.values()))} ({', '.join(parts)})"


def duration(seconds: float) -> str:
    """Return a time in words, such as "40 minutes", "3.5 hours", "12 days"."""
    for unit, length, most in (("seconds", 1, 120), ("minutes", 60, 5400), ("hours", 3600, 172_800)):
        if seconds < most:
            digits = 1 if unit == "hours" and seconds < 36_000 else 0
            return f"{seconds / length:.{digits}f} {unit}"
    return f"{seconds / 86_400:,.0f} days"


def ways_out(run: Run, shares: Mapping[str, float] | None, hours: float = 1.0) -> str:
    """Return three ways to a shorter run: fewer steps, a smaller preset by name, less of what takes longest."""
    shares = shares or {}
    steps = sum(stage.steps or 0 for stage in run.stages.values())
    training = sum(seconds for name, seconds in shares.items() if name in run.stages)
    others = sum(shares.values()) - training
    # Half of the time at least is for the steps.
    fitting = int(steps * min(1.0, max(1800 * hours, 3600 * hours - others) / max(training, 1e-9)))
    rounded = max(len(run.stages), int(fitting / 10 ** (place := max(0, len(str(fitting)) - 2))) * 10**place)
    slowest = max(run.stages, key=lambda name: shares.get(name, 0.0))
    field = type(getattr(run.model, "field", None)).__name__
    shorter = f"fewer steps, steps={rounded} for about {hours:g} h"
    if not steps:
        shorter = f"less time, objective.{slowest}.seconds={3600 * hours:g}"
    preset = "a smaller network, such as field=mlp field.hidden=[64,64]"
    if len(getattr(run.model, "event_shape", ())) == 3:
        preset = "a smaller preset, data=images field=unet_small for your files or experiment=digits"
    elif field == "MLP":
        preset = "a smaller preset, experiment=quick"
    other = "a GPU, hardware.accelerator=auto where there is one"
    if others > training:
        other = "fewer evaluated points, evaluation.points=128, and rarer ones, reporting.validate_every"
    elif len(run.stages) > 1 and shares.get(slowest, 0.0) > 0.5 * sum(shares.values()):
        remaining = next(name for name in run.stages if name != slowest)
        other = f"the stage {remaining} alone, objective={remaining}"
    return f"Three ways out: {preset}; {shorter}; {other}"


@contextlib.contextmanager
def _as_it_was(run: Run) -> Iterator[None]:
    """Leave buffers, modes and counts of the models as they were."""
    models = (run.model, run.state.ema.module)
    buffers = [(buffer, buffer.clone()) for model in models for buffer in model.buffers()]
    training = run.state.ema.training
    run.state.ema.eval()
    try:
        yield
    finally:
        run.state.ema.train(training)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _step_seconds(run: Run, stage: Stage) -> float:
    """Return the time of one gradient; of a slow one, that of a part of the examples, scaled."""
    count = min(FEW, stage.examples)
    _gradient_seconds(run, stage, count)  # the first one loads code
    seconds = _gradient_seconds(run, stage, count)
    while count < stage.examples and seconds < ENOUGH:
        count = min(4 * count, stage.examples)
        seconds = _gradient_seconds(run, stage, count)
    return seconds * stage.examples / count


def _gradient_seconds(run: Run, stage: Stage, count: int) -> float:
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    device, dtype, objective = run.fabric.device, parameters[0].dtype, stage.objective
    assert callable(objective)
    generator = torch.Generator(device).manual_seed(0)
    stream = run.dataset.train_stream(count, torch.Generator().manual_seed(0), device, dtype)
    batch: Any = stream.next()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    with run.fabric.autocast():
        loss = objective(run.model, batch, generator).loss
    torch.autograd.grad(loss, parameters, allow_unused=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    return seconds if math.isfinite(seconds) else 0.0
