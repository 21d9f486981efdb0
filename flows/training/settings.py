"""Builds objects from settings and checks the settings first.

Settings are plain values as a yaml file holds them. A mapping with a `_target_` describes an object: the import path of
a class or function, and its arguments. With `_partial_: true` it describes the function that still lacks arguments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib
import inspect
import re
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from flows.errors import FlowsError
from flows.expectations import public_path
from flows.training.annotations import SettingsError, check_type, is_list, show

TARGET, PARTIAL = "_target_", "_partial_"
# Arguments that a run gives to what these parts describe, so that they are no settings of it.
GIVEN = {
    "model": ("field", "divergence", "solver", "base", "transform", "encoder", "event_shape"),
    "field": ("event_shape", "context_shape"),
    "encoder": ("context_shape", "conditions"),
    "base": ("event_shape", "context_shape", "conditions", "num_points", "points"),
    "transform": ("event_shape", "num_levels", "bounds"),
    "optimizer": ("params", "lr"),
    "objective": ("params", "lr"),
    "evaluation": ("dataset", "seed", "progress_bar"),
    "data": ("conditions",),
}


def instantiate(config: Any, part: str = "", /, **arguments: Any) -> Any:
    """Build the object that `config` describes, and all objects inside it.

    All names and plain values are checked before anything is built.

    Args:
        config: a mapping with a `_target_`.
        part: the dotted name of `config` in messages, such as `"field"` or `"objective.flow_matching"`.
        arguments: more arguments of the target; they win over those in `config`.

    Raises:
        SettingsError: a setting has a wrong name or type, or the target fails with it.
    """
    if not isinstance(config, Mapping) or TARGET not in config:
        raise SettingsError(
            f"{part or 'the settings'} must be a mapping with a {TARGET}, the class to build, got {show(config)}"
        )
    check_settings(config, part, arguments)
    return _build(config, part, arguments)


def check_settings(config: Any, part: str = "", given: Collection[str] = ()) -> None:
    """Check names and plain values against the parameters of the targets, at all depths.

    Args:
        given: names of arguments that come from elsewhere.

    Raises:
        SettingsError: a target has no such parameter, or its annotation does not allow the value.
    """
    if isinstance(config, str) and "${" in config:
        raise SettingsError(f"{part or 'the settings'} must be a plain value, got the interpolation {config!r}")
    if is_list(config):
        for i, element in enumerate(config):
            check_settings(element, f"{part}[{i}]")
    if not isinstance(config, Mapping):
        return
    target = _find_target(config[TARGET], part) if TARGET in config else None
    for key in config:
        _check_key(key, config, part, target, given)
    for key, value in _arguments(config).items():
        name = _join(part, key)
        check_settings(value, name)
        if target is not None and key in target.hints and not _describes_objects(value):
            check_type(name, value, target.hints[key])


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run with every default of their targets written out.

    An object among the defaults becomes a mapping with a `_target_`. Arguments that the run gives (`GIVEN`) are left
    out, and so are defaults that yaml cannot hold.

    Args:
        config: parts by name, such as `field`.
    """
    return {part: _complete(value, GIVEN.get(part, ())) for part, value in config.items()}


def parameter_names(target: Any) -> Sequence[str]:
    """The names of the parameters of a target; none if it cannot be found."""
    try:
        return list(_find_target(target, "").parameters)
    except SettingsError:
        return []


def no_setting(key: str, part: str, valid: Sequence[str], elsewhere: Sequence[str] = ()) -> str:
    """The message for a setting that does not exist.

    Args:
        valid: the settings that `part` has.
        elsewhere: settings with the name `key` in other parts.
    """
    close = elsewhere or difflib.get_close_matches(str(key), valid, n=1)
    suggestion = f" (did you mean {' or '.join(close)}?)" if close else ""
    has = f"has {', '.join(valid)}" if valid else "has no settings"
    return f"there is no setting {_join(part, key)}{suggestion}; {part or 'the top level'} {has}"


@dataclass(frozen=True)
class _Target:
    """A class or function to call, and what is known of its parameters."""

    path: str
    function: Callable[..., Any]
    parameters: Mapping[str, inspect.Parameter]
    hints: Mapping[str, Any]
    open: bool  # takes keyword arguments of any name


