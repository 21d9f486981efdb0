"""The steps of a stage, and what happens between them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from flows.solvers import SolverError
from flows.training.checkpoint import FOLDER, save_checkpoint
from flows.training.fabric import Fabric
from flows.training.loss import NonFiniteLossError
from flows.training.reporting import Reporter
from flows.training.stage import Stage
from flows.training.step import OptimiserStep
from flows.training.stopping import StopSignals, TrainingInterrupted


class Loop:
    """Takes the steps of a stage; logs, validates, draws and saves between them, and stops on a signal.

    Args:
        fabric: launched.
        step: draws batches and moves the weights.
        reporter: told about what happens.
        stop: asked after each step.
        folder: of the run.
        settings: of the run, as yaml text for its checkpoints.
        packages: to be trusted by who continues the run.
        every: "log", "validate", "plot" and "checkpoint", in steps; each happens at the end of a stage as well.
        total: steps of all stages.
        checks_every_step: look at each loss; otherwise only before something is logged or saved, since looking makes
            the program wait for a GPU.
    """

    def __init__(
        self,
        fabric: Fabric,
        step: OptimiserStep,
        reporter: Reporter,
        stop: StopSignals,
        folder: Path,
        settings: str | None,
        packages: list[str],
        every: Mapping[str, int | None],
        total: int,
        checks_every_step: bool,
    ) -> None:
        self.fabric = fabric
        self.step = step
        self.state = step.state
        self.reporter = reporter
        self.stop = stop
        self.last = folder / FOLDER / "last.pt"
        self.settings = settings
        self.packages = packages
        self.every = every
        self.total = total
        self.checks_every_step = checks_every_step

    def run(self, stage: Stage) -> None:
        """Take the steps of the stage that are left.

        Raises:
            TrainingInterrupted, NonFiniteLossError, SolverError: see :meth:`flows.training.Trainer.fit`.
        """
        state, step, reporter = self.state, self.step, self.reporter
        position, loss = state.position, step.loss
        started = time.perf_counter() - position.seconds
        if position.step_in_stage and position.validated != position.step and self._due("validate", stage):
            self._validate(stage)  # the process that came here first died before it could
        while position.step_in_stage < stage.steps:
            position.step_in_stage += 1
            position.step += 1
            try:
                value, norm = step.gradient()
            except SolverError as error:
                if not self.state.is_finite():  # they followed a gradient that nobody looked at
                    raise self._diverged("the weights are not finite", stage) from error
                self._save_before()
                raise self._told_where("training", error, stage) from error
            log, validate, plot, save = (self._due(name, stage) for name in ("log", "validate", "plot", "checkpoint"))
            stopping = self._agree(self.stop.requested)
            save = save or validate or plot or bool(stopping)
            if self.checks_every_step or log or save:
                self._check_finite(value, norm, stage)
            learning_rate = step.follow()

            state.means.add(loss.metrics() | {"gradient_norm": norm})
            position.seconds = time.perf_counter() - started
            for solve in step.solves:
                if warning := state.watch(solve):
                    reporter.warn(warning)
                    reporter.plot_solve(solve)
            reporter.advance()
            if log:
                reporter.log_training(learning_rate)
            if save:  # before what may fail
                self._save("last")
            if validate:
                self._validate(stage)
            if plot and position.step < self.total:  # the best weights are drawn after the last step
                reporter.plot(statistics=loss.output.statistics)
            position.seconds = time.perf_counter() - started
            if stopping:
                raise self.interrupted(stopping)

    def interrupted(self, signal_number: int) -> TrainingInterrupted:
        """What to raise when a signal stops the run after the last state was saved."""
        return TrainingInterrupted(self.last, self.state.position.step, signal_number, self.packages)

    def _due(self, name: str, stage: Stage) -> bool:
        position, every = self.state.position, self.every[name]
        return position.step_in_stage == stage.steps or bool(every and position.step % every == 0)

    def _validate(self, stage: Stage) -> None:
        """Look at the validation part; a run that goes on from the state saved now need not do it again."""
        position = self.state.position
        try:
            if self.reporter.validate():
                self._save("best")
        except (SolverError, ValueError) as error:
            told = self._told_where("validation", error, stage)
            if self.step.policy.action == "raise" or not isinstance(error, SolverError):
                raise told from error
            self.reporter.warn(f"these weights were not compared with the best: {told}")
        position.validated = position.step
        self._save("last")

    def _save(self, name: str) -> None:
        content = {"config": self.settings, **self.state.state_dict()}
        if self.fabric.is_global_zero:
            save_checkpoint(self.last.with_name(f"{name}.pt"), content)
        self.fabric.barrier()

    def _save_before(self) -> None:
        """Save as ``last`` the weights that the step which has just failed started from.

        A run that goes on from there draws other batches than those that failed. Of several processes one may have
        failed alone, and would wait for ever for the others to save with it, so that nothing is saved.
        """
        if self.fabric.world_size > 1:
            return
        position = self.state.position
        self.state.position = replace(position, step=position.step - 1, step_in_stage=position.step_in_stage - 1)
        self._save("last")
        self.state.position = position

    def _agree(self, signal_number: int | None) -> int:
        """The signal that some process has received, 0 if none: all stop after the same step."""
        if self.fabric.world_size == 1:
            return signal_number or 0
        received = torch.tensor(float(signal_number or 0), device=self.fabric.device)
        return int(self.fabric.all_reduce(received, reduce_op="max"))

    def _check_finite(self, loss: Tensor, gradient_norm: Tensor, stage: Stage) -> None:
        if bool(loss.isfinite() & gradient_norm.isfinite()):
            return
        if self.checks_every_step:  # else the weights may have followed such a gradient before
            self._save_before()
        what = "its gradient is not finite" if bool(loss.isfinite()) else f"the loss is {loss.item()}"
        raise self._diverged(what, stage)

    def _diverged(self, what: str, stage: Stage) -> NonFiniteLossError:
        return NonFiniteLossError(
            f"training diverged: {what} {self._where(stage)}. Try a lower learning_rate (now "
            f"{stage.learning_rate:g}), more warmup_steps (now {stage.warmup_steps}), a smaller gradient_clip (now "
            f"{self.step.gradient_clip}), or tighter solver tolerances"
        )

    def _told_where(self, what: str, error: SolverError | ValueError, stage: Stage) -> Exception:
        message = f"{what} stopped {self._where(stage)}: {error}"
        return error.retold(message) if isinstance(error, SolverError) else ValueError(message)

    def _where(self, stage: Stage) -> str:
        """The step in words, and what can be gone back to."""
        position = self.state.position
        exactly = "at" if self.checks_every_step else "at or shortly before"
        saved = f"; the state to resume from is in {self.last}" if self.last.exists() else ""
        return (
            f"{exactly} step {position.step} (step {position.step_in_stage} of {stage.steps} in the stage "
            f"{position.stage}{saved})"
        )
