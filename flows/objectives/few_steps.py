"""Training for samples in few steps: straighter paths, and steps that end where a teacher's paths do."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import flows
from flows.arguments import checked
from flows.datasets import Batch, Dataset
from flows.divergence import DivergenceEstimator
from flows.dynamics import StateDynamics
from flows.errors import FlowsError, InvalidValueError
from flows.models.cnf import CNF
from flows.objectives.base import LossOutput, Objective
from flows.objectives.checks import check_flow
from flows.shares import mean_of_all, own_rows, steps_together
from flows.solvers import ODESolver
from flows.vector_field import checked_value


@dataclass(frozen=True)
class _Taught(Objective):
    """Learns from another flow.

    The teacher is a flow, the folder of a run, or None: the flow as it is when its stage begins.
    """

    solves: ClassVar[bool] = False
    shares: ClassVar[bool] = True
    recommended: ClassVar[Mapping[str, Any]] = {"batch_size": 512, "learning_rate": 1e-3, "warmup_steps": 0}
    teacher: CNF | str | None = None
    _found: list[CNF] = field(default_factory=list, init=False, repr=False, compare=False)

    def check(self, model: nn.Module, dataset: Dataset) -> None:
        super().check(model, dataset)
        flow = check_flow(model, dataset)
        if self.teacher is not None:
            self._teacher(flow)

    def begin(self, flow: CNF, is_first: bool) -> None:
        """Take the flow as the teacher, or start from the weights of a teacher that a run trained.

        Raises:
            InvalidValueError: there is no teacher and no stage before, or the run trained another model.
        """
        if self.teacher is None and is_first:
            raise InvalidValueError(
                f"{type(self).__name__} learns from a trained flow: give teacher=RUN, the folder of a run, or put a "
                "stage before it"
            )
        if self.teacher is None:
            self._keep(copy.deepcopy(flow))
            self._found[0].solver = ODESolver()  # that of the flow may be the few steps that are to be learned
        if isinstance(self.teacher, str):
            try:
                flow.load_state_dict(self._teacher(flow).state_dict())
            except RuntimeError as error:
                raise InvalidValueError(
                    f"the run {self.teacher} trained another model than this one: {str(error).splitlines()[-1].strip()}"
                    "; `flows train teacher=RUN` builds the same"
                ) from error

    def state_dict(self) -> dict[str, Any]:
        """Return the weights of the teacher, whose own run may train on. A flow that was given keeps its own."""
        return self._found[0].state_dict() if self._found and not isinstance(self.teacher, CNF) else {}

    def load_state_dict(self, flow: CNF, state: Mapping[str, Any]) -> None:
        """Take the teacher of the run that is resumed, which was built like the flow."""
        if state:
            self._keep(copy.deepcopy(flow))
            self._found[0].solver = ODESolver()
            self._found[0].load_state_dict(state)

    def _keep(self, teacher: CNF) -> None:
        self._found[:] = [teacher.eval().requires_grad_(False)]

    def _teacher(self, flow: CNF) -> CNF:
        """The teacher, if it suits the flow."""
        given = self.teacher
        if isinstance(given, CNF) and (given is flow or given.field is flow.field):
            raise InvalidValueError("the teacher is the flow that is trained; give a copy, copy.deepcopy(flow)")
        if given is not None and not self._found:
            self._keep(copy.deepcopy(given) if isinstance(given, CNF) else _loaded(given, flow))
        if not self._found:
            raise InvalidValueError(
                f"{type(self).__name__} has no teacher yet: give one, or train with a Trainer and a stage before it"
            )
        teacher = self._found[0]
        if teacher.event_shape != flow.event_shape:
            raise InvalidValueError(
                f"the teacher has events of shape {teacher.event_shape}, and the flow of shape {flow.event_shape}"
            )
        for part in ("base", "transform"):
            theirs, ours = (type(getattr(one, part)).__name__ for one in (teacher, flow))
            if theirs != ours:
                raise InvalidValueError(
                    f"the {part} of the teacher is {theirs}, and that of the flow {ours}: the flow would learn paths "
                    "between other points than its own; build it with the base and the transform of the teacher"
                )
        if (teacher.device, teacher.dtype) != (flow.device, flow.dtype):
            teacher.to(flow.device, flow.dtype)
        return teacher

    def divergence(self, flow: CNF) -> DivergenceEstimator | None:
        return None


def _loaded(run: str, flow: CNF) -> CNF:
    """The flow of a run. Where that needs classes of the user's own, the flow at hand has been built from them."""
    try:
        return flows.load(run)
    except FlowsError:
        return flows.load(run, flow=copy.deepcopy(flow))


