"""One stage of a run: an objective with its own number of steps, batch size and learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from flows.errors import InvalidTypeError, InvalidValueError
from flows.objectives import Objective

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


@dataclass(frozen=True)
class Stage:
    """What is minimised, for how long and how fast.

    The learning rate rises linearly to ``learning_rate`` during ``warmup_steps`` and then follows
    ``learning_rate * schedule(done)``, where ``done`` runs from 0 to 1 over the steps that remain.

    Args:
        objective: called as ``objective(flow, batch, generator)``.
        steps: number of optimiser steps.
        batch_size: training points a step (on each device).
        learning_rate: the highest learning rate of the stage.
        warmup_steps: steps of linear warm-up, part of ``steps``.
        schedule: ``"cosine"`` (to zero), ``"constant"``, or a function of ``done``.
        optimizer: called as ``optimizer(parameters, lr=...)`` at the start of the stage; ``None``: that of the trainer.

    Raises:
        ValueError: a number is out of its range, or the schedule has no such name.
    """

    objective: Objective
    steps: int
    batch_size: int = 512
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    schedule: str | Callable[[float], float] = "cosine"
    optimizer: Callable[..., Optimizer] | None = None

    def __post_init__(self) -> None:
        if not callable(self.objective):
            raise InvalidTypeError(
                f"objective must be callable as objective(flow, batch, generator), got {self.objective!r}"
            )
        if self.optimizer is not None and not callable(self.optimizer):
            raise InvalidTypeError(
                f"optimizer must be callable as optimizer(parameters, lr=...), or None for that of the trainer, got "
                f"{self.optimizer!r}; an optimiser that is built already knows no later stage's learning rate"
            )
        for name, least in (("steps", 1), ("batch_size", 1), ("warmup_steps", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidValueError(f"{name} must be a whole number >= {least}, got {value!r}")
        if isinstance(self.learning_rate, str) or not 0 < self.learning_rate < math.inf:
            raise InvalidValueError(f"learning_rate must be a positive number, got {self.learning_rate!r}")
        if self.warmup_steps >= self.steps:
            raise InvalidValueError(
                f"warmup_steps must be smaller than steps={self.steps}, got {self.warmup_steps}: "
                "the stage would end before its learning rate is reached"
            )
        if not callable(self.schedule) and self.schedule not in SCHEDULES:
            raise InvalidValueError(
                f"schedule must be one of {', '.join(SCHEDULES)} or a function, got {self.schedule!r}"
            )

    def learning_rate_factor(self, step: int) -> float:
        """The multiple of ``learning_rate`` that step number ``step`` (from 0) of the stage uses."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        schedule = self.schedule if callable(self.schedule) else SCHEDULES[self.schedule]
        return schedule((step - self.warmup_steps) / (self.steps - self.warmup_steps))

    def scheduler(self, optimizer: Optimizer) -> LambdaLR:
        """The schedule of this stage on ``optimizer``; it is stepped after each optimiser step."""
        return LambdaLR(optimizer, self.learning_rate_factor)
