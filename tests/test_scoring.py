"""Scoring files: all rows of a file that was not trained on, and parts of the data in files of their own."""

import csv
import json
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import flows
from flows.datasets import Table, Tabular
from flows.datasets.recognition.comparison import compare
from flows.errors import DataWarning, InvalidValueError
from flows.evaluation import RowScores, likelihood, part_batches

QUICK = [
    "data=tabular",
    "data.path=train.csv",
    "steps=4",
    "field.hidden=[8]",
    "solver=rk4",
    "solver.step_size=0.25",
    "hardware.accelerator=cpu",
    "reporting.plot_every=null",
    "reporting.progress_bar=false",
]


def write(path, rows, names="alpha,beta"):
    np.savetxt(path, rows, delimiter=",", header=names, comments="", fmt="%.17g")
    return path


def table(count, seed):
    return np.random.default_rng(seed).normal(size=(count, 2)) @ np.array([[1.0, 0.5], [0.0, 2.0]])


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_all_rows_of_another_file_are_scored(run, tmp_path):
    old = write(tmp_path / "train.csv", table(60, 0))
    code, _, err = run("train", *QUICK, "output_dir=run")
    assert code == 0, err
    flow = flows.load("run").double()
    for count in (1, 3, 20):
        rows = table(count, 1)
        write(tmp_path / "held.csv", np.c_[np.arange(count), rows[:, ::-1]], "id,beta,alpha")
        code, out, err = run(
            "evaluate", "checkpoint=run", "data.path=held.csv", "rows=s.csv", "output=s.json", "dtype=float64"
        )
        assert code == 0, err
        scores, figures = rows_of(tmp_path / "s.csv"), json.loads((tmp_path / "s.json").read_text())
        names = ["row", "log_prob", "standard_error", "solver_error", "trained_on", "alpha", "beta"]
        assert list(scores[0]) == names
        assert [int(row["row"]) for row in scores] == list(range(count))
        assert [[float(row["alpha"]), float(row["beta"])] for row in scores] == rows.tolist()
        expected = flow.log_prob(torch.tensor(rows)).tolist()
        assert [float(row["log_prob"]) for row in scores] == pytest.approx(expected, abs=1e-9)
        assert all(float(row["standard_error"]) == 0 and float(row["solver_error"]) >= 0 for row in scores)
        assert {row["trained_on"] for row in scores} == {"0"}
        assert (figures["part"], figures["points"], figures["points_trained_on"]) == ("all rows", count, 0)
        assert figures["nll"] == pytest.approx(-np.mean(expected), abs=1e-9)
        assert f"0 of {count} rows" in out
    write(tmp_path / "mixed.csv", np.concatenate([table(60, 0)[:10], table(5, 2)]))
    with pytest.warns(DataWarning, match="reward memory"):
        code, out, _ = run("evaluate", "checkpoint=run", "data.path=mixed.csv", "rows=s.csv")
    trained = [row in Tabular(old).split["train"].tolist() for row in range(10)]
    assert f"{sum(trained)} of 15 rows are training points of the run" in out
    assert [int(row["trained_on"]) for row in rows_of(tmp_path / "s.csv")] == [*map(int, trained), *[0] * 5]

    write(tmp_path / "moved.csv", table(60, 0))
    code, out, _ = run("evaluate", "checkpoint=run", "data.path=moved.csv", "rows=s.parquet")
    assert "tabular, test" in out
    found = pq.read_table(tmp_path / "s.parquet").to_pydict()
    assert found["row"] == Tabular(old).split["test"].tolist()

    for wrong, message in {
        "rows=s.json": "rows must end in .csv or .parquet, got 's.json'",
        "part=everything": "part must be test, validation or all, got 'everything'",
    }.items():
        code, _, err = run("evaluate", "checkpoint=run", wrong)
        assert code == 2
        assert message in err


def test_each_part_may_have_a_file_of_its_own(tmp_path):
    parts = {"train": table(20, 0), "validation": table(5, 1), "test": table(3, 2)}
    files = {name: write(tmp_path / f"{name}.csv", rows) for name, rows in parts.items()}
    write(files["test"], parts["test"][:, ::-1], "beta,alpha")  # by name
    data = Tabular(files["train"], validation_path=files["validation"], test_path=files["test"])
    for name in ("validation", "test"):
        assert data.held_out(name).x.numpy() == pytest.approx(parts[name], abs=0)
        assert data.row_numbers(name).tolist() == list(range(len(parts[name])))
    assert data.reference().numpy() == pytest.approx(parts["train"], abs=0)
    only_test = Tabular(files["train"], test_path=files["test"], validation_fraction=0.25)
    assert (only_test.num_test, only_test.num_validation, len(only_test.reference())) == (3, 5, 15)


