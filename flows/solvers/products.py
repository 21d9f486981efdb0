"""Gradients of one solve, which end at the tensors that were stated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

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
    if not _lead_to_others(inputs, computed):
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


def _lead_to_others(inputs: Sequence[Tensor], computed: Sequence[int]) -> bool:
    """Whether one of the inputs was computed from another one, so that the graph between them has to stay."""
    leaves = {id(tensor) for tensor in inputs if tensor.grad_fn is None}
    nodes = {inputs[i].grad_fn for i in computed}
    before = (node for start in nodes if start is not None for node, _ in start.next_functions)
    return any(node in nodes or id(getattr(node, "variable", None)) in leaves for node in graph_nodes(before))


def graph_nodes(starts: Iterable[Any]) -> Iterator[Any]:
    """Each node of autograd's graph that the starts lead to, once, and the starts themselves; None is no node."""
    seen: set[Any] = {None}
    waiting = list(starts)
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            yield node
            waiting += [following for following, _ in node.next_functions]
