"""Conditions in words and numbers: the columns that a density depends on, and their contexts as tensors."""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from flows.arguments import checked
from flows.errors import InvalidTypeError, InvalidValueError

Category = str | float


class Columns(Protocol):
    """A data frame: columns by name."""

    @property
    def columns(self) -> Any: ...

    def __getitem__(self, name: Any, /) -> Any: ...


Named = Mapping[str, Any] | Sequence[Mapping[str, Any]] | Columns  # contexts in words and numbers, by name
MISSING = {"", "?", "na", "n/a", "nan", "null", "none", "<na>"}  # in lower case
MAX_SHOWN = 12  # categories or columns in a message


@checked
class Conditions:
    """Names of condition columns, and the categories of those that hold categories.

    A context has one entry for each column: a number as it is, a word as its place among the categories of its column
    (from 0), and a category that is a number as that number. `encode` makes contexts from words and numbers, `decode`
    the reverse.

    Args:
        columns: their names, in the order of the entries of a context.
        categories: the known categories of each column that holds categories, all words or all numbers.

    Raises:
        InvalidValueError: names repeat, or a column of categories does not exist or has fewer than two.

    Example:
        ```python
        from flows.conditions import Conditions

        conditions = Conditions(["age", "sex"], {"sex": ["female", "male"]})
        print(conditions.encode({"age": 42, "sex": "male"}))  # [42, 1]
        print(conditions.encode([{"age": 42, "sex": "male"}, {"age": 7, "sex": "female"}]).shape)  # (2, 2)
        ```
    """

    def __init__(self, columns: Sequence[str], categories: Mapping[str, Sequence[Category]] | None = None) -> None:
        self.columns = tuple(str(name) for name in columns)
        if not self.columns or len(set(self.columns)) < len(self.columns):
            raise InvalidValueError(f"conditions must have at least one column and each name once, got {list(columns)}")
        given = dict(categories or {})
        for name, found in given.items():
            if name not in self.columns:
                raise InvalidValueError(f"categories are given for {name!r}, and the conditions are {self._named()}")
            if len(set(found)) < max(2, len(found)):
                raise InvalidValueError(f"the categories of {name!r} must be two or more, each once, got {list(found)}")
        self.categories = {name: tuple(given[name]) for name in self.columns if name in given}

    @property
    def shape(self) -> tuple[int]:
        """Shape of one context."""
        return (len(self.columns),)

    @property
    def numbers(self) -> list[int]:
        """Positions of the columns that hold numbers."""
        return [i for i, name in enumerate(self.columns) if name not in self.categories]

    def levels(self, column: str) -> NDArray[np.float64]:
        """The entries that stand for the categories of a column."""
        known = self.categories[column]
        return np.array(range(len(known)) if isinstance(known[0], str) else known, dtype=np.float64)

    def encode(self, given: Any) -> Tensor:  # (*batch, columns), float64
        """Contexts from words and numbers.

        Args:
            given: a mapping from columns to values, or to lists of values, one for each context; a list of mappings; a
                data frame, whose other columns are ignored; or numbers (*batch, columns), which are checked.

        Raises:
            InvalidTypeError, InvalidValueError: a column is missing or unknown, a value is missing, or a category is
                unknown. The message names the row and the column, and lists the known categories.
        """
        if isinstance(given, Tensor | np.ndarray) and np.asarray(given).dtype.kind in "fiub":
            context = torch.as_tensor(given, dtype=torch.float64)
            self.check(context)
            return context
        if isinstance(given, Sequence) and given and all(isinstance(row, Mapping) for row in given):
            for row, entries in enumerate(given, start=1):
                self._check_names(list(entries), f"row {row}: ")
            given = {name: [row[name] for row in given] for name in self.columns}
        is_frame = hasattr(given, "columns") and hasattr(given, "__getitem__")
        if not isinstance(given, Mapping) and not is_frame:
            raise InvalidTypeError(
                f"a context must be a mapping, a list of mappings, a data frame or numbers, got "
                f"{type(given).__name__}; for example {self.example()}"
            )
        table: Any = given
        self._check_names([str(name) for name in (table.columns if is_frame else table)], "", others=is_frame)
        columns = {name: table[name] for name in self.columns}
        single = all(np.ndim(values) == 0 for values in columns.values())
        lengths = {name: len(values) for name, values in columns.items() if np.ndim(values)}
        if len(set(lengths.values())) > 1:
            raise InvalidValueError(f"the columns of contexts must have one length, got {lengths}")
        size = next(iter(lengths.values()), 1)
        listed = {name: list(v) if np.ndim(v) else [v] * size for name, v in columns.items()}
        rows = np.stack([self._entries(name, listed[name], single) for name in self.columns], 1)
        return torch.from_numpy(rows[0] if single else rows)

    def decode(self, context: Tensor) -> dict[str, list[Category]]:
        """The value of each column in contexts (n, columns)."""
        self.check(context)
        found = {}
        for name, values in zip(self.columns, context.detach().cpu().double().T.tolist(), strict=True):
            known = self.categories.get(name)
            words = known is not None and isinstance(known[0], str)
            found[name] = [known[int(value)] for value in values] if words and known else values
        return found

    def check(self, context: Tensor) -> None:
        """Raise `InvalidValueError` unless all entries (*batch, columns) are finite numbers and known categories."""
        if context.ndim == 0 or context.shape[-1] != len(self.columns):
            raise InvalidValueError(
                f"a context must have the shape {self.shape}, one entry for each of {self._named()}, got a tensor of "
                f"shape {tuple(context.shape)}"
            )
        flat = context.detach().reshape(-1, len(self.columns))
        wrong = ~flat.isfinite()
        if bool(wrong.any()):
            row, column = wrong.nonzero()[0].tolist()
            raise InvalidValueError(
                f"{int(wrong.any(1).sum())} of {len(flat)} contexts hold NaN or infinite values, the first is "
                f"{flat[row, column].item()} at index {row} in column {self.columns[column]!r}; fill them in"
            )
        for column, name in enumerate(self.columns):
            if name not in self.categories:
                continue
            levels = torch.as_tensor(self.levels(name)).to(flat)
            unknown = ~torch.isin(flat[:, column], levels)
            if bool(unknown.any()):
                row = int(unknown.nonzero()[0])
                words = isinstance(self.categories[name][0], str)
                cure = f"; words become entries by flow.encoder.contexts({self.example()})" if words else ""
                raise InvalidValueError(
                    f"{int(unknown.sum())} of {len(flat)} contexts have an unknown category in column {name!r}, the "
                    f"first is {flat[row, column].item():g} at index {row}; known are {self._known(name)}{cure}"
                )

    def stable(self, context: NDArray[np.float64]) -> NDArray[np.float64]:
        """Contexts (n, columns) with numbers for words that do not depend on the other categories."""
        found = context.copy()
        for column, name in enumerate(self.columns):
            known = self.categories.get(name)
            if known is not None and isinstance(known[0], str):
                codes = [hashlib.blake2b(str(word).encode(), digest_size=6).digest() for word in known]
                numbers = np.array([int.from_bytes(code, "little") for code in codes], dtype=np.float64)
                found[:, column] = numbers[context[:, column].astype(np.int64)]
        return found

    def example(self) -> str:
        """One context in words, for messages."""
        entries = (
            f"{name!r}: {self.categories[name][0]!r}" if name in self.categories else f"{name!r}: 0.5"
            for name in self.columns
        )
        return "{" + ", ".join(entries) + "}"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return {"columns": list(self.columns), "categories": {name: list(v) for name, v in self.categories.items()}}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any] | None) -> Conditions | None:
        """Build them from what `as_dict` returned; None stays None."""
        return None if stored is None else cls(stored["columns"], stored["categories"])

    @classmethod
    def of(
        cls,
        columns: Mapping[str, Sequence[Any] | ArrayLike],
        categories: Sequence[str] = (),
    ) -> Conditions:
        """Find out what columns hold: numbers, or else categories, sorted.

        Args:
            columns: the values of each column.
            categories: names of columns whose numbers are categories.

        Raises:
            InvalidValueError: a column to be categories does not exist, or a value is missing.
        """
        unknown = [name for name in categories if name not in columns]
        if unknown:
            raise InvalidValueError(
                f"categories has {unknown[0]!r}, which is no condition; the conditions are "
                f"{', '.join(map(repr, columns))}"
            )
        found: dict[str, Sequence[Category]] = {}
        for name, values in columns.items():
            entries = list(values) if not hasattr(values, "tolist") else values.tolist()  # type: ignore[union-attr]
            row = next((i for i, value in enumerate(entries, start=1) if _is_missing(value)), None)
            if row is not None:
                raise InvalidValueError(
                    f"row {row} (the first data row is row 1) has no value in column {name!r}; fill it in, or remove "
                    "that row"
                )
            is_categorical = name in categories or str(getattr(values, "dtype", "")) == "category"
            numeric = all(_as_number(value) is not None for value in entries)
            if numeric and not is_categorical:
                continue
            known = {_as_number(value) if numeric else _as_word(value) for value in entries}
            found[name] = sorted(known)  # type: ignore[type-var]
        single = next((name for name, known in found.items() if len(known) < 2), None)
        if single is not None:
            raise InvalidValueError(
                f"column {single!r} holds a single category, {found[single][0]!r}, so nothing depends on it; leave it "
                "out of the conditions"
            )
        return cls(list(columns), found)

    def _check_names(self, names: Sequence[str], where: str, others: bool = False) -> None:
        missing = [name for name in self.columns if name not in names]
        unknown = [] if others else [name for name in names if name not in self.columns]
        close = difflib.get_close_matches(str(unknown[0]), missing or self.columns, n=1) if unknown else []
        if unknown:
            meant = f" (did you mean {close[0]}?)" if close else ""
            raise InvalidValueError(f"{where}a context has no column {unknown[0]!r}{meant}; it has {self._described()}")
        if missing:
            raise InvalidValueError(
                f"{where}the context lacks {', '.join(map(repr, missing))}; it needs {self._described()}"
            )

    def _entries(self, name: str, values: Sequence[Any], single: bool) -> NDArray[np.float64]:
        known = self.categories.get(name)
        places = None if known is None or not isinstance(known[0], str) else {word: i for i, word in enumerate(known)}
        entries = np.empty(len(values))
        for row, value in enumerate(values, start=1):
            where = "" if single else f"row {row}: "
            if _is_missing(value):
                raise InvalidValueError(f"{where}column {name!r} of the context has no value ({value!r}); fill it in")
            number = _as_number(value)
            if places is not None:
                entry = places.get(_as_word(value))
            elif known is not None:
                entry = number if number in known else None
            elif number is None or math.isinf(number):
                raise InvalidValueError(f"{where}column {name!r} of the context must be a finite number, got {value!r}")
            else:
                entry = number
            if entry is None:
                raise InvalidValueError(
                    f"{where}column {name!r} of the context has the unknown category {value!r}; known are "
                    f"{self._known(name)}"
                )
            entries[row - 1] = entry
        return entries

    def _known(self, name: str) -> str:
        known = self.categories[name]
        more = f" and {len(known) - MAX_SHOWN} more" if len(known) > MAX_SHOWN else ""
        return ", ".join(f"{one:g}" if not isinstance(one, str) else repr(one) for one in known[:MAX_SHOWN]) + more

    def _named(self) -> str:
        more = f" and {len(self.columns) - MAX_SHOWN} more" if len(self.columns) > MAX_SHOWN else ""
        return ", ".join(map(repr, self.columns[:MAX_SHOWN])) + more

    def _described(self) -> str:
        kinds = (
            f"{name!r} (one of {self._known(name)})" if name in self.categories else f"{name!r} (a number)"
            for name in self.columns[:MAX_SHOWN]
        )
        return ", ".join(kinds)

    def __len__(self) -> int:
        return len(self.columns)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Conditions) and self.as_dict() == other.as_dict()

    def __hash__(self) -> int:
        return hash((self.columns, tuple(self.categories.items())))

    def __repr__(self) -> str:
        return f"Conditions({list(self.columns)}, {dict(self.categories)})"


def _is_missing(value: Any) -> bool:
    if value is None or (isinstance(value, str) and value.strip().lower() in MISSING):
        return True
    if type(value).__name__ in ("NAType", "NaTType"):  # of pandas
        return True
    return isinstance(value, float | np.floating) and math.isnan(value)


def _as_number(value: Any) -> float | None:
    """The value as a number; None for words, truth values among them."""
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _as_word(value: Any) -> str:
    """A category as a word; a whole number is written without a point."""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value).strip()
