"""The contract of an encoder of contexts."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from flows.arguments import CheckedMethods
from flows.checks import as_shape
from flows.conditions import Conditions
from flows.errors import InvalidValueError


class Encoder(CheckedMethods, nn.Module, ABC, checks=("forward", "fit")):
    """A map of contexts to the features that a field takes.

    A flow applies it once a solve, not at each evaluation of its field. Its parameters are trained with the field. To
    add one: subclass it, and add a yaml with its `_target_` to `conf/encoder`.

    Args:
        context_shape: shape of one context, in data units.
        features_shape: shape of what the field takes as its context.

    Attributes:
        conditions: names and categories of the entries of a context, for contexts from columns of a table. Default:
            None, contexts are numbers without names.

    Example:
        ```python
        import torch

        import flows


        class Periodic(flows.encoders.Encoder):
            '''An angle in degrees as a point on the circle.'''

            def __init__(self):
                super().__init__(context_shape=(1,), features_shape=(2,))

            def forward(self, context):
                return torch.cat([torch.deg2rad(context).cos(), torch.deg2rad(context).sin()], -1)


        flow = flows.CNF(flows.fields.MLP((2,), context_shape=(2,)), encoder=Periodic())
        flow.sample((10,), context=torch.tensor([90.0]))
        ```
    """

    conditions: Conditions | None = None

    def __init__(self, context_shape: int | Sequence[int], features_shape: int | Sequence[int]) -> None:
        super().__init__()
        self.context_shape = as_shape("context_shape", context_shape)
        self.features_shape = as_shape("features_shape", features_shape)

    def __init_subclass__(cls, **options: Any) -> None:
        """Let every encoder check the shape of its contexts."""
        for name in ("forward", "fit"):
            if name in vars(cls):
                setattr(cls, name, _of_contexts(vars(cls)[name]))
        super().__init_subclass__(**options)

    @abstractmethod
    def forward(
        self,
        context: Tensor,  # (B, *context)
    ) -> Tensor:  # (B, *features)
        """Return the features of each context."""

    def fit(
        self,
        contexts: Tensor,  # (n, *context)
    ) -> Encoder:
        """Fit the encoder to contexts of the training part and return it. Default: nothing to fit."""
        return self

    def contexts(self, given: Any) -> Tensor:  # (*batch, *context)
        """Contexts from words and numbers: a mapping, a list of mappings, or a data frame; see `Conditions.encode`.

        Raises:
            InvalidValueError: the entries of a context have no names, or `given` does not fit them.
        """
        if self.conditions is None:
            raise InvalidValueError(
                f"the entries of these contexts have no names; give a tensor of shape {self.context_shape} for each"
            )
        return self.conditions.encode(given)


def _of_contexts(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def checked_method(self: Encoder, context: Tensor) -> Any:
        if isinstance(context, Tensor) and tuple(context.shape[1:]) != self.context_shape:
            if self.conditions is not None:
                self.conditions.check(context)
            raise InvalidValueError(
                f"a context must have the shape {self.context_shape}, got {tuple(context.shape[1:])} in a batch of "
                f"shape {tuple(context.shape)}"
            )
        return method(self, context)

    return checked_method
