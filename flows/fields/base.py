"""The base class of the vector fields of this package."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from flows.arguments import CheckedMethods, checked
from flows.checks import as_shape
from flows.errors import InvalidValueError
from flows.naming import by_name
from flows.vector_field import BoundField


@checked
class Field(CheckedMethods, nn.Module, ABC):
    """A vector field v(t, x), or v(t, x; context), on points of a fixed event shape.

    Any module with the same `forward` is a field as it is; this class states the shapes and checks the context. A
    field may offer more, such as its divergence in closed form: `BoundField` lists what, and under which names.

    Args:
        event_shape: shape of one point.
        context_shape: shape of one sample's context; `None` for an unconditional field.

    Example:
        ```python
        import torch

        import flows


        class Rotation(flows.fields.Field):
            '''v = ω (−y, x) with a trained ω.'''

            def __init__(self):
                super().__init__(event_shape=(2,), context_shape=None)
                self.speed = torch.nn.Parameter(torch.ones(()))

            def forward(self, t, x, context=None):
                return self.speed * torch.stack([-x[:, 1], x[:, 0]], 1)


        flow = flows.CNF(Rotation())
        ```
    """

    receptive_radius: int | None = None  # in sites of the grid, the axes after the first; None: all of x
    periodic: bool = False  # whether the grid wraps around
    takes_inputs: bool = False  # whether it reads inputs u(t), sampled at times of their own, from its context
    divergence_cost: int = 0  # Jacobian products that value_and_divergence costs as much as

    def __init__(self, event_shape: int | Sequence[int], context_shape: int | Sequence[int] | None) -> None:
        super().__init__()
        self.event_shape = as_shape("event_shape", event_shape)
        self.context_shape = None if context_shape is None else as_shape("context_shape", context_shape)
        if not self.event_shape:
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
        return BoundField(self, context)

    @property
    def num_context_features(self) -> int:
        """The size of one sample's flattened context; 0 without one."""
        return 0 if self.context_shape is None else math.prod(self.context_shape)

    def check_context(self, context: Tensor | None) -> None:
        """Raise `ValueError` if a context is missing, unexpected or of another shape."""
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


@checked
def named_field(field: nn.Module | str, event_shape: int | Sequence[int] | None) -> nn.Module:
    """Return the field, or a new one of the class with that lower-case name and its default settings.

    Raises:
        InvalidValueError: there is no such class, or the event shape is missing.
    """
    if not isinstance(field, str):
        return field
    if event_shape is None:
        raise InvalidValueError(f"field={field!r} needs to know the shape of a point, such as event_shape=2")
    return by_name(Field, field, "field", event_shape=event_shape)
