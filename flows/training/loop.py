"""The steps of a stage: draw a batch, differentiate, move the weights, and look at them now and then."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from flows.bases import Base
from flows.errors import ComputationError, FlowsError, InvalidValueError
from flows.evaluation import Evaluation
from flows.shares import Share, sharing
from flows.solvers import SolverError, SolverStatistics
from flows.training.fabric import SharedEvaluationError, evaluated_together, share_of
from flows.training.files import FOLDER, RunFileError
from flows.training.loss import LossModule
from flows.training.memory import MemoryLimitError, is_out_of_memory, memory_errors, memory_message
from flows.training.signals import StopSignals, TrainingInterrupted
from flows.training.stage import Optimization, Stage
from flows.training.state import Run


class NonFiniteLossError(FlowsError, ArithmeticError):
    """The loss or its gradient is NaN or infinite; the weights of the step before are kept."""


class OptimizerStep:
    """Draws a batch, differentiates its loss and follows the gradient.

    Args:
        run: whose model is trained.
        loss: of that model.
        module: the same, set up by Fabric.
        optimization: clipping, accumulation, and what to do about a batch that cannot be solved.
    """

    def __init__(self, run: Run, loss: LossModule, module: Any, optimization: Optimization) -> None:
        self.run = run
        self.state = run.state
        self.fabric = run.fabric
        self.optimization = optimization
        self.loss = loss
        self.module = module
        self.share: Share | None = None  # of each batch; None: all of it

    def begin(self, stage: Stage) -> None:
        """Minimise the objective of this stage from now on."""
        together = share_of(self.fabric)
        self.loss.begin(stage.objective, self.state.generator, together)
        self.share = together if getattr(stage.objective, "shares", False) else None
        if self.share is None and together is not None:
            name = getattr(stage.objective, "__name__", type(stage.objective).__name__)
            self.run.warn(
                f"{name} does not share batches: each of the {self.fabric.world_size} processes computes all of each "
                "batch, and the run is as fast as with one"
            )

    def gradient(self) -> tuple[Tensor, Tensor]:
        """Differentiate the next batches that can be solved; return their loss and the norm of its gradient.

        The norm is that before clipping.

        Raises:
            SolverError: a batch cannot be solved, or too many in a row cannot if failures are skipped.
        """
        for failures in itertools.count(1):
            try:
                value = self._backward()
                break
            except SolverError as error:
                self._skip(error, failures)
        clip = self.optimization.gradient_clip
        norm = self.fabric.clip_gradients(
            self.module,
            self.state.fabric_optimizer,
            max_norm=float("inf") if clip is None else clip,
            error_if_nonfinite=False,
        )
        return value, norm  # type: ignore[return-value]

    def _backward(self) -> Tensor:
        """Return the mean loss of the next batches, whose gradients add up to that of this mean."""
        number = self.optimization.accumulate_batches
        total: Tensor | float = 0.0
        metrics, solves = [], []
        for k in range(number):
            last = k == number - 1
            self.loss.batch = self.state.stream.next()
            several = self.fabric.world_size > 1
            with self.fabric.no_backward_sync(self.module, enabled=not last and several), sharing(self.share):
                value = self.module() / number
                self.fabric.backward(value)
            self.loss.leave_idle()
            total = total + value.detach()
            if self.loss.output.statistics is not None:
                solves.append(self.loss.output.statistics)
            if not last:  # the loop reads those of the last one
                metrics.append((self.loss.metrics(), self.loss.output.weight))
        for metric, weight in metrics:
            self.state.means.add(metric, weight)
        self.run.solves = solves
        return total  # type: ignore[return-value]

    def follow(self, factor: float) -> None:
        """Move the weights and their average, at this multiple of the learning rate."""
        state = self.state
        self.run.learning_rate = state.set_learning_rate(factor)
        state.fabric_optimizer.step()
        state.fabric_optimizer.zero_grad()
        state.ema.update_parameters(state.model)

    def _skip(self, error: SolverError, failures: int) -> None:
        """Skip the failed batch; raise after too many."""
        if self.optimization.on_solver_error == "raise":
            raise error
        self.state.fabric_optimizer.zero_grad()
        self.state.position.skipped += 1
        if failures == self.optimization.max_solver_errors:
            message = f"{failures} batches in a row could not be solved (max_solver_errors), the last because {error}"
            raise error.retold(message) from error
        self.run.warn(f"a batch was skipped, number {self.state.position.skipped} of this run: {error}")


class Loop:
    """Takes the steps of a stage, validates between them, and stops on a signal.

    Callbacks hear of everything that happens: `on_optimizer_step` when the weights have moved, `on_validation_end`
    when the evaluator has judged them, `on_step_end` when all of a step is done, and `on_failure`, with the state after
    the last whole step, when something failed.

    Args:
        run: whose model is trained.
        step: draws batches and moves the weights.
        stop: asked after each step.
        packages: to pass as `trust=` when resuming.
    """

    def __init__(self, run: Run, step: OptimizerStep, stop: StopSignals, packages: list[str]) -> None:
        self.run = run
        self.fabric = run.fabric
        self.state = run.state
        self.step = step
        self.stop = stop
        self.packages = packages
        self.last = run.folder / FOLDER / "last.pt"
        self._solve: SolverStatistics | None = None  # of the last validation
        # Looking at each loss would make the program wait for a GPU.
        self.checks_every_step = run.fabric.device.type == "cpu"

    def train(self, stage: Stage) -> None:
        """Take the steps of the stage that are left.

        Raises:
            TrainingInterrupted, NonFiniteLossError, SolverError: see `Trainer.fit`.
        """
        run, position = self.run, self.state.position
        self.step.begin(stage)
        started = time.perf_counter() - position.seconds
        run.stage_is_over = stage.done(position.step_in_stage, position.seconds_in_stage) >= 1
        if position.step_in_stage == 0:
            run.call("on_save")
            if position.step == 0 and position.validated is None and knows_the_data(run.model):
                with self._signals_at_once():
                    self._validate(stage)  # training may end no better than it began
        else:
            self._look(stage)  # the process that came here first died before it could
        while not run.stage_is_over:
            stopping = self._take_step(stage)
            position.seconds = time.perf_counter() - started
            with self._saving_after_failures():
                run.call("on_optimizer_step")
            if stopping:  # who sent the signal may not wait for more; a resumed run looks at this step first
                raise self.interrupted()
            with self._saving_after_failures():
                self._look(stage)
            position.seconds = time.perf_counter() - started

    def interrupted(self) -> KeyboardInterrupt:
        """Return what to raise when a signal stops the run."""
        step, saved = self.run.position.step, self.run.saved
        if self.stop.requested is None or saved is None:
            return KeyboardInterrupt()
        return TrainingInterrupted(self.last, saved, self.stop.requested, self.packages, step - saved)

    def stop_together(self) -> None:
        """End all processes of the run if one of them has noticed a signal.

        Raises:
            TrainingInterrupted: it has.
        """
        if self.fabric.world_size > 1 and self.agree()[0]:
            raise self.interrupted()

    def _look(self, stage: Stage) -> None:
        """Validate, draw, and whatever else comes after a step; a signal ends it at once if this step is saved."""
        run, position = self.run, self.state.position
        with self._signals_at_once():
            if run.due("validate") and position.validated != position.step:
                self._validate(stage)
            if stage.patience is not None and position.validated == position.step:
                since = position.step - max(position.best_step or 0, position.stage_starts[-1])
                run.stage_is_over |= since >= stage.patience
            run.call("on_step_end")

    def _signals_at_once(self) -> contextlib.AbstractContextManager[None]:
        """While entered, a signal ends the run at once if this step is saved."""
        at_once = self.run.saved == self.state.position.step and self.fabric.world_size == 1
        return self.stop.at_once() if at_once else contextlib.nullcontext()

    @contextlib.contextmanager
    def _saving_after_failures(self) -> Iterator[None]:
        """While entered, save the state if anything fails, be it a callback of the user's."""
        try:
            yield
        except RunFileError:
            raise
        except Exception:
            if self.fabric.world_size == 1 and self.run.saved != self.state.position.step:
                with contextlib.suppress(Exception):  # what went wrong first is what to tell
                    self.run.call("on_failure")
            raise

    def _take_step(self, stage: Stage) -> bool:
        """Move the weights once; return whether a signal stops the run after this step."""
        run, state, step, position = self.run, self.state, self.step, self.state.position
        begun = time.perf_counter()
        factor = stage.learning_rate_factor(position.step_in_stage, position.seconds_in_stage)
        position.step_in_stage += 1
        position.step += 1
        try:
            value, norm = step.gradient()
        except KeyboardInterrupt:  # this step is not done
            position.step_in_stage -= 1
            position.step -= 1
            raise
        except Exception as error:
            if isinstance(error, SolverError) and not state.is_finite():  # they followed a gradient that nobody saw
                raise self._diverged("the weights are not finite", stage) from error
            self._save_before()
            if isinstance(error, SolverError):
                raise error.retold(self._where("training", error, stage)) from error
            if is_out_of_memory(error):
                cure = "; in a new run, choose a smaller batch_size, and accumulate_batches for the same gradient"
                raise MemoryLimitError(self._where("training", memory_message(error), stage) + cure) from error
            raise
        elapsed = self._elapsed(stage, begun)
        run.stage_is_over = stage.done(position.step_in_stage, position.seconds_in_stage + elapsed) >= 1
        run.stopping, run.overdue = self.agree()
        looks = run.stopping or any(run.due(what) for what in ("log", "validate", "plot", "checkpoint"))
        if self.checks_every_step or looks:
            self._check_finite(value, norm, stage)
        step.follow(factor)
        state.means.add(step.loss.metrics() | {"gradient_norm": norm}, step.loss.output.weight)
        position.seconds_in_stage += elapsed if stage.steps is None else time.perf_counter() - begun
        return run.stopping

    def _elapsed(self, stage: Stage, begun: float) -> float:
        """Return the seconds since `begun`; in a stage that ends by time all processes agree on them."""
        if stage.steps is None and self.fabric.device.type == "cuda":
            torch.cuda.synchronize(self.fabric.device)
        elapsed = time.perf_counter() - begun
        if stage.steps is not None or self.fabric.world_size == 1:
            return elapsed
        return float(self.fabric.all_reduce(torch.tensor(elapsed, device=self.fabric.device), reduce_op="max"))  # type: ignore[arg-type]

    def _validate(self, stage: Stage) -> None:
        """Look at the validation part; a run that goes on from the state saved now need not do it again."""
        run, position = self.run, self.state.position
        evaluation, best = None, False
        run.call("on_validation_start")
        try:
            with run.aside():
                evaluation = evaluated_together(self.fabric, self.run.evaluator, self._evaluate)
                evaluation = replace(evaluation, statistics=self._solve)
            if evaluation.unresolved is not None:
                run.warn(f"the validation is unresolved, so these weights cannot be the best: {evaluation.unresolved}")
            else:
                best = position.best_score is None or evaluation.score < position.best_score
            if best:
                position.best_score, position.best_step = evaluation.score, position.step
        except SharedEvaluationError:
            raise  # the other processes would wait without end
        except FlowsError as error:
            message = self._where("validation", error, stage)
            if position.step == 0 and not isinstance(error, MemoryLimitError):
                pass  # training may mend the weights
            elif not isinstance(error, SolverError):
                kind = ComputationError if isinstance(error, ComputationError) else InvalidValueError
                raise kind(message) from error
            elif self.step.optimization.on_solver_error == "raise":
                raise error.retold(message) from error
            run.warn(f"these weights were not compared with the best: {message}")
        position.validated = position.step
        run.call("on_validation_end", evaluation, best)

    def _evaluate(self) -> Evaluation:
        average = self.state.ema
        training = average.training
        average.eval()
        try:
            with memory_errors("validation", "choose a smaller evaluation.batch_size"):
                found = self.run.evaluator.validate(average.module)
        finally:
            average.train(training)
        if not abs(found.score) < float("inf"):
            name = type(self.run.evaluator).__name__
            raise InvalidValueError(f"{name} found the score {found.score}, which is no finite number")
        self._solve = found.statistics
        return replace(found, statistics=None)  # not sent to other processes

    def _save_before(self) -> None:
        """Save the weights that the step which has just failed started from.

        A run that goes on from there draws other batches than those that failed. Of several processes one may have
        failed alone, and would wait without end for the others to save with it; then nothing is saved.
        """
        if self.fabric.world_size > 1:
            return
        position = self.state.position
        self.state.position = replace(position, step=position.step - 1, step_in_stage=position.step_in_stage - 1)
        with contextlib.suppress(Exception):  # what went wrong first is what to tell
            self.run.call("on_failure")
        self.state.position = position

    def agree(self) -> tuple[bool, bool]:
        """Return whether to stop because of a signal, and whether to save because minutes are over.

        All processes get the same answer: whether any of them has noticed it.
        """
        minutes, stop = self.run.reporting.checkpoint_minutes, self.stop
        overdue = minutes is not None and self.run.unsaved_seconds >= 60 * minutes
        if self.fabric.world_size == 1:
            return stop.requested is not None, overdue
        noticed = torch.tensor([float(stop.requested or 0), float(overdue)], device=self.fabric.device)
        number, late = self.fabric.all_reduce(noticed, reduce_op="max").tolist()  # type: ignore[union-attr]
        if number and stop.requested is None:
            stop.requested = int(number)
        return bool(number), bool(late)

    def _check_finite(self, loss: Tensor, gradient_norm: Tensor, stage: Stage) -> None:
        if bool(loss.isfinite() & gradient_norm.isfinite()):
            return
        if self.checks_every_step:  # else the weights may have followed such a gradient before
            self._save_before()
        what = "its gradient is not finite" if bool(loss.isfinite()) else f"the loss is {loss.item()}"
        raise self._diverged(what, stage)

    def _diverged(self, what: str, stage: Stage) -> NonFiniteLossError:
        return NonFiniteLossError(
            f"training diverged: {what} {self._place(stage)}. In a new run, try a lower learning_rate (now "
            f"{stage.learning_rate:g}), more warmup_steps (now {stage.warmup_steps}), a smaller gradient_clip (now "
            f"{self.step.optimization.gradient_clip}), or tighter solver tolerances"
        )

    def _where(self, what: str, error: object, stage: Stage) -> str:
        return f"{what} stopped {self._place(stage)}: {error}"

    def _place(self, stage: Stage) -> str:
        """Say at which step the run is, and what it can be resumed from."""
        position = self.state.position
        exactly = "at" if self.checks_every_step else "at or shortly before"
        saved = f"; the state to resume from is in {self.last}" if self.last.exists() else ""
        total = "" if stage.steps is None else f" of {stage.steps}"
        in_stage = f"step {position.step_in_stage}{total} in the stage {position.stage}"
        return f"{exactly} step {position.step} ({in_stage}{saved})"


def knows_the_data(model: nn.Module) -> bool:
    """Return whether the model may suit the data before it is trained: a flow that starts elsewhere than at N(0, I)."""
    base = getattr(model, "base", None)
    return isinstance(base, Base) and (not base.is_standard or base.context_shape is not None)
