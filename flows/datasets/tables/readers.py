"""Readers of tables of numbers: .csv, .npy, .npz and .parquet files."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from flows.checks import existing_path, fits_in_memory
from flows.datasets.tables.columns import (
    MAX_EXACT,
    Columns,
    choose_columns,
    distinct_names,
    features,
    leading_index,
    parquet_index,
    warn_of_lost_digits,
)
from flows.datasets.tables.text import MISSING_WORDS, NUMBER, checked_delimiter, names_and_header, read_csv, text_column
from flows.errors import FileError, InvalidTypeError, InvalidValueError, MissingPackageError


def read_table(
    path: str | Path,
    columns: Columns = None,
    delimiter: str = ",",
    header: bool | None = None,
    missing: bool = False,
) -> tuple[np.ndarray, list[str]]:
    """Read a .csv, .npy, .npz or .parquet file of numbers.

    Args:
        path: the file.
        columns: columns to take, by name or position, in this order. Default: all.
        delimiter, header: of a .csv file, see `read_csv`.
        missing: take empty fields and words such as NA in a .csv file for NaN. Default: refuse them.

    Returns:
        The values (rows, columns) in float64 and the names of the columns. Missing values of binary files are
        NaN.

    Raises:
        FileError: the file does not exist, is damaged or cannot be read.
        MissingPackageError: a .parquet file needs pyarrow.
        InvalidTypeError: a setting has the wrong type.
        InvalidValueError: the format is unknown, the content is no table, or a value is no number.
    """
    path = existing_path("path", path, "data file")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        cure = UNPACK.get(path.suffix.lower(), "convert the file")
        raise InvalidValueError(
            f"cannot read {path}: its suffix is {path.suffix!r}, expected one of {', '.join(READERS)}; "
            f"{cure}, or pass its values to flows.datasets.Table(values)"
        )
    settings = {"delimiter": delimiter, "header": header, "missing": missing} if reader is read_csv else {}
    try:
        return reader(path, columns, **settings)
    except UnicodeDecodeError as error:
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
    names, index = column_names(path, delimiter, header)
    place = _place(group_column, names, path)
    groups = read_words(path, place, "group", delimiter, header)
    if columns is None:
        return [i for i in features(None, names, index, path) if i != place], groups
    chosen = choose_columns(columns, names, path)
    if place in chosen:
        raise InvalidValueError(f"the group column {names[place]!r} is no feature; leave it out of columns")
    return chosen, groups


def column_names(path: Path, delimiter: str = ",", header: bool | None = None) -> tuple[list[str], list[int]]:
    """Return the names of the columns of a file, and the positions of the index of a data frame.

    Errors are those of `read_table`.
    """
    suffix = path.suffix.lower()
    if suffix == ".csv":
        names, below, _ = _top_of_csv(path, delimiter, header)
        return names, leading_index(names, below)
    if suffix == ".parquet":
        schema = opened_parquet(path).schema_arrow
        return list(schema.names), parquet_index(schema.names, schema.metadata)
    return read_table(path)[1], []


def read_words(path: Path, column: int, purpose: str, delimiter: str = ",", header: bool | None = None) -> list[str]:
    """Read a column as words: what stands there, or how Python writes its numbers and dates.

    Args:
        path: the file.
        column: its position.
        purpose: what each row has there, such as "group", for the message.
        delimiter, header: of a .csv file, see `read_csv`.

    Raises:
        InvalidValueError: an entry is empty or a word for a missing value; the message says in which row.
    """
    suffix = path.suffix.lower()
    if suffix == ".csv":
        names, _, first = _top_of_csv(path, delimiter, header)
        words = text_column(path, column, checked_delimiter(delimiter), first)
    elif suffix == ".parquet":
        words, names = _parquet_words(path, column)
    else:
        values, names = read_table(path)
        words = [_as_word(value) for value in values[:, column].tolist()]
    empty = next((row for row, word in enumerate(words, start=1) if word.strip().lower() in MISSING_WORDS), None)
    if empty is not None:
        raise InvalidValueError(
            f"{path}: row {empty} (the first data row is row 1) has no {purpose} in column {names[column]!r}; fill it "
            "in, or remove that row"
        )
    return words


def read_rows(path: str | Path) -> list[int]:
    """Read numbers of rows from a text file, as published splits state them.

    Raises:
        FileError: the file does not exist or cannot be read.
        InvalidValueError: a number is no whole one.
    """
    path = existing_path("test_rows", path, "file of row numbers")
    try:
        words = path.read_text(encoding="utf-8").replace(",", " ").split()
    except (UnicodeDecodeError, OSError) as error:
        raise FileError(f"cannot read {path}: {error}") from error
    wrong = next((word for word in words if not NUMBER.fullmatch(word) or not float(word).is_integer()), None)
    if wrong is not None:
        raise InvalidValueError(f"{path} must hold the numbers of rows, whole ones from 0, got {wrong!r}")
    return [int(float(word)) for word in words]


def categorical_columns(path: Path) -> list[int]:
    """Return the positions of the columns that a Parquet file marks as categories; other files mark none."""
    if path.suffix.lower() != ".parquet":
        return []
    import pyarrow as pa

    schema = opened_parquet(path).schema_arrow
    try:
        columns = json.loads((schema.metadata or {}).get(b"pandas", b"{}")).get("columns", [])
        named = {column["name"] for column in columns if column.get("pandas_type") == "categorical"}
    except (ValueError, AttributeError, KeyError, TypeError):
        named = set()
    return [i for i, field in enumerate(schema) if pa.types.is_dictionary(field.type) or field.name in named]


def _top_of_csv(path: Path, delimiter: str, header: bool | None) -> tuple[list[str], list[list[str]], bool]:
    try:
        return names_and_header(path, checked_delimiter(delimiter), header)
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not text in UTF-8 ({error}); save it as such") from error
    except OSError as error:
        raise error if isinstance(error, FileError) else FileError(f"cannot read {path}: {error}") from error


def _parquet_words(path: Path, column: int) -> tuple[list[str], list[str]]:
    import pyarrow as pa

    file = opened_parquet(path)
    with whole_parquet(path):
        stored = file.read().column(column)
        if pa.types.is_timestamp(stored.type):  # Python has no nanoseconds
            stored = stored.cast(pa.timestamp("us", stored.type.tz), safe=False)
        return [_as_word(value) for value in stored.to_pylist()], list(file.schema_arrow.names)


def _as_word(value: object) -> str:
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _place(group_column: str | int, names: Sequence[str], path: Path) -> int:
    if isinstance(group_column, bool) or not isinstance(group_column, str | int):
        raise InvalidTypeError(f"group_column must be the name or position of a column, got {group_column!r}")
    return choose_columns([group_column], names, path)[0]


def read_npy(path: Path, columns: Columns = None) -> tuple[np.ndarray, list[str]]:
    """Read an array saved by `numpy.save`; positions are the names of the columns."""
    return _array_table(opened_npy(path), columns, path)


def opened_npy(path: Path) -> np.ndarray:
    """Return the table of numbers that `numpy.save` wrote, as a memory map.

    Raises:
        FileError: the file is damaged.
        InvalidValueError: it holds no numbers, or no table.
    """
    if zipfile.is_zipfile(path):
        raise FileError(f"{path} holds an archive; rename it to .npz")
    try:
        # A memory map reads no more than the file holds, whatever size a damaged header claims.
        values = np.load(path, mmap_mode="r", allow_pickle=False)
        more = path.stat().st_size - values.offset - values.nbytes if isinstance(values, np.memmap) else 0
        if more:
            raise ValueError(f"it has {more:,} more bytes than its header says")
    except (ValueError, EOFError, OSError, OverflowError, TypeError, SyntaxError, MemoryError, TokenError) as error:
        raise FileError(f"{path} is not a whole .npy file of numbers ({error}); write it with numpy.save") from error
    return _checked_table(values, path)


def read_npz(path: Path, columns: Columns = None) -> tuple[np.ndarray, list[str]]:
    """Read the single array of a file that `numpy.savez` wrote; its checksum is compared."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            size = sum(entry.file_size for entry in archive.infolist())
        if len(names) != 1:
            found = f" ({', '.join(names[:8])})" if names else ""
            raise InvalidValueError(f"{path} holds {len(names)} arrays{found}, expected one; save one table in it")
        fits_in_memory(f"the array in {path}", size)
        with np.load(path, allow_pickle=False) as arrays:
            values = arrays[names[0]]
    except InvalidValueError:
        raise
    except (
        *(ValueError, EOFError, OSError, OverflowError, TypeError, SyntaxError, MemoryError),
        *(zipfile.BadZipFile, zlib.error, NotImplementedError, KeyError, RuntimeError, TokenError),
    ) as error:
        raise FileError(f"{path} is not a whole .npz file of numbers ({error}); write it with numpy.savez") from error
    return _array_table(values, columns, path)


