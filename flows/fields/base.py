"""The contract of a vector field, and a field bound to its context for one solve."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor, nn

from flows.errors import InvalidValueError


class Field(nn.Module, ABC):
    """A vector field v(t, x), or v(t, x; context), on points of a fixed event shape.

    Any module with the same ``forward`` is a field as it is; this base class only adds what CNF would
    otherwise have to be told. A field that knows its divergence also has

    ``value_and_divergence(t, x, context=None) -> (value (B, *event), divergence (B,))``,

    which the estimator ``Analytic`` uses. One whose closed form has parts that stay the same during a solve
    overrides :meth:`bind` to compute them once. Where products J u with its Jacobian are in closed form too,
    ``value_divergence_and_products(t, x, directions, context=None)`` with directions (P, B, *event) gives them beside
    the two, for the regulariser ``JacobianNorm``.

    If that costs about as much as n Jacobian products rather than a part of an evaluation, ``divergence_cost = n``
    says so.

    A field that is decode ∘ encode through a narrower space ℝᴴ can offer ``encode(t, x, context=None) -> (B, H)``,
    ``decode(t, h, context=None) -> (B, *event)`` and ``bottleneck_width = H`` to the estimator ``Bottleneck``.

    Args:
        event_shape: the shape of one point.
        context_shape: the shape of one sample's context, ``None`` for an unconditional field.

    A field on a grid (the axes of an event after the first) says by ``receptive_radius`` how many sites away,
    along any axis, a velocity can depend on x, and by ``periodic`` whether the grid wraps around.
    """

    receptive_radius: int | None = None  # None: on all of x
    periodic: bool = False
    divergence_cost: int = 0  # Jacobian products that value_and_divergence costs as much as

    def __init__(
        self, event_shape: tuple[int, ...] | list[int], context_shape: tuple[int, ...] | list[int] | None
    ) -> None:
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.context_shape = None if context_shape is None else tuple(context_shape)
        if not self.event_shape or min(self.event_shape) < 1:
            raise InvalidValueError(f"event_shape must hold positive sizes, such as (2,), got {self.event_shape}")

    @abstractmethod
    def forward(
        self,
        t: Tensor,  # 0-d or (B,)
        x: Tensor,  # (B, *event)
        context: Tensor | None = None,  # (B, *context)
    ) -> Tensor:  # (B, *event)
        """The velocity at time t."""

    def bind(self, context: Tensor | None = None) -> BoundField:
        """Fix the context for one solve."""
        return BoundField.of(self, context)

    @property
    def num_context_features(self) -> int:
        """The size of the flattened context of one sample, 0 without one."""
        return 0 if self.context_shape is None else math.prod(self.context_shape)

    def check_context(self, context: Tensor | None) -> None:
        """Raise ``ValueError`` if a context is missing, unexpected or of another shape."""
        if self.context_shape is None:
            if context is not None:
                raise InvalidValueError(
                    f"{type(self).__name__} is unconditional and got a context of shape "
                    f"{tuple(context.shape)}; build it with context_shape={tuple(context.shape[1:])}"
                )
        elif context is None:
            raise InvalidValueError(f"{type(self).__name__} needs a context of shape (B, *{self.context_shape})")
        elif tuple(context.shape[1:]) != self.context_shape:
            raise InvalidValueError(
                f"{type(self).__name__} expects a context of shape (B, *{self.context_shape}), "
                f"got {tuple(context.shape)}"
            )


class BoundField:
    """A field with its context fixed: a plain function ``(t, x) -> velocity``."""

    is_wrapper = True  # what the field states about itself is found at .field

    def __init__(self, field: Callable[..., Tensor], context: Tensor | None = None) -> None:
        self.field = field
        self.context = context

    @staticmethod
    def of(field: Callable[..., Tensor], context: Tensor | None = None) -> BoundField:
        """Bind ``field``, keeping its closed form where it has one."""
        kind = ClosedFormField if hasattr(field, "value_and_divergence") else BoundField
        return kind(field, context)

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        return self.field(t, x, *self._given)

    def encode(self, t: Tensor, x: Tensor) -> Tensor:
        """The first half of a field with a bottleneck."""
        return self.field.encode(t, x, *self._given)

    def decode(self, t: Tensor, h: Tensor) -> Tensor:
        """The second half of a field with a bottleneck."""
        return self.field.decode(t, h, *self._given)

    def fresh(self) -> BoundField:
        """The same binding, without what it keeps from earlier evaluations: their graph may be gone."""
        return type(self)(self.field, self.context)

    @property
    def _given(self) -> tuple[Tensor, ...]:
        return () if self.context is None else (self.context,)


class ClosedFormField(BoundField):
    """A bound field that knows its divergence."""

    def value_and_divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.field.value_and_divergence(t, x, *self._given)

    @property
    def value_divergence_and_products(self) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
        """With products in closed form; an AttributeError if the field has none."""
        closed_form = self.field.value_divergence_and_products
        return lambda t, x, directions: closed_form(t, x, directions, *self._given)


def bind(field: Callable[..., Tensor], context: Tensor | None = None) -> BoundField:
    """Bind any callable field to a context for one solve."""
    return field.bind(context) if hasattr(field, "bind") else BoundField.of(field, context)
