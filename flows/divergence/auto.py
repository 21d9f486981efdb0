"""The estimator that the field makes cheapest."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flows.arguments import checked
from flows.divergence.analytic import Analytic
from flows.divergence.base import DivergenceEstimator, FieldSample
from flows.divergence.exact import Exact
from flows.divergence.hutchinson import Hutchinson
from flows.divergence.probing import Probing
from flows.errors import InvalidValueError
from flows.vector_field import BoundField


@checked
@dataclass(frozen=True)
class Auto(DivergenceEstimator):
    """The cheapest exact estimator of the field, or Hutchinson's where exactness costs too much.

    The candidates are `Analytic()` for a field with a closed form, `Probing(radius + 1)` for one that states its
    `receptive_radius`, and `Exact()`. `bind(field)` returns the cheapest if it costs at most `max_products`, otherwise
    `Hutchinson(num_probes)`, which is noisy and says how much.

    Args:
        max_products: the most Jacobian products an evaluation to pay for exactness.
        num_probes: of Hutchinson's estimator. Two is the least that shows its standard error.

    Example:
        ```python
        import torch

        from flows.divergence import Auto, divergence

        divergence(torch.tanh, torch.randn(10, 3), estimator=Auto())  # exact: three products are cheap
        ```
    """

    max_products: int = 32
    num_probes: int = 2

    def __post_init__(self) -> None:
        if self.max_products < 0:
            raise InvalidValueError(f"max_products must be >= 0, got {self.max_products}")
        Hutchinson(self.num_probes)  # checks it

    def bind(self, field: BoundField) -> DivergenceEstimator:
        exact: list[DivergenceEstimator] = [] if field.value_and_divergence is None else [Analytic()]
        exact.append(Exact())
        if field.receptive_radius is not None:
            exact.append(Probing(field.receptive_radius + 1))
        cheapest = min((estimator.bind(field) for estimator in exact), key=lambda estimator: estimator.cost)
        return cheapest if cheapest.cost <= self.max_products else Hutchinson(self.num_probes).bind(field)

    def __call__(self, t: Tensor, x: Tensor, probes: Tensor | None = None) -> FieldSample:
        return self.bind(self.field)(t, x, probes)
