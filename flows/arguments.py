"""Arguments of public functions and classes, checked against their annotations.

`@checked` stands at each public door. Inside the package, functions trust each other.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn

from flows.errors import FlowsError, InvalidTypeError, InvalidValueError
from flows.expectations import allows, describe, described, is_unknown_choice, refusal, show

T = TypeVar("T")
TOO_LARGE = ("can't allocate memory", "size calculation overflowed", "out of memory")  # in the words of torch
MAX_WHOLE = 2**63 - 1  # the largest whole number that torch takes
PLAIN = {int, float, bool, type(None), Tensor}  # types that decide
MAX_LISTED = 8  # elements of a list that a door remembers
MAX_PASSED = 64  # combinations of types that a door remembers
MAX_KEPT = 1 << 16  # entries of a tensor or a list that a module keeps as an argument of its constructor


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

    Modules among them remember the arguments that they were built with; see `Built`.

    Class arguments:
        checks: names of the methods.
    """

    _checks: tuple[str, ...] = ()

    def __init_subclass__(cls, checks: Sequence[str] = (), **options: Any) -> None:
        super().__init_subclass__(**options)
        if issubclass(cls, nn.Module) and inspect.isfunction(vars(cls).get("__init__")):
            setattr(cls, "__init__", _remembering(vars(cls)["__init__"]))  # noqa: B010
        cls._checks = (*cls._checks, *checks)
        for name in cls._checks:
            if inspect.isfunction(vars(cls).get(name)):
                setattr(cls, name, checked(vars(cls)[name]))


@dataclass(frozen=True)
class Built:
    """How a module was built: what describes it in a file that it is saved to.

    Large tensors and most objects are left out, so that a module keeps no data alive.
    """

    kind: type
    arguments: Mapping[str, Any]  # those that were given, by name; `LEFT_OUT` for one that was not kept

    @classmethod
    def of(cls, module: nn.Module) -> Built | None:
        """How a module was built; None if that is unknown."""
        found = vars(module).get(BUILT)
        return found if isinstance(found, Built) and found.kind is type(module) else None


class LeftOut:
    """Stands for an argument that was not kept."""

    def __repr__(self) -> str:
        return "an argument that was not kept"

    def __reduce__(self) -> str:
        return "LEFT_OUT"  # the one there is


LEFT_OUT = LeftOut()
BUILT = "_built"  # the attribute of a module that holds it


def _remembering(function: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(function)
    def build(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        _remember(self, function, args, kwargs)
        function(self, *args, **kwargs)

    return build


def _remember(module: Any, function: Callable[..., None], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Keep the arguments of the constructor with the module, unless that of a subclass has done so."""
    if not isinstance(module, nn.Module) or BUILT in vars(module):
        return
    if inspect.unwrap(type(module).__init__) is not inspect.unwrap(function):
        vars(module)[BUILT] = None  # a subclass with a constructor of its own, whose arguments nobody has seen
        return
    try:
        bound = inspect.signature(function).bind(module, *args, **kwargs)
    except TypeError:  # the constructor raises it
        return
    given = dict(list(bound.arguments.items())[1:])
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    vars(module)[BUILT] = Built(type(module), {name: _kept(value) for name, value in given.items()})


def _kept(value: Any) -> Any:
    """The argument, if it describes the module and is small."""
    if isinstance(value, Tensor):
        return value.detach() if value.numel() <= MAX_KEPT and not isinstance(value, nn.Parameter) else LEFT_OUT
    if isinstance(value, list | tuple | dict):
        return value if len(value) <= MAX_KEPT else LEFT_OUT
    owner = type(value).__module__.partition(".")[0]
    held = callable(value) or is_dataclass(value) or owner in ("builtins", "torch", "numpy")
    return value if held else LEFT_OUT


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
        _remember(args[0], function, args[1:], kwargs)
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
                    f"{self.name} needs {name}{described(self.hints.get(name))}; it takes {self._taken()}"
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
            kind = InvalidValueError if is_unknown_choice(hint, value) else InvalidTypeError
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
    return kind if _decides(kind) else None


@functools.lru_cache(maxsize=4096)
def _decides(kind: type) -> bool:
    """Whether a type alone says if its values are allowed."""
    return not issubclass(kind, str | bytes | type | Sequence | Mapping)


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
