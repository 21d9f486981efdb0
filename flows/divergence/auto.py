"""The estimator that the field makes cheapest."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flows.divergence.analytic import Analytic
from flows.divergence.base import DivergenceEstimator, FieldSample, VectorField, declared
from flows.divergence.exact import Exact
from flows.divergence.hutchinson import Hutchinson
from flows.divergence.probing import Probing
from flows.errors import InvalidValueError


@dataclass(frozen=True)
class Auto(DivergenceEstimator):
    """The cheapest exact estimator of the field, or Hutchinson's where every exact one is too dear.

    The candidates are ``Analytic()`` for a field with a closed form, ``Probing(radius + 1)`` for one that states its
    ``receptive_radius``, and ``Exact()``. The cheapest is taken if it costs no more than ``max_products``, else
    ``Hutchinson(num_probes)``, which is noisy and says how much. :meth:`choose` tells which it is.

    Args:
        max_products: the most Jacobian products an evaluation to pay for exactness.
        num_probes: of Hutchinson's estimator; two is the least that shows its standard error. An exact choice
            returns as many equal rows, for their number must not depend on the field.
    """

    max_products: int = 32
    num_probes: int = 2

    def __post_init__(self) -> None:
        if self.max_products < 0:
            raise InvalidValueError(f"max_products must be >= 0, got {self.max_products}")
        Hutchinson(self.num_probes)  # checks it

    def choose(self, event_shape: tuple[int, ...], field: object | None = None) -> DivergenceEstimator:
        """The estimator that does the work for this field."""
        exact: list[DivergenceEstimator] = [Analytic()] if hasattr(field, "value_and_divergence") else []
        exact.append(Exact())
        radius = declared(field, "receptive_radius")
        if radius is not None:
            exact.append(Probing(radius + 1))
        cheapest = min(exact, key=lambda estimator: estimator.cost(event_shape, field))
        if cheapest.cost(event_shape, field) <= self.max_products:
            return cheapest
        return Hutchinson(self.num_probes)

    def description(self, event_shape: tuple[int, ...], field: object | None = None) -> str:
        return f"Auto ({self.choose(event_shape, field).description(event_shape, field)})"

    def draw_probes(
        self, x: Tensor, generator: torch.Generator | None = None, field: object | None = None
    ) -> Tensor | None:
        return self.choose(tuple(x.shape[1:]), field).draw_probes(x, generator, field)

    def __call__(self, field: VectorField, t: Tensor, x: Tensor, probes: Tensor | None) -> FieldSample:
        return self._expanded(self.choose(tuple(x.shape[1:]), field)(field, t, x, probes))

    def with_jacobian_norm(
        self, field: VectorField, t: Tensor, x: Tensor, probes: Tensor | None, directions: Tensor
    ) -> FieldSample:
        chosen = self.choose(tuple(x.shape[1:]), field)
        return self._expanded(chosen.with_jacobian_norm(field, t, x, probes, directions))

    def _expanded(self, sample: FieldSample) -> FieldSample:
        return replace(sample, estimates=sample.estimates.expand(self.num_estimates, -1))

    @property
    def num_estimates(self) -> int:
        return self.num_probes

    def cost(self, event_shape: tuple[int, ...], field: object | None = None) -> int:
        return self.choose(event_shape, field).cost(event_shape, field)

    def is_exact(self, event_shape: tuple[int, ...], field: object | None = None) -> bool:
        return self.choose(event_shape, field).is_exact(event_shape, field)

    def standard_error(self, estimates: Tensor, event_shape: tuple[int, ...], field: object | None = None) -> Tensor:
        return self.choose(event_shape, field).standard_error(estimates, event_shape, field)
