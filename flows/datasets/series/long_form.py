"""Files of time series in long form: the roles of their columns, and series from their rows."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flows.datasets.tables.columns import choose_columns
from flows.datasets.tables.text import NUMBER
from flows.errors import DataWarning, InvalidValueError, warn

Column = str | int
LONG_FORM = (
    "the file must be in long form, with one row for each series and time; pandas turns a wide table, with a column "
    "for each time, into it: table.melt(id_vars='id', var_name='time', value_name='x')"
)
SINGLE_PRECISION = 2.0**-24  # of a time: its rounding in float32
FINE_ENOUGH = 0.01  # of the spacing of times: coarser rounding matters


def roles_of_columns(
    path: Path,
    names: Sequence[str],
    index: Sequence[int],
    id: Column | None,
    time: Column,
    columns: Sequence[Column] | None,
    context_columns: Sequence[Column],
    input_columns: Sequence[Column],
) -> dict[str, list[int]]:
    """The positions of the columns of each role."""
    given: dict[str, Sequence[Column] | None] = {
        "time": [time],
        "id": [] if id is None else [id],
        "columns": columns,
        "context_columns": context_columns,
        "input_columns": input_columns,
    }
    roles: dict[str, list[int]] = {}
    for role, chosen in given.items():
        for column in () if chosen is None or isinstance(chosen, str | int) else chosen:
            _check_exists(column, role, names, path)
        roles[role] = choose_columns(chosen, names, path) if chosen else []
    if columns is None:
        others = {place for chosen in roles.values() for place in chosen}
        roles["columns"] = [i for i in range(len(names)) if i not in others and i not in index]
    elif not roles["columns"]:
        raise InvalidValueError(f"{path}: columns must name at least one column of the states, got []")
    if not roles["columns"]:
        raise InvalidValueError(
            f"{path} has no column for the values of the states; it has {_quoted(names)}; {LONG_FORM}"
        )
    owner: dict[int, str] = {}
    for role, places in roles.items():
        for place in places:
            if place in owner:
                raise InvalidValueError(
                    f"{path}: column {names[place]!r} cannot be both {owner[place]} and {role}; take it out of one"
                )
            owner[place] = role
    return roles


def _check_exists(column: Column, role: str, names: Sequence[str], path: Path) -> None:
    if column in names or not isinstance(column, str):
        return
    close = difflib.get_close_matches(column.lower(), [name.lower() for name in names], n=1, cutoff=0.5)
    meant = next((name for name in names if close and name.lower() == close[0]), None)
    suggestion = f" (did you mean {meant}?)" if meant else ""
    cure = f"; name it with {role}=..., and mind that {LONG_FORM}" if role == "time" else ""
    raise InvalidValueError(f"{path} has no column {column!r}{suggestion} for {role}; it has {_quoted(names)}{cure}")


def _quoted(names: Sequence[str]) -> str:
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(map(repr, names[:12])) + more


def numbered(ids: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """The distinct ids, whole numbers in their order and then words in theirs, and the number of each row's."""

    def key(word: str) -> tuple[bool, float, str]:
        return (False, float(word), word) if NUMBER.fullmatch(word) else (True, 0.0, word)

    words = [word.strip() for word in ids]
    labels = sorted(set(words), key=key)
    number: Mapping[str, int] = {label: i for i, label in enumerate(labels)}
    return labels, np.array([number[word] for word in words], dtype=np.int64)


def tell_sorted(numbers: NDArray[np.float64], series: NDArray[np.int64], labels: Sequence[str], path: Path) -> None:
    """Warn of rows that were not in the order of time."""
    rows = np.argsort(series, kind="stable")  # each series in the order of the file
    wrong = np.flatnonzero((np.diff(numbers[rows]) < 0) & (np.diff(series[rows]) == 0))
    if len(wrong):
        found = np.unique(series[rows][wrong])
        warn(
            f"{path}: the rows of {len(found)} of {len(labels)} series, such as {labels[found[0]]!r}, were not in the "
            "order of time; they were sorted",
            DataWarning,
        )


