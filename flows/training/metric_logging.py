"""Hands the metrics of a run to its loggers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import yaml

from flows.evaluation import Evaluation
from flows.training.clock import Clock
from flows.training.events import EVENTS_OF_RUNS, TensorBoardLogger, keep_events
from flows.training.fabric import share_of
from flows.training.files import METRICS
from flows.training.loggers import (
    HParams,
    JSONLinesLogger,
    Logger,
    ProgressBar,
)
from flows.training.loss import step_metrics
from flows.training.shown import chosen_settings, layout
from flows.training.state import Run

if TYPE_CHECKING:
    from flows.training.trainer import Summary


class MetricLogging:
    """Hands metrics to the loggers: TensorBoard, `metrics.jsonl`, the progress bar, the user's own.

    Checkpoints know how many lines and events the files had. A resumed run cuts them to these, so that whatever it does
    again is in them once.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock
        self._loggers: list[Logger] = []
        self._files: dict[str, TensorBoardLogger | JSONLinesLogger] = {}  # those of the run's folder
        self._counts = {"events": 0, "metrics": 0}
        self._resumed = False
        self._bar: ProgressBar | None = None
        self._last = (0.0, 0)  # training time without pauses, and step, of the last log

    def on_run_start(self, run: Run) -> None:
        self._last = (time.perf_counter() - run.paused, run.position.step)
        if not run.fabric.is_global_zero:
            return
        resume_step = run.position.step if self._resumed else None
        if run.reporting.progress_bar:
            left = None if self._clock is None else partial(self._clock.remaining, run)
            self._bar = ProgressBar({name: stage.steps for name, stage in run.stages.items()}, resume_step, left)
        with run.writing("what was logged before"):
            kept = keep_events(run.folder, self._counts["events"])
            metrics = JSONLinesLogger(run.folder / METRICS, resume_step, self._counts["metrics"])
        events = TensorBoardLogger(run.folder, resume_step, EVENTS_OF_RUNS, kept, thumbnails=True)
        self._files = {"events": events, "metrics": metrics}
        self._loggers = [events, metrics, *([] if self._bar is None else [self._bar]), *run.reporting.loggers]
        if resume_step is None:
            run.log({"layout": layout(run)})
        if run.config and resume_step is None:
            text = yaml.safe_dump(dict(run.config), sort_keys=False)
            run.log({"config": "".join(f"    {line}\n" for line in text.splitlines())})

    def state_dict(self) -> dict[str, Any]:
        """Return the numbers of lines and events, which are on the disk then."""
        for name, logger in self._files.items():
            logger.file.sync()
            self._counts[name] = logger.count
        return dict(self._counts)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind so many lines and events."""
        self._counts, self._resumed = {name: int(state[name]) for name in self._counts}, True

    def on_log(self, run: Run, metrics: Mapping[str, Any]) -> None:
        for logger in self._loggers:
            logger.log(metrics, run.position.step)

    def on_optimizer_step(self, run: Run) -> None:
        position = run.position
        if self._bar is not None:
            self._bar.advance(position.stage or "", position.step, run.done)
        if not run.due("log"):
            return
        (then, before), now = self._last, time.perf_counter() - run.paused
        if (share := share_of(run.fabric)) is not None:
            run.state.means.average(share.gather)
        metrics = run.state.means.pop()
        metrics |= {"learning_rate": run.learning_rate, "steps_per_second": (position.step - before) / (now - then)}
        if position.skipped:
            metrics["skipped"] = float(position.skipped)
        # One probe leaves the standard error unknown, which is no curve to look at.
        run.log({f"{position.stage}/{name}": value for name, value in metrics.items() if value == value})
        self._last = (now, position.step)

    def on_validation_start(self, run: Run) -> None:
        if self._bar is not None:
            self._bar.pause("validation")

    def on_validation_end(self, run: Run, evaluation: Evaluation | None, is_best: bool) -> None:
        if self._bar is not None:
            self._bar.pause(run.position.stage or "")
        if evaluation is None:
            return
        metrics = dict(evaluation.metrics)
        if evaluation.statistics is not None:
            metrics |= step_metrics(evaluation.statistics)
        named = {name if "/" in name else f"validation/{name}": value for name, value in metrics.items()}
        score = "score" if evaluation.unresolved is None else "score_unresolved"
        run.log({f"validation/{score}": evaluation.score, **named})

    def on_test_start(self, run: Run) -> None:
        if self._bar is not None:
            self._bar.close()  # the test has a bar of its own

    def on_summary(self, run: Run, summary: Summary) -> None:
        found = summary.headline()
        found |= {f"{name}_se": summary.metrics[f"{name}_se"] for name in found if f"{name}_se" in summary.metrics}
        results = {f"test/{name}": value for name, value in found.items()}
        settings = {**chosen_settings(run), "parameters": summary.parameters}
        run.log({"summary": HParams(settings, {**results, "seconds": summary.position.seconds})})

    def on_run_end(self, run: Run) -> None:
        for logger in self._loggers:
            logger.close()
        self._loggers = []
