"""Readers of tables of numbers; errors name the file, the row, the column and the value."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from flows.checks import existing_path
from flows.errors import FileError, InvalidTypeError, InvalidValueError, MissingPackageError

Columns = Sequence[str | int] | None  # by name or position; None: all

MISSING_WORDS = {"", "?", "na", "n/a", "nan", "null", "none"}  # in lower case


def read_table(
    path: str | Path, columns: Columns = None, delimiter: str = ",", header: bool | None = None
) -> tuple[np.ndarray, list[str]]:
    """Read a .csv, .npy or .parquet file of numbers.

    Args:
        path: the file.
        columns: columns to take, by name or position, in this order. Default: all.
        delimiter, header: of a .csv file, see `read_csv`.

    Returns:
        The values (rows, columns) in float64 and the names of the columns. Missing values of .npy and .parquet files
        are NaN.

    Raises:
        FileError: the file does not exist, is damaged or cannot be read.
        MissingPackageError: a .parquet file needs pyarrow.
        InvalidTypeError: a setting has the wrong type.
        InvalidValueError: the format is unknown, the content is no table, or a value is no number.
    """
    path = existing_path("path", path, "data file")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InvalidValueError(
            f"cannot read {path}: its suffix is {path.suffix!r}, expected one of {', '.join(READERS)}; "
            "convert the file, or pass its values to flows.datasets.Table(values)"
        )
    settings = {"delimiter": delimiter, "header": header} if reader is read_csv else {}
    try:
        return reader(path, columns, **settings)
    except (UnicodeDecodeError, csv.Error) as error:
        raise FileError(f"{path} is not text in UTF-8 ({error}); save it as such") from error
    except OSError as error:
        raise error if isinstance(error, FileError) else FileError(f"cannot read {path}: {error}") from error


def read_csv(
    path: Path, columns: Columns = None, delimiter: str = ",", header: bool | None = None
) -> tuple[np.ndarray, list[str]]:
    """Read a text file of numbers, one row a line.

    Args:
        path: the file.
        columns: see `read_table`.
        delimiter: a single character.
        header: whether the first line holds names. Default: find out; it does if one of its fields is text and the
            field below is a number.
    """
    if not isinstance(delimiter, str) or len(delimiter) != 1 or delimiter in '\r\n"':
        raise InvalidValueError(f"delimiter must be a single character, such as ',' or ';', got {delimiter!r}")
    if header not in (None, True, False):
        raise InvalidTypeError(f"header must be true, false or null, got {header!r}")
    top = list(islice(_csv_rows(path, delimiter), 2))
    if not top:
        raise InvalidValueError(f"{path} is empty; expected one row of numbers a line")
    if len(top[0]) == 1 and any(mark in top[0][0] for mark in ",;\t"):
        mark = next(mark for mark in ",;\t" if mark in top[0][0])
        raise InvalidValueError(f"{path} has no {delimiter!r} in its first line but {mark!r}; set delimiter={mark!r}")
    if header is None:
        header = _is_header(*top) if len(top) == 2 else any(_is_text(field) for field in top[0])
    names = [field.strip() for field in top[0]] if header else [str(i) for i in range(len(top[0]))]
    if len(top) == 1 and header:
        raise InvalidValueError(f"{path} has a line of names and no row of numbers below it")
    chosen = choose_columns(columns, names, path)
    rows = islice(_csv_rows(path, delimiter), int(header), None)
    # With a selection of columns, loadtxt would not notice a row with a field too many.
    shifted = columns is not None and _bad_width(rows, len(names))
    if shifted:
        raise InvalidValueError(f"cannot read {path}: {shifted}")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = (line for line in file if line.strip())
            values = np.loadtxt(
                islice(lines, int(header), None),
                delimiter=delimiter,
                usecols=None if columns is None else chosen,
                ndmin=2,
                comments=None,
                quotechar='"',
            )
    except ValueError as error:
        rows = islice(_csv_rows(path, delimiter), int(header), None)
        found = _bad_value(rows, names, chosen) or str(error)
        raise InvalidValueError(f"cannot read {path}: {found}") from error
    if values.shape[1] != len(chosen):
        raise InvalidValueError(
            f"{path} has {len(names)} names in its first line, but rows of {values.shape[1]} fields"
        )
    return values, [names[i] for i in chosen]


def read_npy(path: Path, columns: Columns = None) -> tuple[np.ndarray, list[str]]:
    """Read an array saved by `numpy.save`; positions are the names of the columns."""
    try:
        # A memory map reads no more than the file holds, whatever size a damaged header claims.
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise FileError(f"{path} is not a whole .npy file of numbers ({error}); write it with numpy.save") from error
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiub":
        found = getattr(values, "dtype", type(values).__name__)
        raise InvalidValueError(f"{path} must hold real numbers, got {found}; convert with array.astype(float)")
    if values.ndim != 2:
        raise InvalidValueError(
            f"{path} must be a table (rows, columns), got an array of shape {values.shape}; reshape it, "
            "e.g. with array.reshape(len(array), -1)"
        )
    names = [str(i) for i in range(values.shape[1])]
    chosen = choose_columns(columns, names, path)
    return values[:, chosen].astype(np.float64), names if columns is None else [names[i] for i in chosen]


def read_parquet(path: Path, columns: Columns = None) -> tuple[np.ndarray, list[str]]:
    """Read a Parquet file; nulls become NaN. Needs pyarrow."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingPackageError(f"reading {path} needs pyarrow: pip install pyarrow, or convert to .csv") from error
    try:
        schema = pq.read_schema(path)
        chosen = choose_columns(columns, schema.names, path)
        names = [schema.names[i] for i in chosen]
        table = pq.read_table(path, columns=names)
    except (pa.ArrowException, OSError) as error:
        raise FileError(f"{path} is not a whole Parquet file ({error})") from error
    for name in names:
        kind = table.schema.field(name).type
        numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
        if not numeric and not pa.types.is_decimal(kind):
            first = table[name][0].as_py() if len(table) else None
            raise InvalidValueError(
                f"{path}: column {name!r} is {kind}, not numbers (row 1 is {first!r}); encode it, or leave it out with "
                "columns=[...]"
            )
    arrays = [table[name].cast(pa.float64(), safe=False).to_numpy() for name in names]
    return np.stack(arrays, 1) if len(table) else np.empty((0, len(names))), names


