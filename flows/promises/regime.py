"""What of a field may change its habits after it was examined: its layers, their modes and hooks, and its settings."""

from __future__ import annotations

import functools
import types
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
SETTINGS = (bool, int, float, str, type(None))


def regime_of(field: Any) -> Hashable:
    """The layers of a field, with their classes, modes and hooks. Costs about a microsecond a layer."""
    if not isinstance(field, nn.Module):
        return bool(getattr(field, "training", False))
    found: list[Hashable] = []
    seen: set[int] = set()
    stack: list[nn.Module] = [field]
    while stack:
        module = stack.pop()
        key = id(module)
        if key in seen:
            continue
        seen.add(key)
        kind, own = type(module), module.__dict__
        found += (key, kind, module.training)
        if issubclass(kind, torch.jit.ScriptModule):
            stack += module.children()
            continue
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            found += [tuple(own[hooks]) for hooks in HOOKS if own[hooks]]
        if "forward" in own:
            found.append("forward")
        if own["_modules"]:
            stack += [child for child in own["_modules"].values() if child is not None]
    return tuple(found)


def identity_of(field: Any) -> tuple[Any, list[Any]]:
    """What a field is known by: itself; or the code of a function, with the functions and modules that it uses."""
    parts: list[Any] = []
    while True:
        if isinstance(field, functools.partial):
            parts += filter(_is_part, (*field.args, *field.keywords.values()))
            field = field.func
        elif isinstance(field, types.MethodType):
            parts.append(field.__self__)
            field = field.__func__
        else:
            break
    if not isinstance(field, types.FunctionType):
        return field, parts
    cells = [cell.cell_contents for cell in field.__closure__ or () if is_filled(cell)]
    used = [field.__globals__.get(name) for name in field.__code__.co_names]
    parts += filter(_is_part, (*cells, *used, *(field.__defaults__ or ())))
    return field.__code__, parts


def _is_part(value: Any) -> bool:
    return isinstance(value, nn.Module | types.FunctionType)


def is_filled(cell: types.CellType) -> bool:
    """Whether a closure's variable has a value by now."""
    try:
        cell.cell_contents  # noqa: B018 (raises)
    except ValueError:
        return False
    return True


def settings_of(field: Any) -> dict[tuple[int, str], Hashable]:
    """The plain attributes of a field's modules, such as a rate of dropout or `inplace`."""
    modules = field.modules() if isinstance(field, nn.Module) else (field,)
    return {
        (id(module), name): value
        for module in modules
        for name, value in getattr(module, "__dict__", {}).items()
        if isinstance(value, SETTINGS) and name != "training"
    }
