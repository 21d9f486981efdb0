"""Tensors that a field uses without registering them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flows.errors import InvalidValueError

MAX_DEPTH = 4  # of containers within attributes


def captured_tensors(
    evaluate: Any,  # () -> outputs that carry a graph
    field: Any,
    name: str,
    known: list[Tensor],
) -> list[Tensor]:
    """The tensors with gradients that an evaluation uses, beside the known ones.

    The graph of one evaluation ends in leaves, which are found as they are, and in tensors that were computed before,
    such as the code of an encoder. These are looked for among the attributes of the field's modules and in the closures
    of their functions.

    Raises:
        InvalidValueError: such a tensor is nowhere to be found.
    """
    with torch.enable_grad():
        marker = torch.zeros((), requires_grad=True).clone().grad_fn
        assert marker is not None
        born = marker._sequence_nr()
        held = {}
        for where, tensor in _held(field):
            if tensor.grad_fn is not None:
                held.setdefault((tensor.grad_fn, tensor.output_nr), (where, tensor))
        outputs = evaluate()
    ids = {id(tensor) for tensor in known}
    found: list[Tensor] = []
    seen: set[tuple[Any, int]] = set()
    inputs = {(tensor.grad_fn, tensor.output_nr) for tensor in known if tensor.grad_fn is not None}
    stack: list[tuple[Any, int]] = [
        (o.grad_fn, o.output_nr) for o in outputs if isinstance(o, Tensor) and o.grad_fn is not None
    ]
    while stack:
        edge = stack.pop()
        node = edge[0]
        if node is None or edge in seen:
            continue
        seen.add(edge)
        if edge in inputs:
            continue
        if type(node).__name__ == "AccumulateGrad":
            leaf = getattr(node, "variable")  # noqa: B009 (of this kind of node only)
            if id(leaf) not in ids:
                ids.add(id(leaf))
                found.append(leaf)
        elif node._sequence_nr() < born:
            if edge not in held:
                raise InvalidValueError(
                    f"the field {name} uses a tensor that was computed before the solve (by {type(node).__name__}) and "
                    "is found neither among its parameters nor among its attributes, so that its gradient would be "
                    "lost; pass it as context, keep it as an attribute of the field, or use gradient='backprop'"
                )
            tensor = held[edge][1]
            if id(tensor) not in ids:
                ids.add(id(tensor))
                found.append(tensor)
        else:
            stack.extend(node.next_functions)
    return found


def _held(field: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors with gradients in attributes and closures, with their names."""
    modules = field.named_modules() if isinstance(field, nn.Module) else [("", field)]
    for path, module in modules:
        own = dict(getattr(module, "__dict__", {}))
        functions = [type(module).forward] if isinstance(module, nn.Module) else [module]
        for key, value in own.items():
            if key not in ("_parameters", "_modules"):
                yield from _within(f"{path}.{key}".strip("."), value, 0)
        for function in functions:
            yield from _within(path, function, 0)


def _within(where: str, value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.requires_grad:
            yield where, value
    elif depth >= MAX_DEPTH:
        return
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _within(f"{where}.{key}", inner, depth + 1)
    elif isinstance(value, list | tuple | set):
        for i, inner in enumerate(value):
            yield from _within(f"{where}[{i}]", inner, depth + 1)
    elif isinstance(value, nn.Module):
        for _, module in value.named_modules():
            for key, inner in module.__dict__.items():
                if key not in ("_parameters", "_modules"):
                    yield from _within(f"{where}.{key}", inner, depth + 1)
    elif getattr(value, "__closure__", None):
        for cell in value.__closure__:
            try:
                yield from _within(f"{where} (closure)", cell.cell_contents, depth + 1)
            except ValueError:  # an empty cell
                continue
    elif hasattr(value, "__dict__") and type(value).__module__.split(".")[0] not in ("torch", "builtins"):
        yield from _within(where, dict(value.__dict__), depth + 1)