READERS: dict[str, Callable[..., tuple[np.ndarray, list[str]]]] = {
    ".csv": read_csv,
    ".npy": read_npy,
    ".parquet": read_parquet,
}


def choose_columns(columns: Columns, names: Sequence[str], source: str | Path) -> list[int]:
    """Return the positions of columns that are given by name or position.

    Raises:
        InvalidTypeError: `columns` is no list.
        InvalidValueError: a column is unknown or repeated.
    """
    if columns is None:
        return list(range(len(names)))
    if isinstance(columns, str | int):
        raise InvalidTypeError(f"columns must be a list, got {columns!r}; write [{columns}]")
    if not isinstance(columns, Iterable):
        raise InvalidTypeError(f"columns must be a list of names or positions, got {columns!r}")
    chosen = []
    for column in columns:
        if isinstance(column, str) and column in names:
            chosen.append(list(names).index(column))
        elif isinstance(column, int) and not isinstance(column, bool) and -len(names) <= column < len(names):
            chosen.append(column % len(names))
        else:
            raise InvalidValueError(f"{source} has no column {column!r}; it has {', '.join(map(repr, names))}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise InvalidValueError(f"columns must name at least one column and none twice, got {list(columns)}")
    return chosen


def _csv_rows(path: Path, delimiter: str) -> Iterator[list[str]]:
    """Yield the rows of a text file as lists of fields; blank lines are skipped."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        yield from (row for row in csv.reader(file, delimiter=delimiter) if len(row) > 1 or "".join(row).strip())


def _bad_width(rows: Iterable[list[str]], width: int, first: int = 1) -> str | None:
    """Describe the first row that does not have `width` fields."""
    for number, row in enumerate(rows, start=first):
        if len(row) != width:
            return f"row {number} (the first data row is row 1) has {len(row)} fields, expected {width}; correct it"
    return None


def _bad_value(rows: Iterable[list[str]], names: Sequence[str], chosen: Sequence[int]) -> str | None:
    """Describe the first row of the wrong length, or the first value that is no number."""
    for number, row in enumerate(rows, start=1):
        if wrong := _bad_width([row], len(names), number):
            return wrong
        for i in chosen:
            if _is_number(row[i]):
                continue
            if row[i].strip().lower() in MISSING_WORDS:
                found = f"is missing ({row[i]!r}); fill it in or remove such rows"
            else:
                found = f"is {row[i]!r}, not a number; correct it, or leave the column out with columns=[...]"
            return f"row {number} (the first data row is row 1), column {names[i]!r} {found}"
    return None


def _is_header(first: Sequence[str], second: Sequence[str]) -> bool:
    return any(_is_text(a) and _is_number(b) for a, b in zip(first, second, strict=False))


def _is_text(field: str) -> bool:
    return not _is_number(field) and field.strip().lower() not in MISSING_WORDS


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True
