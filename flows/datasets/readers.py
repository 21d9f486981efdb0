"""Reading tables of numbers from files, with errors that name the file, the row, the column and the value."""

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from flows.errors import InvalidValueError

Columns = Sequence[str | int] | None  # by name or position; None for all

MISSING = {"", "?", "na", "n/a", "nan", "null", "none"}


def read_table(path: str | Path, columns: Columns = None, **csv_settings) -> tuple[np.ndarray, list[str]]:
    """Read a .csv, .npy or .parquet file of numbers.

    Args:
        path: the file.
        columns: which to take, by name or position, in this order; None takes all.
        csv_settings: `delimiter` and `header` of `read_csv`.

    Returns:
        values (rows, columns) in float64, missing ones NaN where the format has such, and the columns' names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format, broken, not a table, or a value that is no number (which one).
    """
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InvalidValueError(
            f"cannot read {path}: its suffix is {path.suffix!r}, expected one of {', '.join(READERS)}; "
            "convert the file, or pass its values to flows.datasets.Table(values)"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no data file at {path}; path is read from {Path.cwd()} unless absolute")
    try:
        return reader(path, columns, **(csv_settings if reader is read_csv else {}))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidValueError(f"{path} is not text in UTF-8 ({error}); save it as such") from error


def read_csv(
    path: Path, columns: Columns = None, delimiter: str = ",", header: bool | None = None
) -> tuple[np.ndarray, list[str]]:
    """Read a text file of numbers, one row a line.

    `header` says whether the first line holds names. None finds out: it does if one of its fields is text
    where the second line has a number.
    """
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
    # Of a few columns loadtxt reads no more than those, and would not notice a row that is shifted.
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
    """Read an array saved by `numpy.save`; columns are called by their position."""
    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InvalidValueError(
            f"{path} is not a whole .npy file of numbers ({error}); write it with numpy.save"
        ) from error
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
        raise ImportError(f"reading {path} needs pyarrow: pip install pyarrow, or convert to .csv") from error
    try:
        schema = pq.read_schema(path)
        chosen = choose_columns(columns, schema.names, path)
        names = [schema.names[i] for i in chosen]
        table = pq.read_table(path, columns=names)
    except pa.ArrowInvalid as error:
        raise InvalidValueError(f"{path} is not a whole Parquet file ({error})") from error
    for name in names:
        kind = table.schema.field(name).type
        numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
        if not numeric and not pa.types.is_decimal(kind):
            first = table[name][0].as_py() if len(table) else None
            raise InvalidValueError(
                f"{path}: column {name!r} is {kind}, not numbers (row 1 is {first!r}); drop or encode it: "
                "choose columns with columns=[...]"
            )
    arrays = [table[name].cast(pa.float64(), safe=False).to_numpy() for name in names]
    return np.stack(arrays, 1) if len(table) else np.empty((0, len(names))), names


READERS: dict[str, Callable] = {".csv": read_csv, ".npy": read_npy, ".parquet": read_parquet}


def choose_columns(columns: Columns, names: Sequence[str], source: str | Path) -> list[int]:
    """Positions of the columns given by name or position. Raises ValueError for unknown and repeated ones."""
    if columns is None:
        return list(range(len(names)))
    if isinstance(columns, str | int):
        raise InvalidValueError(f"columns must be a list, got {columns!r}; write [{columns}]")
    chosen = []
    for column in columns:
        if column in names:
            chosen.append(list(names).index(column))
        elif isinstance(column, int) and -len(names) <= column < len(names):
            chosen.append(column % len(names))
        else:
            raise InvalidValueError(f"{source} has no column {column!r}; it has {', '.join(map(repr, names))}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise InvalidValueError(f"columns must name at least one column and none twice, got {list(columns)}")
    return chosen


def _csv_rows(path: Path, delimiter: str) -> Iterator[list[str]]:
    """Yield the rows of a text file as lists of fields, blank lines left out."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        yield from (row for row in csv.reader(file, delimiter=delimiter) if len(row) > 1 or "".join(row).strip())


def _bad_width(rows: Iterable[list[str]], width: int, first: int = 1) -> str | None:
    """Say which row does not have `width` fields."""
    for number, row in enumerate(rows, start=first):
        if len(row) != width:
            return f"row {number} (the first data row is row 1) has {len(row)} fields, expected {width}; correct it"
    return None


def _bad_value(rows: Iterable[list[str]], names: Sequence[str], chosen: Sequence[int]) -> str | None:
    """Say which row of a text file is too short or long, or which value is no number."""
    for number, row in enumerate(rows, start=1):
        if wrong := _bad_width([row], len(names), number):
            return wrong
        for i in chosen:
            if _is_number(row[i]):
                continue
            if row[i].strip().lower() in MISSING:
                found = f"is missing ({row[i]!r}); fill it in or remove such rows"
            else:
                found = f"is {row[i]!r}, not a number; correct it, or leave the column out with columns=[...]"
            return f"row {number} (the first data row is row 1), column {names[i]!r} {found}"
    return None


def _is_header(first: Sequence[str], second: Sequence[str]) -> bool:
    return any(_is_text(a) and _is_number(b) for a, b in zip(first, second, strict=False))


def _is_text(field: str) -> bool:
    return not _is_number(field) and field.strip().lower() not in MISSING


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True