def _find_target(path: Any, part: str) -> _Target:
    function = _import(path, _join(part, TARGET))
    try:
        all_parameters = {} if _takes_nothing(function) else dict(inspect.signature(function).parameters)
        is_open = any(p.kind is p.VAR_KEYWORD for p in all_parameters.values())
    except (TypeError, ValueError):  # some functions written in C tell nothing
        all_parameters, is_open = {}, True
    try:
        of_fields = dataclasses.is_dataclass(function)  # annotated in the modules that declare them
        hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) and not of_fields else function)
    except Exception:  # an annotation may name what only type checkers import
        hints = {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = {name: p for name, p in all_parameters.items() if p.kind in named}
    stated = {name: hints[name] for name in parameters if name in hints}
    for name, hint in stated.items():
        if parameters[name].default is None:
            stated[name] = typing.Optional[hint]  # noqa: UP045 (`hint` may be any annotation)
    return _Target(path, function, parameters, stated, is_open)


def _takes_nothing(function: Any) -> bool:
    return inspect.isclass(function) and function.__init__ is nn.Module.__init__


def _import(path: Any, name: str) -> Callable[..., Any]:
    """The class or function with an import path."""
    if not isinstance(path, str) or not all(word.isidentifier() for word in path.split(".")) or "." not in path:
        raise SettingsError(f"{name} must be an import path such as flows.fields.MLP, got {show(path)}")
    words = path.split(".")
    found: Any = None
    for i, word in enumerate(words):
        module, prefix = ".".join(words[: i + 1]), ".".join(words[:i])
        if found is not None and hasattr(found, word):
            found = getattr(found, word)
            continue
        try:
            if found is not None and not inspect.ismodule(found):
                raise ModuleNotFoundError(name=module)
            found = importlib.import_module(module)
        except Exception as error:
            absent = isinstance(error, ModuleNotFoundError) and error.name == module
            if not absent:
                raise SettingsError(f"{name}: importing {module} fails: {type(error).__name__}: {error}") from error
            others = [other for other in dir(found) if not other.startswith("_")] if found is not None else []
            close = difflib.get_close_matches(word, others, n=1)
            suggestion = f"; did you mean {prefix}.{close[0]}?" if close else ""
            raise SettingsError(f"{name}: there is no {module}{suggestion}") from None
    if not callable(found):
        raise SettingsError(f"{name} must be a class or function, got {path}, a {type(found).__name__}")
    return found


def _check_key(key: Any, config: Mapping[str, Any], part: str, target: _Target | None, given: Collection[str]) -> None:
    where, name = part or "the settings", _join(part, key)
    if not isinstance(key, str):
        raise SettingsError(f"the names of settings must be text, got {show(key)} in {where}")
    if "${" in key:
        raise SettingsError(f"the names of settings must be plain text, got {show(key)} in {where}")
    if key == PARTIAL:
        check_type(_join(part, key), config[key], bool)
    elif key == "lr" and "lr" in _given(part):
        raise SettingsError(f"{name} cannot be set: every stage has its own, objective.STAGE.learning_rate")
    elif part == "model" and key in _given(part):
        instead = f"it is a part of its own, {key}=..." if key != "event_shape" else "the data give it"
        raise SettingsError(f"{name} cannot be set: {instead}")
    elif part == "evaluation" and key in _given(part):
        raise SettingsError(
            f"{name} cannot be set: the run gives it; use seed=..., data=... or reporting.progress_bar=..."
        )
    elif key != TARGET and key.startswith("_") and key.endswith("_"):
        raise SettingsError(f"there is no special setting {_join(part, key)}; there are {TARGET} and {PARTIAL}")
    elif key not in (TARGET, PARTIAL) and target is not None and not target.open and key not in target.parameters:
        valid = [name for name in target.parameters if name not in given and name not in _given(part)]
        raise SettingsError(
            f"{no_setting(key, part, valid)}. If an experiment sets it, remove it with ~{_join(part, key)}"
        )


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in (TARGET, PARTIAL)}


def _describes_objects(value: Any) -> bool:
    """Whether a `_target_` stands anywhere in `value`."""
    if isinstance(value, Mapping):
        return TARGET in value or any(map(_describes_objects, value.values()))
    return is_list(value) and any(map(_describes_objects, value))


