"""Files of rows that are read in parts: arrays of numpy, and row groups of Parquet."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flows.checks import existing_path
from flows.datasets.permutations import Permutation
from flows.datasets.tables.columns import Columns, choose_columns, features, parquet_index
from flows.datasets.tables.readers import opened_npy, opened_parquet, parquet_numbers, whole_parquet
from flows.errors import FileError, InvalidValueError

BLOCK_BYTES = 2**24  # that are read at once
WINDOW_BYTES = 2**26  # of row groups that are shuffled together
MAX_GROUP_BYTES = 2**29

Rows = NDArray[np.float64]  # (n, columns)


class RowFile(ABC):
    """Rows of numbers in float64. A copy, or one in another process, opens the files again.

    Args:
        paths: the files.

    Attributes:
        columns: their names.
        count: of the rows.
    """

    columns: list[str]
    count: int

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = [Path(path).absolute() for path in paths]
        self._stamps = list(map(_stamp, self._paths))
        self._files: list[Any] = list(map(self._opened, self._paths))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_files"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        for path, stamp in zip(self._paths, self._stamps, strict=True):
            if _stamp(existing_path("path", path, "data file")) != stamp:
                raise FileError(f"{path} has changed since it was opened; open it anew")
        self._files = list(map(self._opened, self._paths))

    def __del__(self) -> None:
        for file in vars(self).get("_files", ()):
            file.close()

    @staticmethod
    @abstractmethod
    def _opened(path: Path) -> Any:
        """Open one of the files."""

    @abstractmethod
    def blocks(self) -> Iterator[Rows]:
        """Read all rows in order, block by block."""

    @abstractmethod
    def take(self, rows: NDArray[np.int64]) -> Rows:
        """Read some rows, in the order given."""

    @abstractmethod
    def shuffled(self, held_out: NDArray[np.int64], split: Permutation) -> ShuffledRows:
        """Return the rows but those held out, to be read in random orders.

        Args:
            held_out: rows, rising.
            split: the order of all rows that begins with those held out.
        """


class ShuffledRows(ABC):
    """Rows in orders that keys decide.

    Args:
        file: of the rows.
        held_out: rows to leave out, rising.
    """

    def __init__(self, file: RowFile, held_out: NDArray[np.int64]) -> None:
        self.count = file.count - len(held_out)

    @abstractmethod
    def read(self, key: int, start: int, stop: int) -> Rows:
        """Read the rows at these places of the order of a key."""


def _stamp(path: Path) -> tuple[int, int]:
    """What changes when a file is written anew."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def open_rows(path: str | Path, columns: Columns = None) -> RowFile:
    """Open a .npy file, a .parquet file, or a folder of .parquet files.

    Raises:
        FileError: there is no such file, or it is damaged.
        InvalidValueError: it cannot be read in parts, or its rows are not numbers.
    """
    path = existing_path("path", path, "data file or folder", folder=True)
    if path.is_dir():
        files = sorted(path.glob("*.parquet"))
        if not files:
            raise InvalidValueError(f"the folder {path} holds no .parquet files; give a folder that does, or a file")
        return ParquetRows(files, columns)
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return NpyRows(path, columns)
    if suffix == ".parquet":
        return ParquetRows([path], columns)
    raise InvalidValueError(
        f"{path} cannot be read in parts: its suffix is {path.suffix!r}, expected .npy or .parquet; convert it, e.g. "
        "with pyarrow.csv.open_csv and pyarrow.parquet.ParquetWriter, or read it whole with data=tabular"
    )


