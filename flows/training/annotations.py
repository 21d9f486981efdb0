"""Checks plain values against annotations, and says in words what an annotation allows."""

from __future__ import annotations

import contextlib
import functools
import inspect
import numbers
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Any

from flows.errors import InvalidValueError
from flows.naming import concrete_subclasses, in_words

NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


PLURALS = {int: "whole numbers", float: "numbers", str: "text"}


MAX_SHOWN = 300  # characters of a value in a message


class SettingsError(InvalidValueError):
    """A setting does not fit. The message begins with its name, such as `solver.rtol`."""


def check_arguments(function: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Check `values` against the annotations of the parameters of `function`.

    Raises:
        SettingsError: a value has another type.
    """
    for name, hint in typing.get_type_hints(function).items():
        if name in values:
            check_type(name, values[name], hint)


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raise `SettingsError` unless the annotation `hint` allows `value`.

    Text is no number, `true` is no 1, and 1.0 is no whole number. A whole number is a number, and a list may stand for
    a tuple. An annotation that pydantic does not know allows everything.
    """
    import pydantic  # slow to import

    try:
        adapter: Any = pydantic.TypeAdapter(_strict(hint), config={"arbitrary_types_allowed": True, "strict": True})
    except (pydantic.PydanticUserError, NameError, TypeError):
        return
    for candidate in (_plain_number(value), _with_tuples(value)):
        with contextlib.suppress(pydantic.ValidationError):
            adapter.validate_python(candidate)
            return
    raise SettingsError(f"{name} must be {_describe(hint)}, got {show(value)}")


def _strict(hint: Any) -> Any:
    """`hint` for pydantic, in which any class that is no plain value asks for an instance of it."""
    import pydantic

    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return typing.Union[tuple(map(_strict, arguments))]  # noqa: UP007 (made of a tuple)
    if origin in (tuple, list, Sequence, Mapping, dict, Iterable):
        return types.GenericAlias(origin, tuple(a if a is ... else _strict(a) for a in arguments))
    if hint in NAMES or hint in (tuple, list, Sequence, Mapping, dict, Any, object) or not inspect.isclass(hint):
        return hint
    return Annotated[Any, pydantic.AfterValidator(functools.partial(_must_be, hint))]


def _must_be(kind: Any, value: Any) -> Any:
    if _is_path(kind):
        fits = isinstance(value, (str, kind))
    elif getattr(kind, "_is_protocol", False) and not getattr(kind, "_is_runtime_protocol", False):
        members = {name for base in kind.__mro__[:-1] for name in vars(base) if not name.startswith("_")}
        fits = all(hasattr(value, name) for name in members)
    else:
        fits = isinstance(value, kind)
    if not fits:
        raise ValueError(f"no {kind.__name__}")  # told by check_type
    return value


def _is_path(kind: Any) -> bool:
    return inspect.isclass(kind) and (kind is os.PathLike or issubclass(kind, PurePath))


def _plain_number(value: Any) -> Any:
    """Numbers of other libraries, such as `numpy.int64`, as Python's."""
    if isinstance(value, bool) or type(value) in (int, float):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def is_list(value: Any) -> bool:
    """Whether a value is a sequence other than text."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _with_tuples(value: Any) -> Any:
    return tuple(map(_with_tuples, value)) if is_list(value) else value


def _describe(hint: Any) -> str:
    """What an annotation allows, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if str in arguments:  # text may be the name of a class
            arguments = tuple(a for a in arguments if a is not str or not any(map(_names, arguments)))
        return " or ".join(dict.fromkeys(map(_describe, arguments)))
    if _names(hint):
        return f"one of {', '.join(_names(hint))}"
    if origin is typing.Literal:
        return " or ".join(map(show, arguments))
    if hint in NAMES:
        return NAMES[hint]
    kind = origin or hint
    if kind is tuple and arguments and arguments[-1] is not ...:
        kinds = list(dict.fromkeys(map(_describe_many, arguments)))
        return f"a list of {len(arguments)}" + (f" {kinds[0]}" if len(kinds) == 1 else "")
    if kind in (tuple, list, Sequence, Iterable):
        return f"a list of {_describe_many(arguments[0])}" if arguments else "a list"
    if kind in (Mapping, dict):
        return "a mapping"
    if kind is Callable:
        return "a function"
    if _is_path(kind):
        return "a path"
    return kind.__name__ if inspect.isclass(kind) else str(hint)


def _names(hint: Any) -> list[str]:
    """The names of the classes of an abstract family, by which settings may choose one."""
    is_family = inspect.isclass(hint) and inspect.isabstract(hint) and hint.__module__.startswith("flows.")
    return [in_words(kind.__name__) for kind in concrete_subclasses(hint)] if is_family else []


def _describe_many(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_describe_many, arguments)))
    if hint in PLURALS:
        return PLURALS[hint]
    if origin in (tuple, list, Sequence):
        return f"lists of {_describe_many(arguments[0])}"
    return _describe(hint)


def show(value: Any) -> str:
    """A value as yaml words it, shortened."""
    text = {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
