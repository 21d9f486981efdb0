"""Everything that training changes, and what a checkpoint holds."""

from __future__ import annotations

import contextlib
import copy
import logging
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flows.arguments import checked
from flows.checks import check_number
from flows.datasets import Dataset, NoData
from flows.errors import FlowsError, InvalidValueError, warn
from flows.evaluation import Evaluator, seeded
from flows.models.precision import working_dtype
from flows.promises import copyable
from flows.solvers import SolverStatistics
from flows.solvers.problem import all_finite
from flows.training.checkpoint import CheckpointError, describe, fingerprint_entry
from flows.training.fabric import Fabric, share_of
from flows.training.files import FOLDER, RunFileError
from flows.training.fitting import check_means, check_optimizer, check_position, load_weights
from flows.training.loggers import MetricMeans
from flows.training.stage import Optimization, Stage

if TYPE_CHECKING:
    from flows.training.callbacks import Reporting

LOG = logging.getLogger("flows")
FIRST = 0  # the process by which all seed what they draw together


@checked
class ExponentialMovingAverage(AveragedModel):
    """Averages weights: average <- d average + (1 - d) weights, d = min(decay, (1 + n) / (10 + n)) at update n.

    The rising d lets the average forget its start, so it also follows a stage of a hundred steps. The first update
    copies the weights.

    Args:
        model: the module to average; it is copied.
        decay: the largest d, from 0 (no averaging) to 1.

    Example:
        ```python
        import flows

        flow = flows.CNF(flows.fields.MLP((2,)))
        average = flows.training.ExponentialMovingAverage(flow, decay=0.999)
        average.update_parameters(flow)
        average.module.sample((10,))
        ```
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        check_number("ema_decay", decay, at_least=0, below=1, otherwise="0 turns the averaging off")
        with copyable(model):
            super().__init__(model, multi_avg_fn=self._average)
        self.decay = decay
        self.requires_grad_(False)
        self._with_extra_state = [name for name, module in model.named_modules() if _keeps_extra_state(module)]

    def update_parameters(self, model: nn.Module) -> None:
        """Move the averages; buffers and extra states are copied."""
        super().update_parameters(model)
        for name in self._with_extra_state:
            extra = model.get_submodule(name).get_extra_state()
            self.module.get_submodule(name).set_extra_state(copy.deepcopy(extra))

    def _average(self, averaged: Any, current: Any, num_averaged: Tensor | int) -> None:
        n = int(self.n_averaged)  # on the CPU, unlike the argument: reading it does not wait for the GPU
        decay = min(self.decay, (1 + n) / (10 + n))
        get_ema_multi_avg_fn(decay)(averaged, current, num_averaged)

    def restart(self) -> None:
        """Let the next update copy the weights, as at the start of a run."""
        self.n_averaged.zero_()


def _keeps_extra_state(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state


@dataclass
class Position:
    """Where a run stands."""

    stage: str | None = None  # None: before the first
    step_in_stage: int = 0  # steps done
    seconds_in_stage: float = 0.0  # spent in these steps alone
    step: int = 0  # steps done over all stages
    stage_starts: list[int] = field(default_factory=list)  # steps done before each stage so far
    best_score: float | None = None  # the lowest on the validation part
    best_step: int | None = None
    validated: int | None = None  # the step whose weights were last validated
    skipped: int = 0  # batches that could not be solved
    seconds: float = 0.0  # spent in training, with validation and pictures


class RunState:
    """The model, its average, and all that changes while a stage runs.

    Args:
        fabric: launched.
        model: on its device.
        dataset: where the batches come from.
        optimization: the optimiser and the decay of the average.
        seed: each stage draws its data and its probes from generators that depend on this, on the place of the stage
            and, of several processes, on none: each draws whole batches and computes its share.
        callbacks: those with a `state_dict` are kept in checkpoints, each process its own.
    """

    optimizer: Optimizer

    def __init__(
        self,
        fabric: Fabric,
        model: nn.Module,
        dataset: Dataset,
        optimization: Optimization,
        seed: int,
        callbacks: list[Any],
    ) -> None:
        self.fabric = fabric
        self.model = model
        self.dataset = dataset
        self.optimization = optimization
        self.ema = ExponentialMovingAverage(model, optimization.ema_decay)
        self.position = Position()
        self.run = uuid.uuid4().hex  # tells this run's checkpoints from those of any other
        self.means = MetricMeans()
        self.generator = torch.Generator(fabric.device)  # of the objective
        self._seed = seed
        names = [type(callback).__name__ for callback in callbacks]
        self._callbacks = {
            f"{name}_{names[:i].count(name)}": callback
            for i, (name, callback) in enumerate(zip(names, callbacks, strict=True))
            if hasattr(callback, "state_dict")
        }

    def begin(self, index: int, name: str, stage: Stage) -> None:
        """Set up a stage: new optimiser, data stream and generators.

        Every stage but the first starts from the averaged weights, which are better than the last ones.
        """
        position = self.position
        is_first = position.stage is None
        if not is_first:
            self.model.load_state_dict(self.ema.module.state_dict())
            self.ema.restart()
        objective: Any = stage.objective
        if hasattr(objective, "begin"):
            objective.begin(self.model, is_first)
            self.ema.module.load_state_dict(self.model.state_dict())
        position.stage, position.step_in_stage, position.seconds_in_stage = name, 0, 0.0
        position.stage_starts = [*position.stage_starts, position.step]
        self.means = MetricMeans()
        self._set_up(index, stage)

    def resume(
        self, checkpoint: Mapping[str, Any], stages: Mapping[str, Stage], best: Mapping[str, Any] | None = None
    ) -> None:
        """Continue bit for bit where `checkpoint` was written.

        `best` is the checkpoint with the lowest score so far. Without one, or if it is of another run, the next weights
        that are validated are the best.

        Raises:
            CheckpointError: the checkpoint belongs to another model, or other stages, or is damaged.
        """
        try:
            check_position(checkpoint["position"], Position)
        except InvalidValueError as error:
            raise CheckpointError(f"the checkpoint cannot be resumed: {error}") from error
        position = Position(**checkpoint["position"])
        if position.stage is None or position.stage not in stages:
            raise CheckpointError(
                f"the checkpoint stopped in the stage {position.stage!r}, this run has {', '.join(stages)}; "
                "resume with the stages that the run was started with"
            )
        started, own_data = checkpoint["data"].get("name"), describe(self.dataset)["name"]
        if started != own_data:
            raise CheckpointError(
                f"the run was started on the data {started!r} and is resumed on {own_data!r}; resume with the same"
            )
        started, own_dtype = checkpoint["dtype"], str(working_dtype(self.model)).removeprefix("torch.")
        if started != own_dtype:
            raise CheckpointError(
                f"the run was started in {started} and is resumed in {own_dtype}; resume in the same precision"
            )
        for name, model in (("model", self.model), ("ema", self.ema.module)):
            try:
                load_weights(model, checkpoint[name])
            except InvalidValueError as error:
                raise CheckpointError(f"the checkpoint belongs to another model: {name}: {error}") from error
        if checkpoint["ema_updates"] < 0:
            raise CheckpointError(f"the checkpoint cannot be resumed: ema_updates={checkpoint['ema_updates']}")
        self.ema.n_averaged.fill_(checkpoint["ema_updates"])
        self.position = position
        self.run = checkpoint["run"]
        mine = best is not None and best.get("run") == self.run
        position.best_score = best["position"]["best_score"] if mine else None  # type: ignore[index]
        position.best_step = best["position"]["best_step"] if mine else None  # type: ignore[index]
        index = list(stages).index(position.stage)
        if checkpoint.get("objective"):
            objective: Any = stages[position.stage].objective
            objective.load_state_dict(self.model, checkpoint["objective"])
        self._set_up(index, stages[position.stage])
        try:
            stage = stages[position.stage]
            build = self.optimization.optimizer_of(stage)
            taken = position.step_in_stage
            check_optimizer(checkpoint["optimizer"], self.optimizer, build, stage.peak_learning_rate, taken)
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            check_means(checkpoint["means"])
            self.means.load_state_dict(checkpoint["means"])
            ranks, rank = checkpoint["ranks"], self.fabric.global_rank
            own = ranks[rank] if rank < len(ranks) else ranks[0]  # all draw the same batches
            self._resume_randomness(own, index)
            for name, callback in self._callbacks.items():
                if name in own["callbacks"]:
                    callback.load_state_dict(own["callbacks"][name])
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise CheckpointError(
                "the checkpoint cannot be resumed: its optimiser, metrics or random numbers do not fit this run "
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
            warn(
                f"the run is resumed on {self.fabric.device.type}, another kind of device than it was started on: the "
                "random numbers of the objective start anew, and the run goes on well, but not bit for bit"
            )
            seeded(self.generator, self._seed, "objective", index, FIRST, self.position.step)

    def is_finite(self) -> bool:
        """Return whether no trained weight is NaN or infinite."""
        trained = [p for p in self.model.parameters() if p.is_floating_point() and p.requires_grad]
        return not trained or all_finite(*trained)

    def state_dict(self) -> dict[str, Any]:
        """Return the content of a checkpoint; every process must call this, since each adds its generators."""
        cuda = self.fabric.device.type == "cuda"
        if (share := share_of(self.fabric)) is not None:
            self.means.average(share.gather)
        own = {
            "data": self.stream.state_dict(),
            "objective": self.generator.get_state(),
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.fabric.device) if cuda else None,
            "callbacks": {name: callback.state_dict() for name, callback in self._callbacks.items()},
        }
        ranks: list[Any] = [own]
        if self.fabric.world_size > 1:
            ranks = [None] * self.fabric.world_size
            torch.distributed.all_gather_object(ranks, own)
        return {
            "run": self.run,
            "data": describe(self.dataset) | fingerprint_entry(self.dataset),
            "dtype": str(working_dtype(self.model)).removeprefix("torch."),
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "ema_updates": int(self.ema.n_averaged),
            "optimizer": self.optimizer.state_dict(),
            "position": asdict(self.position),
            "means": self.means.state_dict(),
            "objective": self._of_objective(),
            "ranks": ranks,
        }

    def set_learning_rate(self, factor: float) -> float:
        """Give each group of the optimiser `factor` times the rate that it began with; return the first one's."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        return self.optimizer.param_groups[0]["lr"]

    def _of_objective(self) -> dict[str, Any]:
        """What the objective of the stage keeps from its beginning, such as a teacher."""
        return self._objective.state_dict() if hasattr(self._objective, "state_dict") else {}

    def _set_up(self, index: int, stage: Stage) -> None:
        self._objective: Any = stage.objective
        new_optimizer = self.optimization.optimizer_of(stage)
        optimizer = new_optimizer(self.model.parameters(), lr=stage.peak_learning_rate)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.fabric_optimizer: Any = self.fabric.setup_optimizers(optimizer)  # one, since one goes in
        self.optimizer = self.fabric_optimizer.optimizer
        draws_its_own = not getattr(stage.objective, "uses_data", True)
        new_stream = partial(NoData, describe(self.dataset)["name"]) if draws_its_own else self.dataset.train_stream
        self.stream = new_stream(
            stage.examples,
            seeded(torch.Generator(), self._seed, "data", index, FIRST),
            self.fabric.device,
            working_dtype(self.model),
        )
        seeded(self.generator, self._seed, "objective", index, FIRST)