@checked
@dataclass(frozen=True)
class Reflow(_Taught):
    """Flow matching between the base and a teacher's samples of it, E ‖v(t, x_t) − (x₁ − x₀)‖² / d.

    Here x₁ is where the teacher carries x₀, and x_t = (1 − t) x₀ + t x₁ with uniform t. Paths of the trained flow are
    straighter than the teacher's, while the distribution at t = 1 stays that of the teacher, up to the errors of the
    fit. So few steps suffice. The flow remains an ODE: its log-density is its own, by an accurate solve.
    [Liu, Gong & Liu 2023, arXiv:2209.03003]

    The data give only the size of a batch, and contexts. Each call solves the teacher's ODE, without a divergence.

    Args:
        teacher: a trained flow in the same flow space, such as `copy.deepcopy(flow)`, which stays as it is; or the
            folder of a run, whose weights are also those that the stage starts from; or `None` (default): the flow as
            it is when the stage begins, after another stage.

    Raises:
        InvalidValueError: the teacher has another event shape, base or transform, or is the flow that is trained, or
            there is none.

    Example:
        ```python
        import copy

        import torch

        import flows

        flow = flows.CNF(flows.fields.MLP((2,), hidden=(16,)))  # trained before
        reflow = flows.objectives.Reflow(copy.deepcopy(flow))
        batch = flows.datasets.Moons().train_stream(32, torch.Generator()).next()
        reflow(flow, batch).loss.backward()
        ```
    """

    def __call__(self, flow: CNF, batch: Batch, generator: torch.Generator | None = None) -> LossOutput:
        rows, weight = own_rows(len(batch))
        start, end, context = _pairs(self._teacher(flow), batch, generator, rows)
        device = start.device if generator is None else generator.device
        t = torch.rand(len(batch), generator=generator, dtype=start.dtype, device=device).to(start.device)
        t = t if rows is None else t[rows]
        share = t.view(-1, *[1] * (start.ndim - 1))
        position = (1 - share) * start + share * end
        view = flow.bind(None if context is None else flow.encode(context))
        loss = (checked_value(view(t, position), position) - (end - start)).square().mean()
        return LossOutput(loss, {"velocity_error": loss.detach()}, weight=weight)


@checked
@dataclass(frozen=True)
class Distillation(_Taught):
    """Few steps that end where a teacher's paths end, E ‖Φ(x₀) − x₁‖² / d.

    Φ takes the steps of `solver` with the field that is trained, and x₁ is where the teacher carries x₀ by its own
    solver. Afterwards sample with `flow.solver = solver`. [Luhman & Luhman 2021, arXiv:2101.02388]

    The trained field means these steps and no ODE. Accurate solves of it give other samples, and `log_prob` is the
    density of that ODE, not of the samples in few steps. Keep the teacher for likelihoods.

    Args:
        teacher: as for `Reflow`.
        solver: one to four fixed steps, such as `ODESolver("euler", step_size=0.5)`, or `flows.fit_grid(flow, 4)`.

    Raises:
        InvalidValueError: as `Reflow`; or the solver is adaptive.

    Example:
        ```python
        import copy

        import torch

        import flows

        flow = flows.CNF(flows.fields.MLP((2,), hidden=(16,)))  # trained before
        two_steps = flows.ODESolver("euler", step_size=0.5)
        distillation = flows.objectives.Distillation(copy.deepcopy(flow), two_steps)
        batch = flows.datasets.Moons().train_stream(32, torch.Generator()).next()
        distillation(flow, batch).loss.backward()
        flow.solver = two_steps
        ```
    """

    solver: ODESolver = field(default_factory=lambda: ODESolver("euler", step_size=1.0))

    def __post_init__(self) -> None:
        if not self.solver.is_fixed_step:
            raise InvalidValueError(
                f"solver must take a few fixed steps, got the adaptive method {self.solver.method!r}; give, for "
                'example, ODESolver("euler", step_size=0.5)'
            )

    def __call__(self, flow: CNF, batch: Batch, generator: torch.Generator | None = None) -> LossOutput:
        rows, weight = own_rows(len(batch))
        start, end, context = _pairs(self._teacher(flow), batch, generator, rows)
        context = None if context is None else flow.encode(context)
        dynamics, learned = StateDynamics(flow.bind(context)), list(flow.parameters())
        with steps_together(rows):
            solution = self.solver.solve(dynamics, (start,), (0.0, 1.0), learned)
        loss = (solution.end[0] - end).square().mean()
        distance = mean_of_all(loss.detach(), weight).sqrt()
        return LossOutput(loss, {"distance": distance}, solution.statistics, weight)


@torch.no_grad()
def _pairs(
    teacher: CNF, batch: Batch, generator: torch.Generator | None, rows: slice | None
) -> tuple[Tensor, Tensor, Tensor | None]:  # (B, *event) in flow space
    """Base points, where the teacher carries them, and their contexts; `rows` of the batch alone."""
    start, context = teacher.base.sample((len(batch.x),), generator), batch.context
    if rows is not None:
        start, context = start[rows], None if context is None else context[rows]
    with steps_together(rows):
        return start, teacher.transport(start, (0.0, 1.0), context, log_density=False).x, context
