"""log p of each row with its errors, as a table in a file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flows.arguments import checked
from flows.datasets import Dataset
from flows.datasets.recognition.comparison import Comparison
from flows.errors import InvalidValueError
from flows.evaluation.likelihood import Likelihood
from flows.writing import write_columns


@checked
@dataclass(frozen=True)
class RowScores:
    """log p of each row of a data set, in nats, with its errors.

    The columns are, in this order: `row`, its place in the file from 0; `log_prob`; `standard_error`, by the probes of
    the divergence and the draws of noise, 0 for an exact divergence; `solver_error`, how far log p moves at much
    tighter tolerances; `trained_on`, 1 for a training row of the run, where a run is known; then the columns of the
    data. A figure that is not known is an empty field.

    ```python
    import torch

    import flows
    from flows.evaluation import RowScores, likelihood, part_batches

    data = flows.datasets.Table(torch.randn(5, 2), columns=["a", "b"], test_rows="all")
    flow = flows.CNF(flows.fields.MLP(event_shape=(2,)))
    scores = RowScores.of(likelihood(flow, part_batches(flow, data, "test", 1000)[0]), data)
    print(scores.columns["log_prob"])
    ```
    """

    columns: Mapping[str, Sequence[Any]]  # by name, (n,) each

    @classmethod
    def of(
        cls,
        result: Likelihood,
        dataset: Dataset,
        part: Literal["validation", "test"] = "test",
        run: Comparison | None = None,
    ) -> RowScores:
        """Put a likelihood of a part beside its rows.

        Args:
            run: the data beside those of a run, for `trained_on`.
        """
        count = result.num_points
        unknown = np.full(count, np.nan)
        errors = {"standard_error": result.standard_errors, "solver_error": result.solver_errors}
        columns: dict[str, Any] = {
            "row": dataset.row_numbers(part)[:count].tolist(),
            "log_prob": (-result.values).tolist(),
            **{name: (unknown if values is None else values).tolist() for name, values in errors.items()},
        }
        if run is not None and part in run.hashes:
            columns["trained_on"] = [None if k != k else int(k) for k in run.known_to_be_trained_on(part)[:count]]
        batch, own = dataset.held_out(part), {}
        if dataset.conditions is not None and batch.context is not None:
            own |= dataset.conditions.decode(batch.context[:count])
        if dataset.columns is not None and batch.x.ndim == 2:
            without_noise = dataset.rows_for_hashing()[part][:count]
            own |= dict(zip(dataset.columns, without_noise.T.tolist(), strict=True))
        for name, values in own.items():
            columns[f"{name} (data)" if name in columns else name] = values
        return cls(columns)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write them as .csv or .parquet.

        Raises:
            InvalidValueError: the file ends otherwise.
            FileError: it cannot be written.
        """
        path = Path(path)
        if path.suffix not in (".csv", ".parquet"):
            raise InvalidValueError(f"rows must end in .csv or .parquet, got {str(path)!r}")
        return write_columns(path, self.columns)
