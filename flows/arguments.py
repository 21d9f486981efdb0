"""Arguments of public functions and classes, checked against their annotations.

`@checked` stands at each public door. Inside the package, functions trust each other.
"""

from __future__ import annotations

import collections.abc
import contextlib
import functools
import inspect
import math
import os
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn

from flows.errors import FlowsError, InvalidTypeError, InvalidValueError
from flows.naming import concrete_subclasses, in_words

T = TypeVar("T")
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
TOO_LARGE = ("can't allocate memory", "size calculation overflowed", "out of memory")  # in the words of torch
MAX_WHOLE = 2**63 - 1  # the largest whole number that torch takes
PLAIN = {int, float, bool, type(None), Tensor}  # types that decide
MAX_LISTED = 8  # elements of a list that a door remembers
MAX_PASSED = 64  # combinations of types that a door remembers
MAX_CHOICES = 12  # that a message lists
MAX_SHOWN = 200  # characters of a value in a message


@overload
def checked(target: T) -> T: ...
@overload
def checked(*, own: Collection[str] | Literal["all"]) -> Callable[[T], T]: ...
def checked(target: Any = None, *, own: Collection[str] | Literal["all"] = ()) -> Any:
    """Check the types of arguments at each call, and that each has a name that exists.

    Numbers, texts, lists, mappings and instances of classes are checked as the annotations say. A whole number is a
    number; True is neither. A list may stand for a tuple. Annotations that name what only type checkers import, and
    arguments without one, allow everything. Values and shapes are the business of the function.

    Costs a microsecond where types decide, and about ten where numbers, texts and lists are looked at.

    Args:
        target: a function or method, or a class, whose constructor is then checked.
        own: arguments that the function checks itself, with a better message; `"all"`: only names are checked here.

    Raises:
        InvalidTypeError: from the call, if an argument has a wrong type or name, or is missing. The message says what
            was expected, what came, and what to write.
        InvalidValueError: from the call, if a text is none of the choices of the annotation.
    """
    if target is None:
        return functools.partial(checked, own=own)
    if not inspect.isclass(target):
        return _with_check(target, None, own)
    init = inspect.unwrap(target.__init__)
    takes_nothing = init in (nn.Module.__init__, object.__init__)
    setattr(target, "__init__", _with_check(_plain_init(target) if takes_nothing else init, target, own))  # noqa: B010
    return target


