"""Tables of numbers: reading, splitting, streaming, and what a bad file is told."""

import copy
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sklearn.datasets import load_breast_cancer
from torch.distributions import MultivariateNormal

from flows import CNF
from flows.datasets import BreastCancer, Table, Tabular
from flows.datasets.tables.diagnosis import near_copies
from flows.datasets.tables.ties import rounding_unit
from flows.errors import DataWarning, FileError, InvalidTypeError, InvalidValueError
from flows.evaluation import likelihood, part_batches
from flows.fields import MLP, Linear
from flows.objectives import FlowMatching, MaximumLikelihood
from flows.objectives.checks import check_flow
from flows.transforms import Identity, Standardise, Whiten

CONF = Path(__file__).parents[1] / "conf/data"
VALUES = np.random.default_rng(0).normal(size=(50, 3)).round(6)


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def all_rows(dataset: Table) -> np.ndarray:
    """Every row of the three parts, sorted by the first column."""
    fixed = [batch.x for batches in (dataset.validation_batches, dataset.test_batches) for batch in batches(4)]
    rows = torch.cat([*fixed, dataset.reference()]).numpy()
    return rows[np.argsort(rows[:, 0])]


def sort(values: np.ndarray) -> np.ndarray:
    return values[np.argsort(values[:, 0])]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def csv(values: np.ndarray, header: str = "", delimiter: str = ",") -> str:
    return header + "".join(delimiter.join(map(str, row)) + "\n" for row in values.tolist())


@pytest.mark.parametrize("kind", ["csv", "header.csv", "npy", "parquet"])
def test_every_format_gives_every_row_once(kind, tmp_path):
    path = tmp_path / f"table.{kind}"
    if kind == "npy":
        np.save(path, VALUES)
    elif kind == "parquet":
        pq.write_table(pa.table(dict(zip("abc", VALUES.T, strict=True))), path)
    else:
        write(path, csv(VALUES, "a,b,c\n" if "header" in kind else ""))
    dataset = Tabular(path)
    assert dataset.event_shape == (3,)
    assert dataset.columns == (["a", "b", "c"] if kind in ("parquet", "header.csv") else ["0", "1", "2"])
    assert (dataset.num_validation, dataset.num_test, len(dataset.reference())) == (5, 5, 40)
    np.testing.assert_array_equal(all_rows(dataset), sort(VALUES))
    order = torch.cat(list(dataset.split.values())).sort().values
    assert torch.equal(order, torch.arange(50))
    again = Tabular(path)
    assert torch.equal(again.reference(), dataset.reference())
    assert not torch.equal(Tabular(path, split_seed=1).reference(), dataset.reference())


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_columns_are_chosen_by_name_and_position(suffix, tmp_path):
    path = tmp_path / f"table.{suffix}"
    words = [f"word {i}" for i in range(50)]
    if suffix == "csv":
        lines = "".join(f"{w},{a},{b},{c}\n" for w, (a, b, c) in zip(words, VALUES.tolist(), strict=True))
        write(path, "id,a,b,c\n" + lines)
    else:
        pq.write_table(pa.table({"id": words, **dict(zip("abc", VALUES.T, strict=True))}), path)
    dataset = Tabular(path, columns=["c", 1])
    assert dataset.columns == ["c", "a"]
    np.testing.assert_array_equal(all_rows(dataset), sort(VALUES[:, [2, 0]]))
    with pytest.raises(ValueError, match=r"has no column 'd'; it has 'id', 'a', 'b', 'c'"):
        Tabular(path, columns=["d"])
    with pytest.raises(ValueError, match="at least one column and none twice, got \\['a', 1\\]"):
        Tabular(path, columns=["a", 1])
    with pytest.raises(InvalidTypeError, match=r"columns must be a list .*, got 'a'; write \['a'\]"):
        Tabular(path, columns="a")


def test_csv_dialects(tmp_path):
    spaced = csv(VALUES, '"height, cm";b;c\n\n', ";").replace("\n", "\r\n")
    path = tmp_path / "table.csv"
    path.write_bytes(b"\xef\xbb\xbf" + spaced.encode())
    dataset = Tabular(path, delimiter=";")
    assert dataset.columns == ["height, cm", "b", "c"]
    np.testing.assert_array_equal(all_rows(dataset), sort(VALUES))
    with pytest.raises(ValueError, match=r"has no ',' in its first line but ';'; set delimiter=semicolon"):
        Tabular(write(tmp_path / "other.csv", csv(VALUES, "", ";")))


