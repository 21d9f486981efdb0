"""Tables with conditions: columns as contexts in data units, kept with the flow, recognised, and refused by name."""

import csv
import json
import re

import numpy as np
import pandas
import pytest
import torch

import flows
from flows.conditions import Conditions
from flows.datasets import Table, Tabular
from flows.datasets.recognition.comparison import compare
from flows.encoders import Embedding, Standardised
from flows.errors import FlowsError, InvalidTypeError, InvalidValueError
from flows.samples import chosen_context, save_samples
from flows.training.building import build_flow

SEX = ("female", "male")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def columns(rows=300, seed=0):
    rng = np.random.default_rng(seed)
    age, sex, rooms = rng.uniform(20, 80, rows).round(1), rng.choice(SEX, rows), rng.choice([2, 4, 7], rows)
    y = 0.1 * age + 2 * (sex == "male") + rooms + rng.normal(size=rows)
    return {"age": age, "sex": sex, "rooms": rooms, "y": y}


def csv_file(path, given):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(given)
        writer.writerows(zip(*(list(values) for values in given.values()), strict=True))
    return path


@pytest.fixture(scope="module")
def table_path(tmp_path_factory):
    return csv_file(tmp_path_factory.mktemp("table") / "homes.csv", columns())


def homes(path, **settings):
    chosen = {"context_columns": ["age", "sex", "rooms"], "categories": ["rooms"], **settings}
    return Tabular(path, **chosen)


def test_contexts_are_the_entries_of_the_columns(table_path):
    data, given = homes(table_path), columns()
    assert data.columns == ["y"]
    assert data.event_shape == (1,)
    assert data.context_shape == (3,)
    assert data.conditions == Conditions(["age", "sex", "rooms"], {"sex": SEX, "rooms": (2.0, 4.0, 7.0)})
    for split in ("validation", "test"):
        batch, rows = data.held_out(split), data.split[split].numpy()
        assert batch.context[:, 0].tolist() == given["age"][rows].tolist()
        assert [SEX[int(i)] for i in batch.context[:, 1]] == given["sex"][rows].tolist()
        assert batch.context[:, 2].tolist() == given["rooms"][rows].tolist()
    batch = next(data.train_stream(50, torch.Generator().manual_seed(0)))
    by_y = {y: i for i, y in enumerate(given["y"].tolist())}
    assert [given["age"][by_y[y]] for y in batch.x[:, 0].tolist()] == batch.context[:, 0].tolist()


