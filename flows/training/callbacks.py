"""What a run tells while it trains. Nothing in here changes what training does next.

A callback is any object with some of these methods; each gets the `Run` first:

    on_run_start(run)
    on_save(run)                                 a stage begins, or a run goes on from elsewhere
    on_optimizer_step(run)                       the weights have moved
    on_validation_start(run)
    on_validation_end(run, evaluation, is_best)  evaluation is None where the weights could not be solved
    on_step_end(run)                             validation included
    on_expensive_solve(run, statistics)          of a training step
    on_failure(run)                              something failed; the run stands behind its last whole step
    on_log(run, metrics)                         numbers, figures and texts, by name
    on_test_start(run), on_test_end(run, report) report is None where the test failed
    on_summary(run, summary)
    on_run_end(run)                              however it ends

One with `state_dict()` and `load_state_dict(state)` is part of the checkpoints. The global random numbers are restored
after each call. A resumed run calls again what came after its checkpoint: where that was written within a step,
`on_validation_end` and `on_step_end` of this step.
"""

from __future__ import annotations

import contextlib
import logging
import statistics as stats
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from flows.arguments import checked
from flows.checks import check_number, whole_number
from flows.errors import FlowsError, InvalidTypeError
from flows.evaluation import Evaluation, Report
from flows.solvers import Attempt, SolverStatistics
from flows.solvers.statistics import shortest
from flows.training.checkpoint import save_checkpoint
from flows.training.clock import Clock
from flows.training.events import EVENTS_OF_RUNS, TensorBoardLogger, keep_events
from flows.training.fabric import on_first_process, share_of
from flows.training.files import FOLDER, METRICS, PLOTS
from flows.training.loggers import (
    HParams,
    JSONLinesLogger,
    Logger,
    ProgressBar,
    read_metrics,
    training_curves,
)
from flows.training.loop import step_metrics
from flows.training.memory import memory_errors
from flows.training.shown import chosen_settings, layout
from flows.training.state import Run
from flows.writing import write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from flows.training.trainer import Summary

HOOKS = (
    "on_run_start",
    "on_save",
    "on_optimizer_step",
    "on_validation_start",
    "on_validation_end",
    "on_step_end",
    "on_expensive_solve",
    "on_failure",
    "on_log",
    "on_test_start",
    "on_test_end",
    "on_summary",
    "on_run_end",
)
LOG = logging.getLogger("flows")

WINDOW = 20  # solves whose median is typical
FIRST_MEDIAN = 5  # solves whose median stands for it at the beginning
EXPLOSION = 3.0  # times the typical number of evaluations; repeated when it doubles
NEVER_WARN_BELOW = 100  # evaluations
ALWAYS_WARN_ABOVE = 1000  # evaluations, where the error drives the steps; repeated when they double


@checked
@dataclass(frozen=True)
class Reporting:
    """What a run tells, and how often.

    Args:
        log_every: in steps, like the next three. All four also happen at the end of a stage; 0: only there.
        validate_every: validating 10,000 points takes as long as a few hundred steps of flow matching.
        plot_every: None: no pictures at all.
        checkpoint_every: of `checkpoints/last.pt`.
        checkpoint_minutes: write it also when the last one is so many minutes old; None: by steps alone.
        progress_bar: show one on the terminal.
        loggers: beside TensorBoard, `metrics.jsonl` and the progress bar.
        callbacks: of your own, see `flows.training.callbacks`.

    Raises:
        ValueError: a number is negative.
        TypeError: a callback or a logger has none of the methods that are called.

    Example:
        ```python
        import flows

        reporting = flows.training.Reporting(log_every=50, plot_every=None, progress_bar=False)
        ```
    """

    log_every: int = 20
    validate_every: int = 2000
    plot_every: int | None = 2000
    checkpoint_every: int = 1000
    checkpoint_minutes: float | None = 10.0
    progress_bar: bool = True
    loggers: Sequence[Logger] = ()
    callbacks: Sequence[Any] = ()

    def __post_init__(self) -> None:
        for name in ("log_every", "validate_every", "plot_every", "checkpoint_every"):
            value = getattr(self, name)
            if not (value is None and name == "plot_every"):
                whole_number(name, value, 0, otherwise="0: only at the end of a stage")
        if self.checkpoint_minutes is not None:
            check_number("checkpoint_minutes", self.checkpoint_minutes, above=0, otherwise="None: by steps alone")
        for callback in self.callbacks:
            if isinstance(callback, type) or not any(callable(getattr(callback, hook, None)) for hook in HOOKS):
                raise InvalidTypeError(
                    f"callbacks must be objects with a method such as on_step_end(run), got {callback!r}; see "
                    "flows.training.callbacks"
                )
        for logger in self.loggers:
            if isinstance(logger, type) or not callable(getattr(logger, "log", None)):
                raise InvalidTypeError(f"loggers must be objects with log(metrics, step) and close(), got {logger!r}")

    def standard_callbacks(self, clock: Clock | None = None) -> list[Any]:
        """Return new callbacks that do all this, with the user's own at the end."""
        clock = clock or Clock()
        pictures = [] if self.plot_every is None else [Pictures(clock)]
        # Checkpoints come last, so that they hold what the others have made of the same step.
        return [EvaluationWarning(), clock, MetricLogging(clock), *pictures, *self.callbacks, Checkpoints()]


