"""From settings to objects, with a message that names the setting where one is wrong."""

from __future__ import annotations

import difflib
import inspect
import numbers
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flows.errors import InvalidValueError

NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}

OWN = {  # settings of the programs that belong to no part
    "seed": int,
    "output_dir": str | None,
    "output": str | None,
    "device": str | None,
    "dtype": str | None,
    "trust": Sequence[str],
    "part": str,
    "batch_size": int,
    "solver_error_points": int,
    "plot": bool,
    "progress_bar": bool,
}


class SettingsError(InvalidValueError):
    """A setting does not fit; the message begins with its name, such as ``solver.rtol``."""


def instantiate(config: Mapping[str, Any], part: str = "", /, **arguments: Any) -> Any:
    """``hydra.utils.instantiate`` with plain lists and dicts as arguments.

    Args:
        config: the settings, with a ``_target_``.
        part: what they are called where the user sees them: ``"field"``, ``"objective.flow_matching"``.
        arguments: beside the settings.

    Raises:
        SettingsError: a setting has the wrong name or type, or the target refuses it.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate as build  # slow to import, and not needed to use a flow

    if not isinstance(config, Mapping) or "_target_" not in config:
        raise SettingsError(f"{part or 'the settings'} must be a mapping with a _target_ to call, got {config!r}")
    check_settings(config, part, arguments)
    try:
        return build(config, _convert_="all", **arguments)
    except InstantiationException as error:
        raise SettingsError(_explain(error, config, part)) from error


def plain_settings(config: Any) -> dict[str, Any]:
    """What Hydra composed, as plain values; those of the program itself have the type that :data:`OWN` says.

    Raises:
        SettingsError: one has not.
        MissingMandatoryValue: one must be given.
    """
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    for name, kind in OWN.items():
        if name in plain:
            check_type(name, plain[name], kind)
    return plain


def check_settings(config: Any, part: str = "", given: Iterable[str] = ()) -> None:
    """Compare settings, at all depths, with the parameters of their targets.

    Args:
        given: arguments that are passed beside the settings.

    Raises:
        SettingsError: a target has no such parameter, or its annotation allows no such value.
    """
    if isinstance(config, (list, tuple)):
        for i, element in enumerate(config):
            check_settings(element, f"{part}[{i}]")
    if not isinstance(config, Mapping):
        return
    names, hints, closed = _signature(config["_target_"]) if "_target_" in config else ([], {}, False)
    for key, value in config.items():
        if str(key).startswith("_"):
            continue
        if closed and key not in names:
            text = no_setting(key, part, [name for name in names if name not in given])
            raise SettingsError(f"{text}. ~{_join(part, key)} takes it away where an experiment has set it")
        if key in hints:
            check_type(_join(part, key), value, hints[key])
        check_settings(value, _join(part, key))


def check_arguments(function: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Compare ``values`` with the annotations of the parameters of ``function`` that they are for.

    Raises:
        SettingsError: a value has another type.
    """
    for name, hint in typing.get_type_hints(function).items():
        if name in values:
            check_type(name, values[name], hint)


def parameter_names(target: Any) -> Sequence[str]:
    """Of the class or function with that import path; none if it cannot be found."""
    return _signature(target)[0]


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raise :class:`SettingsError` unless the annotation ``hint`` allows ``value``, or is none of plain data."""
    if not _fits(value, hint):
        raise SettingsError(f"{name} must be {_describe(hint)}, got {value!r}")


def no_setting(key: str, part: str, valid: Sequence[str], elsewhere: Sequence[str] = ()) -> str:
    """Say that a part has no such setting, and which ones it has; ``elsewhere``: where one of that name is."""
    close = elsewhere or difflib.get_close_matches(key, valid, n=1)
    suggestion = f" (did you mean {' or '.join(close)}?)" if close else ""
    return f"there is no setting {_join(part, key)}{suggestion}; {part or 'the top level'} has {', '.join(valid)}"


def _fits(value: Any, hint: Any) -> bool:
    """Whether plain data are of a type; true for types that no plain data can have, which Hydra builds."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if isinstance(value, Mapping) and "_target_" in value:
        return hint not in NAMES
    if hint is bool or hint is type(None):
        return isinstance(value, hint)
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    kind = origin or hint
    if kind in (tuple, list, Sequence):
        if isinstance(value, str) or not isinstance(value, Sequence):
            return False
        if kind is tuple and arguments and arguments[-1] is not ...:
            return len(value) == len(arguments) and all(map(_fits, value, arguments))
        return not arguments or all(_fits(element, arguments[0]) for element in value)
    if kind is Mapping or kind is dict:
        return isinstance(value, Mapping)
    if value is None or isinstance(value, (str, numbers.Number)):
        return _may_be(value, kind)
    return True


def _may_be(value: Any, kind: Any) -> bool:
    """Whether text, a number or null may stand for an object of a class; what is no class allows all."""
    if not inspect.isclass(kind) or kind is Any:  # which is a class in Python 3.11
        return True
    if getattr(kind, "_is_protocol", False):
        members = (name for base in kind.__mro__[:-1] for name in vars(base) if not name.startswith("_"))
        return all(hasattr(value, name) for name in members)
    if issubclass(kind, os.PathLike):
        return isinstance(value, (str, kind))
    return isinstance(value, kind)


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_describe, arguments)))
    if origin is typing.Literal:
        return " or ".join(map(repr, arguments))
    if hint in NAMES:
        return NAMES[hint]
    kind = origin or hint
    if kind is tuple and arguments and arguments[-1] is not ...:
        return f"a list of {len(arguments)}"
    if kind in (tuple, list, Sequence):
        return f"a list, each {_describe(arguments[0])}" if arguments else "a list"
    if kind is Mapping or kind is dict:
        return "a mapping"
    return getattr(hint, "__name__", str(hint))


def _signature(target: Any) -> tuple[list[str], dict[str, Any], bool]:
    """The names of the parameters, the types of those that state one, and whether there can be no others."""
    from hydra.utils import get_object

    try:
        function = get_object(target)
        parameters = inspect.signature(function).parameters
    except Exception:  # what cannot be looked at is not checked; Hydra says what is wrong with it
        return [], {}, False
    try:
        hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except Exception:  # such as a name that is imported for type checkers alone
        hints = {}
    closed = all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters.values())
    stated = {name: hints[name] for name in parameters if name in hints}
    for name, hint in stated.items():
        if parameters[name].default is None:
            stated[name] = typing.Optional[hint]  # noqa: UP045 (of any annotation)
    return list(parameters), stated, closed


def _explain(error: BaseException, config: Mapping[str, Any], part: str) -> str:
    """The target's own words, after the name of the setting that they are about."""
    from hydra.errors import InstantiationException

    cause = error
    while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
        cause = cause.__cause__
    inner = re.search(r"^full_key: (.+)$", str(error), re.MULTILINE)
    for key in inner[1].split(".") if inner else []:
        part, config = _join(part, key), config.get(key, {}) if isinstance(config, Mapping) else {}
    text = str(cause)
    if text.split(" ")[0] in config:
        return _join(part, text)
    if isinstance(cause, InstantiationException):
        text = text.splitlines()[0]
    if isinstance(cause, (InstantiationException, ValueError, OSError, ImportError)):  # their words are for people
        return f"{part}: {text}" if part else text
    settings = ", ".join(f"{key}={value!r}" for key, value in config.items() if not str(key).startswith("_"))
    return f"{part or 'the settings'}: {config.get('_target_')} fails with {settings}: {type(cause).__name__}: {text}"


def _join(part: str, key: str) -> str:
    return f"{part}.{key}" if part else key