class CheckedMethods:
    """Base of families whose methods check their arguments as `checked` does, in every subclass.

    Class arguments:
        checks: names of the methods.
    """

    _checks: tuple[str, ...] = ()

    def __init_subclass__(cls, checks: Sequence[str] = (), **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._checks = (*cls._checks, *checks)
        for name in cls._checks:
            if inspect.isfunction(vars(cls).get(name)):
                setattr(cls, name, checked(vars(cls)[name]))


def is_checked(target: Any) -> bool:
    """Whether calls of a function or class are checked."""
    function = vars(target).get("__init__") if inspect.isclass(target) else target
    return hasattr(function, "__door__")


def _plain_init(owner: type) -> Callable[..., None]:
    def __init__(self) -> None:
        super(owner, self).__init__()

    return __init__


def _with_check(
    function: Callable[..., Any], owner: type | None, own: Collection[str] | Literal["all"]
) -> Callable[..., Any]:
    door = _Door(function, owner, own)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        door.check(args, kwargs)
        return function(*args, **kwargs)

    @functools.wraps(function)
    def construct(*args: Any, **kwargs: Any) -> None:
        door.check(args, kwargs)
        try:
            function(*args, **kwargs)
        except RuntimeError as error:
            if not isinstance(error, FlowsError) and any(words in str(error) for words in TOO_LARGE):
                raise InvalidValueError(door.too_large(args, kwargs)) from error
            raise

    if owner is not None:
        call = construct

    call.__door__ = door  # type: ignore[attr-defined]
    return call


class _Door:
    """The parameters of one function, and their annotations."""

    def __init__(self, function: Callable[..., Any], owner: type | None, own: Collection[str] | Literal["all"]) -> None:
        self.function, self.owner, self.own = function, owner, own
        self.name = owner.__name__ if owner else function.__qualname__.rpartition("<locals>.")[2]
        found = inspect.signature(function).parameters
        self.is_method = next(iter(found), None) == "self"
        self.parameters = dict(list(found.items())[self.is_method :])
        kinds = {kind: [n for n, p in self.parameters.items() if p.kind is kind] for kind in inspect._ParameterKind}
        self.positional = kinds[inspect.Parameter.POSITIONAL_OR_KEYWORD]
        self.named = {*self.positional, *kinds[inspect.Parameter.KEYWORD_ONLY]}
        self.rest = next(iter(kinds[inspect.Parameter.VAR_POSITIONAL]), None)
        self.extra = next(iter(kinds[inspect.Parameter.VAR_KEYWORD]), None)
        # Types of arguments with which a call is right, and whether there are numbers, whose range matters, among them.
        self.passed: dict[tuple[Any, ...], bool] = {}
        self.required = [n for n in self.parameters if n in self.named and self.parameters[n].default is inspect._empty]

    @functools.cached_property
    def hints(self) -> dict[str, Any]:
        """The annotations that can be resolved; resolved at the first call, as modules may import each other."""
        found: dict[str, Any] = {}
        classes = [] if self.owner is None else [c for c in reversed(self.owner.__mro__) if c is not object]
        for place in (*classes, self.function):  # the fields of a dataclass are annotated where they are declared
            module = sys.modules.get(place.__module__)  # none for code that was executed from a text
            scope = getattr(place, "__globals__", {}) if module is None else vars(module)
            for name, hint in vars(place).get("__annotations__", getattr(place, "__annotations__", {})).items():
                if name in self.parameters and self.own != "all" and name not in self.own:
                    with contextlib.suppress(NameError):  # for type checkers alone, or of another module
                        found[name] = eval(hint, dict(scope)) if isinstance(hint, str) else hint
        return found

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kinds = (*map(_kind, args), *kwargs, *map(_kind, kwargs.values()))
        numbers = self.passed.get(kinds)
        if numbers is False or (numbers and all(map(_in_range, (*args, *kwargs.values())))):
            return
        self._check_all(args, kwargs)
        if len(self.passed) < MAX_PASSED and None not in kinds:
            self.passed[kinds] = any(kind in (int, float) or type(kind) is tuple for kind in kinds)

    def _check_all(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = args[1:] if self.is_method else args
        if len(given) > len(self.positional) and self.rest is None:
            raise InvalidTypeError(
                f"{self.name} takes {self._count(len(self.positional))}, got {len(given)}; it takes {self._taken()}"
            )
        for name, value in zip(self.positional, given, strict=False):
            if name in kwargs:
                raise InvalidTypeError(f"{name} of {self.name} is given twice, by place and by name; give it once")
            self._check(name, value)
        for value in given[len(self.positional) :]:
            self._check(str(self.rest), value)
        for name, value in kwargs.items():
            if name in self.named:
                self._check(name, value)
            elif self.extra is None:
                raise InvalidTypeError(self._unknown(name))
            else:
                self._check(self.extra, value, name)
        by_place = self.positional[: len(given)]
        for name in self.required:
            if name not in kwargs and name not in by_place:
                raise InvalidTypeError(
                    f"{self.name} needs {name}{_described(self.hints.get(name))}; it takes {self._taken()}"
                )

    def too_large(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        given = dict(zip(self.positional, args[1:], strict=False)) | dict(kwargs)
        shown = ", ".join(f"{name}={show(value)}" for name, value in given.items())
        return f"{self.name}({shown}) would not fit into memory; choose smaller numbers"

    def _check(self, name: str, value: Any, shown: str | None = None) -> None:
        hint = self.hints.get(name)
        if hint is None:  # its own business
            return
        if not _in_range(value):
            limit = "and not NaN" if any(isinstance(number, float) for number in _numbers(value)) else "below 2^63"
            raise InvalidValueError(f"{shown or name} must be {describe(hint)} {limit}, got {show(value)}")
        if not allows(hint, value):
            kind = InvalidValueError if _is_unknown_choice(hint, value) else InvalidTypeError
            raise kind(refusal(shown or name, value, hint))

    def _count(self, number: int) -> str:
        by_place = f"{number or 'no'} argument{'' if number == 1 else 's'}"
        return by_place if len(self.named) == number else f"at most {by_place} by place"

    def _taken(self) -> str:
        return ", ".join(self._written(name) for name in self.parameters) or "nothing"

    def _written(self, name: str) -> str:
        stars = "*" * (name == self.rest) or "**" * (name == self.extra)
        return f"{stars}{name}" if stars or name in self.required else f"{name}="

    def _unknown(self, name: str) -> str:
        import difflib

        close = difflib.get_close_matches(name, self.named, n=1)
        suggestion = f" (did you mean {close[0]}?)" if close else ""
        return f"{self.name} has no argument {name!r}{suggestion}; it takes {self._taken()}"


def _numbers(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple | list) else (value,)


def _in_range(value: Any) -> bool:
    """Whether no number is NaN or a whole number that torch cannot take."""
    for number in _numbers(value):
        if (isinstance(number, int) and abs(number) > MAX_WHOLE) or (isinstance(number, float) and math.isnan(number)):
            return False
    return True


def _kind(value: Any) -> Any:
    """The type of a value, with those of its elements; None if they do not decide whether it is allowed."""
    kind = type(value)
    if kind in PLAIN:
        return kind
    if kind in (tuple, list, torch.Size):
        elements = tuple(map(type, value)) if len(value) <= MAX_LISTED else (None,)
        return (kind, *elements) if all(element in PLAIN for element in elements) else None
    return None if isinstance(value, str | bytes | type | Sequence | Mapping) else kind


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


def check_takes(name: str, function: Any, *arguments: str) -> None:
    """Require a function, and no class, that can be called with these arguments by place.

    Raises:
        InvalidTypeError: it cannot.
    """
    call = f"{name}({', '.join(arguments)})"
    if not callable(function) or inspect.isclass(function):
        raise InvalidTypeError(f"{name} must be a function, called as {call}, got {show(function)}")
    _check_call(name, function, call, arguments, {})


def check_keywords(name: str, function: Any, *keywords: str) -> None:
    """Require a function or class that can be called with these arguments by name.

    Raises:
        InvalidTypeError: it cannot.
    """
    call = f"{name}({', '.join(f'{keyword}=...' for keyword in keywords)})"
    _check_call(name, function, call, (), dict.fromkeys(keywords))


def _check_call(name: str, function: Any, call: str, args: Sequence[str], kwargs: Mapping[str, None]) -> None:
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):  # written in C
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InvalidTypeError(f"{name} is called as {call}, which {show(function)} does not take: {error}") from None


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


def _is_unknown_choice(hint: Any, value: Any) -> bool:
    """Whether a value has the type of a choice, but is none of them."""
    return any(
        typing.get_origin(option) is Literal and any(type(one) is type(value) for one in typing.get_args(option))
        for option in _options(hint)
    )


def _described(hint: Any) -> str:
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
        yield f"write torch.tensor({name})"
    elif hasattr(value, "__array__"):
        yield f"write torch.as_tensor({name})"