class Run:
    """A run as its callbacks see it.

    Attributes:
        fabric: of Lightning.
        model: in training; `state.ema.module` has the averaged weights, which are validated and kept.
        state: all that training changes, with `position`.
        stages: by name.
        evaluator: judges the model.
        dataset: trained on.
        reporting: how often to log, validate, draw and save.
        folder: of the run.
        settings: of the run, as yaml text; None if it was started without `config`.
        labels: what a sweep varies, for TensorBoard's HPARAMS tab.
        described: what builds the model again, for a run without settings.
        config: the same, nested.
        solves: what the solver tells about the last step; empty for an objective that solves nothing.
        learning_rate: of the last step.
        stage_is_over: whether the last step was the last of its stage.
        stopping: whether the run ends after this step because of a signal.
        paused: seconds so far that callbacks and validation took.
        saved: the step of `checkpoints/last.pt`; None: nothing was saved yet.
        overdue: whether `Reporting.checkpoint_minutes` are over.

    Example:
        ```python



        class Teller:
            '''A callback; each hook is given the `Run`.'''

            def on_step_end(self, run):
                if run.position.step % 100 == 0:
                    print(run.position.step, run.folder)
        ```
    """

    def __init__(
        self,
        fabric: Fabric,
        state: RunState,
        stages: Mapping[str, Stage],
        evaluator: Evaluator,
        reporting: Reporting,
        folder: Path,
        config: Mapping[str, Any] | None,
        settings: str | None,
    ) -> None:
        self.fabric = fabric
        self.state = state
        self.model = state.model
        self.dataset = state.dataset
        self.stages = dict(stages)
        self.evaluator = evaluator
        self.reporting = reporting
        self.folder = folder
        self.config = config
        self.settings = settings
        self.described: Mapping[str, Any] = {}
        self.labels: Mapping[str, Any] = {}
        self.solves: list[SolverStatistics] = []
        self.learning_rate = 0.0
        self.stage_is_over = False
        self.stopping = False
        self.paused = 0.0
        self.saved: int | None = None
        self.overdue = False
        self._saved_at = time.monotonic()
        self._is_aside = False

    @property
    def position(self) -> Position:
        """Where the run stands."""
        return self.state.position

    @property
    def is_over(self) -> bool:
        """Whether the last step of the last stage is done."""
        return self.stage_is_over and self.position.stage == list(self.stages)[-1]

    @property
    def done(self) -> float:
        """The share of the run that is over; each stage counts the same."""
        names, position = list(self.stages), self.position
        if position.stage is None:
            return 0.0
        stage = self.stages[position.stage]
        return (names.index(position.stage) + stage.done(position.step_in_stage, position.seconds_in_stage)) / len(
            names
        )

    def due(self, what: str) -> bool:
        """Return whether to `"log"`, `"validate"`, `"plot"` or `"checkpoint"` after this step."""
        every = getattr(self.reporting, f"{what}_every")
        late = what == "checkpoint" and self.overdue
        return self.stage_is_over or late or bool(every and self.position.step % every == 0)

    def call(self, hook: str, *arguments: Any) -> None:
        """Call the method of that name of every callback that has one, as `method(run, *arguments)`."""
        with self.aside():
            self.fabric.call(hook, self, *arguments)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Send numbers, figures and texts to all loggers."""
        self.call("on_log", metrics)

    def is_saved(self) -> None:
        """Note that `last.pt` holds the state as it is now."""
        self.saved, self._saved_at, self.overdue = self.position.step, time.monotonic(), False

    @property
    def unsaved_seconds(self) -> float:
        """The age of what is saved."""
        return time.monotonic() - self._saved_at

    @contextlib.contextmanager
    def writing(self, what: object) -> Iterator[None]:
        """While entered, a failure of the disk ends the run in a message that says what was kept.

        Raises:
            RunFileError: `what` cannot be written or read.
        """
        try:
            yield
        except OSError as error:
            if isinstance(error, FlowsError):
                raise
            reason = error.strerror or error
            if not self.folder.is_dir():
                raise RunFileError(
                    f"{what} cannot be written: the folder of the run, {self.folder}, is gone ({reason}); the run "
                    "stops, and nothing of it is left there"
                ) from error
            last = self.folder / FOLDER / "last.pt"
            kept = "nothing of the run is saved"
            if self.saved is not None and last.exists():
                kept = (
                    f"the state after step {self.saved} is whole in {last}; mend the cause and continue with "
                    f"resume={self.folder}"
                )
            raise RunFileError(f"{what} cannot be written at step {self.position.step} ({reason}); {kept}") from error

    def warn(self, text: str) -> None:
        """Tell the person who watches: through `logging`, and in TensorBoard."""
        if self.fabric.is_global_zero:
            LOG.warning("at step %d, %s", self.position.step, text)
            self.log({"warnings": text})

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Leave the global random numbers of training and its clock as they were."""
        if self._is_aside:
            yield
            return
        devices = [self.fabric.device] if self.fabric.device.type == "cuda" else []
        started, self._is_aside = time.perf_counter(), True
        try:
            with torch.random.fork_rng(devices):
                yield
        finally:
            self._is_aside = False
            self.paused += time.perf_counter() - started
