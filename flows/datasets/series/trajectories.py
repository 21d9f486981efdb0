"""One's own time series, from a file in long form: one row for each series and time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flows.arguments import checked
from flows.checks import existing_path
from flows.datasets.series.long_form import (
    by_series,
    check_times,
    numbered,
    roles_of_columns,
    static_covariates,
    tell_coarse_times,
    tell_sorted,
)
from flows.datasets.series.moments import TIME_UNITS, Moments, read_moments
from flows.datasets.series.series import Series
from flows.datasets.tables.readers import column_names, read_table, read_words
from flows.errors import DataWarning, InvalidValueError, warn

Column = str | int


@checked
class Trajectories(Series):
    """Time series from a .csv or .parquet file in long form, one row for each series and time.

    | id | time | x   | y   |
    |----|------|-----|-----|
    | a  | 0.0  | 1.2 | 0.4 |
    | a  | 0.5  | 1.1 | 0.3 |
    | b  | 0.0  | 0.9 | 0.7 |

    Series may have any lengths, starts and times. The order of the rows does not matter: series are ordered by their
    ids, and rows that do not come in the order of time are sorted, which a `DataWarning` says. Dates become numbers,
    the time since the earliest one. A `DataWarning` says in which unit, unless `time_unit` is set.

    Args:
        path: the file.
        id: column that tells series apart, by name or position; it may hold words. Default: the file is one series.
        time: column of the times, numbers or dates such as 2024-01-31 or 2024-01-31T12:00:00.
        columns: columns of the states, by name or position, in this order. Default: all others.
        context_columns: columns of static covariates, which are constant within a series. Default: none.
        input_columns: columns of inputs, which change in time; see `Series`. A row in which all of them are missing is
            no sample of the inputs. Default: none.
        missing: "error" refuses missing values (empty, NA, NaN); "mask" leaves them out of the loss. Rows without any
            value are then samples of the inputs alone, or no rows at all.
        time_unit: "days", "hours", "minutes" or "seconds", of dates. Default: the largest that is no larger than the
            median step.
        relative_times: count the times of each series from its first one. Do so where times are huge, such as seconds
            since 1970, and the clock does not matter. Default: as they are.
        name: name of the runs.
        validation_fraction, test_fraction, split_seed, split_by, window: see `Series`.
        delimiter: separator of the values in a .csv file.
        header: whether the first line of a .csv file holds names. Default: find out.

    Attributes:
        time_name: name of the column of the times.
        time_unit: unit of the times, or `None` if they were numbers.
        time_origin: the date that became time 0, or `None`.

    Raises:
        FileError: the file does not exist or cannot be read.
        InvalidTypeError, InvalidValueError: see `Series` and `read_table`; or a column does not exist or has two roles,
            an id or a time is missing, a time is neither a number nor a date, a series has a single point or two rows
            with the same time, or a static covariate changes. The message names the column and the row or the series.

    Example:
        ```python
        import numpy as np

        import flows

        rows = [(patient, time, patient + 0.1 * time) for patient in range(10) for time in range(5)]
        np.savetxt("series.csv", rows, delimiter=",", header="patient,time,dose", comments="")
        data = flows.datasets.Trajectories("series.csv", id="patient")
        data.event_shape  # (1,)
        ```
    """

    def __init__(
        self,
        path: str | Path,
        id: Column | None = None,
        time: Column = "time",
        columns: Sequence[Column] | None = None,
        context_columns: Sequence[Column] = (),
        input_columns: Sequence[Column] = (),
        missing: Literal["error", "mask"] = "error",
        time_unit: Literal["days", "hours", "minutes", "seconds"] | None = None,
        relative_times: bool = False,
        name: str = "trajectories",
        validation_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        split_by: Literal["position", "content", "time"] = "position",
        window: int | None = None,
        delimiter: str = ",",
        header: bool | None = None,
    ):
        self.path = existing_path("path", path, "data file")
        reading = {"delimiter": delimiter, "header": header}
        names, index = column_names(self.path, **reading)
        roles = roles_of_columns(self.path, names, index, id, time, columns, context_columns, input_columns)
        taken = [place for role in ("columns", "context_columns", "input_columns") for place in roles[role]]
        try:
            table, called = read_table(self.path, taken, **reading, missing=True)
        except InvalidValueError as error:
            if id is not None:
                raise
            raise InvalidValueError(f"{error}; if a column tells series apart, name it: id=...") from error
        (place,) = roles["time"]
        self.time_name = names[place]
        words = read_words(self.path, place, "time", **reading)
        ids = read_words(self.path, roles["id"][0], "id", **reading) if roles["id"] else ["0"] * len(words)
        if not len(table) == len(words) == len(ids):
            raise InvalidValueError(f"{self.path}: fields hold line breaks, so its rows cannot be told; remove them")
        labels, series = numbered(ids)
        moments = read_moments(words, self.time_name, self.path)
        order = np.lexsort((moments.numbers, series))
        tell_sorted(moments.numbers, series, labels, self.path)
        times, series, table = moments.numbers[order], series[order], table[order]
        check_times(self.path, times, series, order, labels, words, bool(roles["id"]))
        times = self._in_units(times, series, moments, time_unit)
        first = np.searchsorted(series, np.arange(len(labels)))
        if relative_times:
            times = times - times[first][series]
        tell_coarse_times(times, series, self.time_name, self.path)
        ends = np.cumsum([len(roles[role]) for role in ("columns", "context_columns", "input_columns")])
        values, context, inputs = np.split(table, ends[:2], 1)
        columns, self.context_columns, sampled = called[: ends[0]], called[ends[0] : ends[1]], called[ends[1] :]
        parts, own, own_times = by_series(times, values, inputs, first, missing)
        known = static_covariates(self.path, context, self.context_columns, times, first, labels, missing)
        super().__init__(
            [part[0] for part in parts],
            [part[1] for part in parts],
            context=known if self.context_columns else None,
            missing=missing,
            columns=columns,
            name=name,
            ids=labels,
            inputs=own if sampled else None,
            input_times=own_times if sampled else None,
            input_columns=sampled,
            validation_fraction=validation_fraction,
            test_fraction=test_fraction,
            split_seed=split_seed,
            split_by=split_by,
            window=window,
            source=str(path),
        )
        self.split_settings = {
            **self.split_settings,
            **{"time_unit": self.time_unit, "time_origin": self.time_origin, "relative_times": relative_times},
        }

    def _in_units(
        self, seconds: NDArray[np.float64], series: NDArray[np.int64], moments: Moments, unit: str | None
    ) -> NDArray[np.float64]:
        """The times in the unit that was asked for, or in one that suits dates."""
        self.time_unit, self.time_origin = unit, moments.origin
        if moments.origin is None:
            if unit is not None:
                raise InvalidValueError(
                    f"{self.path}: column {self.time_name!r} holds numbers, and time_unit={unit} is for dates; leave "
                    "it out, the times are taken in the unit that they have"
                )
            return seconds
        if unit is None:
            step = float(np.median(np.diff(seconds)[np.diff(series) == 0]))
            self.time_unit = next((name for name, size in TIME_UNITS.items() if size <= step), "seconds")
            warn(
                f"{self.path}: the dates in column {self.time_name!r} became {self.time_unit} since {moments.origin}; "
                "set time_unit=... to choose the unit yourself",
                DataWarning,
            )
        return seconds / TIME_UNITS[str(self.time_unit)]
