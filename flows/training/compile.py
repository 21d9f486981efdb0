"""Compile what a training step evaluates."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flows.divergence import DivergenceEstimator, FieldSample
from flows.errors import InvalidTypeError, InvalidValueError
from flows.models.cnf import CNF
from flows.objectives import Objective
from flows.promises import raise_explained
from flows.solvers import ODESolver, many_solves
from flows.training.stage import Stage
from flows.vector_field import BoundField

WAY_OUT = "Use divergence.mode=forward, a field with a closed form and divergence=analytic, or hardware.compile=false"
LONG_STEPS, LONG_SECONDS = 1000, 120.0  # of a stage that wins back on a CPU what compiling takes


@contextmanager
def compiled(model: nn.Module, objective: Any) -> Iterator[None]:
    """Run compiled code inside the context.

    An objective that solves takes compiled steps, as with `ODESolver(compile=True)`. For any other the field is
    compiled, with its divergence where the objective takes it.

    Raises:
        ValueError: the objective would differentiate compiled code twice, which cannot be; or the solver takes no
            Runge-Kutta steps.
    """
    if _solves(objective):
        with _compiled_steps(model):
            yield
        return
    field = _field_of(model)
    call = field._compiled_call_impl  # what nn.Module.compile sets
    own = model.divergence if isinstance(model, CNF) else None
    if isinstance(model, CNF):
        estimator = matched_divergence(model, objective)
        if estimator is not None:
            model.divergence = _Compiled(estimator, forward=estimator.bind(model.bind()).mode == "forward")
    field.compile()
    try:
        yield
    except RuntimeError as error:
        if "double backward" not in str(error):
            raise_explained(error, type(field).__name__)
        raise InvalidValueError(
            "hardware.compile=true does not go with this field or objective: something within an evaluation calls "
            f"autograd, such as a value_and_divergence by torch.autograd.grad. {WAY_OUT}"
        ) from error
    finally:
        if isinstance(model, CNF) and own is not None:
            model.divergence = own
        field._compiled_call_impl = call


@contextmanager
def _compiled_steps(model: Any) -> Iterator[None]:
    solver = model.solver
    model.solver = replace(solver, compile=True)
    try:
        yield
    finally:
        model.solver = solver


@contextmanager
def compiled_evaluation(model: Any) -> Iterator[None]:
    """Let large solves without gradients, as of validation and test, take compiled steps inside the context.

    A solver that compiles, or cannot, stays what it is.
    """
    solver = getattr(model, "solver", None)
    if not isinstance(solver, ODESolver) or solver.compile:
        yield
        return
    model.solver = replace(solver, compile="auto")
    try:
        with many_solves():
            yield
    finally:
        model.solver = solver


def stages_to_compile(
    setting: bool | Literal["auto"], device: str, model: nn.Module, stages: Mapping[str, Stage]
) -> tuple[set[str], list[str]]:
    """The stages to train compiled, and notices about the others.

    Args:
        setting: `"auto"`: all that can be if `device` is "cuda"; elsewhere those that solve and are long.

    Raises:
        ValueError: the setting is `True`, and a stage cannot be.
    """
    chosen: set[str] = set()
    notices: list[str] = []
    if not setting:
        return chosen, notices
    for name, stage in stages.items():
        if setting == "auto" and device != "cuda" and not (_solves(stage.objective) and is_long(stage)):
            continue
        try:
            _check(model, stage.objective)
            chosen.add(name)
        except ValueError as reason:
            if setting != "auto":
                raise
            notices.append(f"hardware.compile=auto leaves the stage {name} uncompiled: {reason}")
    return chosen, notices


def is_long(stage: Stage) -> bool:
    """Whether a stage is long enough to win back what compiling takes.

    Settings decide, not times that were measured, so that a resumed run compiles what the first one did.
    """
    if stage.steps is not None:
        return stage.steps >= LONG_STEPS
    return (stage.seconds or 0.0) >= LONG_SECONDS


def _check(model: Any, objective: Any) -> None:
    """Raise `ValueError` if a stage cannot be compiled."""
    if _solves(objective):
        if not isinstance(getattr(model, "solver", None), ODESolver):
            raise InvalidTypeError(
                f"hardware.compile=true is for flows.CNF and flows.NeuralODE, got {type(model).__name__}; compile the "
                "model yourself by model.compile(), and leave hardware.compile=false"
            )
        with _compiled_steps(model):
            return
    _field_of(model)
    if isinstance(model, CNF):
        matched_divergence(model, objective)


def _solves(objective: Any) -> bool:
    return getattr(objective, "solves", True)  # a function that is no `Objective` may solve


def _field_of(model: Any) -> nn.Module:
    field = getattr(model, "field", None)
    if not isinstance(field, nn.Module):
        raise InvalidTypeError(
            f"hardware.compile=true is for flows.CNF and flows.NeuralODE, got {type(model).__name__}; compile the "
            "model yourself by model.compile(), and leave hardware.compile=false"
        )
    return field


def matched_divergence(flow: CNF, objective: Any) -> DivergenceEstimator | None:
    """The estimator that an objective uses which solves nothing, if it uses one.

    Raises:
        ValueError: it differentiates backwards within an evaluation.
    """
    taken = objective.divergence(flow) if isinstance(objective, Objective) else None
    if taken is None:
        return None
    if taken.bind(flow.bind()).mode == "reverse":
        name = type(taken.bind(flow.bind())).__name__
        raise InvalidValueError(
            f"hardware.compile=true does not go with divergence {name}(mode='reverse') of an objective that solves "
            "nothing: training differentiates its vector-Jacobian products once more, and torch.compile has no double "
            f"backward. {WAY_OUT}; this objective can also do without, by its divergence_weight=0"
        )
    return taken


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
