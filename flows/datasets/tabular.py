"""Tables of numbers: one example a row, split once into training, validation and test parts."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from flows.datasets.base import Batch, Dataset, convert, fixed_batches
from flows.datasets.passes import EpochStream, random_split
from flows.datasets.readers import choose_columns, read_table
from flows.errors import InvalidTypeError, InvalidValueError


class Table(Dataset):
    """A table of numbers from memory, (rows, columns), one example a row.

    The rows are shuffled with `split_seed` and cut into test, validation and training part. Nothing is scaled
    here: a flow's own transform, fitted on `reference()`, does that, so that its log_prob is in data units.

    Args:
        values: finite numbers (rows, columns): a tensor, an array, a data frame, nested lists.
        columns: names for messages and for `columns` of this object; default "0", "1", ...
        name: what runs are called after.
        validation_fraction, test_fraction: shares of the rows, rounded to whole rows; at least one row each.
        split_seed: which rows go where.
        source: what error messages call the table.

    Raises:
        ValueError: not a table, NaN or infinite values, a column that is constant in the training part, or
            too few rows; the message names the row and the column.
    """

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
            raise InvalidValueError(f"{source} has {table.shape[1]} columns, got {len(self.columns)} names for them")
        _check_finite(table, self.columns, source)
        self.event_shape = (table.shape[1],)
        shares = {"test": test_fraction, "validation": validation_fraction}
        self.split = random_split(len(table), shares, split_seed, source, "rows")
        self.num_validation, self.num_test = len(self.split["validation"]), len(self.split["test"])
        self._parts = {part: table[rows] for part, rows in self.split.items()}
        _check_varies(self._parts["train"], self.columns, source)

    def train_stream(
        self,
        batch_size: int,
        generator: torch.Generator,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "TableStream":
        """Return an endless stream over the training rows, shuffled anew for each pass."""
        return TableStream(self.name, self._parts["train"], batch_size, generator, device, dtype)

    def validation_batches(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Iterator[Batch]:
        return fixed_batches(self._parts["validation"], batch_size, device, dtype, self.name)

    def test_batches(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Iterator[Batch]:
        return fixed_batches(self._parts["test"], batch_size, device, dtype, self.name)

    def reference(self) -> Tensor:
        """Return the whole training part, (n, columns), in torch's default dtype."""
        return convert(self._parts["train"], None, None, self.name)


class Tabular(Table):
    """A table of numbers from a .csv, .npy or .parquet file (the last needs pyarrow).

    Args:
        path: the file.
        columns: which columns to take, by name or position, in this order; None takes all.
        name: what runs are called after.
        validation_fraction, test_fraction, split_seed: see `Table`.
        delimiter: what separates the values of a .csv file.
        header: whether the first line of a .csv file holds names; None finds out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: see `flows.datasets.readers.read_table` and `Table`.
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
    """Shapes of cell nuclei in 569 breast tumours, 30 features; embedded in scikit-learn.

    Source: Street, Wolberg & Mangasarian 1993, Nuclear feature extraction for breast tumor diagnosis (UCI
    Breast Cancer Wisconsin, Diagnostic). The diagnosis is left out.

    Args:
        columns: which features, by name or position; None takes all 30.
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

        data = load_breast_cancer()
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
    """Batches of rows without replacement; see `EpochStream`."""

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
        if array.dtype.kind not in "fiubO":  # text that looks like numbers is not converted on the quiet
            raise InvalidTypeError(f"its type is {array.dtype}")
        table = torch.from_numpy(np.array(array, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise InvalidValueError(f"{source} must hold real numbers only: {error}") from error
    if table.ndim != 2 or table.shape[1] == 0:
        raise InvalidValueError(f"{source} must be a table (rows, columns), got an array of shape {tuple(table.shape)}")
    return table


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
