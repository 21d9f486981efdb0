"""The command line as Hydra can read it: options first, and text quoted where its grammar would refuse it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from flows.errors import InvalidValueError

# Settings whose value is text as a file system or a shell knows it: the last word of their names.
LITERAL = {
    "cache_dir",
    "checkpoint",
    "delimiter",
    "file",
    "folder",
    "output",
    "output_dir",
    "path",
    "resume",
    "source",
}
FLAGS = {  # options of Hydra and of ours, and whether each takes a value
    "--help": False,
    "-h": False,
    "--hydra-help": False,
    "--version": False,
    "--settings": False,
    "--cfg": True,
    "-c": True,
    "--resolve": False,
    "--package": True,
    "-p": True,
    "--run": False,
    "-r": False,
    "--multirun": False,
    "-m": False,
    "--shell-completion": False,
    "-sc": False,
    "--config-path": True,
    "-cp": True,
    "--config-name": True,
    "-cn": True,
    "--config-dir": True,
    "-cd": True,
    "--experimental-rerun": True,
    "--info": False,
    "-i": False,
}
CHOICES = {  # of the values of options
    "--cfg": ("job", "hydra", "all"),
    "-c": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
    "-i": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}
COMMON = "--help, --settings, --multirun (-m), --cfg, --config-dir"
MULTIRUN = {"-m", "--multirun"}


def readable_arguments(arguments: Sequence[str]) -> list[str]:
    """The command line with its options first, and values quoted that are plain text but no part of Hydra's grammar.

    `output_dir=runs/#1` becomes `output_dir='runs/#1'`. What Hydra reads keeps its meaning: lists, mappings,
    interpolations, quoted text, and in a sweep everything with a comma.

    Raises:
        InvalidValueError: there is no such option.
    """
    options, overrides = _separated(list(arguments))
    several = bool(MULTIRUN & set(options))
    return [*options, *(_quoted_if_needed(override, several) for override in overrides)]


def quoted(text: str) -> str:
    """Text in quotes for Hydra."""
    escaped = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), text)
    return f"'{escaped}'"


def quoted_override(key: str, value: object) -> str:
    """`key=value` as one argument for a shell and Hydra, quoted where either needs it."""
    text = str(value)
    if not re.fullmatch(r"[A-Za-z0-9/_.:+%-]+", text):
        return shlex.quote(f"{key}={quoted(text)}")
    return f"{key}={text}"


def _separated(arguments: list[str]) -> tuple[list[str], list[str]]:
    options: list[str] = []
    overrides: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if not argument.startswith("-") or argument == "-":
            overrides.append(argument)
            continue
        if name not in FLAGS or (equals and not FLAGS[name] and name not in CHOICES):
            raise InvalidValueError(_no_option(name, equals + value))
        options.append(argument)
        if FLAGS[name] and not equals:
            value = next(rest, "")
            options.append(value)
            if not value or value.startswith("-"):
                raise InvalidValueError(f"the option {name} needs a value: write {name} VALUE")
        if name in CHOICES and value and value not in CHOICES[name]:
            raise InvalidValueError(f"{name} must be followed by {' or '.join(CHOICES[name])}, got {value!r}")
    return options, overrides


def _no_option(name: str, value: str) -> str:
    key = name.lstrip("-").replace("-", "_") or "setting"
    return (
        f"there is no option {name}; there are {COMMON}. A setting is written without dashes: {key}{value or '=VALUE'}"
    )


def _quoted_if_needed(override: str, several: bool) -> str:
    key, equals, text = override.partition("=")
    if not key.strip("+~@ "):
        raise InvalidValueError(f"{override} is no setting; write setting=value, without spaces, such as data=moons")
    if not equals or not text or key.startswith("~"):
        return override
    literal = re.split(r"[./@]", key.lstrip("+"))[-1] in LITERAL
    try:
        parsed = OverridesParser.create().parse_override(override)
        value = None if parsed.is_sweep_override() else parsed.value()
    except (HydraException, ValueError):  # numbers of thousands of digits are too long for Python
        unclear = "${" in text or (several and "," in text) or text[0] in ("'\"" if literal else "'\"[{(")
        return override if unclear else f"{key}={quoted(text)}"
    blank = not text.strip()
    number = literal and isinstance(value, bool | int | float)
    return f"{key}={quoted(text)}" if blank or number else override
