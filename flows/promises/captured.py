"""Tensors that a field uses without registering them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flows.errors import InvalidValueError
from flows.promises.regime import is_filled

MAX_DEPTH = 4  # of containers within attributes


def captured_tensors(
    evaluate: Callable[[], Sequence[Any]],  # returns outputs that carry a graph
    field: Any,
    name: str,
    known: Sequence[Tensor],
    strict: bool = True,
) -> list[Tensor]:
    """The tensors with gradients that an evaluation uses, beside the known ones.

    The graph of one evaluation ends in leaves, which are found as they are, and in tensors that were computed before,
    such as the code of an encoder. These are looked for among the attributes of the field's modules and in the closures
    of their functions. An evaluation before that one shows what the field caches.

    Args:
        evaluate: evaluates the field.
        field, name: the module and its name.
        known: parameters, points and context.
        strict: whether a tensor that is nowhere to be found is an error.

    Raises:
        InvalidValueError: there is such a tensor, or the field uses a tensor that an earlier evaluation computed.
    """
    with torch.enable_grad():
        born = _now()
        held = {
            (tensor.grad_fn, tensor.output_nr): tensor for tensor in held_tensors(field) if tensor.grad_fn is not None
        }
        first = evaluate()
        again = _now()
        outputs = evaluate()
        del first
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
        elif born <= node._sequence_nr() < again:
            raise InvalidValueError(
                f"the field {name} keeps a tensor of an earlier evaluation (by {type(node).__name__}) and uses it "
                "again, so that it would miss later changes of the parameters and their gradients; compute it anew in "
                "each forward"
            )
        elif node._sequence_nr() < born:
            tensor = held.get(edge)
            if tensor is None and strict:
                raise InvalidValueError(
                    f"the field {name} uses a tensor that was computed before the solve (by {type(node).__name__}) and "
                    "is found neither among its parameters nor among its attributes, so that its gradient would be "
                    "lost; pass it as context, keep it as an attribute of the field, or use gradient='backprop'"
                )
            if tensor is not None and id(tensor) not in ids:
                ids.add(id(tensor))
                found.append(tensor)
        else:
            stack.extend(node.next_functions)
    return found


@contextmanager
def copyable(model: nn.Module) -> Iterator[None]:
    """Let `copy.deepcopy` copy modules whose attributes hold computed tensors, as old weight normalisation leaves them.

    Raises:
        InvalidValueError: there are such tensors in containers, which cannot be copied.
    """
    computed = [
        (module.__dict__, key, value)
        for module in model.modules()
        for key, value in module.__dict__.items()
        if isinstance(value, Tensor) and value.grad_fn is not None
    ]
    for own, key, value in computed:
        own[key] = value.detach()
    try:
        yield
    except RuntimeError as error:
        if "deepcopy" not in str(error):
            raise
        raise InvalidValueError(
            f"the model {type(model).__name__} cannot be copied, because a list or a dict in it holds tensors that "
            "carry a graph; detach what is kept between calls, or compute it anew in each forward"
        ) from error
    finally:
        for own, key, value in computed:
            own[key] = value


def _now() -> int:
    """The number of the next node of autograd's graphs."""
    node = torch.zeros((), requires_grad=True).clone().grad_fn
    assert node is not None
    return node._sequence_nr()


def held_tensors(field: Any) -> Iterator[Tensor]:
    """Tensors with gradients in attributes and closures, which the field has not registered."""
    for module in field.modules() if isinstance(field, nn.Module) else ():
        yield from _within(_unregistered(module), 0)
        yield from _within(type(module).forward, 0)
    if not isinstance(field, nn.Module):
        yield from _within(field, 0)


def _unregistered(module: nn.Module) -> list[Any]:
    return [value for key, value in module.__dict__.items() if key not in ("_parameters", "_modules")]


def _within(value: Any, depth: int) -> Iterator[Tensor]:
    inner: Iterable[Any] = ()
    if isinstance(value, Tensor):
        if value.requires_grad:
            yield value
    elif depth < MAX_DEPTH:
        if isinstance(value, dict):
            inner = value.values()
        elif isinstance(value, list | tuple | set):
            inner = value
        elif isinstance(value, nn.Module):
            inner = [*value.parameters(), *(part for module in value.modules() for part in _unregistered(module))]
        elif getattr(value, "__closure__", None):
            inner = [cell.cell_contents for cell in value.__closure__ if is_filled(cell)]
        elif hasattr(value, "__dict__") and type(value).__module__.partition(".")[0] not in ("torch", "builtins"):
            inner = value.__dict__.values()
    for part in list(inner):
        yield from _within(part, depth + 1)