def _checked_table(values: object, path: Path) -> np.ndarray:
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiub":
        found = getattr(values, "dtype", type(values).__name__)
        raise InvalidValueError(f"{path} must hold real numbers, got {found}; convert with array.astype(float)")
    if values.ndim != 2:
        raise InvalidValueError(
            f"{path} must be a table (rows, columns), got an array of shape {values.shape}; reshape it, "
            "e.g. with array.reshape(len(array), -1)"
        )
    return values


def _array_table(values: object, columns: Columns, path: Path) -> tuple[np.ndarray, list[str]]:
    values = _checked_table(values, path)
    names = [str(i) for i in range(values.shape[1])]
    chosen = choose_columns(columns, names, path)
    taken = [names[i] for i in chosen]
    if values.dtype.kind in "iu" and len(values):
        warn_of_lost_digits([names[i] for i in chosen if _is_beyond(values[:, i].min(), values[:, i].max())], path)
    with np.errstate(over="ignore"):  # infinite values are said later
        return values[:, chosen].astype(np.float64), taken


def _is_beyond(smallest: Any, largest: Any) -> bool:
    return int(largest) > MAX_EXACT or int(smallest) < -MAX_EXACT


def read_parquet(path: Path, columns: Columns = None) -> tuple[np.ndarray, list[str]]:
    """Read a Parquet file; nulls become NaN. Needs pyarrow."""
    file = opened_parquet(path)
    if not file.schema_arrow.names:
        raise InvalidValueError(f"{path} has no columns; expected numbers")
    with whole_parquet(path):
        schema = file.schema_arrow
        unique = len(set(schema.names)) == len(schema.names)
        chosen = features(columns, schema.names, parquet_index(schema.names, schema.metadata), path)
        names = [schema.names[i] for i in chosen]
        # pyarrow selects by name, which does not tell repeated names apart.
        table = file.read(columns=names).select(names) if unique else file.read().select(chosen)
    values, beyond = parquet_numbers(table, path)
    warn_of_lost_digits(beyond, path)
    return values, distinct_names(names, path)


