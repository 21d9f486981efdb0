"""Readers of tables of numbers; errors name the file, the row, the column and the value."""

from __future__ import annotations

import csv
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from flows.checks import existing_path
from flows.errors import DataWarning, FileError, InvalidTypeError, InvalidValueError, MissingPackageError

Columns = Sequence[str | int] | None  # by name or position; None: all

MISSING_WORDS = {"", "?", "na", "n/a", "nan", "null", "none"}  # in lower case
INDEX_NAME = re.compile(r"|unnamed: \d+(\.\d+|_level_\d+)*|__index_level_\d+__|level_\d+|index", re.IGNORECASE)
WORDS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|", "space": " "}  # easier to type than the characters
DELIMITERS = {**WORDS, "\\t": "\t"}
HEADER_SAMPLE = 1000  # rows below the first line that are read to tell whether it holds names
MIN_ROWS_TO_ASK = 10  # shorter files get no warning about a first line that may hold names
YEARS = range(1800, 2201)


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


def read_groups(
    path: str | Path,
    group_column: str | int,
    columns: Columns = None,
    delimiter: str = ",",
    header: bool | None = None,
) -> tuple[list[int], list[str]]:
    """Read the column that says which rows belong together; it may hold words.

    Returns:
        The positions of the columns that are features, and the group of each row as text.

    Raises:
        FileError, InvalidTypeError, InvalidValueError: see `read_table`; or there is no such column, it is also a
            feature, or one of its entries is empty.
    """
    path = existing_path("path", path, "data file")
    suffix = path.suffix.lower()
    if suffix == ".csv":
        delimiter = checked_delimiter(delimiter)
        top = _top(path, delimiter)
        names, first = _names(top, header, path)
        index = _leading_index(names, top[int(first) :])
        place = _place(group_column, names, path)
        rows = islice(_csv_rows(path, delimiter), int(first), None)
        groups = [row[place] if place < len(row) else "" for row in rows]
    elif suffix == ".parquet":
        file = _open_parquet(path)
        names, index = file.schema_arrow.names, _parquet_index(file.schema_arrow.names, file.schema_arrow.metadata)
        place = _place(group_column, names, path)
        found = file.read().column(place).to_pylist()
        groups = ["" if group is None else str(group) for group in found]
    else:
        values, names = read_table(path)
        index, place = [], _place(group_column, names, path)
        groups = [repr(value) for value in values[:, place].tolist()]
    empty = next((row for row, group in enumerate(groups, start=1) if group.strip().lower() in MISSING_WORDS), None)
    if empty is not None:
        raise InvalidValueError(
            f"{path}: row {empty} (the first data row is row 1) has no group in column {names[place]!r}; fill it in"
        )
    if columns is None:
        return [i for i in _chosen(None, names, index, path) if i != place], groups
    chosen = choose_columns(columns, names, path)
    if place in chosen:
        raise InvalidValueError(f"the group column {names[place]!r} is no feature; leave it out of columns")
    return chosen, groups


def _place(group_column: str | int, names: Sequence[str], path: Path) -> int:
    if isinstance(group_column, bool) or not isinstance(group_column, str | int):
        raise InvalidTypeError(f"group_column must be the name or position of a column, got {group_column!r}")
    return choose_columns([group_column], names, path)[0]


