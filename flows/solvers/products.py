"""Gradients of one solve, which end at the tensors that were stated."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor


def reached_gradients(
    values: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
) -> list[Tensor | None]:
    """`torch.autograd.grad` that goes past no input; `None` for those that are not reached.

    An input may have been computed from another one, such as a context from a layer that the field shares. What
    reaches the first is its own gradient then, and is not counted for the other as well: the caller's backward pass
    takes it there, and needs the graph between them.
    """
    computed = [i for i, tensor in enumerate(inputs) if tensor.grad_fn is not None]
    if not computed:
        return list(torch.autograd.grad(values, inputs, cotangents, allow_unused=True))
    reached: dict[int, Tensor] = {}

    def stop(i: int, gradient: Tensor) -> Tensor:
        reached[i] = gradient
        return torch.zeros_like(gradient)

    with ExitStack() as hooks:
        for i in computed:
            handle = inputs[i].register_hook(lambda gradient, i=i: stop(i, gradient))
            hooks.callback(handle.remove)
        found = torch.autograd.grad(values, inputs, cotangents, retain_graph=True, allow_unused=True)
    return [reached.get(i, gradient) for i, gradient in enumerate(found)]