def parquet_numbers(table: Any, path: Path) -> tuple[np.ndarray, list[str]]:
    """Return a table of pyarrow in float64, NaN for null, and the columns with numbers too large for that.

    Raises:
        InvalidValueError: a column does not hold numbers.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    arrays, beyond, names = [], [], table.column_names
    for name, stored in zip(names, table.columns, strict=True):
        column = stored
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        kind = column.type
        numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
        if not numeric and not pa.types.is_decimal(kind):
            first = column[0].as_py() if len(table) else None
            raise InvalidValueError(
                f"{path}: column {name!r} is {kind}, not numbers (row 1 is {first!r}); encode it, or leave it out with "
                "columns=[...]"
            )
        if pa.types.is_integer(kind) and len(column) > column.null_count:
            extremes = pc.call_function("min_max", [column]).as_py()
            beyond += [name] if _is_beyond(extremes["min"], extremes["max"]) else []
        arrays.append(column.cast(pa.float64(), safe=False).to_numpy())
    return np.stack(arrays, 1) if len(table) else np.empty((0, len(names))), beyond


def opened_parquet(path: Path) -> Any:
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingPackageError(f"reading {path} needs pyarrow: pip install pyarrow, or convert to .csv") from error
    with whole_parquet(path):
        return pq.ParquetFile(path, page_checksum_verification=True)


@contextmanager
def whole_parquet(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises on damaged bytes into an error that names the file."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:
        reason = " ".join(str(error).split())
        raise FileError(f"{path} is not a whole Parquet file ({reason})") from error


UNPACK = {".gz": "unpack it with gunzip", ".zip": "unpack it with unzip", ".xz": "unpack it with unxz"}
READERS: dict[str, Callable[..., tuple[np.ndarray, list[str]]]] = {
    ".csv": read_csv,
    ".npy": read_npy,
    ".npz": read_npz,
    ".parquet": read_parquet,
}
