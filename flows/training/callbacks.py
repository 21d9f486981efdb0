"""What a run tells while it trains. Nothing in here changes what training does next.

A callback is any object with some of these methods; each gets the `Run` first:

    on_run_start(run)
    on_optimizer_step(run)                       the weights have moved
    on_validation_start(run)
    on_validation_end(run, evaluation, is_best)  evaluation is None where the weights could not be solved
    on_step_end(run)                             validation included
    on_expensive_solve(run, statistics)          of a training step
    on_failure(run)                              a step failed; the run stands before it
    on_log(run, metrics)                         numbers, figures and texts, by name
    on_test_start(run), on_test_end(run, report) report is None where the test failed
    on_summary(run, summary)
    on_run_end(run)                              however it ends

One with `state_dict()` and `load_state_dict(state)` is part of the checkpoints. The global random numbers are restored
after each call.
"""

from __future__ import annotations

import statistics as stats
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flows.arguments import checked
from flows.checks import whole_number
from flows.errors import FlowsError
from flows.evaluation import Evaluation, Report
from flows.solvers import Attempt, SolverStatistics
from flows.solvers.statistics import shortest
from flows.training.checkpoint import save_checkpoint
from flows.training.files import CONFIG, FOLDER, METRICS
from flows.training.loggers import (
    HParams,
    JSONLinesLogger,
    Logger,
    ProgressBar,
    TensorBoardLogger,
    flat,
    read_metrics,
)
from flows.training.loop import step_metrics
from flows.training.state import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from flows.training.trainer import Summary

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
        progress_bar: show one on the terminal.
        loggers: beside TensorBoard, `metrics.jsonl` and the progress bar.
        callbacks: of your own, see `flows.training.callbacks`.

    Raises:
        ValueError: a number is negative.
    """

    log_every: int = 20
    validate_every: int = 2000
    plot_every: int | None = 2000
    checkpoint_every: int = 1000
    progress_bar: bool = True
    loggers: Sequence[Logger] = ()
    callbacks: Sequence[Any] = ()

    def __post_init__(self) -> None:
        for name in ("log_every", "validate_every", "plot_every", "checkpoint_every"):
            value = getattr(self, name)
            if not (value is None and name == "plot_every"):
                whole_number(name, value, 0, otherwise="0: only at the end of a stage")

    def standard_callbacks(self) -> list[Any]:
        """Return new callbacks that do all this, with the user's own at the end."""
        pictures = [] if self.plot_every is None else [Pictures()]
        return [EvaluationWarning(), MetricLogging(), Checkpoints(), *pictures, *self.callbacks]


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
        if evaluation is not None and (warning := self._validation(evaluation.statistics)):
            run.warn(f"in validation, {warning}")

    def state_dict(self) -> dict[str, Any]:
        """Return what it has seen of training."""
        return self._training.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the one that had this state."""
        self._training.load_state_dict(state)


class MetricLogging:
    """Hands metrics to the loggers: TensorBoard, `metrics.jsonl`, the progress bar, the user's own."""

    def __init__(self) -> None:
        self._loggers: list[Logger] = []
        self._bar: ProgressBar | None = None
        self._last = (0.0, 0)  # training time without pauses, and step, of the last log

    def on_run_start(self, run: Run) -> None:
        self._last = (time.perf_counter() - run.paused, run.position.step)
        if not run.fabric.is_global_zero:
            return
        resume_step = run.position.step or None
        if run.reporting.progress_bar:
            self._bar = ProgressBar({name: stage.steps for name, stage in run.stages.items()}, resume_step)
        self._loggers = [
            TensorBoardLogger(run.folder, resume_step),
            JSONLinesLogger(run.folder / METRICS, resume_step),
            *([] if self._bar is None else [self._bar]),
            *run.reporting.loggers,
        ]
        if run.config and resume_step is None:
            text = (run.folder / CONFIG).read_text(encoding="utf-8")
            run.log({"config": "".join(f"    {line}\n" for line in text.splitlines())})

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
        metrics = run.state.means.pop()
        metrics |= {"learning_rate": run.learning_rate, "steps_per_second": (position.step - before) / (now - then)}
        if position.skipped:
            metrics["skipped"] = float(position.skipped)
        # One probe leaves the standard error unknown, which is no curve to look at.
        run.log({f"train/{name}": value for name, value in metrics.items() if value == value})
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
        results = {f"test/{name}": value for name, value in summary.headline().items()}
        settings = {**flat(run.config or {}), "parameters": summary.parameters}
        run.log({"summary": HParams(settings, {**results, "seconds": summary.position.seconds})})

    def on_run_end(self, run: Run) -> None:
        for logger in self._loggers:
            logger.close()
        self._loggers = []


class Checkpoints:
    """Saves `last.pt` to continue from, and `best.pt` with the lowest score of validation."""

    def on_optimizer_step(self, run: Run) -> None:
        if run.stopping or any(run.due(what) for what in ("checkpoint", "validate", "plot")):
            self._save(run, "last")  # before anything that may fail

    def on_validation_end(self, run: Run, evaluation: Evaluation | None, is_best: bool) -> None:
        if is_best:
            self._save(run, "best")
        self._save(run, "last")

    def on_failure(self, run: Run) -> None:
        self._save(run, "last")

    def _save(self, run: Run, name: str) -> None:
        content = {"config": run.settings, **run.state.state_dict()}
        if run.fabric.is_global_zero:
            save_checkpoint(run.folder / FOLDER / f"{name}.pt", content)
        run.fabric.barrier()


class Pictures:
    """Draws the averaged model and the steps of a solve into `plots/` and TensorBoard."""

    def __init__(self) -> None:
        self._validation: SolverStatistics | None = None  # of the last one

    def on_validation_end(self, run: Run, evaluation: Evaluation | None, is_best: bool) -> None:
        self._validation = None if evaluation is None else evaluation.statistics

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
            self._save(run, {"curves": plots.curves(read_metrics(run.folder / METRICS), entropy, steps)}, "")

    def _draw(self, run: Run, model: Any, suffix: str | None = None) -> None:
        from flows import plots  # slow to import

        if not run.fabric.is_global_zero:
            return
        try:
            figures = dict(run.evaluator.pictures(model))
        except FlowsError as error:  # far from the data a field may be stiff, or samples infinite
            run.log({"plots/failed": str(error)})
            return
        solve, purpose = (run.solves[-1], "training") if run.solves else (self._validation, "validation")
        if solve is not None and solve.attempts:
            figures["solve"] = plots.steps(solve, purpose)
        self._show(run, figures, f"_{run.position.step:06d}" if suffix is None else suffix)

    def _show(self, run: Run, figures: Mapping[str, Figure], suffix: str) -> None:
        self._save(run, figures, suffix)
        run.log({f"plots/{name}": figure for name, figure in figures.items()})

    def _save(self, run: Run, figures: Mapping[str, Figure], suffix: str) -> None:
        folder = run.folder / "plots"
        folder.mkdir(exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}{suffix}.png")
            figure.set_layout_engine("none")  # the layout is found; a logger that draws it again need not search


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
