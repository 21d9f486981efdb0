"""Tables of columns, written as .csv or .parquet."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from flows.writing import write_result


def write_columns(path: Path, columns: Mapping[str, Sequence[Any]], digits: int | None = None) -> Path:
    """Write columns by name: numbers, words, and NaN or None for what is unknown.

    A .csv has an empty field there, a .parquet file a null.

    Args:
        digits: of numbers in a .csv; None: as many as tell them apart.

    Raises:
        FileError: the file cannot be written.
    """
    write = _write_parquet if path.suffix == ".parquet" else _write_csv
    return write_result(path, lambda file: write(file, columns, digits))


def _write_csv(file: BinaryIO, columns: Mapping[str, Sequence[Any]], digits: int | None) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in zip(*columns.values(), strict=True):
        writer.writerow([_field(value, digits) for value in row])
    text.detach()  # flushes, and leaves the file open


def _field(value: Any, digits: int | None) -> str:
    if value is None or value != value:
        return ""
    exact = digits is None or not isinstance(value, float) or not math.isfinite(value)
    return str(value) if exact else f"{value:.{digits}g}"


def _write_parquet(file: BinaryIO, columns: Mapping[str, Sequence[Any]], digits: int | None) -> None:
    import pyarrow as pa  # slow to import
    import pyarrow.parquet as pq

    pq.write_table(pa.table({name: pa.array(values, from_pandas=True) for name, values in columns.items()}), file)
