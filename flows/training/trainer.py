"""Train whatever has an objective and an evaluator."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flows.arguments import checked
from flows.checks import check_seed
from flows.datasets import Dataset
from flows.datasets.recognition.recognition import refuse_other_data
from flows.errors import ComputationError, FlowsError, InvalidTypeError, InvalidValueError
from flows.evaluation import Evaluator, Report, aligned, default_evaluator
from flows.freed_memory import keep_freed_memory
from flows.models.cnf import CNF
from flows.models.neural_ode import NeuralODE
from flows.models.results import DataNames
from flows.naming import by_name, in_words
from flows.objectives import Objective
from flows.solvers import Compilations, SolverError, compilations, many_solves
from flows.training import estimator_use
from flows.training.callbacks import Reporting
from flows.training.checkpoint import CheckpointError, describe, find_checkpoint, load_checkpoint
from flows.training.clock import Clock
from flows.training.compile import compiled, compiled_evaluation, is_long, stages_to_compile
from flows.training.continuing import AUTO, discard_unsaved, saved_state, was_killed_early
from flows.training.described import try_to_describe
from flows.training.fabric import (
    Hardware,
    SharedEvaluationError,
    build_fabric,
    deterministic_algorithms,
    evaluated_together,
    on_first_process,
)
from flows.training.files import (
    CONFIG,
    FOLDER,
    SUMMARY,
    OutputFolderError,
    RunFileError,
    branch_run,
    check_place,
    claimed_folder,
    end_branch,
    not_writable,
    own_run_folder,
)
from flows.training.identity import check_same_run, load_best, load_to_resume, mark_folder
from flows.training.launcher import together
from flows.training.loggers import OF_THE_RUN
from flows.training.loop import Loop, OptimizerStep
from flows.training.loss import LossModule
from flows.training.memory import memory_errors
from flows.training.settings_text import settings_text
from flows.training.signals import StopSignals, TrainingInterrupted
from flows.training.stage import Optimization, Stage
from flows.training.state import Position, Run, RunState
from flows.training.streams import unbreakable_streams
from flows.training.trusted import foreign_packages
from flows.writing import to_json, write_text

LOG = logging.getLogger("flows")


@dataclass(frozen=True)
class Summary:
    """The result of a run.

    Example:
        ```python
        import flows

        data = flows.datasets.Moons(num_validation=100, num_test=100)
        flow = flows.CNF(flows.fields.MLP((2,), hidden=(8,)))
        reporting = flows.training.Reporting(progress_bar=False, plot_every=None)
        summary = flows.Trainer(flow, data, flows.objectives.FlowMatching(), steps=5, reporting=reporting).fit()
        summary.metrics["nll"], summary.total_seconds
        ```
    """

    metrics: Mapping[str, Any]  # of the test, plain values; empty if it failed
    report: Report | None = field(repr=False)  # None if the test failed
    position: Position  # at the end of training
    evaluation_seconds: float  # of the test
    total_seconds: float  # of training, test and pictures
    parameters: int
    data: str
    device: str
    seed: int
    output_dir: str
    compilations: Compilations = field(default_factory=Compilations)  # of solver steps, by this process
    divergence_steps: int | None = None  # in which the flow's estimator took part; None: that cannot be told
    divergence_use: str | None = None  # the same in words, if it was chosen and took part in some steps alone

    @property
    def validation_score(self) -> float | None:
        """The score of the weights that were tested, the lowest on the validation part."""
        return self.position.best_score

    def headline(self) -> dict[str, Any]:
        """Return the few metrics by which runs are compared; None where unknown."""
        return {name: self.metrics.get(name) for name in (self.report.headline if self.report else ())}

    def as_dict(self) -> dict[str, Any]:
        """Return what `summary.json` holds: every metric of the test as `test_<name>`, and facts of the run."""
        return {
            **{f"test_{name}": value for name, value in self.metrics.items()},
            "evaluated_with": self.report and self.report.evaluated_with,
            "validation_score": self.validation_score,
            "best_step": self.position.best_step,
            "steps": self.position.step,
            "skipped_batches": self.position.skipped,
            "seconds": self.position.seconds,
            "evaluation_seconds": self.evaluation_seconds,
            "total_seconds": self.total_seconds,
            "parameters": self.parameters,
            "data": self.data,
            "device": self.device,
            "seed": self.seed,
            "output_dir": self.output_dir,
            "divergence_steps": self.divergence_steps,
            "compilations": self.compilations.count,
            "compile_seconds": self.compilations.seconds,
            "uncompiled_because": self.compilations.reasons,
        }

    def __str__(self) -> str:
        training = f"{self.position.seconds:.1f} s for {self.position.step:,} steps"
        if self.position.skipped:
            training += f" ({self.position.skipped} batches skipped)"
        rows = [("data", self.data), *(self.report.rows if self.report else ())]
        if self.position.best_step not in (None, self.position.step):
            rows.append(("weights", f"of step {self.position.best_step:,}, the best on the validation part"))
        time = f"{training}, {self.evaluation_seconds:.1f} s for the test, {self.total_seconds:.1f} s in all"
        rows.append(("time", time))
        if self.divergence_use is not None:
            rows.append(("estimator", self.divergence_use))
        if str(self.compilations):
            rows.append(("compiled", str(self.compilations)))
        return aligned([*rows, ("files", self.output_dir)])


@checked(own=("dataset",))
class Trainer:
    """Trains a model through a sequence of stages, in a folder that holds all that the run produces.

    The model is any module for which there are an objective and an evaluator. The exponential moving average of its
    weights is what is validated, tested, drawn and returned; each stage after the first starts from it.
    `checkpoints/last.pt` continues the run bit for bit (on a GPU with `deterministic`), `checkpoints/best.pt` had the
    lowest validation score. Where a flow starts from another base than N(0, I), the weights before the first step are
    validated, too, so that training a flow that begins at a fitted base leaves it no worse than that base.

    ```python
    import flows

    flow = flows.CNF(flows.fields.MLP(event_shape=(2,)))
    data = flows.datasets.Moons(num_validation=500, num_test=1000)
    summary = flows.Trainer(flow, data, flows.objectives.FlowMatching(), steps=100).fit()  # take thousands of steps
    print(summary)
    ```

    Args:
        model: trained in place.
        dataset: where training batches come from.
        objective: what is minimised for `steps`, also by its name such as `"flow_matching"`; or several stages by name,
            `{name: Stage(...)}`. Checkpoints and metrics use the names.
        steps: of a single objective; a stage has its own.
        evaluator: judges the model; None: `flows.evaluation.default_evaluator`.
        optimization: how gradients become weights; None: the defaults.
        hardware: where to compute; None: the defaults.
        reporting: what to tell, and how often; None: the defaults.
        output_dir: folder of the run; must not hold another one. None: that of the run to resume, or else a new one,
            `runs/<data>/<date>_<time>`.
        seed: of the data, the probes and whatever else is random in training.
        resume: a checkpoint file, or the folder of a run, to continue as if it had never stopped, in its own folder or
            in a new one. `"auto"`: continue the run in `output_dir` if it has saved anything, else start it.
        config: the settings as nested plain values; kept in the folder and in the checkpoints.

    Raises:
        FlowsError: model, data, objective, evaluator and hardware do not suit each other.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        objective: Objective | Callable | Mapping[str, Stage] | str,
        *,
        steps: int | None = None,
        evaluator: Evaluator | None = None,
        optimization: Optimization | None = None,
        hardware: Hardware | None = None,
        reporting: Reporting | None = None,
        output_dir: str | os.PathLike[str] | None = None,
        seed: int = 0,
        resume: str | os.PathLike[str] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        check_seed(seed)
        if output_dir is not None:
            check_place(output_dir)
        self.model = model
        self.dataset = dataset
        if isinstance(model, CNF | NeuralODE):
            model.names = DataNames.of(describe(dataset))
        self.stages = as_stages(objective, steps)
        self.optimization = optimization or Optimization()
        self.hardware = hardware or Hardware()
        self.reporting = reporting or Reporting()
        self.seed = seed
        self.config = None if config is None else dict(config)
        self.labels: dict[str, Any] = {}  # what a sweep varies, for TensorBoard's HPARAMS tab
        self.evaluator = evaluator or default_evaluator(model, dataset, seed, self.reporting.progress_bar)
        for stage in self.stages.values():
            if isinstance(stage.objective, Objective):
                stage.objective.check(model, dataset)
        self.evaluator.check(model)
        self._callbacks = self.reporting.standard_callbacks(
            Clock(self.hardware.max_cpu_hours, bool(self.hardware.compile))
        )
        self.fabric = build_fabric(self.hardware, self._callbacks)
        self.optimization.check(self.model, self.fabric.world_size)
        self._compiled, self._notices = stages_to_compile(
            self.hardware.compile, self.fabric.device.type, model, self.stages
        )
        self._starts_over = False  # in a folder where this run was killed before it saved anything
        if resume == AUTO:
            resume = saved_state(output_dir)
            self._starts_over = resume is None and output_dir is not None and was_killed_early(output_dir)
        self._resumed = resumed = None if resume is None else find_checkpoint(resume, prefer="last")
        self._checkpoint = None if resumed is None else load_to_resume(resumed)
        known = None if self._checkpoint is None else self._checkpoint["data"]
        if known is not None and describe(dataset)["name"] == known.get("name"):  # else said by `RunState.resume`
            refuse_other_data(known, dataset)
        self._resumed_folder = None if resumed is None else own_run_folder(resumed)
        self._output_dir = self._resumed_folder if output_dir is None else Path(output_dir)
        if resumed is not None and self._checkpoint is not None and self._continues_in_place():
            check_same_run(self._checkpoint, resumed)
            last = resumed.with_name("last.pt")
            if last.exists() and last.resolve() != resumed.resolve():
                raise OutputFolderError(
                    f"resuming from {resumed.name} in its own folder would overwrite last.pt, the later state of this "
                    "run; choose another output_dir, or resume from last.pt"
                )

    @property
    def resumed_step(self) -> int | None:
        """The step after which the run goes on; None: it starts."""
        return None if self._checkpoint is None else self._checkpoint["position"]["step"]

    @property
    def source(self) -> Path | None:
        """The folder of the run, or the file, that it goes on from; None: it starts."""
        return self._resumed_folder or self._resumed

    def _continues_in_place(self) -> bool:
        source, path = self._resumed_folder, self._output_dir
        return source is not None and path is not None and source.resolve() == path.resolve()

    def fit(self) -> Summary:
        """Train through all stages, then test the best weights; afterwards `self.model` holds them.

        Returns:
            The figures that `summary.json` holds, too.

        Raises:
            OutputFolderError: the folder cannot be written, or another run lives in it.
            RunFileError: a checkpoint or the summary cannot be written; the checkpoints before are whole.
            TrainingInterrupted: a signal came; the step was finished and `last.pt` written.
            NonFiniteLossError: the loss or its gradient is NaN or infinite.
            SolverError: a batch cannot be solved, see `Optimization.on_solver_error`.
        """
        if self.fabric.device.type == "cpu":
            keep_freed_memory()
        with together(self.fabric), unbreakable_streams(), contextlib.ExitStack() as claim:
            self.folder = on_first_process(self.fabric, lambda: self._open_folder(claim))
            if self.hardware.deterministic:
                claim.enter_context(deterministic_algorithms())
            torch.manual_seed(self.seed + self.fabric.global_rank)  # for a dropout or the like
            return self._fit()

    def _open_folder(self, claim: contextlib.ExitStack) -> Path:
        """Make the folder, with the settings in it; it is nobody else's until `claim` ends."""
        source, path = self._resumed_folder, self._output_dir
        in_place = self._continues_in_place()
        resuming = in_place or self._starts_over
        folder = claim.enter_context(claimed_folder(path, resuming, describe(self.dataset)["name"]))
        if self._starts_over:
            discard_unsaved(folder, self.config)
        if source is not None and not in_place:
            best, own = load_best(source, keep=True), (self._checkpoint or {}).get("run")
            if (best is not None and best.get("run") == own) or not (source / FOLDER / "best.pt").exists():
                self._write(folder, lambda: branch_run(source, folder))
        if self.config is not None:
            if "output_dir" in self.config:
                self.config["output_dir"] = str(folder)
            text = settings_text(self.config)
            self._write(folder, lambda: write_text(folder / CONFIG, text))
        return folder

    def _write(self, folder: Path, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            raise not_writable(folder, error) from error

    def _new_state(self) -> RunState:
        return RunState(self.fabric, self.model, self.dataset, self.optimization, self.seed, self._callbacks)

    def _fit(self) -> Summary:
        settings = None if self.config is None else settings_text(self.config)
        loss = LossModule(self.model)
        module = self.fabric.setup_module(loss)  # before the average copies the weights
        state = self._new_state()
        position = state.position
        run = Run(self.fabric, state, self.stages, self.evaluator, self.reporting, self.folder, self.config, settings)
        run.labels = self.labels
        described = try_to_describe(self.model) if settings is None else None
        if described is not None and described.settings is not None:
            run.described = {"described": settings_text(described.settings), "arguments": described.arguments}
        if self._checkpoint is not None:
            best = on_first_process(self.fabric, lambda: load_best(self.folder))
            state.resume(self._checkpoint, self.stages, best)
            position = state.position
        on_first_process(self.fabric, lambda: mark_folder(self.folder, state.run))
        self._compilations = copy.deepcopy(compilations())
        self._started = time.perf_counter() - position.seconds  # as if a resumed run had never stopped
        with StopSignals() as stop:
            loop = Loop(run, OptimizerStep(run, loss, module, self.optimization), stop, foreign_packages(self.config))
            try:
                self._keep_start(run)
                run.call("on_run_start")
                self._train(run, loop)
                loop.stop_together()
                with stop.at_once():
                    return self._test(run)
            except TrainingInterrupted:
                raise
            except KeyboardInterrupt:
                raise loop.interrupted() from None
            finally:
                run.call("on_run_end")

    def _keep_start(self, run: Run) -> None:
        """Let `last.pt` of this folder be what a resumed run goes on from, before any other file is changed."""
        if self._resumed is None:
            return
        if self._resumed.resolve() == (self.folder / FOLDER / "last.pt").resolve():
            run.is_saved()
        else:
            run.call("on_save")
            on_first_process(self.fabric, lambda: end_branch(self.folder))

    def _train(self, run: Run, loop: Loop) -> None:
        names, state = list(self.stages), run.state
        for notice in self._notices:
            run.warn(notice)
        first = names.index(state.position.stage or names[0])
        if state.position.stage == names[-1] and run.done >= 1 and (self.folder / SUMMARY).exists():
            # Not in TensorBoard: a run that is resumed once more keeps the same events.
            LOG.warning(
                "at step %d, nothing is left to train, so the best weights are only tested again; to train on, give it "
                "more: resume=%s objective.%s.%s",
                state.position.step,
                self.folder,
                names[-1],
                more_of(self.stages[names[-1]]),
            )
        for index, name in list(enumerate(names))[first:]:
            stage = self.stages[name]
            if state.position.stage != name:
                state.begin(index, name, stage)
            compiles = name in self._compiled
            with contextlib.ExitStack() as code:
                code.enter_context(many_solves(is_long(stage)))
                if compiles:
                    code.enter_context(compiled_evaluation(state.ema.module))
                    code.enter_context(compiled(self.model, stage.objective))
                loop.train(stage)

    def _test(self, run: Run) -> Summary:
        """Load the best weights into the model, test them, and write the summary."""
        long = any(is_long(stage) for stage in self.stages.values())
        with many_solves(long), compiled_evaluation(self.model) if self._compiled else contextlib.nullcontext():
            return self._tested(run)

    def _tested(self, run: Run) -> Summary:
        self.model.load_state_dict(on_first_process(self.fabric, lambda: self._best_weights(run.state)))
        self.model.eval()
        report, failure = None, None
        if self.fabric.is_global_zero:
            run.call("on_test_start")
        started = time.perf_counter()
        try:
            with memory_errors("the test", "choose a smaller evaluation.batch_size"):
                report = evaluated_together(self.fabric, self.evaluator, lambda: self.evaluator.test(self.model))
        except SharedEvaluationError:
            raise  # the other processes would wait without end
        except FlowsError as error:  # the run is done, and what it has found is kept
            failure = error
        seconds = time.perf_counter() - started
        return on_first_process(self.fabric, lambda: self._summarise(run, report, failure, seconds))

    def _best_weights(self, state: RunState) -> dict[str, Any]:
        if state.position.best_step is None:  # nothing was validated
            return copy.deepcopy(state.ema.module.state_dict())
        try:
            return load_checkpoint(self.folder / FOLDER / "best.pt")["ema"]
        except CheckpointError as error:
            raise RunFileError(
                f"the best weights cannot be tested: {error}. Training is done, and the last weights are in "
                f"{self.folder / FOLDER / 'last.pt'}: resume={self.folder} tests these"
            ) from error

    def _summarise(
        self, run: Run, report: Report | None, failure: FlowsError | None, evaluation_seconds: float
    ) -> Summary:
        if failure is not None:
            run.log({"test/failed": str(failure)})
        run.call("on_test_end", report)
        taking = estimator_use.stages_with_estimator(self.model, self.stages)
        summary = Summary(
            metrics={} if report is None else dict(report.metrics),
            report=report,
            position=copy.copy(run.position),
            evaluation_seconds=evaluation_seconds,
            total_seconds=time.perf_counter() - self._started,
            parameters=sum(p.numel() for p in self.model.parameters()),
            data=describe(self.dataset)["name"],
            device=str(self.fabric.device),
            seed=self.seed,
            output_dir=str(self.folder),
            compilations=compilations().since(self._compilations),
            divergence_steps=None if taking is None else estimator_use.steps(taking, self.stages, run.position),
            divergence_use=estimator_use.in_words(self.model, self.stages, run.position),
        )
        run.call("on_summary", summary)
        with run.writing(self.folder / SUMMARY):
            write_text(self.folder / SUMMARY, to_json(summary.as_dict()))
        if failure is not None:
            message = (
                f"training is done, but its test stopped: {failure}. The weights are in {self.folder / FOLDER}, the "
                "summary has no test figures, and `evaluate` tests them again"
            )
            if isinstance(failure, SolverError):
                raise failure.retold(f"{message}, also with other settings of the solver") from failure
            kind = ComputationError if isinstance(failure, ComputationError) else InvalidValueError
            raise kind(message) from failure
        return summary


def more_of(stage: Stage) -> str:
    """The setting by which a stage would last twice as long."""
    return f"steps={2 * stage.steps}" if stage.steps is not None else f"seconds={2 * (stage.seconds or 0.0):g}"


def as_stages(objective: Objective | Callable | Mapping[str, Stage] | str, steps: int | None) -> dict[str, Stage]:
    """Return the stages by name; a single objective becomes one of its own name.

    Raises:
        ValueError: there is none, or `steps` is missing or out of place.
    """
    if isinstance(objective, str):
        objective = by_name(Objective, objective, "objective")
    if not isinstance(objective, Mapping):
        if steps is None:
            raise InvalidValueError("how long? Give steps=..., or stages: {'name': Stage(objective, seconds=60)}")
        return {in_words(getattr(objective, "__name__", type(objective).__name__)): Stage(objective, steps)}
    if not objective:
        raise InvalidValueError("objective must hold at least one Stage, got none")
    if steps is not None:
        raise InvalidValueError("each stage has its own steps: leave out steps=...")
    for name, stage in objective.items():
        if name in OF_THE_RUN:
            raise InvalidValueError(f"a stage cannot be called {name!r}, as other metrics are; choose another name")
        if not isinstance(stage, Stage):
            raise InvalidTypeError(f"objective must hold Stages by name, got {stage!r} for {name!r}")
    return dict(objective)
