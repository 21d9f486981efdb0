"""Tables of numbers: one example a row, split at random."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from flows.datasets.base import Dataset
from flows.datasets.batches import Batch, EpochStream, convert
from flows.datasets.readers import choose_columns, read_table
from flows.datasets.splits import random_split
from flows.errors import InvalidTypeError, InvalidValueError


class Table(Dataset):
    """A table of numbers in memory, one example a row.

    Nothing is scaled here. A flow's own transform does that, fitted to `reference()`, so that its `log_prob` has the
    units of the data.

    Args:
        values: finite numbers (rows, columns): a tensor, an array, a data frame or nested lists.
        columns: names of the columns. Default: "0", "1", ...
        name: name of the runs.
        validation_fraction, test_fraction: fractions of the rows, rounded to whole rows.
        split_seed: seed of the random split.
        source: what messages call the table.

    Attributes:
        split: the row indices of "train", "validation" and "test".

    Raises:
        InvalidTypeError: a value is no number.
        InvalidValueError: the values are no table, a value is NaN or infinite, a column is constant in the training
            rows, or a split would be empty. The message names the row and the column.

    Example:
        ```python
        import torch

        import flows

        dataset = flows.datasets.Table(torch.randn(500, 3), columns=["a", "b", "c"])
        stream = dataset.train_stream(64, torch.Generator().manual_seed(0))
        x = next(stream).x  # (64, 3)
        ```
    """

    columns: list[str]

    def __init__(
        self,
        values: ArrayLike | Tensor,
        columns: Sequence[str] | None = None,
        name: str = "table",
        validation_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        source: str = "the table",
    ):
        table = _as_table(values, source)
        self.name = name
        self.columns = [str(i) for i in range(table.shape[1])] if columns is None else list(columns)
        if len(self.columns) != table.shape[1]:
            raise InvalidValueError(f"{source} has {table.shape[1]} columns, but columns has {len(self.columns)} names")
        _check_finite(table, self.columns, source)
        self.event_shape = (table.shape[1],)
        fractions = {"test": test_fraction, "validation": validation_fraction}
        self.split = random_split(len(table), fractions, split_seed, source, "rows")
        self.num_validation, self.num_test = len(self.split["validation"]), len(self.split["test"])
        self._parts = {split: table[rows] for split, rows in self.split.items()}
        _check_varies(self._parts["train"], self.columns, source)

    def train_stream(
        self,
        batch_size: int,
        generator: torch.Generator,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> TableStream:
        """Return an endless stream of training rows, reshuffled at each pass."""
        return TableStream(self.name, self._parts["train"], batch_size, generator, device, dtype)

    def held_out(self, split: Literal["validation", "test"]) -> Batch:
        return Batch(self._parts[split])

    def reference(self) -> Tensor:
        """Return all training rows (n, columns) in torch's default dtype."""
        return convert(self._parts["train"], None, None, self.name)


class Tabular(Table):
    """A table of numbers from a .csv, .npy or .parquet file.

    Parquet files need pyarrow.

    Args:
        path: the file.
        columns: columns to take, by name or position, in this order. Default: all.
        name: name of the runs.
        validation_fraction, test_fraction, split_seed: see `Table`.
        delimiter: separator of the values in a .csv file.
        header: whether the first line of a .csv file holds names. Default: find out.

    Raises:
        FileError: the file does not exist or cannot be read.
        InvalidTypeError, InvalidValueError: see `read_table` and `Table`.
    """

    def __init__(
        self,
        path: str | Path,
        columns: Sequence[str | int] | None = None,
        name: str = "tabular",
        validation_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        delimiter: str = ",",
        header: bool | None = None,
    ):
        values, names = read_table(path, columns, delimiter=delimiter, header=header)
        super().__init__(values, names, name, validation_fraction, test_fraction, split_seed, str(path))
        self.path = Path(path)


class BreastCancer(Table):
    """Thirty features of the cell nuclei of 569 breast tumours.

    Part of scikit-learn; the diagnosis is left out. [Street, Wolberg & Mangasarian 1993, Nuclear feature extraction for
    breast tumor diagnosis, UCI Breast Cancer Wisconsin (Diagnostic)]

    Args:
        columns: features to take, by name or position, in this order. Default: all 30.
        validation_fraction, test_fraction, split_seed: see `Table`.
    """

    def __init__(
        self,
        columns: Sequence[str | int] | None = None,
        validation_fraction: float = 0.15,
        test_fraction: float = 0.15,
        split_seed: int = 0,
    ):
        from sklearn.datasets import load_breast_cancer

        data: Any = load_breast_cancer()
        names = [str(feature) for feature in data.feature_names]
        chosen = choose_columns(columns, names, "breast_cancer")
        super().__init__(
            data.data[:, chosen],
            columns=[names[i] for i in chosen],
            name="breast_cancer",
            validation_fraction=validation_fraction,
            test_fraction=test_fraction,
            split_seed=split_seed,
            source="breast_cancer",
        )


class TableStream(EpochStream):
    """Batches of rows without replacement."""

    def __init__(
        self,
        dataset: str,
        rows: Tensor,  # (n, columns)
        batch_size: int,
        generator: torch.Generator,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(dataset, len(rows), batch_size, generator, device, dtype)
        self._rows = convert(rows, self.device, self.dtype, dataset)

    def next(self) -> Batch:
        return Batch(self._rows[self.draw().to(self.device)])


def _as_table(values: ArrayLike | Tensor, source: str) -> Tensor:
    try:
        array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
        table = np.array(array, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidTypeError(f"{source} must hold real numbers only: {error}") from error
    if array.dtype.kind not in "fiubO":  # text that looks like numbers, and dates
        raise InvalidTypeError(f"{source} must hold real numbers only, its type is {array.dtype}")
    if table.ndim != 2 or table.shape[1] == 0:
        raise InvalidValueError(f"{source} must be a table (rows, columns), got an array of shape {table.shape}")
    return torch.from_numpy(table)


def _check_finite(table: Tensor, columns: Sequence[str], source: str) -> None:
    bad = torch.nonzero(~torch.isfinite(table))
    if len(bad):
        row, column = bad[0].tolist()
        affected = len(bad[:, 0].unique())
        raise InvalidValueError(
            f"{source}: {len(bad)} values in {affected} of {len(table)} rows are NaN or infinite; the first "
            f"is {table[row, column].item()} in row {row + 1} (the first data row is row 1), column "
            f"{columns[column]!r}; fill them in or remove those rows"
        )


def _check_varies(train: Tensor, columns: Sequence[str], source: str) -> None:
    constant = [name for name, same in zip(columns, (train == train[0]).all(0).tolist(), strict=True) if same]
    if constant:
        value = train[0, columns.index(constant[0])].item()
        kept = [name for name in columns if name not in constant]
        advice = f"leave it out: columns={kept}" if kept else "there is nothing to learn"
        raise InvalidValueError(
            f"{source}: column {', '.join(map(repr, constant))} is constant ({value:g}) in the {len(train)} "
            f"training rows, so it has no density and cannot be standardised; {advice}"
        )
