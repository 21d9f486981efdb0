"""Classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flows.arguments import checked
from flows.checks import check_number
from flows.errors import InvalidValueError
from flows.fields.base import Field
from flows.vector_field import BoundField, bind


@checked
class Guided(Field):
    r"""v(t, x; ∅) + w (v(t, x; c) − v(t, x; ∅)) with ∅ the zero vector: a conditional field under guidance.

    w = 1 is the field itself, w = 0 the unconditional one; w > 1 overstates what sets the context apart, and the
    flow's samples are then no longer those of the data given the context. It is a flow all the same: its `log_prob` is
    that of the guided ODE. Take the likelihood of data from the flow without guidance.

    The field must have been trained with contexts replaced by zeros now and then
    (`FlowMatching(context_dropout=0.1)`), and a zero context must mean nothing else, as with classes. An evaluation
    costs two of the field; the divergence is in closed form where the field's is. [Ho & Salimans 2022,
    arXiv:2207.12598; of velocities: Zheng et al. 2023, arXiv:2311.13443]

    Args:
        field: with a `context_shape`; its parameters are shared.
        weight: w.

    Example:
        ```python
        import torch

        import flows

        field = flows.fields.MLP((2,), context_shape=(3,))
        flow = flows.CNF(flows.fields.Guided(field, weight=2.0))
        flow.sample((10,), context=torch.eye(3)[0])
        ```
    """

    def __init__(self, field: nn.Module, weight: float) -> None:
        view = bind(field)
        if view.context_shape is None:
            raise InvalidValueError(
                f"guidance needs a field with a context_shape, and {view.name} has none or is unconditional"
            )
        super().__init__(view.event_shape, view.context_shape)
        self.conditional = field
        check_number("weight", weight)
        self.weight = weight
        self.receptive_radius = view.receptive_radius
        self.periodic = view.periodic

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.check_context(context)
        return self.bind(context)(t, x)

    @property
    def divergence_cost(self) -> int:
        return 2 * bind(self.conditional).divergence_cost

    def bind(self, context: Tensor | None = None) -> BoundField:
        return _BoundGuided(self, context)


class _BoundGuided(BoundField):
    """A guided field at work: one view with the context, one without."""

    def __init__(self, field: Guided, context: Tensor | None) -> None:
        super().__init__(field, context)
        self.conditional = bind(field.conditional, context)
        self.unconditional = bind(field.conditional, None if context is None else torch.zeros_like(context))
        self.value_and_divergence = self._guided_closed_form()

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.lerp(self.unconditional(t, x), self.conditional(t, x), self.field.weight)

    @property
    def strangers(self) -> list[BoundField]:
        return self.conditional.strangers

    def _guided_closed_form(self) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]] | None:
        without, given, weight = (
            self.unconditional.value_and_divergence,
            self.conditional.value_and_divergence,
            self.field.weight,
        )
        if without is None or given is None:
            return None
        return lambda t, x: tuple(torch.lerp(a, b, weight) for a, b in zip(without(t, x), given(t, x), strict=True))
