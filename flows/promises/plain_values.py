"""What a module computes with beside its tensors, of which compiled code keeps copies."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Hashable, Iterable, Mapping, Set
from typing import Any

import numpy as np
from torch import Tensor, nn

from flows.arguments import BUILT
from flows.promises.regime import SETTINGS, is_filled

OWN = frozenset(vars(nn.Module())) - {"training"} | {BUILT}  # attributes that hold tensors, modules and hooks
MAX_DEPTH = 6  # of lists within lists
MAX_VALUES = 2000  # of one attribute that are looked at
MAX_BYTES = 1 << 16  # of an array that is looked at
HERE = ("torch", "flows")  # packages whose classes read no variables that change


def plain_values(module: nn.Module) -> dict[str, Hashable]:
    """What the parts of a module read from Python, by name, to be compared between two solves.

    These are attributes of each part, what its objects and functions hold, and, for classes of other packages, plain
    values of the class and variables that its methods name. Costs about 10 microseconds a part.
    """
    found: dict[str, Hashable] = {}
    for path, part in module.named_modules():
        prefix = f"{path}." if path else ""
        for name, value in vars(part).items():
            if name not in OWN:
                found[prefix + name] = _frozen(value)
        kind = type(part)
        for name in _class_attributes(kind):
            found[f"{kind.__name__}.{name}"] = _frozen(getattr(kind, name, None))
        for variables, name in _variables(kind):
            if name in variables and not isinstance(variables[name], type | types.ModuleType):
                found[f"the variable {name}"] = _frozen(variables[name])
    return found


def changed_names(before: Mapping[str, Hashable], after: Mapping[str, Hashable]) -> list[str]:
    """The names of values that differ."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def _frozen(value: Any) -> Hashable:
    """A value that is equal as long as nothing in `value` changes. It keeps no large object alive."""
    if isinstance(value, SETTINGS):  # most are
        return value if value == value else "nan"
    left = MAX_VALUES

    def frozen(value: Any, depth: int) -> Hashable:
        nonlocal left
        if isinstance(value, SETTINGS):
            return value if value == value else "nan"
        kind = type(value)
        left -= 1
        if isinstance(value, Tensor | nn.Module) or depth == 0 or left < 0:
            return kind  # a program takes tensors as arguments or is refused, and modules are parts
        parts = _parts(value)
        if parts is None:
            return kind, id(value)
        own, inner = parts
        return kind, own, tuple(frozen(part, depth - 1) for part in inner)

    return frozen(value, MAX_DEPTH)


def _parts(value: Any) -> tuple[Hashable, Iterable[Any]] | None:
    """What a value is known by, and what it holds; `None`: it is known by itself alone."""
    if isinstance(value, list | tuple):
        return len(value), value[:MAX_VALUES]
    if isinstance(value, Set):
        return len(value), sorted(map(repr, value)) if len(value) <= MAX_VALUES else ()
    if isinstance(value, Mapping):
        return len(value), (part for item in value.items() for part in item)
    if isinstance(value, np.ndarray):
        content = value.tobytes() if value.nbytes <= MAX_BYTES and value.dtype != object else id(value)
        return (value.shape, str(value.dtype), content), ()
    if isinstance(value, functools.partial):
        return "partial", (value.func, value.args, value.keywords)
    if isinstance(value, types.MethodType):
        return value.__func__, (value.__self__,)
    if isinstance(value, types.FunctionType):
        held = [cell.cell_contents for cell in value.__closure__ or () if is_filled(cell)]
        read = [] if _is_here(value) else [variables[name] for variables, name in _named_in(value) if name in variables]
        return weakref.ref(value), (*held, *read, value.__defaults__, value.__kwdefaults__)
    if isinstance(value, type | types.ModuleType):
        return None
    slots = [name for kind in type(value).__mro__ for name in _names(vars(kind).get("__slots__", ()))]
    attributes = {**{name: getattr(value, name, None) for name in slots}, **getattr(value, "__dict__", {})}
    return (id(type(value)), (part for item in attributes.items() for part in item)) if attributes else None


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


@functools.lru_cache(maxsize=256)
def _class_attributes(kind: type) -> tuple[str, ...]:
    """The names of plain values of a class of another package."""
    named = {name: value for one in reversed(_foreign(kind)) for name, value in vars(one).items()}
    plain = (*SETTINGS, list, tuple, dict)
    return tuple(name for name, value in named.items() if not name.startswith("__") and isinstance(value, plain))


@functools.lru_cache(maxsize=256)
def _variables(kind: type) -> tuple[tuple[dict[str, Any], str], ...]:
    """The variables of files that the methods of a class of another package name."""
    functions = [
        value for one in _foreign(kind) for value in vars(one).values() if isinstance(value, types.FunctionType)
    ]
    return tuple(found for function in functions for found in _named_in(function))


def _named_in(function: types.FunctionType) -> list[tuple[dict[str, Any], str]]:
    return [(function.__globals__, name) for name in function.__code__.co_names]


def _foreign(kind: type) -> list[type]:
    return [one for one in kind.__mro__ if one is not object and not _is_here(one)]


def _is_here(kind: Any) -> bool:
    return str(kind.__module__).partition(".")[0] in HERE
