"""Draws a run while it trains, and at its end."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flows.errors import FlowsError
from flows.evaluation import Evaluation, Report
from flows.solvers import Attempt, SolverStatistics
from flows.training.clock import Clock
from flows.training.files import METRICS, PLOTS
from flows.training.loggers import (
    read_metrics,
    training_curves,
)
from flows.training.memory import memory_errors
from flows.training.state import Run
from flows.writing import write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


LOG = logging.getLogger("flows")


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
