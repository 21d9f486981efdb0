"""Tables that do not fit into memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flows.arguments import checked
from flows.checks import whole_number
from flows.datasets.base import Dataset
from flows.datasets.batches import Batch, BatchStream, convert
from flows.datasets.permutations import LARGEST_KEY, Permutation, new_key
from flows.datasets.recognition.hashing import STEP, hash_rows, mix
from flows.datasets.tables.columns import distinct_names
from flows.datasets.tables.diagnosis import warnings_about
from flows.datasets.tables.row_files import RowFile, ShuffledRows, open_rows
from flows.errors import DataWarning, InvalidValueError, warn

LOG = logging.getLogger("flows")


@checked
class LargeTable(Dataset):
    """A table in .npy or .parquet files that is larger than memory, one example a row.

    Its rows are read as they are needed: those of an array (.npy) one by one, those of Parquet by row groups. `path`
    may also be a folder of .parquet files. At the start, the whole file is read once, block by block. Numbers that are
    not finite are refused, mean and standard deviation of the training rows are computed in float64, and a checksum
    is taken by which a resumed run recognises the file.

    The rows of an array come in a pseudo-random permutation at each pass. Row groups of Parquet come in random order,
    and those that follow each other are shuffled together, about 64 MiB of them. So rows that are sorted within a row
    group stay near each other. Orders take no memory, and a stream resumes bit for bit by a key and a position.

    Validation and test rows are drawn at random from all rows and kept in memory. So are the training rows of
    `reference()`, which pictures, warnings about values and all but mean and standard deviation go by.

    Args:
        path: the file or folder.
        columns: columns to take, by name or position, in this order. Default: all.
        name: name of the runs.
        num_validation, num_test: sizes of these parts.
        num_reference: rows of `reference()`.
        split_seed: seed of the random split.
        quiet: leave out the warnings about values.

    Raises:
        FileError: there is no such file, or it is damaged.
        InvalidValueError: it cannot be read in parts, it has too few rows, a value is not finite, or a column is
            constant.

    Example:
        ```python
        import numpy as np
        import torch

        import flows

        np.save("large.npy", np.random.default_rng(0).normal(size=(5000, 3)))
        data = flows.datasets.LargeTable("large.npy", num_validation=500, num_test=500)
        batch = next(data.train_stream(64, torch.Generator().manual_seed(0)))  # .x: (64, 3)
        ```
    """

    columns: list[str]

    def __init__(
        self,
        path: str | Path,
        columns: Sequence[str | int] | None = None,
        name: str = "large_table",
        num_validation: int = 10_000,
        num_test: int = 10_000,
        num_reference: int = 50_000,
        split_seed: int = 0,
        quiet: bool = False,
    ):
        for argument, number in (("num_validation", num_validation), ("num_test", num_test)):
            whole_number(argument, number)
        whole_number("num_reference", num_reference, 2)
        whole_number("split_seed", split_seed, 0, LARGEST_KEY - 1)
        self.path, self.name, self.source = Path(path), name, str(path)
        file = open_rows(path, columns)
        self.columns = distinct_names(file.columns, self.path)
        self.event_shape = (len(self.columns),)
        self.num_validation, self.num_test = num_validation, num_test
        held = num_validation + num_test
        if file.count < held + 2:
            raise InvalidValueError(
                f"{path} has {file.count:,} rows, too few for {num_validation:,} of validation, {num_test:,} of the "
                "test and at least 2 for training; choose a smaller num_validation and num_test, or read it whole "
                "with data=tabular"
            )
        split = Permutation(file.count, split_seed)
        rows = split(np.arange(min(file.count, held + num_reference)))
        held_out = np.sort(rows[:held])
        found = _first_pass(file, held_out, self.columns, self.source)
        self._moments = found.mean, found.sd
        values = torch.from_numpy(file.take(rows))
        self._held_out = {"validation": values[:num_validation], "test": values[num_validation:held]}
        self._reference = values[held:]
        self._places = {
            "validation": torch.from_numpy(rows[:num_validation]),
            "test": torch.from_numpy(rows[num_validation:held]),
        }
        self._rows: ShuffledRows = file.shuffled(held_out, split)
        self.split_settings = {"rows": file.count, "checksum": found.checksum, "split_seed": split_seed}
        if not quiet:
            places = {
                "validation": slice(num_validation),
                "test": slice(num_validation, held),
                "train": slice(held, None),
            }
            split_rows = {part: np.arange(len(values))[place] for part, place in places.items()}
            source = f"{path}, by {len(values):,} of its rows"
            for message in warnings_about(
                values.numpy(), split_rows, self.columns, [True] * values.shape[1], source, {}
            ):
                warn(message, DataWarning)

    def row_numbers(self, split: Literal["validation", "test"]) -> Tensor:  # (n,), in the file
        return self._places[split]

    def train_stream(
        self,
        batch_size: int,
        generator: torch.Generator,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LargeTableStream:
        """Return an endless stream of training rows in float64, reshuffled at each pass."""
        return LargeTableStream(self.name, self._rows, batch_size, generator, device, _exact(device, dtype))

    def held_out(self, split: Literal["validation", "test"]) -> Batch:
        return Batch(self._held_out[split])

    def reference(self) -> Tensor:
        """Return some training rows (num_reference, columns) in float64, always the same."""
        return self._reference

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of all training rows, (columns,) each in float64."""
        return self._moments

    def _in_batches(
        self,
        split: Literal["validation", "test"],
        batch_size: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> Iterator[Batch]:
        return super()._in_batches(split, batch_size, device, _exact(device, dtype))


class LargeTableStream(BatchStream):
    """Batches of rows without replacement in an order that a key decides, drawn anew at each pass.

    Rows left over at the end of a pass are too few for a batch and are skipped in that pass.
    """

    def __init__(
        self,
        dataset: str,
        rows: ShuffledRows,
        batch_size: int,
        generator: torch.Generator,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(dataset, batch_size, generator, device, dtype)
        self.batch_size = min(self.batch_size, rows.count)
        self._rows = rows
        self._key, self._position = 0, rows.count  # the first `next` begins a pass

    def next(self) -> Batch:
        if self._position + self.batch_size > self._rows.count:
            self._key, self._position = new_key(self.generator), 0
        start = self._position
        self._position += self.batch_size
        values = torch.from_numpy(self._rows.read(self._key, start, self._position))
        return Batch(convert(values, self.device, self.dtype, self.dataset))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"key": self._key, "position": self._position, "rows": self._rows.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["rows"] != self._rows.count:
            raise InvalidValueError(
                f"the saved position belongs to {state['rows']:,} training rows, but {self.dataset!r} now has "
                f"{self._rows.count:,}; resume with the file and the split that the run was started with"
            )
        key, position = state["key"], state["position"]
        if not all(type(number) is int for number in (key, position)) or not (
            0 <= key < LARGEST_KEY and 0 <= position <= self._rows.count
        ):
            raise InvalidValueError(f"the saved position is damaged: row {position!r} of {self._rows.count:,}")
        super().load_state_dict(state)
        self._key, self._position = key, position


class _FirstPass:
    """Mean and standard deviation of the training rows, and a checksum of all rows."""

    def __init__(self, width: int) -> None:
        self.count, self.total = 0, np.zeros(width)  # of differences to the first row, which keep more digits
        self.squares = np.zeros(width)  # sum of (x − mean)²
        self._origin = np.zeros(width)
        self._digest = 0

    def add(self, rows: NDArray[np.float64], start: int) -> None:
        """Add all rows of a block, which begins at row `start`, to the checksum."""
        places = STEP * np.arange(start + 1, start + len(rows) + 1, dtype=np.uint64)
        self._digest += int(mix(hash_rows(rows + 0.0) + places).sum(dtype=np.uint64))

    def add_training(self, rows: NDArray[np.float64]) -> None:
        """Add training rows of a block. [Chan, Golub & LeVeque 1983]"""
        if not len(rows):
            return
        if not self.count:
            self._origin = rows[0].copy()
        rows = rows - self._origin
        with np.errstate(over="ignore", invalid="ignore"):  # the sum says so at the end
            mean = rows.mean(0)
            squares = np.square(rows - mean).sum(0)
            if self.count:
                apart = mean - self.total / self.count
                squares += np.square(apart) * (self.count * len(rows) / (self.count + len(rows)))
            self.squares += squares
            self.total += rows.sum(0)
        self.count += len(rows)

    @property
    def mean(self) -> Tensor:
        return torch.from_numpy(self._origin + self.total / self.count)

    @property
    def sd(self) -> Tensor:
        return torch.from_numpy(np.sqrt(self.squares / (self.count - 1)))

    @property
    def checksum(self) -> str:
        return f"{self._digest % 2**64:016x}"


def _first_pass(file: RowFile, held_out: NDArray[np.int64], columns: Sequence[str], source: str) -> _FirstPass:
    found, start = _FirstPass(len(columns)), 0
    low, high = np.full(len(columns), np.inf), np.full(len(columns), -np.inf)
    for rows in file.blocks():
        bad = np.argwhere(~np.isfinite(rows))
        if len(bad):
            row, column = bad[0]
            raise InvalidValueError(
                f"{source}: row {start + row + 1:,} (the first data row is row 1) is {rows[row, column]} in column "
                f"{columns[column]!r}, and {len(bad):,} values near it are NaN or infinite; fill them in or remove "
                "those rows"
            )
        found.add(rows, start)
        kept = np.ones(len(rows), bool)
        kept[held_out[slice(*np.searchsorted(held_out, [start, start + len(rows)]))] - start] = False
        training = rows[kept]
        found.add_training(training)
        if len(training):
            low, high = np.minimum(low, training.min(0)), np.maximum(high, training.max(0))
        start += len(rows)
    constant = [repr(name) for name, same in zip(columns, low == high, strict=True) if same]
    if constant:
        raise InvalidValueError(
            f"{source}: column {', '.join(constant)} is constant in the {found.count:,} training rows, so it has no "
            "density and cannot be standardised; leave it out with columns=[...]"
        )
    if large := [repr(name) for name, sd in zip(columns, found.sd.tolist(), strict=True) if not 0 < sd < math.inf]:
        raise InvalidValueError(
            f"{source}: the numbers of column {', '.join(large)} are too large or too small for a standard deviation "
            "in float64; change its unit, or leave it out with columns=[...]"
        )
    LOG.info("%s: %d rows read once", source, start)
    return found


def _exact(device: torch.device | str | None, dtype: torch.dtype | None) -> torch.dtype | None:
    """Return float64, or `dtype` on a device that lacks float64."""
    return dtype if torch.device(device or "cpu").type == "mps" else torch.float64
