"""What of a field may change its habits after it was examined: its layers, their modes and hooks, and its settings."""

from __future__ import annotations

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
        if id(module) in seen:
            continue
        seen.add(id(module))
        own = module.__dict__
        found += (id(module), type(module), module.training)
        if isinstance(module, torch.jit.ScriptModule):
            stack += module.children()
            continue
        found += [tuple(own[hooks]) for hooks in HOOKS if own[hooks]]
        if "forward" in own:
            found.append("forward")
        stack += [child for child in own["_modules"].values() if child is not None]
    return tuple(found)


def settings_of(field: Any) -> dict[tuple[int, str], Hashable]:
    """The plain attributes of a field's modules, such as a rate of dropout or `inplace`."""
    modules = field.modules() if isinstance(field, nn.Module) else (field,)
    return {
        (id(module), name): value
        for module in modules
        for name, value in getattr(module, "__dict__", {}).items()
        if isinstance(value, SETTINGS) and name != "training"
    }
