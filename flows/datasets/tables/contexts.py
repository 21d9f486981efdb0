"""Columns of a table that its density is conditional on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flows.checks import existing_path
from flows.conditions import Conditions
from flows.datasets.tables.columns import choose_columns, features
from flows.datasets.tables.readers import categorical_columns, column_names, read_words
from flows.datasets.tables.text import NUMBER
from flows.errors import InvalidTypeError, InvalidValueError

Column = str | int
MAX_SHOWN = 5  # rows or categories in a message


def read_context_columns(
    path: Path,
    columns: Sequence[Column] | None,
    context_columns: Sequence[Column],
    categories: Sequence[Column],
    group_column: Column | None,
    reading: Mapping[str, Any],
) -> tuple[list[int], dict[str, Any], list[str]]:
    """Read the columns that are conditions.

    Returns:
        The positions of the values, the conditions by name, and the names of those that are categories.

    Raises:
        InvalidTypeError, InvalidValueError: a column does not exist, or is a condition and a value at once.
    """
    names, index = column_names(path, **reading)
    chosen = _chosen("context_columns", context_columns, names, path)
    group = None if group_column is None else choose_columns([group_column], names, path)[0]
    if columns is None:
        values = [i for i in features(None, names, index, path) if i not in chosen and i != group]
        if not values:
            raise InvalidValueError(
                f"{path}: all columns are conditions, so no column is left whose density could be learned; take one "
                "out of context_columns"
            )
    else:
        values = choose_columns(columns, names, path)
    both = [names[i] for i in chosen if i in values or i == group]
    if both:
        role = "group_column" if names.index(both[0]) == group else "columns"
        raise InvalidValueError(
            f"{path}: column {both[0]!r} cannot be both a value and a condition; take it out of {role} or of "
            "context_columns"
        )
    is_category = set(_chosen("categories", categories, names, path) if categories else ())
    outside = [names[i] for i in is_category if i not in chosen]
    if outside:
        raise InvalidValueError(
            f"{path}: categories has {outside[0]!r}, which is no condition; add it to context_columns"
        )
    is_category |= set(categorical_columns(path)) & set(chosen)
    found: dict[str, Any] = {}
    for place in chosen:
        words = read_words(path, place, "condition", **reading)
        numeric = all(map(NUMBER.fullmatch, words))
        found[names[place]] = np.array(words, dtype=np.float64) if numeric else words
    return values, found, [names[i] for i in sorted(is_category)]


def read_contexts(path: str | Path, conditions: Conditions) -> Tensor:  # (n, columns)
    """Read contexts from a .csv or .parquet file with the names of the conditions; other columns are ignored.

    Raises:
        FileError, InvalidValueError: the file cannot be read, lacks a column, or holds an unknown category.
    """
    path = existing_path("context", path, "file of contexts")
    if path.suffix.lower() not in (".csv", ".parquet"):
        raise InvalidValueError(f"contexts come from a .csv or .parquet file with names of columns, got {path}")
    names, _ = column_names(path)
    found = {name: read_words(path, names.index(name), "condition") for name in conditions.columns if name in names}
    try:
        return conditions.encode(found)
    except InvalidValueError as error:
        raise InvalidValueError(f"{path}: {error}") from error


def _chosen(setting: str, columns: Sequence[Column], names: Sequence[str], path: Path) -> list[int]:
    try:
        return choose_columns(columns, names, path)
    except (InvalidTypeError, InvalidValueError) as error:
        raise type(error)(f"{setting}: {error}") from error


def as_columns(context: Any, source: str) -> dict[str, Any]:
    """Return contexts of a table as columns by name; those of an array are called c0, c1, ...

    Raises:
        InvalidTypeError, InvalidValueError: they are no table.
    """
    if isinstance(context, Mapping):
        return {str(name): values for name, values in context.items()}
    if hasattr(context, "columns"):
        names = [str(name) for name in context.columns]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise InvalidValueError(f"the context of {source} has several columns called {repeated[0]!r}")
        return {str(name): context[name] for name in context.columns}
    array = context.detach().cpu().numpy() if isinstance(context, Tensor) else np.asarray(context)
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim != 2 or array.shape[1] == 0:
        raise InvalidValueError(
            f"the context of {source} must be a table (rows, columns), got an array of shape {array.shape}"
        )
    return {f"c{i}": column for i, column in enumerate(array.T)}


class TableContexts:
    """The contexts of a table, and what their columns mean.

    Args:
        context: columns by name, a data frame, or an array.
        categories: names of columns whose numbers are categories.
        conditions: those of another table, such as one that a flow was trained on. Default: found out.
        values: names of the columns of values.
        rows: number of rows.
        source: what messages call the table.

    Raises:
        InvalidTypeError, InvalidValueError: the columns do not fit, or a value is missing or unknown.
    """

    def __init__(
        self,
        context: Any,
        categories: Sequence[str],
        conditions: Conditions | None,
        values: Sequence[str],
        rows: int,
        source: str,
    ) -> None:
        columns = as_columns(context, source)
        both = [name for name in columns if name in values]
        if both:
            raise InvalidValueError(
                f"{source}: column {both[0]!r} cannot be both a value and a condition; take it out of one"
            )
        wrong = {name: len(column) for name, column in columns.items() if len(column) != rows}
        if wrong:
            name, count = next(iter(wrong.items()))
            raise InvalidValueError(f"{source}: the condition {name!r} has {count} entries, and the table {rows} rows")
        self.source = source
        self.given = conditions is not None
        try:
            self.conditions = Conditions.of(columns, categories) if conditions is None else conditions
            self.entries: NDArray[np.float64] = self.conditions.encode(columns).numpy()
        except (InvalidTypeError, InvalidValueError) as error:
            raise type(error)(f"{source}: {error}") from error

    def check(self, split: Mapping[str, Tensor]) -> None:
        """Raise `InvalidValueError` unless training rows tell something about each condition and category."""
        if self.given:
            return
        train = self.entries[split["train"].numpy()]
        names = self.conditions.columns
        constant = [name for name, same in zip(names, (train == train[0]).all(0).tolist(), strict=True) if same]
        if constant:
            kept = [name for name in names if name not in constant]
            advice = f"leave it out: context_columns=[{','.join(kept)}]" if kept else "leave it out"
            raise InvalidValueError(
                f"{self.source}: the condition {', '.join(map(repr, constant))} is constant in the {len(train)} "
                f"training rows, so nothing can be learned from it; {advice}"
            )
        for column, name in enumerate(names):
            if name in self.conditions.categories:
                self._check_seen(name, column, train[:, column])

    def _check_seen(self, name: str, column: int, train: NDArray[np.float64]) -> None:
        unseen = ~np.isin(self.entries[:, column], train)
        if not unseen.any():
            return
        known = dict(zip(self.conditions.levels(name).tolist(), self.conditions.categories[name], strict=True))
        seen = [repr(word) for entry, word in known.items() if entry in train]
        rows = np.flatnonzero(unseen)
        first = known[float(self.entries[rows[0], column])]
        more = f" and {len(seen) - MAX_SHOWN} more" if len(seen) > MAX_SHOWN else ""
        others = f"; {len(rows)} rows have such categories" if len(rows) > 1 else ""
        raise InvalidValueError(
            f"{self.source}: row {rows[0] + 1} (the first data row is row 1) has the category {first!r} in column "
            f"{name!r}, which no training row has{others}; known are {', '.join(seen[:MAX_SHOWN])}{more}. Merge rare "
            "categories, leave out those rows, or choose another split_seed"
        )

    def stable(self) -> NDArray[np.float64]:
        """Entries (n, columns) that do not depend on which other categories there are."""
        return self.conditions.stable(self.entries)
