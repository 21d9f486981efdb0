"""Training for samples in few steps: straighter paths, and steps that end where a teacher's paths do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flows.arguments import checked
from flows.datasets import Batch, Dataset
from flows.divergence import DivergenceEstimator
from flows.dynamics import StateDynamics
from flows.errors import InvalidValueError
from flows.models.cnf import CNF
from flows.objectives.base import LossOutput, Objective
from flows.objectives.checks import check_flow
from flows.solvers import ODESolver
from flows.vector_field import checked_value


@checked
@dataclass(frozen=True)
class Reflow(Objective):
    """Flow matching between the base and a teacher's samples of it, E ‖v(t, x_t) − (x₁ − x₀)‖² / d.

    Here x₁ is where the teacher carries x₀, and x_t = (1 − t) x₀ + t x₁ with uniform t. Paths of the trained flow are
    straighter than the teacher's, while the distribution at t = 1 stays that of the teacher, up to the errors of the
    fit. So few steps suffice. The flow remains an ODE: its log-density is its own, by an accurate solve.
    [Liu, Gong & Liu 2023, arXiv:2209.03003]

    The data give only the size of a batch, and contexts. Each call solves the teacher's ODE, without a divergence.

    Args:
        teacher: a trained flow in the same flow space, such as `copy.deepcopy(flow)`. It is not trained.

    Raises:
        InvalidValueError: the teacher has another event shape, or is the flow that is trained.

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

    solves: ClassVar[bool] = False
    recommended: ClassVar[Mapping[str, Any]] = {"batch_size": 512, "learning_rate": 1e-3, "warmup_steps": 0}
    teacher: CNF

    def check(self, model: nn.Module, dataset: Dataset) -> None:
        super().check(model, dataset)
        _check_teacher(check_flow(model, dataset), self.teacher)

    def __call__(self, flow: CNF, batch: Batch, generator: torch.Generator | None = None) -> LossOutput:
        _check_teacher(flow, self.teacher)
        start, end = _pairs(self.teacher, batch, generator)
        device = start.device if generator is None else generator.device
        t = torch.rand(len(start), generator=generator, dtype=start.dtype, device=device).to(start.device)
        share = t.view(-1, *[1] * (start.ndim - 1))
        position = (1 - share) * start + share * end
        view = flow.bind(None if batch.context is None else flow.encode(batch.context))
        loss = (checked_value(view(t, position), position) - (end - start)).square().mean()
        return LossOutput(loss, {"velocity_error": loss.detach()})

    def divergence(self, flow: CNF) -> DivergenceEstimator | None:
        return None


@checked
@dataclass(frozen=True)
class Distillation(Objective):
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

    solves: ClassVar[bool] = False
    recommended: ClassVar[Mapping[str, Any]] = {"batch_size": 512, "learning_rate": 1e-3, "warmup_steps": 0}
    teacher: CNF
    solver: ODESolver = field(default_factory=lambda: ODESolver("euler", step_size=1.0))

    def __post_init__(self) -> None:
        if not self.solver.is_fixed_step:
            raise InvalidValueError(
                f"solver must take a few fixed steps, got the adaptive method {self.solver.method!r}; give, for "
                'example, ODESolver("euler", step_size=0.5)'
            )

    def check(self, model: nn.Module, dataset: Dataset) -> None:
        super().check(model, dataset)
        _check_teacher(check_flow(model, dataset), self.teacher)

    def __call__(self, flow: CNF, batch: Batch, generator: torch.Generator | None = None) -> LossOutput:
        _check_teacher(flow, self.teacher)
        start, end = _pairs(self.teacher, batch, generator)
        context = None if batch.context is None else flow.encode(batch.context)
        solution = self.solver.solve(StateDynamics(flow.bind(context)), (start,), (0.0, 1.0), list(flow.parameters()))
        loss = (solution.end[0] - end).square().mean()
        return LossOutput(loss, {"distance": loss.detach().sqrt()}, solution.statistics)

    def divergence(self, flow: CNF) -> DivergenceEstimator | None:
        return None


@torch.no_grad()
def _pairs(
    teacher: CNF, batch: Batch, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:  # (B, *event) in flow space
    """Base points, and where the teacher carries them."""
    start = teacher.base.sample((len(batch.x),), generator)
    return start, teacher.transport(start, (0.0, 1.0), batch.context, log_density=False).x


def _check_teacher(flow: CNF, teacher: CNF) -> None:
    if teacher.event_shape != flow.event_shape:
        raise InvalidValueError(
            f"the teacher has events of shape {teacher.event_shape}, and the flow of shape {flow.event_shape}"
        )
    if teacher is flow or teacher.field is flow.field:
        raise InvalidValueError("the teacher is the flow that is trained; give a copy, copy.deepcopy(flow)")
