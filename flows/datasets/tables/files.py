"""Tables in one file, or in several: one for each part of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flows.checks import existing_path
from flows.datasets.tables.contexts import read_context_columns
from flows.datasets.tables.readers import column_names, read_groups, read_table
from flows.errors import FlowsError, InvalidValueError

Column = str | int


@dataclass(frozen=True)
class Wanted:
    """What is read of a file; see `flows.datasets.Tabular`."""

    columns: Sequence[Column] | None = None
    context_columns: Sequence[Column] = ()
    categories: Sequence[Column] = ()
    group_column: Column | None = None
    delimiter: str = ","
    header: bool | None = None


@dataclass(frozen=True)
class Found:
    """What was read."""

    values: np.ndarray  # (rows, columns)
    names: list[str]
    groups: list[str] | None  # of each row
    context: dict[str, Any] | None  # columns by name
    categories: list[str]  # columns of the context whose numbers are categories
    rows: Mapping[str, np.ndarray] = field(default_factory=dict)  # of the parts that have a file of their own
    files: Sequence[str | Path] = ()  # beside the first


def read_parts(path: str | Path, others: Mapping[str, str | Path], wanted: Wanted) -> Found:
    """Read a table whose parts may lie in further files with the same columns.

    Args:
        path: the file with the rows of all other parts.
        others: files of parts.

    Raises:
        FileError: a file does not exist or cannot be read.
        InvalidTypeError, InvalidValueError: a file is no table of numbers, or lacks a column; the message names it.
    """
    first = read_part(path, wanted)
    if not others:
        return first
    if wanted.group_column is not None:
        raise InvalidValueError(
            f"the files decide the split ({', '.join(f'{part}_path' for part in others)}), so leave out group_column, "
            "and name the features with columns"
        )
    tables, contexts, rows, start = [first.values], [first.context], {}, len(first.values)
    for part, file in others.items():
        found = _like(first, file, wanted, f"{part}_path")
        if not len(found.values):
            raise InvalidValueError(f"{part}_path: {file} has no rows")
        tables.append(found.values)
        contexts.append(found.context)
        rows[part] = np.arange(start, start + len(found.values))
        start += len(found.values)
    context = None
    if first.context is not None:
        context = {name: _joined([one[name] for one in contexts if one is not None]) for name in first.context}
    categories = list(dict.fromkeys(first.categories))
    files = list(others.values())
    return Found(np.concatenate(tables), first.names, None, context, categories, rows, files)


def read_part(path: str | Path, wanted: Wanted) -> Found:
    """Read a table from one file."""
    columns, groups, context, categories = wanted.columns, None, None, list(map(str, wanted.categories))
    reading = {"delimiter": wanted.delimiter, "header": wanted.header}
    if wanted.context_columns:
        path = existing_path("path", path, "data file")
        columns, context, categories = read_context_columns(
            path, columns, wanted.context_columns, wanted.categories, wanted.group_column, reading
        )
    if wanted.group_column is not None:
        columns, groups = read_groups(path, wanted.group_column, columns, **reading)
    values, names = read_table(path, columns, **reading)
    return Found(values, names, groups, context, categories)


def _like(first: Found, path: str | Path, wanted: Wanted, setting: str) -> Found:
    """Read the columns of the first file, by name where this one has names."""
    try:
        file = existing_path(setting, path, "data file")
        named = [*first.names, *(first.context or ())]
        known = column_names(file, wanted.delimiter, wanted.header)[0]
        if all(name in known for name in named):
            wanted = Wanted(
                first.names, list(first.context or ()), first.categories, None, wanted.delimiter, wanted.header
            )
        elif not _are_positions(known) and not _are_positions(first.names):
            missing = [name for name in named if name not in known]
            raise InvalidValueError(
                f"{path} lacks {', '.join(map(repr, missing))}; it needs the columns {', '.join(named)}, and has "
                f"{', '.join(known)}"
            )
        found = read_part(file, wanted)
    except FlowsError as error:
        if str(error).startswith(setting):
            raise
        raise type(error)(f"{setting}: {error}") from error
    if found.values.shape[1] != len(first.names):
        raise InvalidValueError(
            f"{setting}: {path} has {found.values.shape[1]} columns, and the rows for training {len(first.names)} "
            f"({', '.join(first.names)})"
        )
    return found


def _are_positions(names: Sequence[str]) -> bool:
    return list(names) == [str(i) for i in range(len(names))]


def _joined(columns: Sequence[Any]) -> Any:
    """Columns of several files as one: of words if any of them holds words."""
    if all(isinstance(column, np.ndarray) for column in columns):
        return np.concatenate(columns)
    return [word for column in columns for word in (column.tolist() if isinstance(column, np.ndarray) else column)]
