"""Time series read from files in long form, and recognised when a run goes on or is evaluated."""

import math
from datetime import datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from flows.datasets import Series, Trajectories
from flows.datasets.recognition.comparison import compare
from flows.datasets.recognition.recognition import recognised, refuse_other_data
from flows.errors import DataWarning, InvalidValueError


def table(count=12, seed=0):
    """Rows (id, time, x, y, dose, u): irregular times, a static dose, an input."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        for t in np.cumsum(rng.uniform(0.1, 1, size=4 + i % 5)):
            rows.append([f"s{i}", float(t), math.sin(t + i), math.cos(t * i), 0.5 * i, float(t) ** 2])
    return rows


def write(path, rows, names="id,time,x,y,dose,u"):
    path.write_text("\n".join([names, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


SETTINGS = {"id": "id", "columns": ["x", "y"], "context_columns": ["dose"]}


def test_a_file_holds_what_was_written(tmp_path):
    rows = table()
    data = Trajectories(write(tmp_path / "t.csv", rows), **SETTINGS, input_columns=["u"])
    assert data.ids == sorted({row[0] for row in rows})
    assert (data.columns, data.context_columns, data.input_columns) == (["x", "y"], ["dose"], ["u"])
    found = []
    for split, chosen in data.split.items():
        batch = data.part(split)
        for k, example in enumerate(chosen.tolist()):
            label = data.ids[data.examples[example].series]
            for j in range(int(batch.mask[k].sum())):
                t, (x, y) = float(batch.times[k, j]), batch.x[k, j].tolist()
                sample_time, u, dose = batch.context[k, j].tolist()
                assert sample_time == t
                found.append([label, t, x, y, dose, u])
    assert sorted(found) == sorted(rows)


def test_the_order_of_rows_does_not_matter(tmp_path):
    rows = table()
    one = Trajectories(write(tmp_path / "t.csv", rows), **SETTINGS)
    with pytest.warns(DataWarning, match=r"the rows of \d+ of 12 series, such as 's0', were not in the order of time"):
        other = Trajectories(write(tmp_path / "u.csv", rows[::-1]), **SETTINGS)
    for split in one.split:
        assert torch.equal(one.part(split).x, other.part(split).x)
        assert torch.equal(one.part(split).times, other.part(split).times)
    refuse_other_data({**one.description(), "fingerprint": one.fingerprint()}, other)


def test_parquet_and_csv_are_the_same_data(tmp_path):
    rows = table()
    columns = zip(["id", "time", "x", "y", "dose", "u"], zip(*rows, strict=True), strict=True)
    pq.write_table(pa.table({name: list(values) for name, values in columns}), tmp_path / "t.parquet")
    one = Trajectories(write(tmp_path / "t.csv", rows), **SETTINGS)
    refuse_other_data(
        {**one.description(), "fingerprint": one.fingerprint()}, Trajectories(tmp_path / "t.parquet", **SETTINGS)
    )


@pytest.mark.parametrize(
    ("step", "unit"),
    [({"days": 3}, "days"), ({"hours": 5}, "hours"), ({"minutes": 2}, "minutes"), ({"seconds": 0.25}, "seconds")],
)
def test_dates_become_numbers_in_a_unit_that_suits(tmp_path, step, unit):
    start, size = datetime(2024, 2, 27, 22, 30), timedelta(**step)
    rows = [[i, (start + size * (i + j)).isoformat(), j, -j] for i in range(5) for j in range(4)]
    path = write(tmp_path / "t.csv", rows, "id,when,x,y")
    with pytest.warns(DataWarning, match=f"the dates in column 'when' became {unit} since 2024-02-27 22:30:00"):
        data = Trajectories(path, id="id", time="when")
    assert (data.time_unit, data.time_origin) == (unit, "2024-02-27 22:30:00")
    batch = data.part("train")
    expected = size / timedelta(**{unit: 1})
    torch.testing.assert_close(batch.times.diff(dim=1), torch.full_like(batch.times[:, 1:], expected))
    hours = Trajectories(path, id="id", time="when", time_unit="hours", relative_times=True).part("train")
    torch.testing.assert_close(hours.times[:, -1], torch.full_like(hours.times[:, 0], 3 * size / timedelta(hours=1)))


def test_seconds_since_1970_stay_exact(tmp_path):
    rows = [[i, 1.7e9 + 0.001 * j + 1000 * i, j] for i in range(5) for j in range(4)]
    with pytest.warns(DataWarning, match="float32"):
        data = Trajectories(write(tmp_path / "t.csv", rows, "id,time,x"), id="id")
    batch = next(data.train_stream(4, torch.Generator().manual_seed(0), dtype=torch.float32))
    torch.testing.assert_close(batch.times.diff(dim=1), torch.full((len(batch), 3), 0.001).double(), atol=3e-7, rtol=0)


def stored(data):
    return {**data.description(), "fingerprint": data.fingerprint()}


def changed(column, number=5, to=9.0):
    rows = table()
    rows[number][column] = to
    return rows


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        (changed(2), {}, "values changed in the column 'x'"),
        (changed(1, 5, 1.9), {}, "times, missing values, covariates or inputs are others"),
        (
            [row if row[0] != "s3" else [*row[:4], 7.0, row[5]] for row in table()],
            {},
            "covariates or inputs are others",
        ),
        (table()[:-3], {}, "3 of 50 training rows of the run are missing"),
        (table(), {"split_seed": 1}, "split_seed is 1, 0 in the run"),
        (table(), {"split_by": "time"}, "split_by is time, position in the run"),
        (table(), {"window": 3}, "window is 3, null in the run"),
        (table(), {"columns": ["y", "x"]}, r"the columns come in another order; set columns=\[x,y\]"),
        (table(), {"columns": ["x"]}, r"they have 1 columns, those of the run 2 \('y' missing\)"),
    ],
)
def test_other_series_are_refused_when_a_run_goes_on(tmp_path, rows, settings, words):
    run = stored(Trajectories(write(tmp_path / "t.csv", table()), **SETTINGS))
    data = Trajectories(write(tmp_path / "u.csv", rows), **{**SETTINGS, **settings})
    with pytest.raises(InvalidValueError, match=words):
        refuse_other_data(run, data)


def test_columns_are_put_in_the_order_of_the_run(tmp_path):
    path = write(tmp_path / "t.csv", table())
    run = Trajectories(path, **SETTINGS)
    with pytest.warns(DataWarning, match="put into its order"):
        data, _ = recognised(stored(run), Trajectories(path, **{**SETTINGS, "columns": ["y", "x"]}), "test")
    assert isinstance(data, Series)
    assert torch.equal(data.part("test").x, run.part("test").x)


def test_test_states_are_no_training_states(tmp_path):
    """With the same start of all series, and where later pieces start from states that were trained on."""
    times = [torch.arange(8.0) + 0.1 * i for i in range(12)]
    values = [torch.stack([t - t[0], (t - t[0]) * i], 1) for i, t in enumerate(times)]
    for split_by in ("position", "time"):
        data = Series(times, values, split_by=split_by)
        found = compare(stored(data), data)
        assert found.text == ""
        assert found.trained_on("test")[0] == 0
    other = Series(times, values, split_seed=3)
    assert compare(stored(Series(times, values)), other).trained_on("test")[0] > 0
