"""Classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flows.errors import InvalidValueError
from flows.fields.base import BoundField, Field, bind


class Guided(Field):
    r"""v(t, x; ∅) + w (v(t, x; c) − v(t, x; ∅)) with ∅ the zero vector: a conditional field under guidance.

    w = 1 is the field itself, w = 0 the unconditional one; w > 1 overstates what sets the context apart, and the
    flow's samples are then no longer those of the data given the context. The field must have been trained with
    contexts replaced by zeros now and then (``FlowMatching(context_dropout=0.1)``), and a zero context must mean
    nothing else, as with classes. An evaluation costs two of the field; the divergence is in closed form where
    the field's is. [Ho & Salimans 2022, arXiv:2207.12598; of velocities: Zheng et al. 2023, arXiv:2311.13443]

    Args:
        field: with a ``context_shape``; its parameters are shared.
        weight: w.
    """

    def __init__(self, field: nn.Module, weight: float) -> None:
        shape = getattr(field, "context_shape", None)
        if shape is None:
            raise InvalidValueError(
                f"guidance needs a field with a context_shape, and {type(field).__name__} has none or is unconditional"
            )
        super().__init__(field.event_shape, shape)
        self.conditional = field
        self.weight = weight
        self.receptive_radius = getattr(field, "receptive_radius", None)
        self.periodic = getattr(field, "periodic", False)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.bind(context)(t, x)

    @property
    def value_and_divergence(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """The closed form, if the field has one."""
        if not hasattr(self.conditional, "value_and_divergence"):
            raise AttributeError("value_and_divergence")
        return lambda t, x, context=None: self.bind(context).value_and_divergence(t, x)

    @property
    def divergence_cost(self) -> int:
        return 2 * getattr(self.conditional, "divergence_cost", 0)

    def bind(self, context: Tensor | None = None) -> BoundField:
        self.check_context(context)
        closed = hasattr(self.conditional, "value_and_divergence")
        return (_ClosedFormGuided if closed else _BoundGuided)(self, context)


class _BoundGuided(BoundField):
    def __init__(self, field: Guided, context: Tensor) -> None:
        super().__init__(field, context)
        self._given_context = bind(field.conditional, context)
        self._given_none = bind(field.conditional, torch.zeros_like(context))

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.lerp(self._given_none(t, x), self._given_context(t, x), self.field.weight)


class _ClosedFormGuided(_BoundGuided):
    def value_and_divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        without, given = (bound.value_and_divergence(t, x) for bound in (self._given_none, self._given_context))
        value, divergence = (torch.lerp(a, b, self.field.weight) for a, b in zip(without, given, strict=True))
        return value, divergence
