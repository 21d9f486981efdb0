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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flows.arguments import checked
from flows.checks import check_number, whole_number
from flows.errors import InvalidTypeError
from flows.evaluation import Evaluation
from flows.training.checkpoint import save_checkpoint
from flows.training.clock import Clock
from flows.training.expensive_solves import EvaluationWarning
from flows.training.fabric import on_first_process
from flows.training.files import FOLDER
from flows.training.loggers import (
    Logger,
)
from flows.training.metric_logging import MetricLogging
from flows.training.pictures import Pictures
from flows.training.state import Run

if TYPE_CHECKING:
    pass

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