def tell_coarse_times(times: NDArray[np.float64], series: NDArray[np.int64], name: str, path: Path) -> None:
    """Warn of times so large that float32, in which fields work, cannot tell neighbours apart."""
    step = float(np.median(np.diff(times)[np.diff(series) == 0]))
    largest = float(np.abs(times).max())
    if largest * SINGLE_PRECISION > FINE_ENOUGH * step:
        warn(
            f"{path}: the times in column {name!r} reach {largest:.4g} at a median step of {step:.4g}; they are kept "
            "in float64, but a field that depends on time sees them in float32, rounded to steps of "
            f"{2 * largest * SINGLE_PRECISION:.2g}. Subtract a constant, or "
            "set relative_times=true to count from the start of each series",
            DataWarning,
        )


def by_series(
    times: NDArray[np.float64],
    values: NDArray[np.float64],
    inputs: NDArray[np.float64],
    first: NDArray[np.int64],
    missing: str,
) -> tuple[list[tuple[NDArray, NDArray]], list[NDArray], list[NDArray]]:
    """The times and values of each series, its inputs, and their times. Rows without any value are left out."""
    parts, own, own_times = [], [], []
    cuts = first[1:]
    for t, x, u in zip(np.split(times, cuts), np.split(values, cuts), np.split(inputs, cuts), strict=True):
        kept = slice(None) if missing == "error" else ~np.isnan(x).all(1)
        sampled = ~np.isnan(u).all(1)
        parts.append((t[kept], x[kept]))
        own.append(u[sampled])
        own_times.append(t[sampled])
    return parts, own, own_times


def _shown(time: object) -> str:
    return f"{time:.15g}"


def check_times(
    path: Path,
    times: NDArray[np.float64],  # sorted by series and time
    series: NDArray[np.int64],
    order: NDArray[np.int64],  # the row in the file of each
    labels: Sequence[str],
    words: Sequence[str],  # the times as they are written
    has_id: bool,
) -> None:
    """Refuse times that repeat, and series of a single point."""
    if not len(times):
        raise InvalidValueError(f"{path} has no rows; expected one for each series and time")
    counts = np.bincount(series, minlength=len(labels))
    if has_id and len(labels) > 1 and counts.max() == 1:
        raise InvalidValueError(
            f"{path}: each of the {len(labels)} series has a single point, so the id column does not tell "
            f"series apart, or {LONG_FORM}"
        )
    again = np.flatnonzero((np.diff(times) == 0) & (np.diff(series) == 0))
    if len(again):
        at = int(again[0])
        one, other = sorted(int(row) for row in order[at : at + 2])
        whose = f"series {labels[int(series[at])]!r} has" if has_id else "there are"
        cure = "keep one row for each time" if has_id else "if the file holds several series, name their column: id=..."
        raise InvalidValueError(
            f"{path}: {whose} two rows with the time {words[one].strip()}, rows {one + 1} and {other + 1} "
            f"(the first data row is row 1), and {len(again)} such rows in all; {cure}"
        )
    single = np.flatnonzero(counts == 1)
    if len(single):
        raise InvalidValueError(
            f"{path}: {len(single)} of {len(labels)} series have a single point, such as "
            f"{labels[int(single[0])]!r}, and a trajectory needs two or more; leave them out, with pandas "
            "table[table.groupby('id')['time'].transform('size') > 1]"
        )


def static_covariates(
    path: Path,
    context: NDArray[np.float64],
    names: Sequence[str],
    times: NDArray[np.float64],
    first: NDArray[np.int64],
    labels: Sequence[str],
    missing: str,
) -> NDArray[np.float64]:  # (N, c)
    """The value of each static covariate in each series."""
    found = np.empty((len(labels), len(names)))
    ends = [*first[1:].tolist(), len(times)]
    for i, (label, start, end) in enumerate(zip(labels, first.tolist(), ends, strict=True)):
        for j, name in enumerate(names):
            column = context[start:end, j]
            known = ~np.isnan(column)
            if not known.any() or (missing == "error" and not known.all()):
                raise InvalidValueError(
                    f"{path}: the static covariate {name!r} is missing in series {label!r}, at time "
                    f"{_shown(times[start + int(np.argmin(known))])}; fill it in"
                )
            value = column[known][0]
            other = np.flatnonzero(known & (column != value))
            if len(other):
                raise InvalidValueError(
                    f"{path}: the static covariate {name!r} changes within series {label!r}, from {value:g} "
                    f"to {column[other[0]]:g} at time {_shown(times[start + other[0]])}; correct it, or take it as "
                    f"an input: input_columns=[{name}]"
                )
            found[i, j] = value
    return found