def test_files_of_parts_must_have_the_same_columns(tmp_path):
    train, other = write(tmp_path / "a.csv", table(20, 0)), write(tmp_path / "b.csv", table(4, 1), "alpha,gamma")
    with pytest.raises(InvalidValueError, match=r"test_path: .*b.csv lacks 'beta'; it needs the columns alpha, beta"):
        Tabular(train, test_path=other)
    with pytest.raises(InvalidValueError, match=r"validation_path or validation_rows, not both"):
        Tabular(train, validation_path=train, validation_rows=[1])
    with pytest.raises(InvalidValueError, match=r"the files decide the split .*leave out group_column"):
        Tabular(train, test_path=train, group_column="beta")


def test_conditions_of_words_come_from_every_file(tmp_path):
    train, test = tmp_path / "train.csv", tmp_path / "test.csv"
    train.write_text("y,sex\n" + "\n".join(f"{i % 7 + i / 50},{'mf'[i % 2]}" for i in range(30)))
    test.write_text("sex,y\nf,1.5\nm,2.5\n")
    data = Tabular(train, context_columns=["sex"], test_path=test)
    held = data.held_out("test")
    assert held.x[:, 0].tolist() == [1.5, 2.5]
    assert data.conditions.decode(held.context) == {"sex": ["f", "m"]}


def test_all_rows_of_a_table_are_test_rows_without_any_for_training():
    trained = Table(table(40, 0), columns=["a", "b"])
    scored = Table(table(40, 0)[:1], columns=["a", "b"], test_rows="all")
    assert (scored.num_test, scored.num_validation, len(scored.reference())) == (1, 0, 0)
    found = compare(trained.description() | {"fingerprint": trained.fingerprint()}, scored)
    assert found.trained_on("test") == (int(0 in trained.split["train"]), 1)
    assert not found.same_rows
    again = Table(table(40, 0)[::-1].copy(), columns=["a", "b"], test_rows="all")
    assert compare(trained.description() | {"fingerprint": trained.fingerprint()}, again).same_rows


def test_rounding_units_may_be_given():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = Table([[1.0, 2.0]], columns=["a", "b"], test_rows="all", dequantise_columns={"b": 0.5})
    noisy = data.held_out("test").x[0]
    assert noisy[0] == 1.0
    assert 0 < abs(noisy[1] - 2.0) <= 0.25
    with pytest.raises(InvalidValueError, match=r"dequantise_columns.b must be .*> 0"):
        Table([[1.0, 2.0]], columns=["a", "b"], test_rows="all", dequantise_columns={"b": 0})


def test_the_parts_given_by_rows_are_checked():
    with pytest.raises(InvalidValueError, match="row 3 is in test_rows and in validation_rows"):
        Table(table(9, 0), test_rows=[1, 3], validation_rows=[3, 4])
    with pytest.raises(InvalidValueError, match="in validation_rows row 9 does not exist"):
        Table(table(9, 0), validation_rows=[9])
    data = Table(table(9, 0), test_rows=[1, 3], validation_rows=[4])
    assert data.split["train"].tolist() == [0, 2, 5, 6, 7, 8]


def test_scores_state_the_error_of_each_row():
    field = flows.fields.MLP(event_shape=(2,), hidden=(8,))
    flow = flows.CNF(field, divergence=flows.divergence.Hutchinson(4), solver=flows.ODESolver("rk4", step_size=0.5))
    with torch.no_grad():
        for weights in field.parameters():
            weights.normal_(generator=torch.Generator().manual_seed(0))
    data = Table(table(6, 0), columns=["a", "row"], test_rows="all")
    batches, _ = part_batches(flow, data, "test", 4)
    scores = RowScores.of(likelihood(flow, batches, torch.Generator().manual_seed(0), 2), data).columns
    assert list(scores) == ["row", "log_prob", "standard_error", "solver_error", "a", "row (data)"]
    assert all(error > 0 for error in scores["standard_error"])
    assert np.isfinite(scores["solver_error"]).tolist() == [True, True, False, False, False, False]
