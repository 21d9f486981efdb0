"""Tables of numbers: one example a row, split at random."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from flows.arguments import checked
from flows.checks import whole_number
from flows.conditions import Conditions
from flows.datasets.base import Dataset
from flows.datasets.batches import Batch
from flows.datasets.recognition.hashing import content_keys, word_keys
from flows.datasets.splits import content_split, given_split, group_split, random_split
from flows.datasets.tables.contexts import TableContexts
from flows.datasets.tables.dequantisation import NOISE_SEEDS, Noise, TableStream, dequantised, units_of
from flows.datasets.tables.diagnosis import warnings_about
from flows.datasets.tables.files import Wanted, read_parts
from flows.datasets.tables.readers import read_rows
from flows.errors import DataWarning, InvalidTypeError, InvalidValueError, warn

ALL = "all"  # rows are for the test


@checked
class Table(Dataset):
    """A table of numbers in memory, one example a row.

    Nothing is scaled here. A flow's own transform does that, fitted to `reference()`, so that its `log_prob` has the
    units of the data. All rows are float64, whatever dtype is asked for: 10⁶ + z in float32 would lose most of z, while
    a flow with a transform such as `Standardise` rounds only what is left after centring.

    Where values repeat, a density can grow without limit: likelihoods then have no meaning. A `DataWarning` names
    columns with ties, columns that are linear functions of others, outliers, row counters, and duplicated rows.

    `dequantise_columns` cures ties. It adds δ(u − ½) to each value, with the rounding unit δ of its column and
    u ~ U(0, 1): anew for every training batch, once for validation and test rows. The density p is then that of the
    noisy columns, and E log p(x + δ(u − ½)) + log δ <= log P(x) for the probability P of a rounded value.

    By default the split shuffles positions: appending a row, or another order of the rows, gives other splits.
    `split_by="content"` decides by the numbers in a row alone, so that a training row stays one whatever rows come and
    go, and copies stay together; the sizes then only come close to the fractions. With `groups`, rows of a group stay
    in one split.

    With a `context` the density is conditional on other columns, p(values | context). They stay in data units: a flow
    standardises numbers and takes categories as one-hot vectors by its encoder, see `flows.encoders.Standardised`.

    Args:
        values: finite numbers (rows, columns): a tensor, an array, a data frame or nested lists.
        columns: names of the columns. Default: those of a data frame, otherwise "0", "1", ...
        name: name of the runs.
        validation_fraction, test_fraction: fractions of the rows, rounded to whole rows.
        split_seed: seed of the random split.
        source: what messages call the table.
        dequantise_columns: columns to add noise to, by name or position; "auto" for all that repeat rounded values; a
            mapping from names to rounding units where these are known. Default: none.
        quiet: leave out the warnings about values.
        split_by: "position" or "content".
        groups: the group of each row, as numbers or words. Default: each row is its own.
        context: columns that the density is conditional on: a data frame, a mapping from names to columns, or numbers
            (rows, columns), which are then called "c0", "c1", ... Columns of words, of truth values and those that
            pandas marks as categories are categories. Default: none.
        categories: names of context columns whose numbers are categories.
        conditions: what another table knows of the context columns, such as `flow.encoder.conditions`; an unknown
            category is then an error. Default: found out, by the training rows.
        test_rows, validation_rows: the rows of these parts, from 0, as published splits state them. The fraction of a
            part that is not given is then of the other rows. `test_rows="all"`: a table to evaluate on, of which no
            row is for training; it may have a single row. Default: chosen at random.

    Attributes:
        units: rounding unit of each column that noise is added to, otherwise 0.
        split: the row indices of "train", "validation" and "test".
        conditions: names and categories of the context columns, or None; `conditions.encode` makes contexts from words.

    Raises:
        InvalidTypeError: a value is no number.
        InvalidValueError: the values are no table, a value is NaN or infinite, a column is constant in the training
            rows, a split would be empty, names repeat, or a column to dequantise has no rounding unit; a column is a
            value and a condition, a condition is constant or missing, or no training row has a category. The message
            names the row and the column.

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
    labels_identify = True
    _contexts: dict[str, Tensor] | None = None
    _labels: dict[str, np.ndarray] | None = None

    def __init__(
        self,
        values: ArrayLike | Tensor,
        columns: Sequence[str] | None = None,
        name: str = "table",
        validation_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        source: str = "the table",
        dequantise_columns: Noise = None,
        quiet: bool = False,
        split_by: Literal["position", "content"] = "position",
        groups: ArrayLike | None = None,
        context: Any = None,
        categories: Sequence[str] = (),
        conditions: Conditions | None = None,
        test_rows: Literal["all"] | Sequence[int] | ArrayLike | None = None,
        validation_rows: Sequence[int] | ArrayLike | None = None,
    ):
        table = _as_table(values, source)
        self.name, self.source = name, source
        if columns is None:
            columns = [str(name) for name in getattr(values, "columns", range(table.shape[1]))]
        self.columns = list(columns)
        if len(self.columns) != table.shape[1]:
            raise InvalidValueError(f"{source} has {table.shape[1]} columns, but columns has {len(self.columns)} names")
        repeated = sorted({name for name in self.columns if self.columns.count(name) > 1})
        if repeated:
            raise InvalidValueError(f"{source} has several columns called {repeated[0]!r}; give each its own name")
        _check_finite(table, self.columns, source)
        self.event_shape = (table.shape[1],)
        contexts = None
        if context is not None:
            contexts = TableContexts(context, categories, conditions, self.columns, len(table), source)
            self.conditions, self.context_shape = contexts.conditions, contexts.conditions.shape
        elif categories:
            raise InvalidValueError(f"{source}: categories are of the context columns, and there are none")
        fractions = {"test": test_fraction, "validation": validation_fraction}
        others = None if contexts is None else contexts.stable()
        whole = table.numpy() if others is None else np.hstack([others, table.numpy()])
        self.is_scored = scored = isinstance(test_rows, str) and test_rows == ALL
        if scored:
            self.split = _all_rows(len(table), source)
        else:
            given = {"test": test_rows, "validation": validation_rows}
            given = {part: rows for part, rows in given.items() if rows is not None}
            self.split = _split(whole, fractions, split_seed, source, split_by, groups, given)
        self.split_settings = {
            **{f"{split}_fraction": float(fraction) for split, fraction in fractions.items()},
            **{"split_seed": int(split_seed), "split_by": split_by, "groups": groups is not None},
        }
        for name, rows in (("test_rows", test_rows), ("validation_rows", validation_rows)):
            if rows is not None:
                self.split_settings[name] = ALL if scored else "given"
        self.num_validation, self.num_test = len(self.split["validation"]), len(self.split["test"])
        self._parts = {split: table[rows] for split, rows in self.split.items()}
        if contexts is not None:
            if not scored:
                contexts.check(self.split)
            entries, stable = torch.from_numpy(contexts.entries), contexts.stable()
            self._contexts = {split: entries[rows] for split, rows in self.split.items()}
            self._labels = {split: stable[rows.numpy()] for split, rows in self.split.items()}
        if not scored:
            _check_varies(self._parts["train"], self.columns, source)
        self.units = units_of(table, self.columns, dequantise_columns, source, others)
        if not (quiet or scored):
            rows = {split: indices.numpy() for split, indices in self.split.items()}
            named = {} if contexts is None else dict(zip(contexts.conditions.columns, contexts.stable().T, strict=True))
            for message in warnings_about(table.numpy(), rows, self.columns, (self.units == 0).tolist(), source, named):
                warn(message, DataWarning)
        if self.units.any():
            steps = {name: unit for name, unit in zip(self.columns, self.units.tolist(), strict=True) if unit}
            starts = {name: float(table[:, self.columns.index(name)].min()) for name in steps}
            self.split_settings |= {"noise": steps, "smallest": starts}
        self._held_out = {split: self._with_noise(split) for split in ("validation", "test")}

    def rows_for_hashing(self) -> dict[str, np.ndarray]:
        return {split: rows.numpy() for split, rows in self._parts.items()}

    def labels_for_hashing(self) -> dict[str, np.ndarray] | None:
        return self._labels

    def row_numbers(self, split: Literal["validation", "test"]) -> Tensor:
        return self.split[split]

    def reordered(self, columns: Sequence[int]) -> Table:
        """Return the same table with its columns in another order."""
        order = list(columns)
        new = copy.copy(self)
        new._fingerprint = None
        new.columns = [self.columns[i] for i in order]
        new.units = self.units[order]
        new._parts = {split: rows[:, order] for split, rows in self._parts.items()}
        new._held_out = {split: rows[:, order] for split, rows in self._held_out.items()}
        return new

    def train_stream(
        self,
        batch_size: int,
        generator: torch.Generator,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> TableStream:
        """Return an endless stream of training rows in float64, reshuffled at each pass."""
        dtype = _exact(device, dtype)
        train = Batch(self._parts["train"], None if self._contexts is None else self._contexts["train"])
        return TableStream(self.name, train, self.units, batch_size, generator, device, dtype)

    def held_out(self, split: Literal["validation", "test"]) -> Batch:
        return Batch(self._held_out[split], None if self._contexts is None else self._contexts[split])

    def reference(self) -> Tensor:
        """Return all training rows (n, columns) in float64, with noise where it is added."""
        return self._with_noise("train").clone()

    def reference_contexts(self) -> Tensor | None:
        return None if self._contexts is None else self._contexts["train"]

    def _in_batches(
        self,
        split: Literal["validation", "test"],
        batch_size: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> Iterator[Batch]:
        return super()._in_batches(split, batch_size, device, _exact(device, dtype))

    def _with_noise(self, split: str) -> Tensor:
        generator = torch.Generator().manual_seed(NOISE_SEEDS[split])
        return dequantised(self._parts[split], self.units, generator)


@checked
class Tabular(Table):
    """A table of numbers from a .csv, .npy, .npz or .parquet file.

    Parquet files need pyarrow.

    Args:
        path: the file.
        columns: columns to take, by name or position, in this order. Default: all.
        name: name of the runs.
        validation_fraction, test_fraction, split_seed: see `Table`.
        delimiter: separator of the values in a .csv file.
        header: whether the first line of a .csv file holds names. Default: find out.
        dequantise_columns, split_by: see `Table`.
        group_column: a column, by name or position, that says which rows belong together, such as a patient or a day.
            They stay in one split, and the column is no feature. It may hold words. Default: none.
        context_columns: columns, by name or position, that the density is conditional on; `columns` are then by default
            all others. They may hold numbers or words. Default: none.
        categories: context columns whose numbers are categories.
        conditions: see `Table`.
        test_rows, validation_rows: the rows of these parts, from 0, or a text file of them; see `Table`.
        test_path, validation_path: files with the rows of these parts, with the same columns. `path` then holds the
            rows for training, and those of a part without a file of its own.

    Raises:
        FileError: the file does not exist or cannot be read.
        InvalidTypeError, InvalidValueError: see `read_table` and `Table`.

    Example:
        ```python
        import numpy as np

        import flows

        rows = np.random.default_rng(0).normal(size=(100, 2))
        np.savetxt("table.csv", rows, delimiter=",", header="height,width", comments="")
        data = flows.datasets.Tabular("table.csv")
        data.columns, data.event_shape  # ["height", "width"], (2,)
        ```
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
        dequantise_columns: Noise = None,
        split_by: Literal["position", "content"] = "position",
        group_column: str | int | None = None,
        context_columns: Sequence[str | int] = (),
        categories: Sequence[str | int] = (),
        conditions: Conditions | None = None,
        test_rows: str | Path | Sequence[int] | None = None,
        validation_rows: str | Path | Sequence[int] | None = None,
        test_path: str | Path | None = None,
        validation_path: str | Path | None = None,
    ):
        wanted = Wanted(columns, context_columns, categories, group_column, delimiter, header)
        own = {"test": test_path, "validation": validation_path}
        found = read_parts(path, {part: file for part, file in own.items() if file is not None}, wanted)
        rows: dict[str, Any] = {"test_rows": test_rows, "validation_rows": validation_rows}
        for part, places in found.rows.items():
            if rows[f"{part}_rows"] is not None:
                raise InvalidValueError(f"give {part}_path or {part}_rows, not both")
            rows[f"{part}_rows"] = places
        listed: dict[str, Any] = {name: read_rows(given) if _is_file(given) else given for name, given in rows.items()}
        super().__init__(
            found.values,
            found.names,
            name,
            validation_fraction,
            test_fraction,
            split_seed,
            " and ".join(str(file) for file in (path, *found.files)),
            dequantise_columns,
            split_by=split_by,
            groups=found.groups,
            context=found.context,
            categories=found.categories,
            conditions=conditions,
            test_rows=listed["test_rows"],
            validation_rows=listed["validation_rows"],
        )
        self.path = Path(path)
        self._starts = {part: int(places[0]) for part, places in found.rows.items()}  # of files of their own

    def row_numbers(self, split: Literal["validation", "test"]) -> Tensor:
        return self.split[split] - self._starts.get(split, 0)


def _split(
    table: np.ndarray,
    fractions: Mapping[str, float],
    seed: int,
    source: str,
    split_by: Literal["position", "content"],
    groups: ArrayLike | None,
    given: Mapping[str, Any],
) -> dict[str, Tensor]:
    if split_by not in ("position", "content"):
        raise InvalidValueError(f"split_by must be 'position' or 'content', got {split_by!r}")
    if given:
        if groups is not None or split_by != "position":
            names = " and ".join(f"{part}_rows" for part in given)
            raise InvalidValueError(f"{source}: {names} decides the split, so leave out split_by and groups")
        return given_split(len(table), given, fractions, seed, source, "rows")
    if groups is None:
        if split_by == "position":
            return random_split(len(table), fractions, seed, source, "rows")
        return content_split(content_keys(table, whole_number("split_seed", seed, 0)), fractions, seed, source, "rows")
    words = np.asarray(groups)
    if words.shape != (len(table),):
        raise InvalidValueError(f"groups must have one entry for each of {len(table)} rows, got shape {words.shape}")
    if split_by == "position":
        return group_split(words, fractions, seed, source, "rows")
    return content_split(word_keys(words, whole_number("split_seed", seed, 0)), fractions, seed, source, "rows")


def _is_file(given: Any) -> bool:
    return isinstance(given, str | Path) and given != ALL


def _all_rows(count: int, source: str) -> dict[str, Tensor]:
    """The split of a table that is only evaluated on."""
    if not count:
        raise InvalidValueError(f"{source} has no rows")
    none = torch.zeros(0, dtype=torch.int64)
    return {"train": none, "validation": none, "test": torch.arange(count)}


def _exact(device: torch.device | str | None, dtype: torch.dtype | None) -> torch.dtype | None:
    """Return float64, or `dtype` on a device that lacks float64."""
    return dtype if torch.device(device or "cpu").type == "mps" else torch.float64


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
