"""Compile what a training step evaluates."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flows.divergence import Analytic, DivergenceEstimator, FieldSample
from flows.errors import InvalidTypeError, InvalidValueError
from flows.models.cnf import CNF
from flows.objectives import Objective
from flows.objectives.base import active_costs
from flows.path_costs import draw_directions
from flows.promises import raise_explained
from flows.vector_field import BoundField

WAY_OUT = "Use divergence.mode=forward, a field with a closed form and divergence=analytic, or hardware.compile=false"


@contextmanager
def compiled(flow: nn.Module, objective: Any) -> Iterator[None]:
    """Run the field and its divergence as compiled code inside the context.

    Path costs that take Jacobian products of their own stay as they are. The first steps take long, since they
    compile (a minute and more on a CPU).

    Raises:
        ValueError: training would differentiate twice, which compiled code cannot.
    """
    assert isinstance(flow, CNF)  # `stages_to_compile` chooses no stage of another model
    own, call = flow.divergence, flow.field._compiled_call_impl  # what nn.Module.compile sets
    estimator = compilable_divergence(flow, objective)
    if estimator is not None:
        flow.divergence = _Compiled(estimator, forward=estimator.bind(flow.bind()).mode == "forward")
    flow.field.compile()
    try:
        yield
    except RuntimeError as error:
        if "double backward" not in str(error):
            raise_explained(error, type(flow.field).__name__)
        raise InvalidValueError(
            "hardware.compile=true does not go with this field or objective: something within an evaluation calls "
            f"autograd, such as a value_and_divergence or a path cost by torch.autograd.grad. {WAY_OUT}"
        ) from error
    finally:
        flow.divergence = own
        flow.field._compiled_call_impl = call


def stages_to_compile(
    setting: bool | Literal["auto"], device: str, flow: nn.Module, objectives: Mapping[str, Any]
) -> tuple[set[str], list[str]]:
    """The objectives to train compiled, and notices about the others.

    Args:
        setting: `"auto"`: all that can be, if `device` is "cuda".

    Raises:
        ValueError: the setting is `True`, and an objective cannot be.
    """
    if not setting or (setting == "auto" and device != "cuda"):
        return set(), []
    if not isinstance(flow, CNF):
        if setting == "auto":
            return set(), []
        raise InvalidTypeError(
            f"hardware.compile=true is for flows.CNF, got {type(flow).__name__}; compile the model yourself by "
            "model.compile(), and leave hardware.compile=false"
        )
    chosen, notices = set(), []
    for name, objective in objectives.items():
        try:
            compilable_divergence(flow, objective)
            chosen.add(name)
        except ValueError as reason:
            if setting != "auto":
                raise
            notices.append(f"hardware.compile=auto leaves the stage {name} uncompiled: {reason}")
    return chosen, notices


def compilable_divergence(flow: CNF, objective: Any) -> DivergenceEstimator | None:
    """The estimator that the objective uses, if it uses one.

    A function that is no `Objective` is taken to use the flow's.

    Raises:
        ValueError: it differentiates backwards within an evaluation.
    """
    solves = getattr(objective, "solves", True)
    assumed = flow.divergence if solves else None
    taken = objective.divergence(flow) if isinstance(objective, Objective) else assumed
    if taken is None:
        return None
    estimator = taken.bind(flow.bind())
    if solves and flow.solver.gradient == "adjoint":
        raise InvalidValueError(
            "hardware.compile=true does not go with solver.gradient=adjoint, whose backward pass calls autograd at "
            "each evaluation; use solver.gradient=backprop or checkpoint"
        )
    if estimator.mode == "reverse":
        name = type(estimator).__name__
        raise InvalidValueError(
            f"hardware.compile=true does not go with divergence {name}(mode='reverse'): training differentiates its "
            f"vector-Jacobian products once more, and torch.compile has no double backward. {WAY_OUT}"
            f"{'' if solves else '; this objective can also do without, by its divergence_weight=0'}"
        )
    costs = active_costs(getattr(objective, "regularizers", ()))
    norms = draw_directions(costs, torch.zeros(1, *flow.event_shape), torch.Generator()) is not None
    if norms and _takes_norms_in_reverse(estimator):
        raise InvalidValueError(
            f"hardware.compile=true does not go with a path cost that needs the norm of the Jacobian of "
            f"{type(flow.field).__name__}: {type(estimator).__name__}() takes it by vector-Jacobian products, and "
            "torch.compile has no double backward. Use divergence=hutchinson with divergence.mode=forward, a field "
            "with value_divergence_and_products such as MLP, or hardware.compile=false"
        )
    return taken


def _takes_norms_in_reverse(estimator: DivergenceEstimator) -> bool:
    if isinstance(estimator, Analytic):
        return estimator.field.value_divergence_and_products is None
    return type(estimator).with_jacobian_norm is DivergenceEstimator.with_jacobian_norm


class _Compiled(DivergenceEstimator):
    """An estimator that runs as compiled code once bound.

    Args:
        estimator: the options.
        forward: whether they take products in forward mode.
    """

    def __init__(self, estimator: DivergenceEstimator, forward: bool) -> None:
        self.estimator = estimator
        # Forward mode writes zeros that cannot be written to again; reusing their memory would (torch 2.13).
        self._evaluate = torch.compile(_evaluate, options={"allow_buffer_reuse": False} if forward else None)

    def bind(self, field: BoundField) -> DivergenceEstimator:
        """A copy with the bound estimator in the place of the options."""
        bound = copy.copy(self)
        bound._field, bound.estimator = field, self.estimator.bind(field)
        return bound

    def __call__(self, t: Tensor, x: Tensor, probes: Tensor | None = None) -> FieldSample:
        if torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()  # as in all evaluations but the first of a solve: one program less
        return FieldSample(*self._evaluate(self.estimator.fresh(), t, x, probes))

    def draw_probes(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor | None:
        return self.estimator.draw_probes(x, generator)

    def with_jacobian_norm(self, t: Tensor, x: Tensor, probes: Tensor | None, directions: Tensor) -> FieldSample:
        return self.estimator.with_jacobian_norm(t, x, probes, directions)

    @property
    def num_estimates(self) -> int:
        return self.estimator.num_estimates

    @property
    def cost(self) -> int:
        return self.estimator.cost

    @property
    def is_exact(self) -> bool:
        return self.estimator.is_exact

    @property
    def description(self) -> str:
        return self.estimator.description

    def standard_error(self, estimates: Tensor) -> Tensor:
        return self.estimator.standard_error(estimates)


def _evaluate(estimator: DivergenceEstimator, t: Tensor, x: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
    sample = estimator(t, x, probes)
    return sample.value, sample.estimates