def test_headers_are_recognised(tmp_path):
    years = write(tmp_path / "years.csv", csv(VALUES, "mean,2019,2020\n"))
    assert Tabular(years).columns == ["mean", "2019", "2020"]
    numbered = write(tmp_path / "numbered.csv", csv(VALUES, "0,1,2\n"))
    assert len(all_rows(Tabular(numbered))) == 50
    assert len(all_rows(Tabular(numbered, header=False))) == 51
    flowers = write(tmp_path / "flowers.csv", "".join(f"{a},{b},rose\n" for a, b, _ in VALUES.tolist()))
    assert len(all_rows(Tabular(flowers, columns=[0, 1]))) == 50


BAD_CSV = {
    "a,b,c,d\n1,x,y,3\n2,z,NA,4\n": r"'b' is 'x', not .*; moreover 'c' has words\. Numbers alone: columns=\[a,d\]",
    "a,b\n1,2\n3,x\n": r"bad\.csv: row 2 \(the first data row is row 1\), column 'b' is 'x', not a number; correct it",
    "a,b\n1,2\n3,\n": r"row 2 .* column 'b' is missing \(''\); fill it in",
    "1,2\n3,NA\n": r"row 2 .* column '1' is missing \('NA'\)",
    "1,2\n3,4,5\n": r"row 2 \(the first data row is row 1\) has 3 fields, expected 2",
    "a,b\n1,nan\n2,inf\n3,4\n": r"bad\.csv: 2 values in 2 of 3 rows are NaN or infinite; the first is nan in row 1",
    "": "is empty",
    "a,b\n": "a line of names and no row of numbers",
    "1,2\n2,3\n3,4\n": "has 3 rows, too few to split: 3 training, 0 test, 0 validation rows",
    "a,b\n" + "".join(f"{i},7\n" for i in range(20)): r"column 'b' is constant \(7\) .* leave it out: columns=\['a'\]",
}


@pytest.mark.parametrize("text", BAD_CSV)
def test_bad_csv(text, tmp_path):
    with pytest.raises(ValueError, match=BAD_CSV[text]):
        Tabular(write(tmp_path / "bad.csv", text))


def test_shifted_rows_are_noticed_in_a_selection_of_columns(tmp_path):
    lines = csv(VALUES, "a,b,c\n").splitlines()
    lines[7] = "0.1,0.2,0.3,0.4"
    with pytest.raises(ValueError, match=r"row 7 .* has 4 fields, expected 3"):
        Tabular(write(tmp_path / "table.csv", "\n".join(lines)), columns=["a"])
    with pytest.raises(ValueError, match="has 2 names in its first line, but rows of 3 fields"):
        Tabular(write(tmp_path / "names.csv", csv(VALUES, "a,b\n")))


