"""What an annotation expects: whether it allows a value, and both in words."""

from __future__ import annotations

import collections.abc
import inspect
import os
import reprlib
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flows.naming import concrete_subclasses, in_words

NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    type(None): "None",
    Tensor: "a torch.Tensor",
    nn.Module: "a torch.nn.Module",
    torch.Generator: "a torch.Generator",
}
PLURALS = {int: "whole numbers", float: "numbers", str: "texts", Tensor: "tensors"}
LISTS = (tuple, list, collections.abc.Sequence)
MAPPINGS = (dict, collections.abc.Mapping)
MAX_CHOICES = 12  # that a message lists
MAX_SHOWN = 200  # characters of a value in a message


def allows(hint: Any, value: Any) -> bool:
    """Whether an annotation allows a value."""
    if hint is Any:
        return True
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(allows(one, value) for one in arguments)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in arguments)
    if hint in (None, type(None)):
        return value is None
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    kind = origin or hint
    if kind in LISTS:
        if not isinstance(value, collections.abc.Sequence) or isinstance(value, str | bytes):
            return False
        elements = arguments[:1] if len(arguments) == 1 or arguments[-1:] == (...,) else ()
        return not elements or all(allows(elements[0], one) for one in value)
    if kind in MAPPINGS:
        return isinstance(value, collections.abc.Mapping) and (
            not arguments or all(allows(arguments[0], k) and allows(arguments[1], v) for k, v in value.items())
        )
    if kind is collections.abc.Callable:
        return callable(value)
    if kind in (collections.abc.Iterable, collections.abc.Iterator):
        return isinstance(value, kind) and not isinstance(value, str | bytes | Tensor)
    if not inspect.isclass(kind) or kind in (object, inspect._empty) or kind.__module__.startswith("numpy"):
        return True
    if getattr(kind, "_is_protocol", False):
        return not isinstance(value, type) and all(hasattr(value, name) for name in _members(kind))
    return isinstance(value, kind)


def refusal(name: str, value: Any, hint: Any) -> str:
    """The message for a value that an annotation does not allow: what was expected, what came, what to write."""
    cure = next((cure for cure in _cures(name, value, hint) if cure), "")
    return f"{name} must be {describe(hint)}, got {show(value)}{'; ' if cure else ''}{cure}"


