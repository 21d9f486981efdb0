"""Find an object by the lower-case name of its class."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from flows.errors import InvalidTypeError, InvalidValueError

T = TypeVar("T")


def by_name(family: type[T], value: T | str, argument: str = "", **given: Any) -> T:
    """Return `value`, or an instance of the subclass that it names.

    Names are the lower-case names of the subclasses that have been imported, with or without underscores between
    words, so a new subclass needs no registration.

    Args:
        argument: the name of the argument that has the value; the message begins with it. Default: it has none.
        given: arguments of the subclass, such as its event shape, if it takes them.

    Raises:
        ValueError: no subclass that takes these arguments has that name; the message lists those that there are.
        TypeError: neither a name nor an instance of the family.
    """
    if isinstance(value, family):
        return value
    found = [cls for cls in concrete_subclasses(family) if not _missing(cls, given)]
    choices = {cls.__name__.lower(): cls for cls in found}
    names = ", ".join(sorted(in_words(cls.__name__) for cls in found))
    if isinstance(value, str):
        name = value.lower().replace("_", "")
        if name in choices:
            return choices[name](**{key: one for key, one in given.items() if key in _parameters(choices[name])})
        where = f"{argument}: " if argument else ""
        close = difflib.get_close_matches(value.lower(), names.split(", "), n=1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        raise InvalidValueError(f"{where}unknown {family.__name__} {value!r}; expected one of {names}{meant}")
    raise InvalidTypeError(f"expected a {family.__name__} or one of the names {names}, got {type(value).__name__}")


def in_words(name: str) -> str:
    """`optimal_transport` for OptimalTransport, and `student_t` for StudentT, but `silu` for SiLU."""
    return re.sub("(?<=[a-z])(?=[A-Z](?:[a-z]|$))", "_", name).lower()


def _missing(cls: type, given: Mapping[str, Any]) -> list[str]:
    """The arguments that a class needs beside those that are given."""
    return [name for name, p in _parameters(cls).items() if p.default is p.empty and name not in given]


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    found = {} if cls.__init__ is object.__init__ else inspect.signature(cls).parameters
    return {name: p for name, p in found.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def concrete_subclasses(family: type) -> list[type]:
    found = []
    for cls in family.__subclasses__():
        if not inspect.isabstract(cls) and not cls.__name__.startswith("_"):
            found.append(cls)
        found.extend(concrete_subclasses(cls))
    return found
