"""What a run tells while it trains and when it is done."""

from __future__ import annotations

import contextlib
import copy
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from flows import plots
from flows.datasets import Dataset, Energy
from flows.errors import InvalidValueError
from flows.evaluation import BitsPerDim, ImportanceWeights, Likelihood
from flows.models.cnf import CNF
from flows.solvers import SolverError, SolverStatistics
from flows.training.checkpoint import FOLDER, load_checkpoint
from flows.training.examiner import Examiner
from flows.training.fabric import Fabric, on_first_process
from flows.training.folder import write_text
from flows.training.loggers import HParams, JSONLinesLogger, Logger, ProgressBar, TensorBoardLogger, read_metrics
from flows.training.metrics import step_metrics
from flows.training.state import RunState
from flows.training.summary import Summary, flat, to_json
from flows.training.watch import EvaluationWatch

METRICS = "metrics.jsonl"


class Reporter:
    """Validates, draws and logs; nothing that it does changes what training does next.

    A context manager: leaving it closes the loggers. Only the first process of several writes.

    Args:
        fabric: launched.
        dataset: what to validate and test on.
        state: of the run; its averaged weights are the ones looked at.
        folder: where plots, metrics and the summary go.
        steps: the number of steps of each stage.
        examiner: evaluates on ``dataset``.
        extra_loggers: beside the standard ones.
        progress_bar: whether to show one.
        pictures: whether to draw any.
        config: settings for TensorBoard, nested.
    """

    def __init__(
        self,
        fabric: Fabric,
        dataset: Dataset,
        state: RunState,
        folder: Path,
        steps: Mapping[str, int],
        examiner: Examiner,
        extra_loggers: Sequence[Logger],
        progress_bar: bool,
        pictures: bool,
        config: Mapping[str, Any] | None,
    ) -> None:
        self.fabric = fabric
        self.dataset = dataset
        self.state = state
        self.folder = folder
        self.pictures = pictures
        self.examiner = examiner
        self.config = config or {}
        self._steps = dict(steps)
        self._clock = (time.perf_counter(), state.position.step)
        self._started = self._clock[0] - state.position.seconds  # in a run that is resumed, as if it had never stopped
        self._watch = EvaluationWatch(early=1)  # of validation
        self._solve: SolverStatistics | None = None  # of the last validation
        self._loggers: list[Logger] = []
        if fabric.is_global_zero:
            resume_step = state.position.step or None
            self._loggers = [
                TensorBoardLogger(folder, resume_step),
                JSONLinesLogger(folder / METRICS, resume_step),
                *([ProgressBar(steps, resume_step)] if progress_bar else []),
                *extra_loggers,
            ]
            if config and resume_step is None:
                text = (folder / "config.yaml").read_text(encoding="utf-8")
                self._log({"config": "".join(f"    {line}\n" for line in text.splitlines())})

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *exception: object) -> None:
        for logger in self._loggers:
            logger.close()
        self._loggers = []

    def advance(self) -> None:
        """Show that another step is done."""
        for logger in self._loggers:
            if isinstance(logger, ProgressBar):
                logger.advance(self.state.position.step)

    def log_training(self, learning_rate: float) -> None:
        """Log the means of the training metrics since the last time."""
        then, before = self._clock
        now, step = time.perf_counter(), self.state.position.step
        metrics = self.state.means.pop()
        metrics |= {"learning_rate": learning_rate, "steps_per_second": (step - before) / (now - then)}
        if self.state.position.skipped:
            metrics["skipped"] = float(self.state.position.skipped)
        if "nll" in metrics and self.dataset.entropy is not None:
            metrics["gap"] = metrics["nll"] - self.dataset.entropy
        if "nll" in metrics and self.dataset.num_levels is not None:
            metrics["bits_per_dim"] = BitsPerDim.from_log_prob({"": -metrics["nll"]}, self.dataset.event_shape).value
        # One probe leaves the standard error unknown, which is no curve to look at.
        self._log({f"train/{name}": value for name, value in metrics.items() if not math.isnan(value)})
        self._clock = (time.perf_counter(), step)

    def validate(self) -> bool:
        """Log the NLL of the validation part, or the free energy of an energy; whether it is the best so far."""
        return on_first_process(self.fabric, self._validate)

    def _validate(self) -> bool:
        if isinstance(self.dataset, Energy):
            with self._aside():
                weights = self.examiner.importance_weights(self.state.ema.module, self.dataset, "validation")
            metrics = weights.metrics() | self._told_of(weights.statistics)
            self._log({f"validation/{name}": value for name, value in metrics.items()})
            return self._is_best(weights.free_energy)
        with self._aside():
            result = self.examiner.likelihood(self.state.ema.module, "validation")
        metrics = {"nll": result.nll, "standard_error": result.standard_error, "nfe": result.nfe}
        metrics |= self._told_of(result.statistics)
        if self.dataset.entropy is not None:
            metrics["gap"] = result.nll - self.dataset.entropy
        parts = {}
        if result.bits_per_dim is not None:
            metrics["bits_per_dim"] = result.bits_per_dim.value
            parts = {f"bits_per_dim/{name}": value for name, value in result.bits_per_dim.parts.items()}
        self._log({f"validation/{name}": value for name, value in metrics.items()} | parts)
        return self._is_best(result.nll)

    def _told_of(self, solve: SolverStatistics) -> dict[str, float]:
        """Metrics of the steps of a validation solve, which is kept to be drawn, and watched."""
        self._solve = solve
        if warning := self._watch(solve):
            self.warn(f"in validation, {warning}")
        return step_metrics(solve)

    def _is_best(self, nll: float) -> bool:
        position = self.state.position
        best = position.best_nll is None or nll < position.best_nll
        if best:
            position.best_nll, position.best_step = nll, position.step
        return best

    def warn(self, text: str) -> None:
        """Tell the person at the terminal, and TensorBoard."""
        if self.fabric.is_global_zero:
            tqdm.write(f"Warning: at step {self.state.position.step}, {text}", file=sys.stderr)
            self._log({"warnings": text})

    def plot(
        self, flow: CNF | None = None, suffix: str | None = None, statistics: SolverStatistics | None = None
    ) -> None:
        """Draw the averaged flow, or ``flow``, and a solve into ``plots/`` and TensorBoard.

        The solve is that of ``statistics``, of training, or else the last one of validation.
        """
        if not self.pictures or not self.fabric.is_global_zero:
            return
        with self._aside():
            generator = self.examiner.generator("plots")
            try:
                figures = plots.figures(self.state.ema.module if flow is None else flow, self.dataset, generator)
            except (SolverError, ValueError) as error:  # far from the data a field may be stiff, or samples infinite
                self._log({"plots/failed": str(error)})
                return
        solve, purpose = (self._solve, "validation") if statistics is None else (statistics, "training")
        if solve is not None and solve.attempts:
            figures["solve"] = plots.steps(solve, purpose)
        self._show(figures, suffix)

    def plot_solve(self, statistics: SolverStatistics) -> None:
        """Draw the steps of a training solve."""
        if self.pictures and self.fabric.is_global_zero and statistics.attempts:
            self._show({"solve": plots.steps(statistics, "training")})

    def _show(self, figures: Mapping[str, Figure], suffix: str | None = None) -> None:
        suffix = f"_{self.state.position.step:06d}" if suffix is None else suffix
        self._save_figures(figures, suffix)
        self._log({f"plots/{name}": figure for name, figure in figures.items()})

    def conclude(self, flow: CNF, statistics: SolverStatistics | None = None) -> Summary:
        """Load the best weights into ``flow``, test them, and write the summary and the final plots.

        ``statistics`` are of the last training solve, which is drawn as well.
        """
        flow.load_state_dict(on_first_process(self.fabric, self._best_weights))
        flow.eval()
        return on_first_process(self.fabric, lambda: self._conclude(flow, statistics))

    def _best_weights(self) -> dict[str, Any]:
        if self.state.position.best_step is None:  # nothing was validated
            return copy.deepcopy(self.state.ema.module.state_dict())
        return load_checkpoint(self.folder / FOLDER / "best.pt")["ema"]

    def _conclude(self, flow: CNF, statistics: SolverStatistics | None) -> Summary:
        for logger in self._loggers:
            if isinstance(logger, ProgressBar):
                logger.close()  # the test has a bar of its own
        started = time.perf_counter()
        test = weights = failure = None
        try:
            test, weights = self._test(flow)
        except (SolverError, ValueError) as error:  # the run is done, and what it has found is kept
            failure = error
            self._log({"test/failed": str(error)})
        evaluation_seconds = time.perf_counter() - started
        self.plot(flow, "", statistics)
        summary = Summary(
            test=test and replace(test, statistics=None),  # which other processes have no use for
            weights=weights and replace(weights, statistics=None),
            entropy=self.dataset.entropy,
            position=copy.copy(self.state.position),
            evaluation_seconds=evaluation_seconds,
            total_seconds=time.perf_counter() - self._started,
            parameters=sum(p.numel() for p in flow.parameters()),
            data=self.dataset.name,
            device=str(self.fabric.device),
            seed=self.examiner.seed,
            output_dir=str(self.folder),
        )
        if self.pictures:
            curves = plots.curves(read_metrics(self.folder / METRICS), self.dataset.entropy, list(self._steps.values()))
            self._save_figures({"curves": curves}, "")
        results = {f"test/{name}": value for name, value in summary.headline().items()}
        settings = {**flat(self.config), "parameters": summary.parameters}
        self._log({"summary": HParams(settings, {**results, "seconds": summary.position.seconds})})
        write_text(self.folder / "summary.json", to_json(summary.as_dict()))
        if failure is not None:
            message = (
                f"training is done, but its test stopped: {failure}. The weights are in {self.folder / FOLDER}, the "
                "summary has no test figures, and scripts/evaluate.py tests them again"
            )
            if isinstance(failure, SolverError):
                raise failure.retold(f"{message}, also with other settings of the solver") from failure
            raise InvalidValueError(message) from failure
        return summary

    def _test(self, flow: CNF) -> tuple[Likelihood | None, ImportanceWeights | None]:
        if not isinstance(self.dataset, Energy):
            return self.examiner.likelihood(flow, "test"), None
        weights = self.examiner.importance_weights(flow, self.dataset, "test")
        if not self.dataset.has_samples:
            return None, weights
        try:
            return self.examiner.likelihood(flow, "test"), weights
        except (SolverError, ValueError) as error:  # where the flow has never been, it may be stiff
            self.warn(f"the test on samples of the energy was left out: {error}")
            return None, weights

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Leave the global random numbers and the clock as they were."""
        devices = [self.fabric.device] if self.fabric.device.type == "cuda" else []
        started = time.perf_counter()
        with torch.random.fork_rng(devices):
            training = self.state.ema.training
            self.state.ema.eval()
            try:
                yield
            finally:
                self.state.ema.train(training)
        self._clock = (self._clock[0] + time.perf_counter() - started, self._clock[1])

    def _save_figures(self, figures: Mapping[str, Figure], suffix: str) -> None:
        folder = self.folder / "plots"
        folder.mkdir(exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}{suffix}.png")
            figure.set_layout_engine("none")  # the layout is found; a logger that draws it again need not search

    def _log(self, metrics: Mapping[str, Any]) -> None:
        for logger in self._loggers:
            logger.log(metrics, self.state.position.step)
