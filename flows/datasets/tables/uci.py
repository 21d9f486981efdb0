"""Regression tables of the UCI repository with the published splits."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from flows.arguments import checked
from flows.checks import existing_path, whole_number
from flows.datasets.tables.readers import read_rows
from flows.datasets.tables.tabular import Table
from flows.errors import FileError, InvalidValueError


@checked
class UCIRegression(Table):
    """A regression table of the UCI repository: the last column given all others.

    The folder has a file `data.txt` of numbers, and `test_rows_0.txt`, `test_rows_1.txt`, ... with the rows of the test
    parts. Conditions that are constant in all other rows are left out. Likelihoods are in the units of the data.
    [Hernández-Lobato & Adams 2015, arXiv:1502.05336; Gal & Ghahramani 2016, arXiv:1506.02142]

    Targets with few distinct values, such as the quality of wine, get uniform noise of one rounding unit, since a
    density could grow without limit there.

    Args:
        path: the folder of one table.
        split: number of the published split.
        validation_fraction: of the training rows.
        split_seed: of the validation part.
        dequantise_columns: see `Table`.

    Raises:
        FileError: the folder or a file does not exist, or cannot be read.
        InvalidValueError: a file holds something else.

    Example:
        ```python
        from pathlib import Path

        import numpy as np

        import flows

        folder = Path("concrete")
        folder.mkdir()
        np.savetxt(folder / "data.txt", np.random.default_rng(0).normal(size=(200, 3)))
        np.savetxt(folder / "test_rows_0.txt", np.arange(20), fmt="%d")
        data = flows.datasets.UCIRegression("concrete", split=0)
        data.event_shape, data.context_shape  # (1,), (2,)
        ```
    """

    def __init__(
        self,
        path: str | Path,
        split: int = 0,
        validation_fraction: float = 0.1,
        split_seed: int = 0,
        dequantise_columns: Literal["auto"] | None = "auto",
    ) -> None:
        folder = existing_path("path", path, "folder of a table", folder=True)
        whole_number("split", split, 0)
        numbers = existing_path("path", folder / "data.txt", "table")
        try:
            table = np.loadtxt(numbers, ndmin=2)
        except (ValueError, OSError) as error:
            raise FileError(f"{numbers} is no table of numbers: {error}") from error
        if table.shape[1] < 2:
            raise InvalidValueError(f"{numbers} has {table.shape[1]} column, and needs conditions and a target")
        test_rows = read_rows(folder / f"test_rows_{split}.txt")
        names = [f"x{i}" for i in range(table.shape[1] - 1)]
        train = np.delete(table, [row for row in test_rows if row < len(table)], axis=0)
        context = {name: table[:, i] for i, name in enumerate(names) if np.ptp(train[:, i]) > 0}
        super().__init__(
            table[:, -1:],
            ["y"],
            f"uci_{folder.name}",
            validation_fraction,
            split_seed=split_seed,
            source=str(folder),
            dequantise_columns=dequantise_columns,
            quiet=True,  # the docstring says it
            context=context,
            test_rows=test_rows,
        )
        self.split_settings = {**self.split_settings, "split": split}