def read_csv(
    path: Path, columns: Columns = None, delimiter: str = ",", header: bool | None = None
) -> tuple[np.ndarray, list[str]]:
    """Read a text file of numbers, one row a line.

    Args:
        path: the file.
        columns: see `read_table`.
        delimiter: a single character.
        header: whether the first line holds names. Default: find out. It does if one of its fields is text and the
            field below is a number, or if its fields are numbers that can only be names: positions, years, or whole
            numbers above decimals.

    An index that pandas wrote is left out, unless `columns` asks for it.
    """
    delimiter = checked_delimiter(delimiter)
    top = _top(path, delimiter)
    names, header = _names(top, header, path)
    chosen = _chosen(columns, names, _leading_index(names, top[1:] if header else top), path)
    every = len(chosen) == len(names)
    rows = islice(_csv_rows(path, delimiter), int(header), None)
    # With a selection of columns, loadtxt would not notice a row with a field too many.
    shifted = not every and _bad_width(rows, len(names))
    if shifted:
        raise InvalidValueError(f"cannot read {path}: {shifted}")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = (line for line in file if line.strip())
            values = np.loadtxt(
                islice(lines, int(header), None),
                delimiter=delimiter,
                usecols=None if every and columns is None else chosen,
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
    return values, _distinct([names[i] for i in chosen], path)


def checked_delimiter(delimiter: object) -> str:
    """Return the character that a delimiter means: itself, or one with a name such as "tab".

    Raises:
        InvalidValueError: it is no single character, or one that numbers are written with.
    """
    found = DELIMITERS.get(delimiter.lower(), delimiter) if isinstance(delimiter, str) else delimiter
    if not isinstance(found, str) or len(found) != 1 or found in '\r\n"\0' or found.isalnum() or found in "+-._":
        raise InvalidValueError(
            f"delimiter must be a single character that numbers lack, or one of the words {', '.join(WORDS)}, got "
            f"{delimiter!r}"
        )
    return found


def _top(path: Path, delimiter: str) -> list[list[str]]:
    """Return the first rows of a text file; check that it is one and has that delimiter."""
    top = list(islice(_csv_rows(path, delimiter), HEADER_SAMPLE))
    if not top:
        raise InvalidValueError(f"{path} is empty; expected one row of numbers a line")
    marks = [mark for mark in WORDS.values() if mark != delimiter and mark in top[0][0]]
    if len(top[0]) == 1 and marks and (marks[0] != " " or len(top[0][0].split()) == len(top[-1][0].split()) > 1):
        word = next(word for word, mark in WORDS.items() if mark == marks[0])
        raise InvalidValueError(f"{path} has no {delimiter!r} in its first line but {marks[0]!r}; set delimiter={word}")
    return top


def _names(top: Sequence[Sequence[str]], header: bool | None, path: Path) -> tuple[list[str], bool]:
    """Return the names of the columns, and whether they stand in the first line."""
    if header not in (None, True, False):
        raise InvalidTypeError(f"header must be true, false or null, got {header!r}")
    first = _is_header(top[0], top[1:], path) if header is None else bool(header)
    if len(top) == 1 and first:
        raise InvalidValueError(f"{path} has a line of names and no row of numbers below it")
    return [field.strip() for field in top[0]] if first else [str(i) for i in range(len(top[0]))], first


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
    file = _open_parquet(path)
    import pyarrow as pa

    try:
        schema = file.schema_arrow
        unique = len(set(schema.names)) == len(schema.names)
        chosen = _chosen(columns, schema.names, _parquet_index(schema.names, schema.metadata), path)
        names = [schema.names[i] for i in chosen]
        # pyarrow selects by name, which does not tell repeated names apart.
        table = file.read(columns=names).select(names) if unique else file.read().select(chosen)
    except (pa.ArrowException, OSError) as error:
        raise FileError(f"{path} is not a whole Parquet file ({error})") from error
    arrays = []
    for name, column in zip(names, table.columns, strict=True):
        kind = column.type
        numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
        if not numeric and not pa.types.is_decimal(kind):
            first = column[0].as_py() if len(table) else None
            raise InvalidValueError(
                f"{path}: column {name!r} is {kind}, not numbers (row 1 is {first!r}); encode it, or leave it out with "
                "columns=[...]"
            )
        arrays.append(column.cast(pa.float64(), safe=False).to_numpy())
    values = np.stack(arrays, 1) if len(table) else np.empty((0, len(names)))
    return values, _distinct(names, path)


def _open_parquet(path: Path) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingPackageError(f"reading {path} needs pyarrow: pip install pyarrow, or convert to .csv") from error
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise FileError(f"{path} is not a whole Parquet file ({error})") from error


READERS: dict[str, Callable[..., tuple[np.ndarray, list[str]]]] = {
    ".csv": read_csv,
    ".npy": read_npy,
    ".parquet": read_parquet,
}


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


def _chosen(columns: Columns, names: Sequence[str], index: Sequence[int], source: Path) -> list[int]:
    """Return the positions to read: by default all but the index."""
    chosen = choose_columns(columns, names, source)
    if columns is not None or not index or len(index) == len(names):
        return chosen
    left_out = ", ".join(repr(names[i]) for i in index)
    warnings.warn(
        f"{source}: column {left_out} is the index of a data frame, not a feature, and was left out; to take it, name "
        "it in columns=[...]",
        DataWarning,
        stacklevel=5,
    )
    return [i for i in chosen if i not in index]


def _leading_index(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
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


def _parquet_index(names: Sequence[str], metadata: dict[bytes, bytes] | None) -> list[int]:
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


def _distinct(names: Sequence[str], source: Path) -> list[str]:
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
    warnings.warn(
        f"{source}: the names {', '.join(map(repr, repeated))} occur several times; the columns are now called "
        f"{', '.join(map(repr, new))}",
        DataWarning,
        stacklevel=4,
    )
    return new


def _is_header(first: Sequence[str], rows: Sequence[Sequence[str]], path: Path) -> bool:
    """Tell whether the first line holds names; warn where only a guess is possible."""
    if not rows:
        return any(_is_text(field) for field in first)
    if any(_is_text(a) and _is_number(b) for a, b in zip(first, rows[0], strict=False)):
        return True
    index = len(list(_index_names(first)))  # names of an index come before numbers
    numbers = [field.strip() for field in first[index:]]
    if not numbers or not all(map(_is_number, numbers)) or len({float(field) for field in numbers}) < len(numbers):
        return False
    columns = [[row[i] for row in rows if i < len(row)] for i in range(index, len(first))]
    if not all(field.lstrip("+-").isdigit() for field in numbers):
        steps = np.diff([float(field) for field in numbers])
        even = len(numbers) >= 5 and steps[0] > 0 and bool(np.allclose(steps, steps[0], rtol=1e-6))
        return _guessed(even, first, path) if even else False
    whole = [int(field) for field in numbers]
    consecutive = all(b - a == 1 for a, b in pairwise(whole))
    position = consecutive and whole[0] in (0, 1)
    years = consecutive and all(year in YEARS for year in whole)
    if index and (position or years or len(rows) > 1):
        return True
    if len(rows) > 1 and any(column and all(map(_is_decimal, column)) for column in columns):
        return True if position or years else _guessed(True, first, path)
    inside = any(_is_number(field) and float(field) in YEARS for column in columns for field in column)
    if (position and len(whole) > 2) or (years and len(whole) > 1 and not inside):
        return _guessed(True, first, path)
    if len(whole) > 1 and consecutive and len(rows) >= MIN_ROWS_TO_ASK:
        _guessed(False, first, path)
    return False


def _index_names(fields: Sequence[str]) -> Iterator[str]:
    for field in fields:
        if not INDEX_NAME.fullmatch(field.strip()):
            return
        yield field


def _guessed(header: bool, first: Sequence[str], path: Path) -> bool:
    taken, other = ("names", "numbers") if header else ("numbers", "names")
    line = ",".join(first[:5]) + (",..." if len(first) > 5 else "")
    warnings.warn(
        f"{path}: the first line, {line}, was taken for {taken}; if it holds {other}, set "
        f"header={str(not header).lower()}",
        DataWarning,
        stacklevel=6,
    )
    return header


def _is_decimal(field: str) -> bool:
    return _is_number(field) and not field.strip().lstrip("+-").isdigit()


def _is_text(field: str) -> bool:
    return not _is_number(field) and field.strip().lower() not in MISSING_WORDS


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True
