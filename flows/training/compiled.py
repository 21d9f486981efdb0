"""torch.compile for what a training step evaluates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from flows.divergence import Analytic, DivergenceEstimator, FieldSample, VectorField
from flows.errors import InvalidValueError
from flows.models.cnf import CNF
from flows.objectives import Objective
from flows.objectives.base import active_costs
from flows.path_costs import draw_directions

WAY_OUT = "Use divergence.mode=forward, a field with a closed form and divergence=analytic, or trainer.compile=false"


@contextmanager
def compiled(flow: CNF, objective: Objective) -> Iterator[None]:
    """While entered, the field and its divergence run as compiled code; afterwards as they were.

    Path costs that take Jacobian products of their own stay as they are. The first steps take long, since they
    compile (a minute and more on a CPU).

    Raises:
        ValueError: training would differentiate twice, which compiled code cannot.
    """
    own, call = flow.divergence, flow.field._compiled_call_impl  # what nn.Module.compile sets
    estimator = compilable_divergence(flow, objective)
    if estimator is not None:
        flow.divergence = _Compiled(estimator, estimator.choose(flow.event_shape, flow.field))
    flow.field.compile()
    try:
        yield
    except RuntimeError as error:
        if "double backward" not in str(error):
            raise
        raise InvalidValueError(
            "trainer.compile=true does not go with this field or objective: something within an evaluation calls "
            f"autograd, such as a value_and_divergence or a path cost by torch.autograd.grad. {WAY_OUT}"
        ) from error
    finally:
        flow.divergence = own
        flow.field._compiled_call_impl = call


def stages_to_compile(
    setting: bool | Literal["auto"], device: str, flow: CNF, objectives: Mapping[str, Objective]
) -> tuple[set[str], list[str]]:
    """The names of the objectives to train compiled, and notices about others that ``"auto"`` would have.

    Args:
        setting: ``"auto"``: all that can be, if ``device`` is "cuda".

    Raises:
        ValueError: the setting is ``True``, and an objective cannot be.
    """
    if not setting or (setting == "auto" and device != "cuda"):
        return set(), []
    chosen, notices = set(), []
    for name, objective in objectives.items():
        try:
            compilable_divergence(flow, objective)
            chosen.add(name)
        except ValueError as reason:
            if setting != "auto":
                raise
            notices.append(f"trainer.compile=auto leaves the stage {name} uncompiled: {reason}")
    return chosen, notices


def compilable_divergence(flow: CNF, objective: Objective) -> DivergenceEstimator | None:
    """What the objective takes the divergence with, if it does; a function that is no ``Objective`` may use the flow's.

    Raises:
        ValueError: it differentiates backwards within an evaluation.
    """
    solves = getattr(objective, "solves", True)
    assumed = flow.divergence if solves else None
    taken = objective.divergence(flow) if isinstance(objective, Objective) else assumed
    if taken is None:
        return None
    estimator = taken.choose(flow.event_shape, flow.field)
    if solves and flow.solver.gradient == "adjoint":
        raise InvalidValueError(
            "trainer.compile=true does not go with solver.gradient=adjoint, whose backward pass calls autograd at each "
            "evaluation; use solver.gradient=backprop or checkpoint"
        )
    if getattr(estimator, "mode", None) == "reverse":
        name = type(estimator).__name__
        raise InvalidValueError(
            f"trainer.compile=true does not go with divergence {name}(mode='reverse'): training differentiates its "
            f"vector-Jacobian products once more, and torch.compile has no double backward. {WAY_OUT}"
            f"{'' if solves else '; this objective can also do without, by its divergence_weight=0'}"
        )
    costs = active_costs(getattr(objective, "regularizers", ()))
    norms = draw_directions(costs, torch.zeros(1, *flow.event_shape), torch.Generator()) is not None
    if norms and _takes_norms_in_reverse(estimator, flow.field):
        raise InvalidValueError(
            f"trainer.compile=true does not go with a path cost that needs the norm of the Jacobian of "
            f"{type(flow.field).__name__}: {type(estimator).__name__}() takes it by vector-Jacobian products, and "
            "torch.compile has no double backward. Use divergence=hutchinson with divergence.mode=forward, a field "
            "with value_divergence_and_products such as MLP, or trainer.compile=false"
        )
    return taken


def _takes_norms_in_reverse(estimator: DivergenceEstimator, field: object) -> bool:
    if isinstance(estimator, Analytic):
        return not hasattr(field, "value_divergence_and_products")
    return type(estimator).with_jacobian_norm is DivergenceEstimator.with_jacobian_norm


class _Compiled(DivergenceEstimator):
    """An estimator that evaluates, compiled, the one that it has chosen for the field."""

    def __init__(self, estimator: DivergenceEstimator, chosen: DivergenceEstimator) -> None:
        self.estimator = estimator
        self.chosen = chosen
        # Forward mode writes zeros that cannot be written to again; reusing their memory would (torch 2.13).
        forward = getattr(chosen, "mode", None) == "forward"
        self._evaluate = torch.compile(_evaluate, options={"allow_buffer_reuse": False} if forward else None)

    def __call__(self, field: VectorField, t: Tensor, x: Tensor, probes: Tensor | None) -> FieldSample:
        if torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()  # as in all evaluations but the first of a solve: one program less
        value, estimates = self._evaluate(self.chosen, field.fresh(), t, x, probes)
        return FieldSample(value, estimates.expand(self.num_estimates, -1))  # as Auto does with an exact choice

    def draw_probes(
        self, x: Tensor, generator: torch.Generator | None = None, field: object | None = None
    ) -> Tensor | None:
        return self.estimator.draw_probes(x, generator, field)

    def with_jacobian_norm(
        self, field: VectorField, t: Tensor, x: Tensor, probes: Tensor | None, directions: Tensor
    ) -> FieldSample:
        return self.estimator.with_jacobian_norm(field, t, x, probes, directions)

    @property
    def num_estimates(self) -> int:
        return self.estimator.num_estimates

    def cost(self, event_shape: tuple[int, ...], field: object | None = None) -> int:
        return self.estimator.cost(event_shape, field)

    def choose(self, event_shape: tuple[int, ...], field: object | None = None) -> DivergenceEstimator:
        return self.estimator.choose(event_shape, field)

    def is_exact(self, event_shape: tuple[int, ...], field: object | None = None) -> bool:
        return self.estimator.is_exact(event_shape, field)

    def standard_error(self, estimates: Tensor, event_shape: tuple[int, ...], field: object | None = None) -> Tensor:
        return self.estimator.standard_error(estimates, event_shape, field)


def _evaluate(
    estimator: DivergenceEstimator, field: VectorField, t: Tensor, x: Tensor, probes: Tensor | None
) -> tuple[Tensor, Tensor]:
    sample = estimator(field, t, x, probes)
    return sample.value, sample.estimates
