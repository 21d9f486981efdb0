"""Times in a file: numbers as they are, dates as numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flows.datasets.tables.text import NUMBER, hint
from flows.errors import DataWarning, InvalidValueError, warn

TIME_UNITS = {"days": 86_400.0, "hours": 3_600.0, "minutes": 60.0, "seconds": 1.0}  # in seconds
COMPACT_DATE = re.compile(r"(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])")  # 20240131
LIKE_A_DATE = re.compile(r"\d{1,4}[-./]\d{1,2}[-./]\d{1,4}.*")


@dataclass(frozen=True)
class Moments:
    """The times of all rows: numbers, or seconds since `origin`."""

    numbers: NDArray[np.float64]
    origin: str | None  # the earliest date; None for numbers


def read_moments(words: Sequence[str], column: str, path: Path) -> Moments:
    """Return times that are written as numbers or as dates of ISO 8601.

    Raises:
        InvalidValueError: a time is neither, or both kinds occur. The message names the row.
    """
    is_number = [NUMBER.fullmatch(word) is not None for word in words]
    if all(is_number):
        _tell_compact_dates(words, column, path)
        numbers = np.array(words, dtype=object).astype(np.float64)
        bad = np.flatnonzero(~np.isfinite(numbers))
        if len(bad):
            raise InvalidValueError(f"{_place(path, int(bad[0]), column)} is {words[bad[0]]}; correct it")
        return Moments(numbers, None)
    dates: dict[int, datetime] = {}
    for row, word in enumerate(words):
        moment = _date(word)
        if moment is not None and not is_number[row]:
            dates[row] = moment
        elif not is_number[row]:
            cure = hint(word) or "correct it"
            if LIKE_A_DATE.fullmatch(word.strip()):
                cure = "write dates as 2024-01-31 or 2024-01-31T12:00:00, for which the order of day and month is clear"
            raise InvalidValueError(
                f"{_place(path, row, column)} is {word[:60]!r}, neither a number nor a date; {cure}"
            )
    if any(is_number):
        row, other = is_number.index(True), next(iter(dates))
        raise InvalidValueError(
            f"{_place(path, row, column)} is the number {words[row]}, and row {other + 1} is the date {words[other]!r}"
            "; write all times in one way"
        )
    zoned = [moment.tzinfo is not None for moment in dates.values()]
    if any(zoned) and not all(zoned):
        row = zoned.index(not zoned[0])
        raise InvalidValueError(
            f"{_place(path, row, column)} is {words[row]!r}, and row 1 is {words[0]!r}: only one of them has a time "
            "zone; give all dates one, or none"
        )
    origin = min(dates.values())
    seconds = [(moment - origin) / timedelta(seconds=1) for moment in dates.values()]
    return Moments(np.array(seconds, dtype=np.float64), origin.isoformat(" "))


def _date(word: str) -> datetime | None:
    text = word.strip()
    try:
        if len(text) == 10:
            return datetime.combine(date.fromisoformat(text), datetime.min.time())
        return datetime.fromisoformat(text.removesuffix("Z") + "+00:00" * text.endswith("Z"))
    except ValueError:
        return None


def _place(path: Path, row: int, column: str) -> str:
    return f"{path}: row {row + 1} (the first data row is row 1), column {column!r}"


def _tell_compact_dates(words: Sequence[str], column: str, path: Path) -> None:
    if len(set(words)) > 1 and all(COMPACT_DATE.fullmatch(word.strip()) for word in words):
        warn(
            f"{path}: column {column!r} was taken for numbers, but {words[0].strip()} looks like a date; write dates "
            "as 2024-01-31, or the step between months will be 70 or more",
            DataWarning,
        )
