"""The divergence that the field itself knows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flows.divergence.base import DivergenceEstimator, FieldSample, VectorField, checked_value, declared, field_name
from flows.errors import InvalidTypeError


@dataclass(frozen=True)
class Analytic(DivergenceEstimator):
    """The closed form of the field's own ``value_and_divergence(t, x)``.

    Exact. Most closed forms cost a part of an evaluation, whatever the dimension (``cost`` is 0), as for
    :class:`flows.fields.MLP` with up to two hidden layers. Others grow: with three or more hidden layers as many
    tangents are pushed through as the narrowest of them, or the event, is wide. Such a field states its
    ``divergence_cost`` in Jacobian products, which ``cost`` returns and :class:`Auto` weighs.

    Raises:
        TypeError: the field has no closed form; the message names what to choose instead.
    """

    def draw_probes(self, x: Tensor, generator: torch.Generator | None = None, field: object | None = None) -> None:
        return None

    def __call__(self, field: VectorField, t: Tensor, x: Tensor, probes: Tensor | None = None) -> FieldSample:
        closed_form = getattr(field, "value_and_divergence", None)
        if closed_form is None:
            raise InvalidTypeError(
                f"Analytic() needs a field with value_and_divergence(t, x), and {field_name(field)} has none; choose "
                "Auto() for the cheapest that it allows, Exact() for no sampling error at one Jacobian product a "
                "dimension, or Hutchinson(num_probes=...) for noise at a few"
            )
        value, divergence = closed_form(t, x)
        return FieldSample(checked_value(value, x), divergence.unsqueeze(0))

    def with_jacobian_norm(
        self, field: VectorField, t: Tensor, x: Tensor, probes: Tensor | None, directions: Tensor
    ) -> FieldSample:
        """‖J‖²_F from products in closed form where the field has ``value_divergence_and_products``."""
        closed_form = getattr(field, "value_divergence_and_products", None)
        if closed_form is None:
            return super().with_jacobian_norm(field, t, x, probes, directions)
        value, divergence, products = closed_form(t, x, directions)
        return FieldSample(value, divergence.unsqueeze(0), products.square().flatten(2).sum((0, 2)))

    def cost(self, event_shape: tuple[int, ...], field: object | None = None) -> int:
        return declared(field, "divergence_cost") or 0

    def is_exact(self, event_shape: tuple[int, ...], field: object | None = None) -> bool:
        return True
