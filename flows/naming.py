"""Find an object by the lower-case name of its class."""

from __future__ import annotations

import inspect
import re
from typing import TypeVar

from flows.errors import InvalidTypeError, InvalidValueError

T = TypeVar("T")


def by_name(family: type[T], value: T | str, argument: str = "") -> T:
    """Return `value`, or an instance of the subclass that it names.

    Names are the lower-case names of the subclasses that have been imported, with or without underscores between
    words, so a new subclass needs no registration.

    Args:
        argument: the name of the argument that has the value; the message begins with it. Default: it has none.

    Raises:
        ValueError: no subclass has that name; the message lists those that there are.
        TypeError: neither a name nor an instance of the family.
    """
    if isinstance(value, family):
        return value
    found = concrete_subclasses(family)
    choices = {cls.__name__.lower(): cls for cls in found}
    names = ", ".join(sorted(in_words(cls.__name__) for cls in found))
    if isinstance(value, str):
        name = value.lower().replace("_", "")
        if name in choices:
            return choices[name]()
        where = f"{argument}: " if argument else ""
        raise InvalidValueError(f"{where}unknown {family.__name__} {value!r}; expected one of {names}")
    raise InvalidTypeError(f"expected a {family.__name__} or one of the names {names}, got {type(value).__name__}")


def in_words(name: str) -> str:
    """`optimal_transport` for OptimalTransport, but `silu` for SiLU."""
    return re.sub("(?<=[a-z])(?=[A-Z][a-z])", "_", name).lower()


def concrete_subclasses(family: type) -> list[type]:
    found = []
    for cls in family.__subclasses__():
        if not inspect.isabstract(cls) and not cls.__name__.startswith("_"):
            found.append(cls)
        found.extend(concrete_subclasses(cls))
    return found
