"""A stage of a run: what is minimised, for how long and how fast."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from flows.arguments import checked
from flows.checks import FASTEST_STEP, can_be_finished, check_number, whole_number
from flows.errors import InvalidTypeError, InvalidValueError
from flows.naming import by_name, concrete_subclasses
from flows.objectives import Objective

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
DEFAULTS = {"batch_size": 512, "learning_rate": 1e-3, "warmup_steps": 0}  # of objectives that recommend nothing


def _optimizer_named(name: str) -> Callable[..., Optimizer]:
    """The optimiser of torch with that lower-case name.

    Raises:
        InvalidValueError: there is none; the message lists those that there are.
    """
    kinds = [kind for kind in concrete_subclasses(Optimizer) if kind.__module__.startswith("torch.optim.")]
    found: dict[str, Callable[..., Optimizer]] = {kind.__name__.lower(): kind for kind in kinds}
    if name.lower() not in found:
        raise InvalidValueError(f"optimizer: torch has no {name!r}; expected one of {', '.join(sorted(found))}")
    return found[name.lower()]


@checked
@dataclass(frozen=True)
class Stage:
    """What is minimised, for how long and how fast.

    The learning rate rises linearly during `warmup_steps` and then follows `learning_rate * schedule(done)`. Here
    `done` runs from 0 to 1 over the remaining steps, or over the seconds of a stage that ends by time.

    Args:
        objective: called as `objective(model, batch, generator)`, or the name of one, such as `"flow_matching"`.
        steps: number of optimiser steps; give either this or `seconds`.
        seconds: time to train for; validation, pictures and checkpoints do not count.
        batch_size: training examples in one step, of all devices together; None: as the objective recommends.
        learning_rate: the highest of the stage; None: as the objective recommends.
        warmup_steps: steps of linear warm-up; None: as the objective recommends, but at most a tenth of `steps`.
        schedule: `"cosine"` (to zero), `"constant"`, or a function of `done`.
        optimizer: called as `optimizer(parameters, lr=...)` at the start of the stage, or the name of one of torch's;
            None: that of `Optimization`.
        patience: end the stage early when no validation of the last so many steps was better than all before; None:
            never.

    Raises:
        ValueError: a number is out of its range, or there is no schedule of that name.

    Example:
        ```python
        import flows
        from flows.objectives import FlowMatching, MaximumLikelihood

        stages = {
            "flow_matching": flows.training.Stage(FlowMatching(), steps=1000, batch_size=512, learning_rate=3e-3),
            "likelihood": flows.training.Stage(MaximumLikelihood(), seconds=60),
        }
        ```
    """

    objective: Objective | Callable | str
    steps: int | None = None
    seconds: float | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    warmup_steps: int | None = None
    schedule: str | Callable[[float], float] = "cosine"
    optimizer: Callable[..., Optimizer] | str | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.objective, str):
            object.__setattr__(self, "objective", by_name(Objective, self.objective, "objective"))
        if isinstance(self.optimizer, str):
            object.__setattr__(self, "optimizer", _optimizer_named(self.optimizer))
        if not callable(self.objective):
            raise InvalidTypeError(
                f"objective must be callable as objective(model, batch, generator), got {self.objective!r}"
            )
        if self.optimizer is not None and not callable(self.optimizer):
            raise InvalidTypeError(
                f"optimizer must be callable as optimizer(parameters, lr=...), or None for that of Optimization, got "
                f"{self.optimizer!r}; an optimiser that is built already knows no later stage's learning rate"
            )
        if (self.steps is None) == (self.seconds is None):
            raise InvalidValueError(
                f"give either steps or seconds, got steps={self.steps!r} and seconds={self.seconds!r}"
            )
        if self.steps is not None:
            whole_number("steps", self.steps, 1)
            can_be_finished(f"steps: {self.steps:,} steps", FASTEST_STEP * self.steps)
        else:
            check_number("seconds", self.seconds, above=0)
            can_be_finished(f"seconds: {self.seconds:g} seconds", float(self.seconds))  # type: ignore[arg-type]
        recommended = {**DEFAULTS, **getattr(self.objective, "recommended", {})}
        if self.steps is not None:
            recommended["warmup_steps"] = min(recommended["warmup_steps"], self.steps // 10)
        for name, value in recommended.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.patience is not None:
            whole_number("patience", self.patience, 1, otherwise="None never ends the stage early")
        whole_number("batch_size", self.batch_size, 1)
        whole_number("warmup_steps", self.warmup_steps, 0)
        check_number("learning_rate", self.learning_rate, above=0)
        if self.steps is not None and self.num_warmup_steps >= self.steps:
            raise InvalidValueError(
                f"warmup_steps must be smaller than steps={self.steps}, got {self.warmup_steps}: "
                "the stage would end before its learning rate is reached; lower warmup_steps as well"
            )
        if not callable(self.schedule) and self.schedule not in SCHEDULES:
            raise InvalidValueError(
                f"schedule must be one of {', '.join(SCHEDULES)} or a function, got {self.schedule!r}"
            )

    @property
    def peak_learning_rate(self) -> float:
        """`learning_rate`, which is never None once the stage is built."""
        assert self.learning_rate is not None
        return self.learning_rate

    @property
    def num_warmup_steps(self) -> int:
        """`warmup_steps`, which is never None once the stage is built."""
        assert self.warmup_steps is not None
        return self.warmup_steps

    @property
    def examples(self) -> int:
        """`batch_size`, which is never None once the stage is built."""
        assert self.batch_size is not None
        return self.batch_size

    def done(self, step: int, seconds: float = 0.0) -> float:
        """Return the share of the stage that is over after `step` steps, which took `seconds`."""
        return step / self.steps if self.steps is not None else min(1.0, seconds / self.seconds)  # type: ignore[operator]

    def learning_rate_factor(self, step: int, seconds: float = 0.0) -> float:
        """Return the multiple of `learning_rate` for the step after so many steps and seconds of the stage."""
        warmup = self.num_warmup_steps
        if step < warmup:
            return (step + 1) / (warmup + 1)
        schedule = self.schedule if callable(self.schedule) else SCHEDULES[self.schedule]
        return schedule(self.done(step, seconds) if self.steps is None else (step - warmup) / (self.steps - warmup))

    def __str__(self) -> str:
        return f"{self.steps} steps" if self.steps is not None else f"{self.seconds:g} seconds"


@checked
@dataclass(frozen=True)
class Optimization:
    """How gradients become weights.

    Args:
        optimizer: called as `optimizer(parameters, lr=...)` at the start of each stage without one of its own; or the
            name of one of torch's, such as `"adamw"`.
        gradient_clip: largest norm of the gradient, longer ones are scaled down; None: no limit.
        accumulate_batches: number of batches whose gradients are averaged for one step, for larger batches than fit
            into memory.
        ema_decay: of the moving average of the weights, which is validated and kept; 0 turns it off.
        on_solver_error: `"raise"` when a batch cannot be solved, or `"skip"` it and take the next one. Weights whose
            validation cannot be solved are then passed over, too; in several processes they end the run.
        max_solver_errors: stop after so many failures in a row, with the state saved.

    Raises:
        ValueError: a number is out of its range.

    Example:
        ```python
        import torch

        import flows

        adamw = lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-2)
        optimization = flows.training.Optimization(optimizer=adamw, ema_decay=0.99)
        ```
    """

    optimizer: Callable[..., Optimizer] | str = torch.optim.Adam
    gradient_clip: float | None = 10.0
    accumulate_batches: int = 1
    ema_decay: float = 0.999
    on_solver_error: Literal["raise", "skip"] = "raise"
    max_solver_errors: int = 10

    def __post_init__(self) -> None:
        if isinstance(self.optimizer, str):
            object.__setattr__(self, "optimizer", _optimizer_named(self.optimizer))
        if not callable(self.optimizer):
            raise InvalidTypeError(
                f"optimizer must be callable as optimizer(parameters, lr=...), got {self.optimizer!r}"
            )
        if self.gradient_clip is not None:
            check_number("gradient_clip", self.gradient_clip, above=0, otherwise="None sets no limit")
        whole_number("accumulate_batches", self.accumulate_batches, 1)
        each = FASTEST_STEP * self.accumulate_batches
        can_be_finished(f"accumulate_batches: a step of {self.accumulate_batches:,} batches", each)
        check_number("ema_decay", self.ema_decay, at_least=0, below=1, otherwise="0 turns the averaging off")
        if self.on_solver_error not in ("raise", "skip"):
            raise InvalidValueError(f"on_solver_error must be 'raise' or 'skip', got {self.on_solver_error!r}")
        whole_number("max_solver_errors", self.max_solver_errors, 1)

    def optimizer_of(self, stage: Stage) -> Callable[..., Optimizer]:
        """What builds the optimiser of a stage: its own, or the one of all stages."""
        chosen = stage.optimizer or self.optimizer
        assert callable(chosen), "names have become classes"
        return chosen

    def check(self, model: nn.Module, world_size: int) -> None:
        """Raise `InvalidValueError` where skipping does not work: where solves fail while gradients are exchanged."""
        solvers = [getattr(module, "solver", None) for module in model.modules()]  # also of a base that is a flow
        adjoint = any(getattr(solver, "gradient", None) == "adjoint" for solver in solvers)
        if self.on_solver_error == "skip" and world_size > 1 and adjoint:
            raise InvalidValueError(
                "on_solver_error='skip' with gradient='adjoint' works in one process, since a backward solve may fail "
                "when processes have exchanged some of the gradients; use gradient='checkpoint', which needs little "
                "memory as well, or on_solver_error='raise'"
            )