class NpyRows(RowFile):
    """The rows of an array that `numpy.save` wrote.

    Rows are read from the file one by one, not through a memory map, whose pages would count as memory of the process.
    """

    def __init__(self, path: Path, columns: Columns = None) -> None:
        values = opened_npy(path)
        names = [str(i) for i in range(values.shape[1])]
        self._chosen = choose_columns(columns, names, path)
        self.columns = [names[i] for i in self._chosen]
        if values.flags.f_contiguous and not values.flags.c_contiguous:
            raise InvalidValueError(
                f"{path} is stored column by column, so that no row can be read alone; save it with "
                "numpy.save(path, numpy.ascontiguousarray(values))"
            )
        if not self._chosen:
            raise InvalidValueError(f"{path} has no columns; an array of shape {values.shape} holds no numbers")
        self.path, self.count, self._width = path, len(values), values.shape[1]
        self._dtype, self._offset = values.dtype, int(getattr(values, "offset", 0))
        super().__init__([path])

    @staticmethod
    def _opened(path: Path) -> Any:
        return path.open("rb", buffering=0)

    def blocks(self) -> Iterator[Rows]:
        size = max(1, BLOCK_BYTES // (8 * self._width))
        for start in range(0, self.count, size):
            yield self._read(start, min(size, self.count - start))

    def take(self, rows: NDArray[np.int64]) -> Rows:
        order, found = np.argsort(rows), np.empty((len(rows), len(self.columns)))
        size = self._width * self._dtype.itemsize
        file = self._files[0].fileno()
        pieces = [os.pread(file, size, self._offset + row * size) for row in rows[order].tolist()]
        found[order] = self._numbers(b"".join(pieces), len(rows))
        return found

    def shuffled(self, held_out: NDArray[np.int64], split: Permutation) -> ShuffledRows:
        return _AnyRow(self, held_out, split)

    def _read(self, start: int, count: int) -> Rows:
        size = self._width * self._dtype.itemsize
        return self._numbers(os.pread(self._files[0].fileno(), count * size, self._offset + start * size), count)

    def _numbers(self, data: bytes, count: int) -> Rows:
        if len(data) < count * self._width * self._dtype.itemsize:
            raise FileError(f"{self.path} has become shorter since it was opened; it must not change during a run")
        values = np.frombuffer(data, self._dtype).reshape(count, self._width)
        with np.errstate(over="ignore"):
            return values[:, self._chosen].astype(np.float64)


class _AnyRow(ShuffledRows):
    """Rows of a file that gives any of them at once: an order is a permutation of all rows."""

    def __init__(self, file: NpyRows, held_out: NDArray[np.int64], split: Permutation) -> None:
        super().__init__(file, held_out)
        self._file, self._split, self._first = file, split, len(held_out)

    def read(self, key: int, start: int, stop: int) -> Rows:
        places = Permutation(self.count, key)(np.arange(start, stop))
        return self._file.take(self._split(self._first + places))


class ParquetRows(RowFile):
    """The rows of Parquet files, one row group after the other."""

    def __init__(self, paths: Sequence[Path], columns: Columns = None) -> None:
        super().__init__(paths)
        schema = self._files[0].schema_arrow
        chosen = features(columns, schema.names, parquet_index(schema.names, schema.metadata), paths[0])
        self.columns = [schema.names[i] for i in chosen]
        if len(set(schema.names)) < len(schema.names):
            raise InvalidValueError(f"{paths[0]} has several columns of one name; give each its own")
        for path, file in zip(paths, self._files, strict=True):
            missing = [name for name in self.columns if name not in file.schema_arrow.names]
            if missing:
                raise InvalidValueError(f"{path} has no column {missing[0]!r}, and {paths[0]} has one")
        groups = [(i, j) for i, file in enumerate(self._files) for j in range(file.num_row_groups)]
        self.groups = [(i, j) for i, j in groups if self._files[i].metadata.row_group(j).num_rows]
        sizes = [self._files[i].metadata.row_group(j).num_rows for i, j in self.groups]
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.count = int(self.starts[-1])
        largest = max(sizes, default=0)
        if 8 * largest * len(self.columns) > MAX_GROUP_BYTES:
            raise InvalidValueError(
                f"{paths[0]} has a row group of {largest:,} rows, which is read as a whole and takes "
                f"{8 * largest * len(self.columns) / 2**20:,.0f} MiB; write the file with a smaller row_group_size"
            )

    @staticmethod
    def _opened(path: Path) -> Any:
        return opened_parquet(path)

    def group(self, number: int) -> Rows:
        """Read a row group."""
        i, j = self.groups[number]
        with whole_parquet(self._paths[i]):
            table = self._files[i].read_row_group(j, columns=self.columns).select(self.columns)
        return parquet_numbers(table, self._paths[i])[0]

    def blocks(self) -> Iterator[Rows]:
        return (self.group(number) for number in range(len(self.groups)))

    def take(self, rows: NDArray[np.int64]) -> Rows:
        found, group = np.empty((len(rows), len(self.columns))), np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(group):
            own = group == number
            found[own] = self.group(int(number))[rows[own] - self.starts[number]]
        return found

    def shuffled(self, held_out: NDArray[np.int64], split: Permutation) -> ShuffledRows:
        return _Windows(self, held_out)


class _Windows(ShuffledRows):
    """Rows of Parquet files in random orders of the row groups; neighbouring groups are shuffled together."""

    def __init__(self, file: ParquetRows, held_out: NDArray[np.int64]) -> None:
        super().__init__(file, held_out)
        self._file, self._held_out = file, held_out
        self._sizes = np.diff(file.starts) - np.diff(np.searchsorted(held_out, file.starts))
        self._cached: dict[tuple[int, int], Rows] = {}

    def read(self, key: int, start: int, stop: int) -> Rows:
        order = Permutation(len(self._sizes), key)(np.arange(len(self._sizes)))
        most = max(1, WINDOW_BYTES // (8 * len(self._file.columns)))
        window = (np.cumsum(self._sizes[order]) - self._sizes[order]) // most  # of each group
        ends = np.concatenate([[0], np.cumsum(np.bincount(window, self._sizes[order]).astype(np.int64))])
        first, last = np.searchsorted(ends, [start, stop - 1], side="right") - 1
        needed = {}
        for number in range(first, last + 1):
            found = self._cached.get((key, number))
            needed[key, number] = self._shuffled(key, number, order[window == number]) if found is None else found
        self._cached = needed
        pieces = [
            rows[max(0, start - ends[number]) : max(0, stop - ends[number])] for (_, number), rows in needed.items()
        ]
        return np.concatenate(pieces)

    def _shuffled(self, key: int, number: int, groups: NDArray[np.int64]) -> Rows:
        if not len(groups):
            return np.empty((0, len(self._file.columns)))
        rows = np.concatenate([self._training(int(group)) for group in groups])
        order = Permutation(len(rows), (key + number + 1) % 2**62)(np.arange(len(rows))) if len(rows) else []
        return rows[order]

    def _training(self, group: int) -> Rows:
        start, stop = self._file.starts[group : group + 2]
        kept = np.ones(stop - start, bool)
        kept[self._held_out[np.searchsorted(self._held_out, start) : np.searchsorted(self._held_out, stop)] - start] = 0
        return self._file.group(group)[kept]
