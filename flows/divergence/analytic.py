"""The divergence that the field itself knows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flows.arguments import checked
from flows.divergence.base import DivergenceEstimator, FieldSample
from flows.errors import InvalidTypeError, InvalidValueError
from flows.vector_field import checked_value


@checked
@dataclass(frozen=True)
class Analytic(DivergenceEstimator):
    """The closed form of the field's own `value_and_divergence(t, x)`.

    Exact. Most closed forms cost a part of an evaluation, whatever the dimension, as that of `flows.fields.MLP` with
    up to two hidden layers; then `cost` is 0. Others grow: three or more hidden layers push as many tangents through
    the network as the narrowest of them, or the event, is wide. Such a field states its `divergence_cost` in Jacobian
    products, which `cost` returns and `Auto` weighs.

    Raises:
        TypeError: the field has no closed form; the message names what to choose instead.

    Example:
        ```python
        import torch

        import flows

        flow = flows.CNF(flows.fields.MLP((2,)), divergence=flows.divergence.Analytic())
        flow.log_prob(torch.randn(10, 2))  # exact, for fields with a closed form
        ```
    """

    def __call__(self, t: Tensor, x: Tensor, probes: Tensor | None = None) -> FieldSample:
        closed_form = self.field.value_and_divergence
        if closed_form is None:
            raise InvalidTypeError(
                f"Analytic() needs a field with value_and_divergence(t, x), and {self.field.name} has none; choose "
                "Auto() for the cheapest that it allows, Exact() for no sampling error at one Jacobian product a "
                "dimension, or Hutchinson(num_probes=...) for noise at a few"
            )
        value, divergence = closed_form(t, x)
        if divergence.shape != x.shape[:1]:
            raise InvalidValueError(
                f"value_and_divergence of {self.field.name} must return one divergence a point, of shape ({len(x)},), "
                f"got {tuple(divergence.shape)}"
            )
        return FieldSample(checked_value(value, x), divergence.unsqueeze(0))

    def with_jacobian_norm(self, t: Tensor, x: Tensor, probes: Tensor | None, directions: Tensor) -> FieldSample:
        """‖J‖²_F from products in closed form, where the field has `value_divergence_and_products`."""
        closed_form = self.field.value_divergence_and_products
        if closed_form is None:
            return super().with_jacobian_norm(t, x, probes, directions)
        value, divergence, products = closed_form(t, x, directions)
        return FieldSample(value, divergence.unsqueeze(0), products.square().flatten(2).sum((0, 2)))

    @property
    def cost(self) -> int:
        return self.field.divergence_cost

    @property
    def is_exact(self) -> bool:
        return True
