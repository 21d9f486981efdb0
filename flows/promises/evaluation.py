"""One evaluation of a field, with the copies that its habits need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flows.errors import InvalidValueError
from flows.promises.failures import raise_explained
from flows.promises.traits import Traits

CURE_OF_WRITING = "begin forward with `x = x.clone()`, or use operations that return a new tensor"


class Evaluation:
    """Calls a field, or a closed form of it, for one solve.

    Beside healing what the examination found, it watches two promises at each call, because a field may break them at
    some points only. Torch counts the writes to a tensor, so both checks are free of reads: arguments keep their count,
    and so does the last output when the next one is computed.

    Args:
        field: the module.
        name: of the field, for messages.
        traits: what is known of it.
    """

    def __init__(self, field: Any, name: str, traits: Traits) -> None:
        self.field = field
        self.name = name
        self.traits = traits
        self.buffers: dict[str, Tensor] | None = None  # as they were when the solve began
        self.last: tuple[Tensor, int] | None = None

    def __call__(self, function: Callable[..., Any], t: Tensor, x: Tensor, *more: Tensor) -> Any:
        """`function(t, x, *more)`."""
        traits = self.traits
        if traits.expands_time and t.ndim == 0:
            t = t.expand(len(x))
        if torch.compiler.is_compiling():
            return function(t, x, *more)
        given = (t, x, *more)
        if traits.copies_inputs:
            given = tuple(tensor.clone() for tensor in given)
        counts = _writes(given)
        try:
            value = self._with_frozen_buffers(function, given) if traits.frozen_buffers else function(*given)
        except RuntimeError as error:
            raise_explained(error, self.name)
        if not traits.copies_inputs and _writes(given) != counts:
            raise InvalidValueError(
                f"the field {self.name} writes into its arguments, which spoils the solve and the caller's tensors; "
                f"{CURE_OF_WRITING}"
            )
        if not isinstance(value, Tensor):
            return value
        if traits.copies_output:
            return value.clone()
        if self.last is not None and _writes(self.last[:1]) != [self.last[1]]:
            raise InvalidValueError(
                f"the field {self.name} has written into the tensor that it returned before, which the solver still "
                "uses; return a new tensor, such as `out.clone()`"
            )
        kept = value.detach()  # without its graph
        self.last = kept, _writes((kept,))[0]
        return value

    def _with_frozen_buffers(self, function: Callable[..., Any], given: tuple[Tensor, ...]) -> Any:
        """Evaluate with the buffers that the first evaluation of the solve left, whatever later ones write."""
        assert isinstance(self.field, nn.Module)
        named = dict(self.field.named_buffers())
        if self.buffers is None:
            with torch.no_grad():
                function(*given)  # lets the state go on by one step a solve
            self.buffers = {name: named[name].detach().clone() for name in self.traits.frozen_buffers}
        if function is not self.field:
            raise InvalidValueError(
                f"the field {self.name} changes its buffers {', '.join(self.traits.frozen_buffers)} at each "
                "evaluation, which does not go with its closed forms; call eval() on the part that has them"
            )
        copies = {name: buffer.clone() for name, buffer in self.buffers.items()}
        return torch.func.functional_call(self.field, copies, given)

    def fresh(self) -> Evaluation:
        """The same for a new graph."""
        renewed = Evaluation(self.field, self.name, self.traits)
        renewed.buffers = self.buffers
        return renewed


def _writes(tensors: tuple[Tensor, ...]) -> list[int]:
    """How often each tensor has been written to; inference tensors do not count."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]