class EvaluationWatch:
    """Notices a solve that takes many times the usual evaluations, or very many.

    Those of the backward pass count. Usual is the lowest median of 20 solves in a row, so a slow rise is noticed, too;
    before there are 20, from the `early`-th on, the median of those. The warning names the time and the
    sample of the shortest steps.
    """

    def __init__(self, early: int = FIRST_MEDIAN) -> None:
        self.early = early
        self._recent: deque[int] = deque(maxlen=WINDOW)
        self._typical: float | None = None
        self._threshold = EXPLOSION
        self._many = ALWAYS_WARN_ABOVE

    def __call__(self, statistics: SolverStatistics | None) -> str | None:
        """Return a warning about this solve, if there is reason for one."""
        if statistics is None:
            return None
        nfe, typical = statistics.nfe_forward + statistics.nfe_backward, self._typical
        if typical is None and len(self._recent) >= self.early:
            typical = stats.median(self._recent)
        self._recent.append(nfe)
        if len(self._recent) == WINDOW:
            median = stats.median(self._recent)
            self._typical = median if self._typical is None else min(self._typical, median)
        exploded = typical is not None and nfe >= max(NEVER_WARN_BELOW, self._threshold * typical)
        if not exploded and nfe < self._many:
            return None
        culprit = _culprit(statistics)
        if not exploded and not culprit:  # the user's many steps, of fixed size
            return None
        usual = ": the field is"
        if exploded and typical is not None:
            usual = f", {nfe / typical:.1f} times the usual {typical:.0f}: the field gets"
            while nfe >= self._threshold * typical:
                self._threshold *= 2
        while nfe >= self._many:
            self._many *= 2
        backward = f" ({statistics.nfe_backward} of them backward)" if statistics.nfe_backward else ""
        return (
            f"the solve took {nfe} evaluations{backward}{usual} stiff{culprit}. Try a regulariser, a lower learning "
            "rate, or larger rtol and atol"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what it has seen."""
        return {
            "recent": list(self._recent),
            "typical": self._typical,
            "threshold": self._threshold,
            "many": self._many,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the watch that had this state."""
        self._recent = deque(state["recent"], maxlen=WINDOW)
        self._typical, self._threshold, self._many = state["typical"], state["threshold"], state["many"]


class EvaluationWarning:
    """Warns early when solves get expensive, in training and in validation."""

    def __init__(self) -> None:
        self._training = EvaluationWatch()
        self._validation = EvaluationWatch(early=1)

    def on_optimizer_step(self, run: Run) -> None:
        for solve in run.solves:
            if warning := self._training(solve):
                run.warn(warning)
                run.call("on_expensive_solve", solve)

    def on_validation_end(self, run: Run, evaluation: Evaluation | None, is_best: bool) -> None:
        if not run.position.step:  # a flow at rest takes fewer evaluations than is usual
            return
        if evaluation is not None and (warning := self._validation(evaluation.statistics)):
            run.warn(f"in validation, {warning}")

    def state_dict(self) -> dict[str, Any]:
        """Return what it has seen."""
        return {"training": self._training.state_dict(), "validation": self._validation.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the one that had this state."""
        self._training.load_state_dict(state["training"])
        self._validation.load_state_dict(state["validation"])


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

    def on_validation_end(self, run: Run, evaluation: Evaluation | None, is_best: bool) -> None:
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


class Checkpoints:
    """Saves `last.pt` to continue from, and `best.pt` with the lowest score of validation."""

    def on_save(self, run: Run) -> None:
        self._save(run, "last")

    def on_optimizer_step(self, run: Run) -> None:
        if run.stopping or any(run.due(what) for what in ("checkpoint", "validate", "plot")):
            self._save(run, "last")  # before validation and pictures, which may fail

    def on_validation_end(self, run: Run, evaluation: Evaluation | None, is_best: bool) -> None:
        if is_best:
            self._save(run, "best")
        self._save(run, "last")

    def on_failure(self, run: Run) -> None:
        self._save(run, "last")

    def _save(self, run: Run, name: str) -> None:
        content = {"config": run.settings, **run.described, **run.state.state_dict()}

        def write() -> None:
            path = run.folder / FOLDER / f"{name}.pt"
            with run.writing(path):
                path.parent.mkdir(exist_ok=True)  # not its parents: a folder that was removed stays away
                save_checkpoint(path, content)

        on_first_process(run.fabric, write)
        if name == "last":
            run.is_saved()


class Pictures:
    """Draws the averaged model and the steps of a solve into `plots/` and TensorBoard."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock
        self._solves: dict[str, SolverStatistics] = {}  # the last ones: in training, and in validation
        self._fails = False

    def on_optimizer_step(self, run: Run) -> None:
        self._solves.pop("training", None)
        if run.solves and run.due("plot"):
            self._solves["training"] = run.solves[-1]

    def on_validation_end(self, run: Run, evaluation: Evaluation | None, is_best: bool) -> None:
        self._solves.pop("validation", None)
        if evaluation is not None and evaluation.statistics is not None:
            self._solves["validation"] = evaluation.statistics

    def on_step_end(self, run: Run) -> None:
        if run.due("plot") and not run.is_over:  # the best weights are drawn after the last step
            average = run.state.ema
            training = average.training
            average.eval()
            self._draw(run, average.module)
            average.train(training)

    def on_expensive_solve(self, run: Run, statistics: SolverStatistics) -> None:
        from flows import plots

        if run.fabric.is_global_zero and statistics.attempts:
            self._show(run, {"solve": plots.steps(statistics, "training")}, f"_{run.position.step:06d}")

    def on_test_end(self, run: Run, report: Report | None) -> None:
        from flows import plots

        self._draw(run, run.model, "")
        if run.fabric.is_global_zero:
            ends = [*run.position.stage_starts[1:], run.position.step]
            steps = [end - start for start, end in zip(run.position.stage_starts, ends, strict=True)]
            entropy = getattr(run.dataset, "entropy", None)  # any data with a train_stream will do
            with self._forgiving(run.folder / METRICS):
                curves = read_metrics(run.folder / METRICS)
                curves |= training_curves(curves)
                self._save(run, {"curves": plots.curves(curves, entropy, steps)}, "")

    def state_dict(self) -> dict[str, Any]:
        """Return the steps of the solves, which a resumed run draws without having solved them."""
        return {
            name: {
                "nfe_forward": solve.nfe_forward,
                "attempts": [list(attempt) for attempt in solve.attempts],
                "observed": {
                    name: [[t, float(value)] for t, value in values] for name, values in solve.observed.items()
                },
            }
            for name, solve in self._solves.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Draw these solves."""
        self._solves = {
            name: SolverStatistics(
                nfe_forward=solve["nfe_forward"],
                attempts=[Attempt(*attempt) for attempt in solve["attempts"]],
                observed={
                    name: [(t, torch.tensor(value)) for t, value in values]
                    for name, values in solve["observed"].items()
                },
            )
            for name, solve in state.items()
        }

    def _draw(self, run: Run, model: Any, suffix: str | None = None) -> None:
        from flows import plots  # slow to import

        if not run.fabric.is_global_zero:
            return
        began = time.perf_counter()
        try:
            with memory_errors("drawing"):
                figures = dict(run.evaluator.pictures(model))
        except FlowsError as error:  # far from the data a field may be stiff, or samples infinite
            run.log({"plots/failed": str(error)})
            return
        purpose = "training" if "training" in self._solves else "validation"
        solve = self._solves.get(purpose)
        if solve is not None and solve.attempts:
            figures["solve"] = plots.steps(solve, purpose)
        self._show(run, figures, f"_{run.position.step:06d}" if suffix is None else suffix)
        if self._clock is not None:
            self._clock.on_pictures(time.perf_counter() - began)

    def _show(self, run: Run, figures: Mapping[str, Figure], suffix: str) -> None:
        self._save(run, figures, suffix)
        run.log({f"plots/{name}": figure for name, figure in figures.items()})

    def _save(self, run: Run, figures: Mapping[str, Figure], suffix: str) -> None:
        folder = run.folder / PLOTS
        for name, figure in figures.items():
            with self._forgiving(folder / f"{name}{suffix}.png"):
                folder.mkdir(exist_ok=True)
                write_figure(folder / f"{name}{suffix}.png", figure)
            figure.set_layout_engine("none")  # the layout is found; a logger that draws it again need not search

    @contextlib.contextmanager
    def _forgiving(self, path: Path) -> Iterator[None]:
        """Warn once of a picture that cannot be written: it is not worth a run."""
        try:
            yield
        except OSError as error:
            if not self._fails:
                LOG.warning("%s cannot be written (%s); training goes on", path, error.strerror or error)
            self._fails = True


def _culprit(statistics: SolverStatistics) -> str:
    """Name where the steps are shortest, and the component and sample that cause most of them."""
    backward = statistics.nfe_backward > statistics.nfe_forward and statistics.backward_attempts
    attempts: Sequence[Attempt] = statistics.backward_attempts if backward else statistics.attempts
    least = shortest(attempts)
    if least is None or least.component is None:
        return ""
    size = abs(least.dt)
    short = [attempt for attempt in attempts if abs(attempt.dt) <= 2 * size]
    (component, sample), _ = Counter((attempt.component, attempt.sample) for attempt in short).most_common(1)[0]
    return (
        f" around t = {least.t:.3g}, where the shortest step is {size:.1e} and the "
        f"{str(component).replace('_', '-')} of sample {sample} of the batch has the largest error"
    )
