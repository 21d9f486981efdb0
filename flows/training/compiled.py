"""torch.compile for what a training step evaluates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from flows.cnf import CNF
from flows.divergence import DivergenceEstimator, FieldSample, VectorField
from flows.objectives import Objective


@contextmanager
def compiled(flow: CNF, objective: Objective) -> Iterator[None]:
    """While entered, the field and its divergence run as compiled code; afterwards as they were.

    Path costs that take Jacobian products of their own stay as they are. The first steps take long, since they
    compile (a minute and more on a CPU).

    Raises:
        ValueError: training would differentiate twice, which compiled code cannot.
    """
    estimator = flow.divergence
    if solves(objective):
        check_compilable(flow)
        flow.divergence = _Compiled(estimator)
    flow.field.compile()
    try:
        yield
    finally:
        flow.divergence = estimator
        flow.field._compiled_call_impl = None  # what nn.Module.compile sets


def solves(objective: object) -> bool:
    """Whether it solves the ODE; one that does not say so may."""
    return getattr(objective, "solves", True)


def check_compilable(flow: CNF) -> None:
    """Raise ``ValueError`` if a training solve of the flow differentiates backwards within its evaluations."""
    estimator = flow.divergence.choose(flow.event_shape, flow.field)
    if flow.solver.gradient == "adjoint":
        raise ValueError(
            "trainer.compile=true does not go with solver.gradient=adjoint, whose backward pass calls autograd at each "
            "evaluation; use solver.gradient=backprop or checkpoint"
        )
    if getattr(estimator, "mode", None) == "reverse":
        name = type(estimator).__name__
        raise ValueError(
            f"trainer.compile=true does not go with divergence {name}(mode='reverse'): training differentiates its "
            "vector-Jacobian products once more, and torch.compile has no double backward. Use "
            "divergence.mode=forward, a field with a closed form and divergence=analytic, or trainer.compile=false"
        )


class _Compiled(DivergenceEstimator):
    """An estimator whose evaluation is compiled."""

    def __init__(self, estimator: DivergenceEstimator) -> None:
        self.estimator = estimator
        # Forward mode writes zeros that cannot be written to again; reusing their memory would (torch 2.13).
        forward = getattr(estimator, "mode", None) == "forward"
        self._evaluate = torch.compile(_evaluate, options={"allow_buffer_reuse": False} if forward else None)

    def __call__(self, field: VectorField, t: Tensor, x: Tensor, probes: Tensor | None) -> FieldSample:
        if torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()  # as in all evaluations but the first of a solve: one program less
        return FieldSample(*self._evaluate(self.estimator, field.fresh(), t, x, probes))

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