def test_numbers_are_standardised_by_the_training_part_and_categories_one_hot(table_path):
    data = homes(table_path)
    encoder = Standardised(3, conditions=data.conditions).fit(data.reference_contexts())
    features = encoder(data.reference_contexts())
    assert encoder.features_shape == (6,)
    torch.testing.assert_close(features[:, 0].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(features[:, 0].std(), torch.tensor(1.0))
    given = encoder(encoder.contexts({"age": [40, 40], "sex": ["male", "female"], "rooms": 7}))
    assert given[:, 1:].tolist() == [[0, 1, 0, 0, 1], [1, 0, 0, 0, 1]]


def test_one_context_in_words_is_the_same_in_every_form(table_path):
    conditions = homes(table_path).conditions
    expected = torch.tensor([42.0, 1.0, 7.0], dtype=torch.float64)
    assert conditions.encode({"age": 42, "sex": "male", "rooms": 7}).equal(expected)
    assert conditions.encode([{"age": "42", "sex": "male", "rooms": "7"}]).equal(expected[None])
    assert conditions.encode(expected[None]).equal(expected[None])
    assert conditions.decode(expected[None]) == {"age": [42.0], "sex": ["male"], "rooms": [7.0]}
    assert chosen_context((3,), None, None, [42, "male", 7], conditions).equal(expected)


def test_data_frames_and_arrays_give_the_same_table(table_path):
    pandas = pytest.importorskip("pandas")
    frame, from_file = pandas.DataFrame(columns()), homes(table_path)
    frame["rooms"] = frame["rooms"].astype("category")
    data = Table(frame[["y"]], context=frame[["age", "sex", "rooms"]])
    assert data.conditions == from_file.conditions
    assert data.held_out("test").context.equal(from_file.held_out("test").context)
    assert data.conditions.encode(frame).shape == (300, 3)  # other columns are ignored
    numbers = Table(frame[["y"]], context=frame[["age"]].to_numpy())
    assert numbers.conditions == Conditions(["c0"])
    assert numbers.context_shape == (1,)


def test_parquet_files_of_words_and_pandas_categories(tmp_path, table_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(columns())
    frame["rooms"] = frame["rooms"].astype("category")
    frame.to_parquet(tmp_path / "homes.parquet")
    data = Tabular(tmp_path / "homes.parquet", context_columns=["age", "sex", "rooms"])
    assert data.conditions == homes(table_path).conditions
    stored = homes(table_path)
    assert not compare({**stored.description(), "fingerprint": stored.fingerprint()}, data).differences


CONFIG = {
    "transform": {"_target_": "flows.transforms.Standardise"},
    "field": {"_target_": "flows.fields.MLP", "hidden": [8]},
    "divergence": {"_target_": "flows.divergence.Auto"},
    "solver": {"_target_": "flows.ODESolver"},
}


def test_a_flow_on_such_a_table_has_an_encoder_of_its_columns(table_path):
    data = homes(table_path)
    flow = build_flow(CONFIG, data.event_shape, data)
    context = flow.encoder.contexts({"age": 42, "sex": "male", "rooms": 7})
    batch = data.held_out("test")
    assert flow.log_prob(batch.x, batch.context).shape == (30,)
    assert flow.sample(5, context=context).shape == (5, 1)
    people = pandas.DataFrame({"name": ["Ann", "Bob"], "sex": ["male", "female"], "age": [42, 30], "rooms": [7, 2]})
    rows, x = flow.encoder.contexts(people), batch.x[:2]
    for given in (people, people.to_dict("list") | {"name": []}, people.drop(columns="name").to_dict("records")):
        if isinstance(given, dict):
            del given["name"]
        assert torch.equal(flow.log_prob(x, given), flow.log_prob(x, rows))
        assert torch.equal(flow(given).log_prob(x), flow.log_prob(x, rows))
        one, other = (flow.sample(3, c, torch.Generator().manual_seed(0)) for c in (given, rows))
        assert torch.equal(one, other)
        assert torch.equal(flow.transport(x, context=given).x, flow.transport(x, context=rows).x)
        assert torch.equal(flow.encode(given), flow.encode(rows))
        assert torch.equal(flow.estimate_log_prob(x, given).value, flow.estimate_log_prob(x, rows).value)
    assert flow.sample_and_log_prob(5, {"age": 42, "sex": "male", "rooms": 7})[0].shape == (5, 1)
    with pytest.raises(InvalidValueError, match="the context lacks 'rooms'"):
        flow.sample(2, context={"age": 42, "sex": "male"})
    with pytest.raises(InvalidTypeError, match="a mapping, a list of mappings, a data frame or numbers, got str"):
        flow.log_prob(x, "male")
    moved = flow.log_prob(batch.x, batch.context + torch.tensor([10.0, 0, 0]))
    assert not torch.allclose(moved, flow.log_prob(batch.x, batch.context))
    embedded = build_flow({**CONFIG, "encoder": {"_target_": "flows.encoders.Embedding"}}, (1,), data)
    assert isinstance(embedded.encoder, Embedding)
    assert embedded.encoder.contexts({"age": 1, "sex": "male", "rooms": 2}).tolist() == [1, 1, 2]
    assert embedded.log_prob(batch.x, batch.context).shape == (30,)


@pytest.mark.filterwarnings("ignore:.*repeats values")  # of y, under other conditions
def test_copies_and_training_rows_are_told_by_values_and_conditions(tmp_path):
    given = columns(200)
    given["age"] = given["age"] + 0.001 * np.arange(200)
    given["y"] = np.tile(np.random.default_rng(1).normal(size=100), 2)  # each value twice, under other conditions
    path = csv_file(tmp_path / "t.csv", given)
    data = Tabular(path, context_columns=["age", "sex"], columns=["y"])
    stored = {**data.description(), "fingerprint": data.fingerprint()}
    assert not compare(stored, Tabular(path, context_columns=["age", "sex"], columns=["y"])).differences
    other = {**given, "age": given["age"] + 1}
    found = compare(stored, Tabular(csv_file(tmp_path / "o.csv", other), context_columns=["age", "sex"], columns=["y"]))
    assert "other rows" in found.text
    assert found.trained_on("test")[0] == 0
    fewer = {name: values[: -(len(values) // 10)] for name, values in given.items()}
    found = compare(stored, Tabular(csv_file(tmp_path / "f.csv", fewer), context_columns=["age", "sex"], columns=["y"]))
    assert found.differences
    assert found.trained_on("test")[0] > 0


def test_categories_of_a_run_are_known_to_other_data(table_path, tmp_path):
    data = homes(table_path)
    males = {name: values[columns()["sex"] == "male"] for name, values in columns().items()}
    path = csv_file(tmp_path / "males.csv", males)
    other = homes(path, conditions=data.conditions)
    assert other.conditions == data.conditions
    assert (other.held_out("test").context[:, 1] == 1).all()
    males["sex"] = np.where(np.arange(len(males["sex"])) == 4, "unsaid", males["sex"])
    with pytest.raises(InvalidValueError, match=r"row 5: column 'sex'.*unknown category 'unsaid'.*'female', 'male'"):
        homes(csv_file(tmp_path / "new.csv", males), conditions=data.conditions)


def test_published_test_rows_are_the_test_part(table_path, tmp_path):
    rows = tmp_path / "rows.txt"
    rows.write_text("3\n0.0\n7.000e+00\n")
    data = homes(table_path, test_rows=rows)
    assert data.split["test"].tolist() == [0, 3, 7]
    assert len(data.split["train"]) == 267
    with pytest.raises(InvalidValueError, match=r"from 0 to 299.*row 300 does not exist"):
        homes(table_path, test_rows=[300])
    with pytest.raises(InvalidValueError, match="a row comes twice"):
        homes(table_path, test_rows=[3, 3])
    with pytest.raises(InvalidValueError, match="leave out split_by and groups"):
        homes(table_path, test_rows=[3], split_by="content")


BAD_TABLES = [
    ({"columns": ["y", "age"]}, "'age' cannot be both a value and a condition; take it out of columns or of"),
    ({"context_columns": ["age", "sx"]}, r"context_columns: .* has no column 'sx'; it has 'age', 'sex', 'rooms', 'y'"),
    ({"context_columns": ["age", "sex"]}, "categories has 'rooms', which is no condition; add it to context_columns"),
    ({"context_columns": ["age", "sex", "rooms", "y"]}, "no column is left whose density could be learned"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_TABLES)
def test_columns_that_cannot_be_conditions_are_refused(table_path, settings, message):
    with pytest.raises(InvalidValueError, match=message):
        homes(table_path, **settings)


def test_bad_entries_of_conditions_are_refused(tmp_path):
    def table(**changes):
        return Tabular(csv_file(tmp_path / "t.csv", columns() | changes), context_columns=["age", "sex"])

    words = columns()["sex"].astype(object)
    empty = np.where(np.arange(300) == 7, "", words)
    with pytest.raises(InvalidValueError, match=r"row 8 .*no condition in column 'sex'; fill it in"):
        table(sex=empty)
    with pytest.raises(InvalidValueError, match=r"row 8 .*no condition in column 'age'"):
        table(age=np.where(np.arange(300) == 7, np.nan, columns()["age"]))
    with pytest.raises(InvalidValueError, match=r"'age' is constant in the 240 training rows.*context_columns="):
        table(age=np.full(300, 3))
    with pytest.raises(InvalidValueError, match="'sex' holds a single category, 'male'"):
        table(sex=np.full(300, "male"))
    rare = int(Table(np.random.default_rng(0).normal(size=(300, 2))).split["test"][0])
    with pytest.raises(
        InvalidValueError, match=rf"row {rare + 1} .*'unsaid' in column 'sex', which no training row has"
    ):
        table(sex=np.where(np.arange(300) == rare, "unsaid", words))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"age": 42, "sex": "x", "rooms": 7}, "column 'sex' .*unknown category 'x'; known are 'female', 'male'"),
        ({"age": 42, "sex": "male", "rooms": 5}, "column 'rooms' .*unknown category 5; known are 2, 4, 7"),
        ([{"age": 42, "sex": "male", "rooms": 7}, {"age": 42, "rooms": 7}], "row 2: the context lacks 'sex'; it needs"),
        ({"age": 42, "sx": "male", "rooms": 7}, r"no column 'sx' \(did you mean sex\?\)"),
        ({"age": [1, 2], "sex": ["male"], "rooms": 7}, r"one length, got \{'age': 2, 'sex': 1\}"),
        ({"age": None, "sex": "male", "rooms": 7}, r"'age' of the context has no value \(None\)"),
        ({"age": "old", "sex": "male", "rooms": 7}, "'age' of the context must be a finite number, got 'old'"),
        (
            torch.ones(4, 2),
            r"shape \(3,\), one entry for each of 'age', 'sex', 'rooms', got a tensor of shape \(4, 2\)",
        ),
        (torch.tensor([[1.0, 0, 2], [1.0, 2, 2]]), "1 of 2 .*unknown category in column 'sex'.*2 at index 1"),
        (torch.tensor([[1.0, 0, 2], [torch.nan, 0, 2]]), "1 of 2 contexts hold NaN .*index 1 in column 'age'"),
    ],
)
def test_bad_contexts_are_refused_by_row_and_column(table_path, given, message):
    data = homes(table_path)
    flow = build_flow(CONFIG, data.event_shape, data)
    with pytest.raises(FlowsError, match=message):
        flow.encoder.contexts(given)
    if isinstance(given, torch.Tensor):
        with pytest.raises(InvalidValueError, match=message):
            flow.log_prob(torch.zeros(len(given), 1), given)
        with pytest.raises(InvalidValueError, match=message):
            flow.sample(2, context=given)


def test_contexts_of_other_kinds_say_what_is_expected(table_path):
    unnamed = flows.CNF(flows.fields.MLP(2, (8,), context_shape=3))
    with pytest.raises(InvalidTypeError, match=r"must be a torch.Tensor or None, .*no names; their shape is \(3"):
        unnamed.sample(2, context={"age": 3})
    with pytest.raises(InvalidTypeError, match=r"context must be a torch.Tensor or None, .*write torch.as_tensor"):
        unnamed.log_prob(torch.zeros(2, 2), np.zeros((2, 3)))
    with pytest.raises(InvalidTypeError, match=r"a mapping, a list of mappings, a data frame or numbers, got str"):
        homes(table_path).conditions.encode("male")
    with pytest.raises(InvalidValueError, match="the entries of these contexts have no names; give a tensor"):
        Standardised(3).contexts({"age": 3})
    with pytest.raises(InvalidValueError, match="have no names, so context must be a list of numbers, 2 of them"):
        chosen_context((2,), None, None, {"age": 3})
    with pytest.raises(InvalidValueError, match=r"must have 3 entries, such as \{'age': 0.5, 'sex': 'female'"):
        chosen_context((3,), None, None, [1, 2], homes(table_path).conditions)


def test_samples_of_several_contexts_are_written_with_their_conditions(tmp_path, table_path):
    conditions = homes(table_path).conditions
    csv_file(tmp_path / "people.csv", {"name": ["Ann", "Bob"], "rooms": [7, 2], "sex": SEX, "age": [30, 60]})
    contexts = chosen_context((3,), None, None, str(tmp_path / "people.csv"), conditions)
    assert contexts.tolist() == [[30, 0, 7], [60, 1, 2]]
    samples, each = torch.arange(4.0)[:, None], contexts.repeat_interleave(2, 0)
    save_samples(tmp_path / "s.csv", samples, ["y"], given=conditions.decode(each), num_contexts=2)
    lines = (tmp_path / "s.csv").read_text().splitlines()
    assert lines == ["age,sex,rooms,y", "30,female,7,0", "30,female,7,1", "60,male,2,2", "60,male,2,3"]
    save_samples(tmp_path / "s.npy", samples, num_contexts=2)
    assert np.load(tmp_path / "s.npy").tolist() == [[[0], [1]], [[2], [3]]]
    csv_file(tmp_path / "less.csv", {"age": [30], "sex": ["male"]})
    with pytest.raises(InvalidValueError, match=re.escape("less.csv: the context lacks 'rooms'")):
        chosen_context((3,), None, None, str(tmp_path / "less.csv"), conditions)


def test_a_conditions_of_bad_columns_is_refused():
    with pytest.raises(InvalidValueError, match="at least one column and each name once"):
        Conditions(["a", "a"])
    with pytest.raises(InvalidValueError, match="categories are given for 'b', and the conditions are 'a'"):
        Conditions(["a"], {"b": ["x", "y"]})
    with pytest.raises(InvalidValueError, match="the categories of 'a' must be two or more"):
        Conditions(["a"], {"a": ["x"]})
    with pytest.raises(InvalidValueError, match=r"context_shape must be \(1,\)"):
        flows.encoders.Standardised(2, conditions=Conditions(["a"]))


def trained(data, steps=150):
    flow = build_flow(CONFIG, data.event_shape, data)
    stream, objective = data.train_stream(256, torch.Generator().manual_seed(0)), flows.objectives.FlowMatching()
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(flow, next(stream), torch.Generator().manual_seed(1)).loss.backward()
        optimizer.step()
    return flow.requires_grad_(False)


def test_a_single_value_is_tested_by_its_crps_and_its_intervals(table_path):
    data = homes(table_path)
    flow = build_flow(CONFIG, data.event_shape, data)
    flow.field.out.weight.data.zero_()
    flow.field.out.bias.data.zero_()
    found = flows.evaluation.DensityEvaluator(data, progress_bar=False).measured(flow)
    assert list(found) == ["crps", "coverage"]
    none = flows.evaluation.DensityEvaluator(data, metrics=[], progress_bar=False).measured(flow)
    assert none == {}
    plane = Tabular(table_path, columns=["y", "age"], context_columns=["sex"], dequantise_columns=["age"])
    flow = build_flow(CONFIG, plane.event_shape, plane)
    assert flows.evaluation.DensityEvaluator(plane, progress_bar=False).measured(flow) == {}


@pytest.mark.slow
def test_pictures_follow_the_conditions(table_path):
    data = homes(table_path)
    flow = trained(data)
    pictures = flows.plots.figures(flow, data, torch.Generator().manual_seed(0))
    assert list(pictures) == ["samples", "predictive_intervals", "samples_by_category"]
    axes = pictures["predictive_intervals"].axes[0]
    (median,) = (line for line in axes.get_lines() if line.get_label() == "median")
    slope = np.polyfit(median.get_xdata(), median.get_ydata(), 1)[0]
    assert 0.05 < slope < 0.15  # y = 0.1 age + ...
    titles = [each.get_title() for each in pictures["samples_by_category"].axes]
    assert [title for title in titles if title] == ["sex: female", "sex: male", "rooms: 2", "rooms: 4", "rooms: 7"]
    plane = Tabular(table_path, columns=["y", "age"], context_columns=["rooms", "sex"], dequantise_columns=["age"])
    pictures = flows.plots.figures(build_flow(CONFIG, plane.event_shape, plane), plane)
    assert len(pictures["predictive_intervals"].axes) == 2


def test_intervals_name_the_conditions_that_are_held(table_path):
    data = homes(table_path)
    figure = flows.plots.predictive_intervals(build_flow(CONFIG, data.event_shape, data), data, 5, 3)
    contexts, names = data.reference_contexts(), list(data.conditions.columns)
    most_frequent = {name: contexts[:, names.index(name)].mode().values.item() for name in ("sex", "rooms")}
    words = figure.get_supxlabel()
    assert f"sex {data.conditions.categories['sex'][int(most_frequent['sex'])]}" in words
    assert f"rooms {most_frequent['rooms']:g}" in words
    assert "age" not in words  # the only number, which the panel varies


def test_plots_of_conditions_say_what_they_need(table_path):
    moons = flows.datasets.Moons(num_validation=10, num_test=10)
    flow = flows.CNF(flows.fields.MLP(2, hidden=(4,)))
    with pytest.raises(InvalidValueError, match=r"one or two values given columns of a table, got 'moons'.*no cond"):
        flows.plots.predictive_intervals(flow, moons)
    data = Tabular(table_path, columns=["y"], context_columns=["sex"])
    with pytest.raises(InvalidValueError, match="needs a condition that is a number; use samples_by_category"):
        flows.plots.predictive_intervals(build_flow(CONFIG, (1,), data), data)
    data = Tabular(table_path, columns=["y"], context_columns=["age"])
    with pytest.raises(InvalidValueError, match="needs a condition that holds categories"):
        flows.plots.samples_by_category(build_flow(CONFIG, (1,), data), data)


def test_regression_tables_take_their_published_split(tmp_path):
    table = np.random.default_rng(0).normal(size=(50, 4)).round(6)
    table[:, 1] = 3.0
    np.savetxt(tmp_path / "data.txt", table)
    (tmp_path / "test_rows_2.txt").write_text("4\n0\n")
    data = flows.datasets.UCIRegression(tmp_path, split=2)
    assert data.conditions.columns == ("x0", "x2")
    assert data.held_out("test").x[:, 0].tolist() == table[[0, 4], 3].tolist()
    assert data.held_out("test").context.tolist() == table[[0, 4]][:, [0, 2]].tolist()
    with pytest.raises(FlowsError, match=r"test_rows_0\.txt"):
        flows.datasets.UCIRegression(tmp_path)


def test_regression_tables_get_noise_where_the_target_repeats(tmp_path):
    table = np.random.default_rng(0).normal(size=(400, 3))
    table[:, 2] = (3 * table[:, 0]).round()  # such as the quality of wine
    np.savetxt(tmp_path / "data.txt", table)
    (tmp_path / "test_rows_0.txt").write_text("4\n0\n")
    data = flows.datasets.UCIRegression(tmp_path)
    assert data.units.tolist() == [1]
    noise = data.reference() - data.reference().round()
    assert noise.std() == pytest.approx(12**-0.5, rel=0.1)


def test_the_entropy_of_the_generated_table_is_right():
    conditional_table = pytest.importorskip("benchmarks.conditional_table")
    table = conditional_table.conditional_table(2000)
    draws = np.random.default_rng(0)
    for name, (draw, entropy) in conditional_table.KINDS.items():
        counts, edges = np.histogram(draw(draws, 400_000), bins=400)
        share, width = counts[counts > 0] / 400_000, np.diff(edges)[counts > 0]
        assert abs(-(share * np.log(share / width)).sum() - entropy) < 0.01, name
    assert 0.5 < table.entropy < 2.5


@pytest.mark.slow
def test_a_run_on_a_table_with_conditions_from_end_to_end(table_path, tmp_path, monkeypatch, capsys):
    from flows.cli import evaluate, sample, train

    monkeypatch.chdir(tmp_path)
    conditions = [f"data.path={table_path}", "data.context_columns=[age,sex,rooms]", "data.categories=[rooms]"]
    tiny = ["field.hidden=[8]", "solver=rk4", "solver.step_size=0.25", "reporting.progress_bar=false"]
    steps = "objective.flow_matching.steps"
    rest = ["objective=flow_matching", "reporting.plot_every=null", "hardware.accelerator=cpu", "output_dir=run"]
    train.main(["data=tabular", *conditions, *tiny, *rest, f"{steps}=4", "objective.flow_matching.batch_size=16"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test_crps"] > 0
    assert 0 <= summary["test_coverage"] <= 1
    sample.main(["checkpoint=run", "context={age: 42, sex: male, rooms: 7}", "num_samples=2", "output=s.csv"])
    lines = (tmp_path / "s.csv").read_text().splitlines()
    assert lines[0] == "age,sex,rooms,y"
    assert all(line.startswith("42,male,7,") for line in lines[1:])
    evaluate.main(["checkpoint=run", "output=e.json", "device=cpu"])
    tested = json.loads((tmp_path / "e.json").read_text())
    assert tested["nll"] == pytest.approx(summary["test_nll"])
    assert tested["coverage"] == pytest.approx(summary["test_coverage"], abs=0.1)
    train.main(["resume=run", f"{steps}=6"])
    other = columns() | {"age": columns()["age"] + 1}
    changed = csv_file(tmp_path / "changed.csv", other)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train.main(["resume=run", f"{steps}=8", f"data.path={changed}"])
    assert stopped.value.code == 2
    assert "the run was started on other data or another split" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sample.main(["checkpoint=run", "context={age: 42, sex: other, rooms: 7}"])
    assert "unknown category 'other'; known are 'female', 'male'" in capsys.readouterr().err
