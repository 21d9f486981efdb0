"""The training loop."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch.optim import Optimizer

from flows.datasets import Dataset
from flows.errors import InvalidValueError
from flows.models.cnf import CNF
from flows.training.checkpoint import (
    FOLDER,
    RUN,
    check_content,
    find_checkpoint,
    load_checkpoint,
    own_run_folder,
)
from flows.training.compile import compiled, stages_to_compile
from flows.training.conditioning import check_context_shape, check_samples
from flows.training.examiner import Examiner
from flows.training.fabric import Accelerator, Strategy, build_fabric, deterministic_algorithms, on_first_process
from flows.training.folder import branch_run, claimed_folder, write_text
from flows.training.levels import check_levels
from flows.training.loggers import Logger
from flows.training.loop import Loop
from flows.training.loss import LossModule
from flows.training.reporting import Reporter
from flows.training.settings import check_arguments
from flows.training.stage import Stage
from flows.training.state import RunState
from flows.training.step import OptimiserStep, SolverErrorPolicy
from flows.training.stopping import StopSignals
from flows.training.summary import Summary
from flows.training.trusted import foreign_packages


class Trainer:
    """Trains a flow through a sequence of stages, in a folder that holds all that the run produces.

    The exponential moving average of the weights is what is validated, tested, plotted and finally returned;
    each stage after the first starts from it. ``checkpoints/last.pt`` continues the run bit for bit (on a GPU, with
    ``deterministic``), ``checkpoints/best.pt`` had the lowest validation NLL. See :meth:`fit`.

    Args:
        flow: trained in place.
        dataset: where training, validation and test points come from.
        stages: what is done, in order; the names go into checkpoints and metrics.
        optimizer: called as ``optimizer(parameters, lr=...)`` at the start of each stage without one of its own.
        output_dir: the folder of the run; must not hold another one. ``None``: that of the run to resume, or else a
            new one, ``runs/<data>/<date>_<time>``.
        seed: of the data, the probes and whatever else is random while training.
        resume: a checkpoint file, or the folder of a run: continue it as if it had never stopped, in its own
            folder or in a fresh one.
        config: the settings as nested dicts of plain values; kept in the folder and in the checkpoints.
        accelerator, devices, strategy: see ``lightning_fabric.Fabric``.
        precision: see there, such as 64 or ``"bf16-mixed"``; ``"auto"``: bf16-mixed on a GPU, 32-true elsewhere.
        deterministic: on a GPU, take algorithms that give the same bits each time, slower ones among them; without,
            two runs there differ as the order of their sums does. On the CPU runs are the same bit for bit anyway.
        gradient_clip: the largest norm of the gradient, longer ones are scaled down; ``None``: no limit.
        accumulate_batches: the number of batches whose gradients are averaged for one step: larger batches than fit
            into memory at once.
        ema_decay: of the moving average; 0 turns it off.
        log_every, validate_every, plot_every, checkpoint_every: in steps; all happen at the end of a stage as
            well, and 0 leaves it at that. ``plot_every=None``: no pictures at all.
        evaluation_batch_size: points a solve in validation and test.
        evaluation_points: the first points of validation and test, to evaluate on no more; ``None``: all of them.
        solver_error_points: test points whose NLL is computed again at tighter tolerances.
        loggers: further loggers, beside TensorBoard, ``metrics.jsonl`` and the progress bar.
        progress_bar: whether to show one.
        compile: run what training evaluates through torch.compile, see :func:`flows.training.compile.compiled`;
            ``"auto"``: on a GPU, the stages that can be.
        on_solver_error: ``"raise"`` when a batch cannot be solved, or ``"skip"`` it and take another; skipped ones are
            counted, and ``max_solver_errors`` in a row end the run with its state saved. Weights whose validation
            cannot be solved are passed over too.
        max_solver_errors: see ``on_solver_error``.
    """

    def __init__(
        self,
        flow: CNF,
        dataset: Dataset,
        stages: Mapping[str, Stage],
        optimizer: Callable[..., Optimizer] = torch.optim.Adam,
        *,
        output_dir: str | os.PathLike[str] | None = None,
        seed: int = 0,
        resume: str | os.PathLike[str] | None = None,
        config: Mapping[str, Any] | None = None,
        accelerator: str | Accelerator = "auto",
        devices: int | str | Sequence[int] = 1,
        strategy: str | Strategy = "auto",
        precision: str | int = "32-true",
        deterministic: bool = False,
        gradient_clip: float | None = 10.0,
        accumulate_batches: int = 1,
        ema_decay: float = 0.999,
        log_every: int = 20,
        validate_every: int = 2000,
        plot_every: int | None = 2000,
        checkpoint_every: int = 1000,
        evaluation_batch_size: int = 10_000,
        evaluation_points: int | None = None,
        solver_error_points: int = 2_000,
        loggers: Sequence[Logger] = (),
        progress_bar: bool = True,
        compile: bool | Literal["auto"] = False,
        on_solver_error: Literal["raise", "skip"] = "raise",
        max_solver_errors: int = 10,
    ) -> None:
        check_arguments(Trainer.__init__, locals())
        if not stages:
            raise InvalidValueError("stages must hold at least one Stage, got none")
        if seed < 0:
            raise InvalidValueError(f"seed must be a whole number >= 0, got {seed}")
        if gradient_clip is not None and not gradient_clip > 0:
            raise InvalidValueError(f"gradient_clip must be > 0, or None for no limit, got {gradient_clip}")
        if accumulate_batches < 1:
            raise InvalidValueError(f"accumulate_batches must be a whole number >= 1, got {accumulate_batches}")
        if evaluation_batch_size < 1:
            raise InvalidValueError(f"evaluation_batch_size must be a whole number >= 1, got {evaluation_batch_size}")
        if evaluation_points is not None and evaluation_points < 1:
            raise InvalidValueError(
                f"evaluation_points must be a whole number >= 1, or None for all, got {evaluation_points}"
            )
        if solver_error_points < 0:
            raise InvalidValueError(f"solver_error_points must be >= 0 (0: no solver error), got {solver_error_points}")
        for name in ("log_every", "validate_every", "plot_every", "checkpoint_every"):
            value = locals()[name]
            if not (value is None and name == "plot_every") and not value >= 0:
                raise InvalidValueError(f"{name} must be >= 0 steps (0: only at the end of a stage), got {value}")
        check_context_shape(flow, dataset)
        check_samples(dataset, stages)
        check_levels(flow.transform, dataset)
        self.policy = SolverErrorPolicy(on_solver_error, max_solver_errors)
        self.flow = flow
        self.dataset = dataset
        self.stages = dict(stages)
        self.gradient_clip = gradient_clip
        self.accumulate_batches = accumulate_batches
        self._every = {
            "log": log_every,
            "validate": validate_every,
            "plot": plot_every,
            "checkpoint": checkpoint_every,
        }
        self.seed = seed
        self.config = None if config is None else dict(config)
        self.fabric = build_fabric(accelerator, devices, strategy, precision)
        objectives = {name: stage.objective for name, stage in self.stages.items()}
        self._deterministic = deterministic
        self._compiled, self._notices = stages_to_compile(compile, self.fabric.device.type, flow, objectives)
        self.policy.check(self.fabric.world_size)
        self._checks_every_step = self.fabric.device.type == "cpu"  # a GPU would have to be waited for
        resumed = None if resume is None else find_checkpoint(resume, prefer="last")
        self._checkpoint = None if resumed is None else load_checkpoint(resumed)
        if resumed is not None:
            check_content(self._checkpoint, resumed, RUN)
        self._resumed_folder = None if resumed is None else own_run_folder(resumed)
        self._output_dir = self._resumed_folder if output_dir is None else Path(output_dir)
        self._new_state = lambda: RunState(self.fabric, flow, dataset, optimizer, ema_decay, seed)
        self._examiner = Examiner(
            dataset,
            self.fabric.device,
            seed,
            evaluation_batch_size,
            evaluation_points,
            solver_error_points,
            progress_bar,
        )
        self._reporting = {
            "extra_loggers": loggers,
            "progress_bar": progress_bar,
            "pictures": plot_every is not None,
        }

    def fit(self) -> Summary:
        """Train through all stages, then test the best weights; afterwards ``self.flow`` holds them.

        Returns:
            The figures that ``summary.json`` holds too.

        Raises:
            OutputFolderError: the folder cannot be written, or another run lives in it.
            TrainingInterrupted: SIGINT or SIGTERM came; the step was finished and ``last.pt`` written.
            NonFiniteLossError: the loss or its gradient is NaN or infinite.
            SolverError: a solve cannot go on, see ``on_solver_error``.
        """
        self.fabric.launch()
        with contextlib.ExitStack() as claim:
            self.folder = on_first_process(self.fabric, lambda: self._open_folder(claim))
            if self._deterministic:
                claim.enter_context(deterministic_algorithms())
            return self._fit()

    def _open_folder(self, claim: contextlib.ExitStack) -> Path:
        """The folder of the run with its settings in it, which is nobody else's until ``claim`` ends."""
        source, path = self._resumed_folder, self._output_dir
        in_place = source is not None and source.resolve() == path.resolve()
        folder = claim.enter_context(claimed_folder(path, in_place, self.dataset.name))
        if source is not None and not in_place:
            best = source / FOLDER / "best.pt"
            if not best.exists() or load_checkpoint(best).get("run") == self._checkpoint.get("run"):
                branch_run(source, folder)
        if self.config is not None:
            if "output_dir" in self.config:
                self.config["output_dir"] = str(folder)
            write_text(folder / "config.yaml", self._settings())
        return folder

    def _settings(self) -> str | None:
        return None if self.config is None else yaml.safe_dump(self.config, sort_keys=False)

    def _fit(self) -> Summary:
        torch.manual_seed(self.seed + self.fabric.global_rank)  # for fields with a dropout or the like
        loss = LossModule(self.flow)
        module = self.fabric.setup_module(loss)
        state = self._new_state()
        if self._checkpoint is not None:
            best = self.folder / FOLDER / "best.pt"
            state.resume(self._checkpoint, self.stages, load_checkpoint(best) if best.exists() else None)
        steps = {name: stage.steps for name, stage in self.stages.items()}
        reporter = Reporter(
            self.fabric,
            self.dataset,
            state,
            self.folder,
            steps,
            self._examiner,
            config=self.config,
            **self._reporting,
        )
        names = list(self.stages)
        step = OptimiserStep(
            self.fabric, module, loss, state, self.gradient_clip, self.policy, reporter.warn, self.accumulate_batches
        )
        with reporter, StopSignals() as stop:
            loop = Loop(
                self.fabric,
                step,
                reporter,
                stop,
                self.folder,
                self._settings(),
                foreign_packages(self.config),
                self._every,
                sum(steps.values()),
                self._checks_every_step,
            )
            for notice in self._notices:
                reporter.warn(notice)
            if state.position.stage == names[-1] and state.position.step_in_stage >= self.stages[names[-1]].steps:
                reporter.warn(
                    "nothing is left to train, so the best weights are only tested again; to train on, resume with "
                    f"more steps: objective.{names[-1]}.steps=..."
                )
            for index in range(names.index(state.position.stage or names[0]), len(names)):
                name, stage = names[index], self.stages[names[index]]
                if state.position.stage != name:
                    state.begin(index, name, stage)
                loss.objective, loss.generator = stage.objective, state.generator
                with compiled(self.flow, stage.objective) if name in self._compiled else contextlib.nullcontext():
                    loop.run(stage)
            try:
                stop.no_more_steps()
                return reporter.conclude(self.flow, loss.output and loss.output.statistics)
            except KeyboardInterrupt:
                raise loop.interrupted(stop.requested or signal.SIGINT) from None
