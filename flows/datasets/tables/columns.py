"""Columns of files: which of them are features, and what they are called."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from flows.errors import DataWarning, InvalidTypeError, InvalidValueError, warn

Columns = Sequence[str | int] | None  # by name or position; None: all

INDEX_NAME = re.compile(r"|unnamed: \d+(\.\d+|_level_\d+)*|__index_level_\d+__|level_\d+|index", re.IGNORECASE)
MAX_EXACT = 2**53  # float64 holds all whole numbers up to here


def choose_columns(columns: Columns, names: Sequence[str], source: str | Path) -> list[int]:
    """Return the positions of columns that are given by name or position.

    Raises:
        InvalidTypeError: `columns` is no list.
        InvalidValueError: a column is unknown or repeated, or several have that name.
    """
    if columns is None:
        return list(range(len(names)))
    if isinstance(columns, str | int):
        raise InvalidTypeError(f"columns must be a list, got {columns!r}; write [{columns}]")
    if not isinstance(columns, Iterable):
        raise InvalidTypeError(f"columns must be a list of names or positions, got {columns!r}")
    chosen = []
    for column in columns:
        if isinstance(column, str) and list(names).count(column) > 1:
            places = [i for i, name in enumerate(names) if name == column]
            raise InvalidValueError(
                f"{source} has {len(places)} columns called {column!r}, at positions {', '.join(map(str, places))}; "
                f"choose by position, such as columns=[{places[0]}]"
            )
        if isinstance(column, str) and column in names:
            chosen.append(list(names).index(column))
        elif isinstance(column, int) and not isinstance(column, bool) and -len(names) <= column < len(names):
            chosen.append(column % len(names))
        else:
            raise InvalidValueError(f"{source} has no column {column!r}; it has {', '.join(map(repr, names))}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise InvalidValueError(f"columns must name at least one column and none twice, got {list(columns)}")
    return chosen


def features(columns: Columns, names: Sequence[str], index: Sequence[int], source: Path) -> list[int]:
    """Return the positions to read: by default all but the index."""
    chosen = choose_columns(columns, names, source)
    if columns is not None or not index or len(index) == len(names):
        return chosen
    left_out = ", ".join(repr(names[i]) for i in index)
    warn(
        f"{source}: column {left_out} is the index of a data frame, not a feature, and was left out; to take it, name "
        "it in columns=[...]",
        DataWarning,
    )
    return [i for i in chosen if i not in index]


def leading_index(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """Return the first columns that have the name of an index; "index" and "level_0" must also count rows."""
    found = []
    for i, name in enumerate(names):
        if not INDEX_NAME.fullmatch(name.strip()):
            break
        if name.lower().startswith(("index", "level")) and not _counts([row[i] for row in rows if i < len(row)]):
            break
        found.append(i)
    return found


def _counts(fields: Sequence[str]) -> bool:
    numbers = [int(field) if field.strip().isdigit() else -1 for field in fields]
    return len(numbers) > 1 and all(b - a == 1 for a, b in pairwise(numbers))


def parquet_index(names: Sequence[str], metadata: dict[bytes, bytes] | None) -> list[int]:
    """Return the positions of what pandas stored as the index."""
    try:
        stored = json.loads((metadata or {}).get(b"pandas", b"{}")).get("index_columns", [])
    except (ValueError, AttributeError):
        stored = []
    named = {name for name in stored if isinstance(name, str)}
    return [
        i
        for i, name in enumerate(names)
        if name in named or (INDEX_NAME.fullmatch(name) and not name.lower().startswith(("index", "level")))
    ]


def distinct_names(names: Sequence[str], source: Path) -> list[str]:
    """Number repeated names: a, a.1, a.2."""
    repeated = sorted({name for name in names if list(names).count(name) > 1})
    if not repeated:
        return list(names)
    new: list[str] = []
    for i, name in enumerate(names):
        before = list(names[:i]).count(name)
        candidate = f"{name}.{before}" if before else name
        while before and (candidate in names or candidate in new):
            before += 1
            candidate = f"{name}.{before}"
        new.append(candidate)
    warn(
        f"{source}: the names {', '.join(map(repr, repeated))} occur several times; the columns are now called "
        f"{', '.join(map(repr, new))}",
        DataWarning,
    )
    return new


def warn_of_lost_digits(names: Sequence[str], source: Path) -> None:
    """Warn of columns whose whole numbers float64 cannot hold."""
    if names:
        named = ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        warn(
            f"{source}: column {named} holds whole numbers beyond 2^53, of which float64 keeps 16 digits; subtract a "
            "constant before saving, or leave the column out with columns=[...]",
            DataWarning,
        )
