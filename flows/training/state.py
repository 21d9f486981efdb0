"""Everything that training changes: what a checkpoint holds."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from flows.datasets import Dataset, NoData
from flows.errors import InvalidValueError
from flows.models.cnf import CNF
from flows.solvers.problem import all_finite
from flows.training.checkpoint import CheckpointError
from flows.training.ema import ExponentialMovingAverage
from flows.training.fabric import Fabric
from flows.training.metrics import MetricMeans
from flows.training.stage import Stage
from flows.training.watch import EvaluationWatch


@dataclass
class Position:
    """Where a run stands."""

    stage: str | None = None  # None: before the first
    step_in_stage: int = 0  # steps done
    step: int = 0  # steps done over all stages
    best_nll: float | None = None  # the lowest on the validation part, nats; of an energy, the free energy
    best_step: int | None = None
    validated: int | None = None  # the step whose weights were last validated
    skipped: int = 0  # batches that could not be solved
    seconds: float = 0.0  # spent in training, validation and pictures included


class RunState:
    """The flow, its average, and all that moves while a stage runs.

    Args:
        fabric: launched.
        flow: on its device.
        dataset: where the batches come from.
        optimizer: called as ``optimizer(parameters, lr=...)`` at the start of each stage without one of its own.
        ema_decay: see :class:`ExponentialMovingAverage`.
        seed: each stage draws its data and its probes from generators seeded by this, the stage's place and
            the rank of the process.
    """

    optimizer: Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler

    def __init__(
        self,
        fabric: Fabric,
        flow: CNF,
        dataset: Dataset,
        optimizer: Callable[..., Optimizer],
        ema_decay: float,
        seed: int,
    ) -> None:
        self.fabric = fabric
        self.flow = flow
        self.dataset = dataset
        self.ema = ExponentialMovingAverage(flow, ema_decay)
        self.position = Position()
        self.run = uuid.uuid4().hex  # tells this run's checkpoints from those of any other
        self.means = MetricMeans()
        self.watch = EvaluationWatch()
        self.generator = torch.Generator(fabric.device)  # of the objective
        self._new_optimizer = optimizer
        self._seed = seed

    def begin(self, index: int, name: str, stage: Stage) -> None:
        """Set up a stage: new optimiser, schedule, data stream and generators.

        Every stage but the first starts from the averaged weights, which are better than the last ones.
        """
        if self.position.stage is not None:
            self.flow.load_state_dict(self.ema.module.state_dict())
            self.ema.restart()
        self.position.stage, self.position.step_in_stage = name, 0
        self.means = MetricMeans()
        self._set_up(index, stage)

    def resume(
        self, checkpoint: Mapping[str, Any], stages: Mapping[str, Stage], best: Mapping[str, Any] | None = None
    ) -> None:
        """Continue bit for bit where ``checkpoint`` was written.

        ``best`` is the checkpoint with the lowest validation NLL so far. Without one, or if it is of another run, the
        next weights that are validated are the best.

        Raises:
            CheckpointError: the checkpoint belongs to another model, other stages or another number of devices, or is
                damaged.
        """
        try:
            position = Position(**checkpoint["position"])
        except TypeError as error:
            raise CheckpointError(f"the checkpoint cannot be resumed: it has no position of a run ({error})") from error
        if position.stage not in stages:
            raise CheckpointError(
                f"the checkpoint stopped in the stage {position.stage!r}, this run has {', '.join(stages)}; "
                "resume with the stages that the run was started with"
            )
        ranks = checkpoint["ranks"]
        if len(ranks) != self.fabric.world_size:
            raise CheckpointError(
                f"the run was started on {len(ranks)} device(s) and is resumed on {self.fabric.world_size}; "
                "use the same number, since each draws data of its own"
            )
        if checkpoint["data"] != self.dataset.name:
            raise CheckpointError(
                f"the run was started on the data {checkpoint['data']!r} and is resumed on {self.dataset.name!r}; "
                "resume with the same"
            )
        try:
            self.flow.load_state_dict(checkpoint["flow"])
            self.ema.module.load_state_dict(checkpoint["ema"])
        except RuntimeError as error:
            raise CheckpointError(f"the checkpoint belongs to another model: {error}") from error
        self.ema.n_averaged.fill_(checkpoint["ema_updates"])
        self.position = position
        self.run = checkpoint.get("run")
        mine = best is not None and best.get("run") == self.run
        position.best_nll = best["position"]["best_nll"] if mine else None
        position.best_step = best["position"]["best_step"] if mine else None
        index = list(stages).index(position.stage)
        self._set_up(index, stages[position.stage])
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.schedule.load_state_dict(checkpoint["schedule"])
            self.means.load_state_dict(checkpoint["means"])
            own = ranks[self.fabric.global_rank]
            self._resume_randomness(own, index)
            if "watch" in own:  # checkpoints used to be without
                self.watch.load_state_dict(own["watch"])
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise CheckpointError(
                "the checkpoint cannot be resumed: its optimiser, schedule or random numbers do not fit this run "
                f"({type(error).__name__}: {error})"
            ) from error

    def _resume_randomness(self, own: Mapping[str, Any], index: int) -> None:
        self.stream.load_state_dict(own["data"])
        torch.set_rng_state(own["cpu"])
        if (own["cuda"] is not None) == (self.fabric.device.type == "cuda"):
            self.generator.set_state(own["objective"])
            if own["cuda"] is not None:
                torch.cuda.set_rng_state(own["cuda"], self.fabric.device)
        else:
            warnings.warn(
                f"the run is resumed on {self.fabric.device.type}, another kind of device than it was started on: the "
                "random numbers of the objective start anew, and the run goes on well, but not bit for bit",
                stacklevel=2,
            )
            seeded(self.generator, self._seed, "objective", index, self.fabric.global_rank, self.position.step)

    def is_finite(self) -> bool:
        """Whether no weight is NaN or infinite."""
        return all_finite(*(p for p in self.flow.parameters() if p.is_floating_point()))

    def state_dict(self) -> dict[str, Any]:
        """The content of a checkpoint; every process must call this, since each adds its generators."""
        cuda = self.fabric.device.type == "cuda"
        own = {
            "data": self.stream.state_dict(),
            "watch": self.watch.state_dict(),
            "objective": self.generator.get_state(),
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.fabric.device) if cuda else None,
        }
        ranks = [own]
        if self.fabric.world_size > 1:
            ranks = [None] * self.fabric.world_size
            torch.distributed.all_gather_object(ranks, own)
        return {
            "run": self.run,
            "event_shape": list(self.flow.event_shape),
            "context_shape": None if self.dataset.context_shape is None else list(self.dataset.context_shape),
            "num_classes": self.dataset.num_classes,
            "num_levels": self.dataset.num_levels,
            "data": self.dataset.name,
            "flow": self.flow.state_dict(),
            "ema": self.ema.module.state_dict(),
            "ema_updates": int(self.ema.n_averaged),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "position": asdict(self.position),
            "means": self.means.state_dict(),
            "ranks": ranks,
        }

    def _set_up(self, index: int, stage: Stage) -> None:
        optimizer = (stage.optimizer or self._new_optimizer)(self.flow.parameters(), lr=stage.learning_rate)
        self.schedule = stage.scheduler(optimizer)
        self.optimizer = self.fabric.setup_optimizers(optimizer)
        rank = self.fabric.global_rank
        draws_its_own = not getattr(stage.objective, "uses_data", True)
        new_stream = partial(NoData, self.dataset.name) if draws_its_own else self.dataset.train_stream
        self.stream = new_stream(
            stage.batch_size,
            seeded(torch.Generator(), self._seed, "data", index, rank),
            self.fabric.device,
            next(self.flow.parameters()).dtype,
        )
        seeded(self.generator, self._seed, "objective", index, rank)


def seeded(generator: torch.Generator, seed: int, purpose: str, *key: int) -> torch.Generator:
    """Seed ``generator`` so that it is independent of those of any other seed, purpose and key."""
    if seed < 0:
        raise InvalidValueError(f"seed must be a whole number >= 0, got {seed}")
    words = np.random.SeedSequence([seed, *purpose.encode(), *key]).generate_state(2)
    return generator.manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