def describe(hint: Any) -> str:
    """What an annotation allows, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        by_name = str in arguments and any(map(_choices, arguments))
        named = [in_words(kind.__name__) for one in arguments for kind in _choices(one)] if by_name else []
        others = [describe(one) for one in arguments if one is not str or not by_name]
        return _listed([*others, *([f"one of the names {', '.join(sorted(named))}"] if named else [])])
    if origin is Literal:
        return _listed(map(repr, arguments))
    if hint in NAMES:
        return NAMES[hint]
    kind = origin or hint
    if kind in LISTS or kind in (collections.abc.Iterable, collections.abc.Iterator):
        return f"a list of {_describe_many(arguments[0])}" if arguments else "a list"
    if kind in MAPPINGS:
        return (
            f"a mapping from names to {_describe_many(arguments[1])}"
            if arguments[1:] not in ((), (Any,))
            else "a mapping"
        )
    if kind is collections.abc.Callable:
        return "a function"
    if kind is os.PathLike:
        return "a path"
    if getattr(kind, "_is_protocol", False):
        return f"a {kind.__name__}, with {', '.join(sorted(_members(kind)))}"
    return f"a {public_path(kind)}" if inspect.isclass(kind) else str(hint)


def show(value: Any) -> str:
    """What came, in a few words."""
    if inspect.isclass(value):
        return f"the class {value.__name__}"
    if inspect.isroutine(value) and hasattr(value, "__name__"):
        return f"the function {value.__name__}"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    shape = getattr(value, "shape", ())
    if shape != () and hasattr(value, "dtype"):
        return f"an array ({type(value).__name__}) of shape {tuple(shape)}"
    if value is None or isinstance(value, str | bytes | int | float | complex):
        text = repr(value)
    elif isinstance(value, list | tuple | dict | set | frozenset | range):
        text = reprlib.repr(value)
    else:
        return f"an object of class {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def public_path(kind: type) -> str:
    """The shortest import path of a class among the modules that are loaded."""
    words = kind.__module__.split(".")
    for i in range(1, len(words)):
        package = sys.modules.get(".".join(words[:i]))
        if getattr(package, kind.__name__, None) is kind:
            return f"{'.'.join(words[:i])}.{kind.__name__}"
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _listed(choices: Iterable[str]) -> str:
    *others, last = dict.fromkeys(choices)
    return f"{', '.join(others)} or {last}" if others else last


def is_unknown_choice(hint: Any, value: Any) -> bool:
    """Whether a value has the type of a choice, but is none of them."""
    return any(
        typing.get_origin(option) is Literal and any(type(one) is type(value) for one in typing.get_args(option))
        for option in _options(hint)
    )


def described(hint: Any) -> str:
    return "" if hint is None or hint is Any else f", {describe(hint)}"


def _describe_many(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _listed(map(_describe_many, arguments))
    if origin in LISTS:
        return f"lists of {_describe_many(arguments[0])}"
    return PLURALS.get(hint) or (f"{public_path(hint)} objects" if inspect.isclass(hint) else describe(hint))


def _members(kind: type) -> set[str]:
    """The attributes that a protocol asks for."""
    bases = [base for base in kind.__mro__ if getattr(base, "_is_protocol", False)]
    names = {name for base in bases for name in {*vars(base), *vars(base).get("__annotations__", {})}}
    return {name for name in names if not name.startswith("_")}


def _choices(hint: Any) -> list[type]:
    """The classes of an abstract family of this package that are imported."""
    is_family = inspect.isclass(hint) and inspect.isabstract(hint) and hint.__module__.startswith("flows.")
    found = concrete_subclasses(hint) if is_family else []
    return [kind for kind in found if kind.__module__.startswith("flows.")]


def _options(hint: Any) -> Iterator[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for one in typing.get_args(hint):
            yield from _options(one)
    else:
        yield hint


def _cures(name: str, value: Any, hint: Any) -> Iterator[str]:
    """What to write instead, the best first."""
    for option in _options(hint):
        kind = typing.get_origin(option) or option
        arguments = typing.get_args(option)
        if inspect.isclass(value) and inspect.isclass(kind) and kind is not type and issubclass(value, kind):
            yield f"give an object of the class: {value.__name__}(...)"
        if kind is Tensor:
            yield from _to_tensor(name, value)
        if kind is torch.Generator and isinstance(value, int) and not isinstance(value, bool):
            yield f"write torch.Generator().manual_seed({value})"
        if kind is int and isinstance(value, float) and value.is_integer():
            yield f"write {int(value)}"
        if kind in LISTS and isinstance(value, Iterable) and not isinstance(value, Sequence | Mapping | nn.Module):
            yield f"write {name}.tolist()" if hasattr(value, "tolist") else f"write list({name})"
        if kind in LISTS and arguments and allows(arguments[0], value):
            yield f"write [{show(value)}]" if isinstance(value, str | int | float) else f"write [{name}]"
        if kind is nn.Module and callable(value):
            yield "write a class with forward(t, x) that inherits from torch.nn.Module"
    for option in () if str in _options(hint) else _options(hint):
        choices = sorted(public_path(kind) for kind in _choices(option))
        if 0 < len(choices) <= MAX_CHOICES:
            yield f"there {'is' if len(choices) == 1 else 'are'} {', '.join(choices)}"
        elif inspect.isclass(option) and option.__module__.startswith("flows.") and not choices:
            yield f"write {public_path(option)}(...)"


def _to_tensor(name: str, value: Any) -> Iterator[str]:
    if hasattr(value, "to_numpy"):  # of pandas, polars or pyarrow
        yield f"write torch.as_tensor({name}.to_numpy())"
    elif isinstance(value, Sequence | float | int) and not isinstance(value, str | bytes | bool):
        rows = [row for row in value if isinstance(row, Sequence | Tensor)] if isinstance(value, Sequence) else []
        if len({len(row) for row in rows if not isinstance(row, Tensor) or row.ndim}) > 1:
            yield (
                "its rows have different lengths: pad them, as torch.nn.utils.rnn.pad_sequence does, and say with a "
                "mask, where one is taken, which entries count"
            )
        else:
            yield f"write torch.{'stack' if rows and isinstance(rows[0], Tensor) else 'tensor'}({name})"
    elif hasattr(value, "__array__"):
        yield f"write torch.as_tensor({name})"