def test_bad_files(tmp_path):
    (tmp_path / "latin.csv").write_bytes("größe,b\n1,2\n".encode("latin-1"))
    with pytest.raises(FileError, match=r"latin\.csv is not text in UTF-8"):
        Tabular(tmp_path / "latin.csv")
    with pytest.raises(FileError, match=r"no data file at .*none\.csv; a relative path starts at"):
        Tabular(tmp_path / "none.csv")
    with pytest.raises(
        ValueError, match=r"suffix is '\.xlsx', expected one of \.csv, \.npy, \.npz, \.parquet; convert"
    ):
        Tabular(write(tmp_path / "table.xlsx", ""))
    np.save(tmp_path / "flat.npy", np.arange(10.0))
    with pytest.raises(ValueError, match=r"must be a table .* got an array of shape \(10,\); reshape"):
        Tabular(tmp_path / "flat.npy")
    np.save(tmp_path / "words.npy", np.array([["a", "b"]]))
    with pytest.raises(ValueError, match="must hold real numbers, got <U1; convert"):
        Tabular(tmp_path / "words.npy")
    np.save(tmp_path / "objects.npy", np.array([[object()]]), allow_pickle=True)
    with pytest.raises(FileError, match=r"objects\.npy is not a whole \.npy file of numbers"):
        Tabular(tmp_path / "objects.npy")
    np.save(tmp_path / "cut.npy", VALUES)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-8])
    with pytest.raises(FileError, match=r"cut\.npy is not a whole \.npy file"):
        Tabular(tmp_path / "cut.npy")
    with pytest.raises(FileError, match=r"text\.parquet is not a whole Parquet file"):
        Tabular(write(tmp_path / "text.parquet", "no table"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
def test_only_regular_files_are_opened(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(FileError, match=r"folder\.csv is a folder; path must be the path of a data file"):
        Tabular(tmp_path / "folder.csv")
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "device.csv").symlink_to("/dev/zero")
    for name in ("pipe.csv", "device.csv"):
        with pytest.raises(FileError, match=rf"{name} is no regular file but a (device|pipe)"):
            Tabular(tmp_path / name)
    for path in ("a" * 5000 + ".csv", "null\0.csv"):
        with pytest.raises(FileError, match=r"cannot open|no data file"):
            Tabular(path)
    with pytest.raises(InvalidTypeError, match=r"path must be a text or a pathlib.Path, got 5"):
        Tabular(5)


@pytest.mark.parametrize("delimiter", ["", ",,", "\n", "t", ".", "tabulator"])
def test_delimiters_are_single_characters(delimiter, tmp_path):
    with pytest.raises(InvalidValueError, match=r"delimiter must be a single character .* tab, pipe, space, got"):
        Tabular(write(tmp_path / "table.csv", csv(VALUES)), delimiter=delimiter)


@pytest.mark.parametrize("columns", [5, 2.5, True])
def test_columns_are_a_list(columns, tmp_path):
    with pytest.raises(InvalidTypeError, match="columns must be a list"):
        Tabular(write(tmp_path / "table.csv", csv(VALUES)), columns=columns)


def test_a_header_that_claims_too_much(tmp_path):
    """A damaged .npy file must not make us allocate what its header says."""
    np.save(tmp_path / "huge.npy", VALUES)
    content = (tmp_path / "huge.npy").read_bytes()
    (tmp_path / "huge.npy").write_bytes(content.replace(b"(50, 3)", b"(9000000000000000, 3)").replace(b"  ", b"", 7))
    with pytest.raises(FileError, match=r"huge\.npy is not a whole \.npy file"):
        Tabular(tmp_path / "huge.npy")


def test_bad_parquet_columns(tmp_path):
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({"n": pa.array(range(50)), "word": ["a"] * 50}), path)
    with pytest.raises(ValueError, match=r"column 'word' is string, not numbers \(row 1 is 'a'\)"):
        Tabular(path)
    pq.write_table(pa.table({"n": pa.array([None, *range(49)]), "flag": [True, False] * 25}), path)
    with pytest.raises(ValueError, match=r"1 values in 1 of 50 rows .* nan in row 1 .* column 'n'"):
        Tabular(path)
    with pytest.warns(DataWarning, match="48 of 50 rows are duplicates|repeats values"):
        flags = Tabular(path, columns=["flag"])
    assert flags.reference().unique().tolist() == [0, 1]


def test_bad_tables():
    with pytest.raises(ValueError, match=r"must be a table \(rows, columns\), got an array of shape \(4, 3, 2\)"):
        Table(np.zeros((4, 3, 2)))
    with pytest.raises(InvalidTypeError, match="the table must hold real numbers only, its type is <U1"):
        Table([["1", "2"]])
    with pytest.raises(ValueError, match="test_fraction must be a finite number > 0 and < 1, got 0"):
        Table(VALUES, test_fraction=0)
    with pytest.raises(ValueError, match=r"must leave training rows, got 0\.5 \+ 0\.5"):
        Table(VALUES, validation_fraction=0.5, test_fraction=0.5)
    with pytest.raises(ValueError, match="has 3 columns, but columns has 2 names"):
        Table(VALUES, columns=["a", "b"])
    huge = VALUES.copy()
    huge[Table(VALUES).split["train"][0], 0] = 1e40
    with pytest.warns(DataWarning, match=r"outliers in column '0' .1e\+40"):
        dataset = Table(huge)
    assert dataset.train_stream(4, rng(), dtype=torch.float32).next().x.dtype == torch.float64


def test_a_pass_visits_each_row_at_most_once():
    train = Table(VALUES).reference()
    stream = Table(VALUES).train_stream(16, rng())
    seen = torch.cat([stream.next().x for _ in range(2)])
    assert len(torch.unique(seen, dim=0)) == 32  # of 40; eight wait for the next pass
    counts = torch.zeros(40)
    for _ in range(500):
        counts += (train[:, None] == stream.next().x).all(-1).any(1)
    assert counts.sum() == 500 * 16
    assert (counts - 200).abs().max() < 60


@pytest.mark.parametrize("batch_size", [40, 1000])
def test_batch_of_the_whole_table(batch_size):
    dataset = Table(VALUES)
    stream = dataset.train_stream(batch_size, rng())
    first, second = stream.next().x.numpy(), stream.next().x.numpy()
    assert not np.array_equal(first, second)
    for epoch in (first, second):
        np.testing.assert_array_equal(sort(epoch), sort(dataset.reference().numpy()))


@pytest.mark.parametrize("steps", [0, 1, 4, 5])
def test_stream_resumes_in_the_middle_of_a_pass(steps, tmp_path):
    stream = Table(VALUES).train_stream(8, rng(1))
    for _ in range(steps):
        stream.next()
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    expected = [stream.next().x for _ in range(12)]
    resumed = Table(VALUES).train_stream(8, rng(2))
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(torch.equal(resumed.next().x, x) for x in expected)
    with pytest.raises(ValueError, match="belongs to 40 training rows, but 'table' now has 30; resume with the file"):
        Table(VALUES, test_fraction=0.3).train_stream(8, rng()).load_state_dict(stream.state_dict())


def test_breast_cancer():
    dataset = instantiate(OmegaConf.load(CONF / "breast_cancer.yaml"))
    assert dataset.name == "breast_cancer"
    assert dataset.entropy is None
    assert dataset.event_shape == (30,)
    np.testing.assert_array_equal(all_rows(dataset)[:, 0], np.sort(load_breast_cancer().data[:, 0]))
    assert BreastCancer(columns=["mean area", 0]).columns == ["mean area", "mean radius"]


def test_yaml_of_a_file(tmp_path):
    config = OmegaConf.load(CONF / "tabular.yaml")
    config.path = str(write(tmp_path / "table.csv", csv(VALUES, "a,b,c\n")))
    config.columns = ["a", "c"]
    dataset = instantiate(config)
    assert dataset.name == "tabular"
    assert next(dataset.train_stream(5, rng())).x.shape == (5, 2)


def test_a_flow_in_float64_is_tested_on_points_in_float64(tmp_path) -> None:
    torch.set_default_dtype(torch.float32)  # as programs have it; the fixture sets it back
    np.save(tmp_path / "far.npy", 1e9 + np.random.default_rng(0).normal(size=(500, 1)))
    data = Tabular(tmp_path / "far.npy")
    flow = CNF(Linear((1,)), transform=Standardise((1,))).double()
    batches, count = part_batches(flow, data, "test", 10)
    points = torch.cat([batch.x for batch in batches])
    assert points.dtype == torch.float64
    assert len(points.unique()) == count == data.num_test


# Names and indices


@pytest.mark.parametrize(
    ("header", "values", "names"),
    [
        ("2019,2020,2021\n", VALUES, ["2019", "2020", "2021"]),
        ("1,2,3\n", VALUES, ["1", "2", "3"]),
        ("0,1,2\n", np.c_[VALUES[:, :2], np.arange(50) // 7], ["0", "1", "2"]),
    ],
)
def test_numbers_above_decimals_are_names(header, values, names, tmp_path):
    path = write(tmp_path / "numbers.csv", csv(values, header))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*repeats values", DataWarning)
        dataset = Tabular(path)
    assert dataset.columns == names
    np.testing.assert_array_equal(all_rows(dataset), sort(values))


def integers(count: int = 50, columns: int = 3, high: int = 10**9) -> np.ndarray:
    return np.random.default_rng(1).integers(high, size=(count, columns))


def test_a_guess_about_the_first_line_is_said(tmp_path):
    with pytest.warns(DataWarning, match="first line, 17,204,33, was taken for names; .* set header=false"):
        assert Tabular(write(tmp_path / "ids.csv", csv(VALUES, "17,204,33\n"))).columns == ["17", "204", "33"]
    with pytest.warns(DataWarning, match="first line, 0,1,2, was taken for names; .* set header=false"):
        dataset = Tabular(write(tmp_path / "whole.csv", csv(integers(), "0,1,2\n")))
    assert len(all_rows(dataset)) == 50
    with pytest.warns(DataWarning, match="first line, 0,1, was taken for numbers; .* set header=true"):
        dataset = Tabular(write(tmp_path / "two.csv", csv(integers(columns=2), "0,1\n")))
    assert len(all_rows(dataset)) == 51
    wide = np.random.default_rng(0).normal(size=(50, 5))
    with pytest.warns(DataWarning, match=r"first line, 400\.5,401\.0,401\.5,402\.0,402\.5, was taken for names"):
        dataset = Tabular(write(tmp_path / "spectra.csv", csv(wide, "400.5,401.0,401.5,402.0,402.5\n")))
    assert dataset.columns[0] == "400.5"
    whole = integers()
    assert len(all_rows(Tabular(write(tmp_path / "plain.csv", csv(whole))))) == 50


@pytest.mark.parametrize("name", ["", "Unnamed: 0", "Unnamed: 0.1", "__index_level_0__", "index", "level_0"])
@pytest.mark.parametrize("header", ["a,b,c", "0,1,2"])
def test_an_index_is_no_feature(name, header, tmp_path):
    rows = np.c_[np.arange(50), VALUES]
    lines = "".join(f"{int(i)},{a},{b},{c}\n" for i, a, b, c in rows.tolist())
    path = write(tmp_path / "table.csv", f"{name},{header}\n{lines}")
    with pytest.warns(DataWarning, match=f"column '{name}' is the index of a data frame, .* was left out"):
        dataset = Tabular(path)
    assert dataset.columns == header.split(",")
    np.testing.assert_array_equal(all_rows(dataset), sort(VALUES))
    with pytest.warns(DataWarning, match=f"column '{name}' only counts the rows"):
        assert Tabular(path, columns=[name, 1]).event_shape == (2,)


@pytest.mark.parametrize("name", ["__index_level_0__", "patient"])
def test_the_index_in_a_parquet_file_is_no_feature(name, tmp_path):
    table = pa.table({"a": VALUES[:, 0], "b": VALUES[:, 1], name: np.arange(50)[::-1] ** 2})
    table = table.replace_schema_metadata({"pandas": json.dumps({"index_columns": [name]})})
    pq.write_table(table, tmp_path / "table.parquet")
    with pytest.warns(DataWarning, match=f"column '{name}' is the index of a data frame"):
        dataset = Tabular(tmp_path / "table.parquet")
    assert dataset.columns == ["a", "b"]
    assert Tabular(tmp_path / "table.parquet", columns=["a", name]).columns == ["a", name]


def test_a_column_that_counts_rows():
    for counter in (np.arange(50), np.linspace(0, 3, 50), np.arange(100, 50, -1)):
        with pytest.warns(DataWarning, match="column 'time' only counts the rows, .* drop with columns="):
            Table(np.c_[counter, VALUES], columns=["time", "a", "b", "c"])


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_repeated_names(suffix, tmp_path):
    path = tmp_path / f"table.{suffix}"
    if suffix == "csv":
        write(path, csv(VALUES, "a,b,a\n"))
    else:
        pq.write_table(pa.table([pa.array(column) for column in VALUES.T], names=["a", "b", "a"]), path)
    with pytest.warns(DataWarning, match="names 'a' occur several times; the columns are now called 'a', 'b', 'a.1'"):
        dataset = Tabular(path)
    np.testing.assert_array_equal(all_rows(dataset), sort(VALUES))
    with pytest.raises(InvalidValueError, match="has 2 columns called 'a', at positions 0, 2; choose by position"):
        Tabular(path, columns=["a"])
    np.testing.assert_array_equal(all_rows(Tabular(path, columns=[2, "b"])), sort(VALUES[:, [2, 1]]))
    with pytest.raises(InvalidValueError, match="the table has several columns called 'a'"):
        Table(VALUES, columns=["a", "b", "a"])


# Densities without a floor

NORMAL = np.random.default_rng(2).normal(size=(2000, 3))
COUNTS = np.random.default_rng(3).poisson(3, 2000)
RAIN = np.where(np.random.default_rng(4).random(2000) < 0.3, 0, np.exp(NORMAL[:, 1]))
SHARES = np.random.default_rng(5).random((2000, 3))

TIES = {
    "binary": (NORMAL[:, 0] > 0, "2 distinct values in 2,000 rows"),
    "rounded": (NORMAL[:, 0].round(1), "distinct values in 2,000 rows"),
    "hundredths": (NORMAL[:, 0].round(2), "distinct values in 2,000 rows"),
    "counts": (COUNTS, "distinct values"),
    "scaled": ((NORMAL[:, 0] > 0) / 0.48 - 0.3, "2 distinct values"),
    "rain": (RAIN, "distinct values in 2,000 rows.* model the rows with the repeated values apart"),
    "clipped": (NORMAL[:, 0].clip(-1, 1), "distinct values in 2,000 rows"),
}


@pytest.mark.parametrize("kind", TIES)
def test_ties_are_named(kind):
    column, words = TIES[kind]
    with pytest.warns(DataWarning, match=rf"column 'tied' \(.*{words}"):
        Table(np.c_[NORMAL[:, 2], column], columns=["free", "tied"])


def test_ties_of_a_single_column_are_found():
    def units(values, context=None):
        return Table(values, dequantise_columns="auto", context=context, quiet=True).units.tolist()

    assert units(COUNTS[:, None]) == [1]
    assert units(COUNTS[:, None], NORMAL) == [1]
    copies = np.tile(NORMAL[:200], (10, 1))  # of whole rows, conditions included, are no ties
    assert units(copies[:, :1], copies[:, 1:]) == [0]
    with pytest.warns(DataWarning, match=r"column '0' \(.*distinct values in 2,000 rows"):
        Table(COUNTS[:, None], context=NORMAL)


DEPENDENT = {
    "copy": NORMAL[:, 0],
    "other unit": 1e6 - 2.54 * NORMAL[:, 0],
    "sum": NORMAL[:, 0] + 0.01 * NORMAL[:, 1],
    "six digits": (NORMAL[:, 0] - NORMAL[:, 1]).round(6),
    "single precision": (NORMAL[:, 0] - NORMAL[:, 1]).astype(np.float32),
}


@pytest.mark.parametrize("kind", DEPENDENT)
def test_dependent_columns_are_named(kind):
    with pytest.warns(DataWarning, match="column 'c' .of 'a'.* is a linear function of other columns.* drop with"):
        Table(np.c_[NORMAL[:, :2], DEPENDENT[kind]], columns=["a", "b", "c"])


def test_percentages_that_sum_to_a_hundred():
    percentages = (100 * SHARES / SHARES.sum(1, keepdims=True)).round(3)
    with pytest.warns(DataWarning, match="column 'c' .of 'a' and 'b'. is a linear function"):
        Table(percentages, columns=["a", "b", "c"])


def test_duplicates_in_training_and_test_rows_are_counted():
    rows = np.r_[NORMAL, NORMAL[:200]]
    with pytest.warns(DataWarning, match="200 of 2,200 rows are duplicates of other rows, and") as caught:
        dataset = Table(rows)
    train = set(map(tuple, dataset.reference().tolist()))
    (held_out,) = dataset.test_batches(1000)
    known = sum(tuple(row) in train for row in held_out.x.tolist())
    assert f"and {known} of 220 test rows" in str(caught[0].message)
    assert known > 0


@pytest.mark.parametrize("copy", ["rounded", "float32", "noise"])
@pytest.mark.parametrize("columns", [2, 3])
def test_copies_up_to_rounding_are_counted(copy, columns):
    rows = np.random.default_rng(5).normal(size=(1000, columns))
    noise = 1e-7 * np.random.default_rng(6).normal(size=(100, columns))
    copies = {"rounded": rows[:100].round(6), "float32": np.float32(rows[:100]), "noise": rows[:100] + noise}[copy]
    with pytest.warns(DataWarning, match="of 110 test rows equal a training row up to rounding") as caught:
        dataset = Table(np.r_[rows, copies])
    train, (held_out,) = dataset.reference(), dataset.test_batches(1000)
    known = int(((held_out.x[:, None] - train).abs().amax(-1) < 1e-5).any(-1).sum())
    assert f"{known} of 110" in str(caught[0].message)


@pytest.mark.parametrize("value", [1e30, -1e30, 1e6])
def test_outliers_are_named(value):
    rows = NORMAL.copy()
    rows[122, 1] = value
    with pytest.warns(DataWarning, match=r"outliers in column 'b' .*in row 123, .*remove these rows"):
        Table(rows, columns=["a", "b", "c"])


def test_honest_tables_are_silent():
    """Warnings are errors here."""
    random = np.random.default_rng(0)
    Table(NORMAL)
    Table(NORMAL.astype(np.float32))
    Table(random.standard_cauchy((5000, 2)))
    Table(np.exp(3 * NORMAL))
    Table(1e6 + NORMAL)
    near, product = NORMAL[:, 0] + 1e-3 * random.normal(size=2000), NORMAL[:, 0] * NORMAL[:, 1]
    Table(np.c_[NORMAL, product + 0.1 * random.normal(size=2000), near])
    Table(
        np.where(
            random.random((5000, 1)) < 0.5, random.normal(size=(5000, 2)), 5 + 1e-3 * random.normal(size=(5000, 2))
        )
    )
    Table(random.normal(size=(5000, 1)))
    Table(np.cumsum(random.normal(size=(3000, 2)), 0))  # neighbours in time are close
    Table(random.normal(size=(30, 40)))  # fewer rows than columns
    BreastCancer()


@pytest.mark.parametrize(
    ("values", "unit"),
    [
        ([0, 1], 1),
        ([0.1, 0.3, 0.8], 0.1),
        ([5, 10, 25], 5),
        ([-0.98, 1.02], 2),
        ([0, 0.25, 0.75], 0.25),
        ([1e9, 1e9 + 2, 1e9 + 6], 2),
        (np.float32([0.1, 0.2, 0.3, 1.7]).tolist(), 0.1),
        ([0.1, 0.1 + 1 / 3, 0.1 + 1], 1 / 3),
        ([0, 1, 2**0.5], None),
        ([4.0], None),
    ],
)
def test_rounding_unit(values, unit):
    assert rounding_unit(np.array(values, dtype=np.float64)) == (None if unit is None else pytest.approx(unit))


def test_dequantised_columns(tmp_path, caplog):
    binary = (NORMAL[:, 0] > 0).astype(float)
    path = tmp_path / "table.npy"
    np.save(path, np.c_[NORMAL[:, 1], binary, COUNTS])
    dataset = Tabular(path, dequantise_columns="auto")
    assert dataset.units.tolist() == [0, 1, 1]
    assert "uniform noise of one rounding unit is added to '1' (1), '2' (1)" in caplog.text
    stream = dataset.train_stream(1600, rng())
    first, second = stream.next().x, stream.next().x
    noise = []
    for x in (first, second, dataset.reference(), *(batch.x for batch in dataset.test_batches(1000))):
        assert {0.0, 1.0} == set(x[:, 1].round().tolist())
        noise.append(x[:, 1:] - x[:, 1:].round())
        assert len(x[:, 1:].unique()) == x[:, 1:].numel()
        assert set(x[:, 0].tolist()) <= set(NORMAL[:, 1].tolist())
    assert not set(first[:, 1].tolist()) & set(second[:, 1].tolist())  # drawn anew
    flat = torch.cat(noise).flatten().sort().values  # uniform on [-1/2, 1/2]: Kolmogorov and Smirnov's distance
    steps = torch.arange(len(flat)) / len(flat)
    assert (flat + 0.5 - steps).abs().max() < 1.95 / len(flat) ** 0.5
    again = Tabular(path, dequantise_columns=[1, "2"])
    for part in ("validation", "test"):
        assert torch.equal(again.held_out(part).x, dataset.held_out(part).x)
    assert torch.equal(again.reference(), dataset.reference())
    with pytest.raises(InvalidValueError, match=r"column '0' has no rounding unit: .* leave it out"):
        Tabular(path, dequantise_columns=[0])
    with pytest.raises(InvalidValueError, match="dequantise_columns must be 'auto', a list"):
        Tabular(path, dequantise_columns="all")


def test_noise_resumes_bit_for_bit():
    values = np.c_[NORMAL[:, 1], COUNTS]
    stream = Table(values, dequantise_columns="auto").train_stream(64, rng(1))
    stream.next()
    state = stream.state_dict()
    expected = [stream.next().x for _ in range(40)]
    resumed = Table(values, dequantise_columns="auto").train_stream(64, rng(2))
    resumed.load_state_dict(state)
    assert all(torch.equal(resumed.next().x, x) for x in expected)


def told_of(table):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Table(torch.as_tensor(table))
    return " ".join(str(one.message) for one in caught)


@pytest.mark.parametrize(
    ("surface", "group"),
    [
        (lambda z, u: [np.cos(u), z[0], np.sin(u)], "'0' and '2'"),
        (lambda z, u: [z[0], z[1], z[0] ** 2], "'0' and '2'"),
        (lambda z, u: [z[0], np.abs(z[0])], "'0' and '1'"),
        (lambda z, u: [z[0], np.exp(z[0])], "'0' and '1'"),
        (lambda z, u: [z[0], z[1], z[0] * z[1]], "'0' and '1' and '2'"),
        (lambda z, u: list(z[:3] / np.linalg.norm(z[:3], axis=0)), "'0' and '1' and '2'"),
        (lambda z, u: [*z, np.sin(2 * z[1])], "'1' and '4'"),
    ],
)
def test_columns_that_follow_from_others_are_named(surface, group):
    rng = np.random.default_rng(0)
    told = told_of(np.stack(surface(rng.normal(size=(4, 2000)), rng.uniform(0, 2 * np.pi, 2000)), 1))
    assert f"rows lie on a curve or surface in the columns {group}, as where" in told
    assert "drop one with columns" in told


@pytest.mark.parametrize(
    "table",
    [
        lambda r: r.normal(size=(2000, 5)),
        lambda r: np.exp(2 * r.normal(size=(2000, 3))),
        lambda r: r.standard_cauchy((2000, 2)).clip(-1e3, 1e3) + r.normal(size=(2000, 2)),
        lambda r: r.normal(size=(2000, 2)) @ np.array([[1.0, 1.0], [0.0, 1e-4]]),
        lambda r: np.stack([np.cos(u := r.uniform(0, 6.28, 2000)), np.sin(u)], 1) + 0.01 * r.normal(size=(2000, 2)),
        lambda r: np.where(r.uniform(size=(2000, 1)) < 0.5, 0.01, 1.0) * r.normal(size=(2000, 3)),
    ],
)
def test_densities_are_no_surfaces(table):
    for seed in range(3):
        assert "curve or surface" not in told_of(table(np.random.default_rng(seed)))


def test_mild_rounding_is_told_mildly():
    z = np.random.default_rng(0).normal(size=(1500, 2))
    mild, strong = told_of(z.round(3)), told_of(z.round(1))
    assert "repeat values, as rounding leaves them" in mild
    assert "no meaning" not in mild
    assert "have no meaning" in strong
    for told in (mild, strong):
        assert "dequantise_columns=auto" in told


@pytest.mark.parametrize("columns", [3, 12])  # by a tree, and by products
def test_near_copies_are_counted_in_few_and_many_columns(columns):
    rows = np.random.default_rng(0).normal(size=(4000, columns))
    test = np.concatenate([rows[:25] * (1 + 1e-9), rows[25:50], np.random.default_rng(1).normal(size=(150, columns))])
    assert near_copies(test, rows) == (25, 200)


def test_single_repeated_values_cannot_be_dequantised():
    with pytest.warns(DataWarning, match="column '1' .* model the rows with the repeated values apart"):
        dataset = Table(np.c_[NORMAL[:, 0], RAIN], dequantise_columns="auto")
    assert not dataset.units.any()


# Digits


FAR = {"a million": 1e6 + NORMAL, "time stamps": 1.7e9 + 10 * NORMAL, "a billion": -1e9 + NORMAL}


@pytest.mark.parametrize("transform", [Standardise, Whiten])
@pytest.mark.parametrize("kind", FAR)
def test_a_flow_in_float32_keeps_the_digits_of_a_table(kind, transform):
    """Density and samples of N(m, C) far from 0, through a flow that is the identity."""
    torch.set_default_dtype(torch.float32)
    dataset = Table(FAR[kind], columns=["a", "b", "c"])
    flow = CNF(Linear((3,), torch.zeros(3, 3)), transform=transform((3,)).fit(dataset.reference()))
    assert flow.dtype == torch.float32
    for batch in (dataset.train_stream(64, rng(), dtype=torch.float32).next(), next(dataset.test_batches(64))):
        assert batch.x.dtype == torch.float64
        assert len(batch.x.unique()) == batch.x.numel()
    train = dataset.reference()
    truth = MultivariateNormal(train.mean(0), train.T.cov() if transform is Whiten else train.var(0).diag())
    points = next(dataset.test_batches(1000)).x
    found = flow.log_prob(points)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth.log_prob(points), rtol=0, atol=2e-3)
    evaluated = likelihood(flow, dataset.test_batches(100, dtype=torch.float32))
    assert evaluated.nll == pytest.approx(-float(truth.log_prob(points).mean()), abs=1e-3)
    samples, log_prob = flow.sample_and_log_prob((2000,), generator=rng())
    assert samples.dtype == torch.float64
    assert len(samples[:, 0].unique()) > 1990
    assert ((samples.mean(0) - train.mean(0)) / train.std(0)).abs().max() < 4 * 2000**-0.5
    torch.testing.assert_close(log_prob.double(), truth.log_prob(samples), rtol=0, atol=2e-3)
    torch.testing.assert_close(flow.log_prob(samples), log_prob, rtol=0, atol=2e-3)
    for moved in (copy.deepcopy(flow).half().float(), copy.deepcopy(flow).to(torch.bfloat16).float()):
        assert torch.equal(moved.transform.mean, flow.transform.mean)
        assert moved.transform.mean.dtype == torch.float64
    check_flow(flow, dataset)  # without a warning


def test_points_near_zero_stay_in_the_dtype_of_the_flow():
    torch.set_default_dtype(torch.float32)
    flow = CNF(Linear((3,), torch.zeros(3, 3)), transform=Standardise((3,)).fit(torch.from_numpy(NORMAL)))
    assert flow.sample((3,)).dtype == flow.log_prob(torch.zeros(2, 3)).dtype == torch.float32


def test_lost_digits_are_named():
    torch.set_default_dtype(torch.float32)
    dataset = Table(np.c_[1e6 + NORMAL[:, 0], NORMAL[:, 1]], columns=["far", "near"])
    words = r"lose digits in torch.float32 .* Identity: column 'far' \(\d+ of 1,600 distinct values .*=standardise"
    with pytest.warns(DataWarning, match=words):
        FlowMatching().check(CNF(Linear((2,)), transform=Identity()), dataset)
    MaximumLikelihood().check(CNF(Linear((2,)).double(), transform=Identity()), dataset)


@pytest.mark.parametrize("transform", [Standardise, Whiten, Identity])
@pytest.mark.parametrize("objective", [FlowMatching(), MaximumLikelihood()])
def test_tables_train_flows_in_float32(objective, transform):
    torch.set_default_dtype(torch.float32)
    dataset = Table(NORMAL + (0 if transform is Identity else 1e6))
    flow = CNF(MLP((3,), (8,)), transform=Identity() if transform is Identity else transform((3,)))
    flow.transform.fit(dataset.reference())
    objective.check(flow, dataset)
    loss = objective(flow, dataset.train_stream(32, rng()).next(), rng()).loss
    loss.backward()
    assert all(weights.grad.dtype == torch.float32 for weights in flow.parameters() if weights.grad is not None)
    assert loss.isfinite()
    assert loss < 20
