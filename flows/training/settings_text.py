"""Settings as yaml text: written without aliases, and read with bounds on size and depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from flows.errors import InvalidValueError

MAX_LENGTH = 1_000_000  # characters
MAX_VALUES = 50_000
MAX_DEPTH = 40
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C is 20 times faster


class _Dumper(yaml.SafeDumper):
    """Writes a value that occurs twice twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def settings_text(settings: Mapping[str, Any]) -> str:
    """Return settings as yaml text."""
    return yaml.dump(dict(settings), Dumper=_Dumper, sort_keys=False)


def read_settings(text: Any) -> Any:
    """Read settings of unknown origin, in time and memory of the size of the text.

    Raises:
        InvalidValueError: it is no yaml of plain values, has aliases, or is too large.
    """
    if not isinstance(text, str):
        raise InvalidValueError(f"they are no text but a {type(text).__name__}")
    if len(text) > MAX_LENGTH:
        raise InvalidValueError(f"they have {len(text):,} characters, more than the {MAX_LENGTH:,} that are read")
    try:
        _check_events(text)
        return yaml.load(text, Loader=LOADER)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError) as error:
        raise InvalidValueError(f"they are not valid yaml: {' '.join(str(error).split())[:300]}") from error


def _check_events(text: str) -> None:
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=LOADER)):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"the alias *{event.anchor}, which flows never writes; write its value out")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise yaml.YAMLError(f"more than {MAX_DEPTH} levels")
        if number > MAX_VALUES:
            raise yaml.YAMLError(f"more than {MAX_VALUES:,} values")
