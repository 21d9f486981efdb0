"""One step of the optimiser, and what happens when a batch cannot be solved."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from flows.errors import InvalidValueError
from flows.solvers import SolverError, SolverStatistics
from flows.training.fabric import Fabric
from flows.training.loss import LossModule
from flows.training.state import RunState


@dataclass(frozen=True)
class SolverErrorPolicy:
    """What to do about a batch whose solve fails.

    Args:
        action: ``"raise"``, or ``"skip"``: leave the weights alone and take the next batch in its place.
        most: with "skip", how many failures in a row end the run, with its state saved.
    """

    action: Literal["raise", "skip"] = "raise"
    most: int = 10

    def __post_init__(self) -> None:
        if self.action not in ("raise", "skip"):
            raise InvalidValueError(f"on_solver_error must be 'raise' or 'skip', got {self.action!r}")
        if isinstance(self.most, bool) or not isinstance(self.most, int) or self.most < 1:
            raise InvalidValueError(f"max_solver_errors must be a whole number >= 1, got {self.most!r}")

    def check(self, world_size: int) -> None:
        """Raise ``ValueError`` where it does not work: processes that wait for each other's gradients."""
        if self.action == "skip" and world_size > 1:
            raise InvalidValueError(
                "on_solver_error='skip' works in one process, since the others would wait for the gradients of the "
                "one that skips; use on_solver_error='raise' on several devices"
            )


class OptimiserStep:
    """Draws a batch, differentiates its loss and follows the gradient.

    Args:
        fabric: launched.
        module: ``loss``, set up by Fabric.
        loss: what is minimised.
        state: of the run.
        gradient_clip: the largest norm of the gradient; ``None``: no limit.
        policy: see :class:`SolverErrorPolicy`.
        warn: told about each batch that is skipped.
        num_batches: whose gradients are averaged for one step.
    """

    def __init__(
        self,
        fabric: Fabric,
        module: nn.Module,
        loss: LossModule,
        state: RunState,
        gradient_clip: float | None,
        policy: SolverErrorPolicy,
        warn: Callable[[str], None],
        num_batches: int = 1,
    ) -> None:
        self.fabric = fabric
        self.module = module
        self.loss = loss
        self.state = state
        self.gradient_clip = gradient_clip
        self.policy = policy
        self.warn = warn
        self.num_batches = num_batches
        self.solves: list[SolverStatistics] = []  # of the last step

    def gradient(self) -> tuple[Tensor, Tensor]:
        """The loss of the next batches that can be solved, and the norm of its gradient before clipping.

        Raises:
            SolverError: a batch cannot be solved, with the policy "raise", or too many in a row cannot.
        """
        for failures in itertools.count(1):
            try:
                value = self._backward()
                break
            except SolverError as error:
                self._skip(error, failures)
        most = float("inf") if self.gradient_clip is None else self.gradient_clip
        norm = self.fabric.clip_gradients(self.module, self.state.optimizer, max_norm=most, error_if_nonfinite=False)
        return value, norm

    def _backward(self) -> Tensor:
        """The mean loss of the next batches, whose gradients add up to that of this mean."""
        total, metrics, self.solves = 0.0, [], []
        for k in range(self.num_batches):
            last = k == self.num_batches - 1
            self.loss.batch = self.state.stream.next()
            with self.fabric.no_backward_sync(self.module, enabled=not last and self.fabric.world_size > 1):
                value = self.module() / self.num_batches
                self.fabric.backward(value)
            total = total + value.detach()
            if self.loss.output.statistics is not None:
                self.solves.append(self.loss.output.statistics)
            if not last:  # those of the last one are read by the loop
                metrics.append(self.loss.metrics())
        for metric in metrics:
            self.state.means.add(metric)
        return total

    def follow(self) -> float:
        """Move the weights, their average and the schedule; the learning rate that was used."""
        state = self.state
        learning_rate = state.schedule.get_last_lr()[0]
        state.optimizer.step()
        state.schedule.step()
        state.optimizer.zero_grad()
        state.ema.update_parameters(state.flow)
        return learning_rate

    def _skip(self, error: SolverError, failures: int) -> None:
        """Go on after the batch that is the latest of so many failures in a row, or raise."""
        if self.policy.action == "raise":
            raise error
        self.state.optimizer.zero_grad()
        self.state.position.skipped += 1
        if failures == self.policy.most:
            message = f"{failures} batches in a row could not be solved (max_solver_errors), the last because {error}"
            raise error.retold(message) from error
        self.warn(f"a batch was skipped, number {self.state.position.skipped} of this run: {error}")
