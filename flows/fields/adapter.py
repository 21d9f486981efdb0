"""Other people's networks as fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from flows.arguments import checked
from flows.errors import InvalidValueError
from flows.fields.base import Field

_GIVEN = ("t", "x", "context", "x_and_t")
_TIME_SHAPES = ("scalar", "batch", "column")


@checked
class Adapter(Field):
    r"""Calls any `nn.Module` as a field, with its arguments in any order.

    ```python
    from torch import nn

    from flows.fields import Adapter

    net = nn.Linear(2, 2)
    Adapter(net, event_shape=(2,), arguments=("x",))                           # net(x), autonomous
    Adapter(net, event_shape=(2,), arguments=("x", "t"))                       # net(x, t)
    Adapter(nn.Linear(3, 2), event_shape=(2,), arguments=("x_and_t",))         # net(cat([x, t], -1))
    Adapter(net, event_shape=(2,), arguments={"x": "sample", "t": "timestep"}, time="batch")  # a U-Net of diffusers
    ```

    Args:
        module: the network; returns a velocity of the shape of `x`.
        event_shape: shape of a point.
        arguments: which of `"t"`, `"x"`, `"context"` and `"x_and_t"` (x with t as one more feature at
            the end) the module takes, in the order of its positional arguments, or a mapping from them to its
            keywords.
        time: what `t` the module is given: `"scalar"` (0-d where the solver gives one), `"batch"` (B,)
            or `"column"` (B, 1).
        context_shape: shape of the context, needed exactly if `"context"` is among the arguments.
    """

    runs_foreign_code = True

    def __init__(
        self,
        module: nn.Module,
        event_shape: int | Sequence[int],
        arguments: Sequence[str] | Mapping[str, str] = ("t", "x"),
        time: str = "batch",
        context_shape: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__(event_shape, context_shape)
        unknown = [name for name in arguments if name not in _GIVEN]
        if unknown or isinstance(arguments, str):
            raise InvalidValueError(f"arguments must be made of {', '.join(_GIVEN)}, got {arguments!r}")
        if time not in _TIME_SHAPES:
            raise InvalidValueError(f"time must be one of {', '.join(_TIME_SHAPES)}, got {time!r}")
        if ("context" in arguments) != (context_shape is not None):
            raise InvalidValueError(
                f"context_shape goes with 'context' among the arguments; got arguments {arguments!r} and "
                f"context_shape {context_shape}"
            )
        self.module = module
        self.arguments = arguments if isinstance(arguments, Mapping) else tuple(arguments)
        self.time = time

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.check_context(context)
        given = {"x": x, "context": context}
        if "t" in self.arguments:
            given["t"] = self._time(t, x)
        if "x_and_t" in self.arguments:
            column = t.reshape(-1, *[1] * (x.ndim - 1)).expand(*x.shape[:-1], 1)
            given["x_and_t"] = torch.cat([x, column], dim=-1)
        if isinstance(self.arguments, Mapping):
            return self.module(**{keyword: given[name] for name, keyword in self.arguments.items()})
        return self.module(*[given[name] for name in self.arguments])

    def _time(self, t: Tensor, x: Tensor) -> Tensor:
        if self.time == "scalar":
            return t
        t = t.expand(x.shape[0])
        return t if self.time == "batch" else t.unsqueeze(1)