def _build(config: Any, part: str, arguments: Mapping[str, Any]) -> Any:
    if is_list(config):
        return [_build(element, f"{part}[{i}]", {}) for i, element in enumerate(config)]
    if not isinstance(config, Mapping):
        return config
    values = {key: _build(value, _join(part, key), {}) for key, value in _arguments(config).items()}
    if TARGET not in config:
        return values
    target = _find_target(config[TARGET], part)
    for key, value in values.items():
        if key in target.hints and _describes_objects(config[key]):
            check_type(_join(part, key), value, target.hints[key])
    values |= arguments
    call = _Partial(target.function, **values)
    call.target, call.settings, call.part = target, _arguments(config), part
    if config.get(PARTIAL):
        return call
    missing = [name for name, p in target.parameters.items() if p.default is p.empty and name not in values]
    if missing:
        raise SettingsError(f"{_join(part, missing[0])} must be given, it has no default")
    return call()


class _Partial(functools.partial):
    """A call whose errors name the settings that it was made from."""

    target: _Target
    settings: Mapping[str, Any]
    part: str

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        with _named_errors(self.target, self.settings, self.part):
            return super().__call__(*args, **kwargs)


@contextlib.contextmanager
def _named_errors(target: _Target, settings: Mapping[str, Any], part: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        own = target.path.startswith("flows.")
        if own and not isinstance(error, (FlowsError, ValueError, TypeError, OSError, ImportError)):
            raise  # a bug of this package; another package may raise anything on a bad value
        raise SettingsError(_explain(error, target, settings, part)) from error


def _explain(error: Exception, target: _Target, settings: Mapping[str, Any], part: str) -> str:
    """The target's own words after the name of the setting; with all settings if they are not meant for the user."""
    text = str(error).strip()
    first = re.match(r"\w*", text)[0]  # type: ignore[index]
    if part and re.match(rf"{re.escape(part)}[\s.:\[]", text):
        return text  # an object inside has named its setting
    if first in target.parameters and first not in _given(part):
        return _join(part, text)
    if isinstance(error, (FlowsError, ValueError, OSError, ImportError)) and text:
        return f"{part}: {text}" if part else text
    line = text.splitlines()[0] if text else ""
    shown = ", ".join(f"{key}={show(value)}" for key, value in settings.items())
    with_them = f" with {shown}" if shown else ""
    return f"{part or 'the settings'}: {target.path} fails{with_them}: {type(error).__name__}: {line}"


def _complete(config: Any, given: Collection[str]) -> Any:
    if is_list(config):
        return [_complete(element, given) for element in config]
    if not isinstance(config, Mapping):
        return config
    completed = {key: _complete(value, given) for key, value in config.items()}
    try:
        target = _find_target(config[TARGET], "")
    except (KeyError, SettingsError):  # no object, or one whose error is told when it is built
        return completed
    for name, parameter in target.parameters.items():
        # keyword-only parameters of torch's optimisers choose among implementations and change with its version
        internal = parameter.kind is parameter.KEYWORD_ONLY and not target.path.startswith("flows.")
        if name not in completed and name not in given and not internal:
            with contextlib.suppress(TypeError):
                completed[name] = _as_settings(_default(target.function, parameter))
    return completed


def _default(function: Any, parameter: inspect.Parameter) -> Any:
    """The default of a parameter, also of a dataclass field with a `default_factory`."""
    if dataclasses.is_dataclass(function):
        for field in dataclasses.fields(function):
            if field.name == parameter.name and field.default_factory is not dataclasses.MISSING:
                return field.default_factory()
    if parameter.default is parameter.empty:
        raise TypeError("no default")
    return parameter.default


def _as_settings(value: Any) -> Any:
    """A default as yaml can hold it.

    Raises:
        TypeError: it cannot.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {key: _as_settings(element) for key, element in value.items()}
    if is_list(value):
        return [_as_settings(element) for element in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return {TARGET: public_path(type(value))} | {name: _as_settings(element) for name, element in fields.items()}
    raise TypeError(f"{value!r} is no plain value")


def _given(part: str) -> Sequence[str]:
    return GIVEN.get(part.split(".")[0], ())


def _join(part: str, key: Any) -> str:
    return f"{part}.{key}" if part else str(key)
