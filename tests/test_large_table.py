"""Tables larger than memory: read in parts, shuffled without memory, resumed bit for bit."""

import copy
import gc
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import flows
from flows.datasets import LargeTable
from flows.datasets.permutations import Permutation
from flows.datasets.recognition.comparison import compare
from flows.errors import FileError, InvalidValueError
from flows.training.building import build_model

ROWS = np.random.default_rng(0).normal(size=(2000, 3)) * [1.0, 2.0, 0.01] + [0.0, 5.0, 1e6]
SIZES = {"num_validation": 50, "num_test": 70, "num_reference": 100, "quiet": True}


def write(folder, kind, rows=ROWS):
    if kind == "npy":
        np.save(folder / "rows.npy", rows)
        return folder / "rows.npy"
    table = pa.table({f"c{i}": column for i, column in enumerate(rows.T)})
    if kind == "parquet":
        pq.write_table(table, folder / "rows.parquet", row_group_size=130)
        return folder / "rows.parquet"
    (folder / "shards").mkdir()
    for i, start in enumerate(range(0, len(rows), 700)):
        pq.write_table(table.slice(start, 700), folder / "shards" / f"{i}.parquet", row_group_size=300)
    return folder / "shards"


KINDS = ("npy", "parquet", "shards")


def numbers_of(x):
    """The row of the file that each row of `x` is."""
    places = {row.tobytes(): i for i, row in enumerate(ROWS)}
    return [places[row.tobytes()] for row in x.numpy()]


def stream_of(data, batch_size=100, seed=0):
    return data.train_stream(batch_size, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [1, 2, 3, 17, 1000, 4096])
def test_a_permutation_holds_each_number_once(count):
    found = Permutation(count, 5)(np.arange(count))
    assert sorted(found.tolist()) == list(range(count))
    if count > 10:
        assert (found != Permutation(count, 6)(np.arange(count))).mean() > 0.8
        assert abs(np.corrcoef(found, np.arange(count))[0, 1]) < 0.5


def test_permutations_put_each_number_anywhere():
    """Over many keys, each of 12 numbers comes first equally often (χ² below its 99.9 % point)."""
    first = [int(Permutation(12, key)(np.arange(1))[0]) for key in range(2400)]
    counts = np.bincount(first, minlength=12)
    assert ((counts - 200) ** 2 / 200).sum() < 31.3


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_takes_each_training_row_once(tmp_path, kind):
    data = LargeTable(write(tmp_path, kind), **SIZES)
    held = numbers_of(data.held_out("validation").x) + numbers_of(data.held_out("test").x)
    assert len(set(held)) == 120
    stream = stream_of(data, 94)  # 20 batches are a pass
    seen = [numbers_of(next(stream).x) for _ in range(40)]
    first, second = ([row for batch in seen[i : i + 20] for row in batch] for i in (0, 20))
    assert sorted(first + held) == list(range(2000))
    assert sorted(second + held) == list(range(2000))
    assert first != second
    assert abs(np.corrcoef(first, range(len(first)))[0, 1]) < 0.2
    assert set(numbers_of(data.reference())) < set(first)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [0, 3, 19, 21])
def test_a_stream_resumes_bit_for_bit(tmp_path, kind, steps):
    path = write(tmp_path, kind)
    stream = stream_of(LargeTable(path, **SIZES), 94)
    for _ in range(steps):
        next(stream)
    other = stream_of(LargeTable(path, **SIZES), 94, seed=9)
    other.load_state_dict(stream.state_dict())
    for _ in range(25):
        assert torch.equal(next(other).x, next(stream).x)


def test_small_windows_are_read_across_their_borders(tmp_path, monkeypatch):
    monkeypatch.setattr("flows.datasets.tables.row_files.WINDOW_BYTES", 8 * 3 * 300)
    data = LargeTable(write(tmp_path, "parquet"), **SIZES)
    stream = stream_of(data, 470)
    seen = [row for _ in range(4) for row in numbers_of(next(stream).x)]
    assert len(set(seen)) == 1880


@pytest.mark.parametrize("kind", KINDS)
def test_standardisation_is_that_of_all_training_rows(tmp_path, kind):
    data = LargeTable(write(tmp_path, kind), **SIZES)
    held = numbers_of(data.held_out("validation").x) + numbers_of(data.held_out("test").x)
    training = np.delete(ROWS, held, axis=0)
    config = {
        "field": {"_target_": "flows.fields.MLP", "hidden": [4]},
        "transform": {"_target_": "flows.transforms.Standardise"},
        "solver": {"_target_": "flows.solvers.ODESolver"},
        "divergence": {"_target_": "flows.divergence.Exact"},
    }
    flow = build_model(config, data.event_shape, dataset=data)
    np.testing.assert_allclose(flow.transform.mean, training.mean(0), rtol=1e-14)
    np.testing.assert_allclose(flow.transform.sd, training.std(0, ddof=1), rtol=1e-10)


def test_the_same_rows_are_recognised_in_either_format_and_others_are_not(tmp_path):
    data = LargeTable(write(tmp_path, "npy"), **SIZES)
    stored = {"fingerprint": data.fingerprint(), **data.description()}
    assert not compare(stored, LargeTable(tmp_path / "rows.npy", **SIZES)).differences
    again = LargeTable(write(tmp_path, "shards"), name="large_table", **SIZES)
    assert again.split_settings["checksum"] == data.split_settings["checksum"]
    changed = ROWS.copy()
    place = next(iter(set(range(2000)) - set(numbers_of(torch.cat([data.reference(), *data._held_out.values()])))))
    changed[place, 0] += 1e-9
    (tmp_path / "other").mkdir()
    other = compare(stored, LargeTable(write(tmp_path / "other", "npy", changed), **SIZES))
    assert "checksum" in " ".join([*other.differences, *other.unequal])


def test_a_run_that_is_resumed_is_the_run_that_was_not(tmp_path):
    path = write(tmp_path, "parquet")

    def trainer(folder, steps, **options):
        torch.manual_seed(0)
        flow = flows.CNF(flows.fields.MLP((3,), hidden=(4,)), transform=flows.transforms.Standardise((3,)))
        data = LargeTable(path, **SIZES)
        flow.transform.fit_moments(*data.moments())
        reporting = flows.training.Reporting(progress_bar=False, plot_every=None)
        stage = flows.training.Stage(flows.objectives.FlowMatching(), steps, batch_size=300, schedule="constant")
        output = tmp_path / folder
        return flows.Trainer(flow, data, {"match": stage}, reporting=reporting, output_dir=output, **options)

    trainer("whole", 10).fit()
    trainer("parts", 4).fit()
    trainer("parts", 10, resume=tmp_path / "parts").fit()
    one, two = (torch.load(tmp_path / n / "checkpoints/last.pt", weights_only=False) for n in ("whole", "parts"))
    assert all(torch.equal(one["model"][name], two["model"][name]) for name in one["model"])


BAD = {
    "too few": (lambda folder: write(folder, "npy", ROWS[:100]), "100 rows, too few .* smaller num_validation"),
    "nan": (lambda folder: write(folder, "parquet", np.where(ROWS[7] == ROWS, np.nan, ROWS)), r"row 8 .* 'c0'"),
    "constant": (lambda folder: write(folder, "npy", ROWS * [1, 0, 1]), "column '1' is constant in the 1,880"),
    "columns first": (lambda folder: write(folder, "npy", np.asfortranarray(ROWS)), r"column by column, .*ascontig"),
    "words": (lambda folder: words(folder), "column 'c1' is string, not numbers"),
    "an empty folder": (lambda folder: folder, "holds no .parquet files"),
    "text": (lambda folder: text(folder), "its suffix is '.csv', expected .npy or .parquet"),
    "no columns": (lambda folder: write(folder, "npy", ROWS[:, :0]), "has no columns"),
    "beyond float64": (
        lambda folder: write(folder, "npy", ROWS * [1, 1e300, 1]),
        "column '1' are too large or too small",
    ),
    "a cube": (lambda folder: write(folder, "npy", ROWS.reshape(100, 20, 3)), "must be a table"),
}


def words(folder):
    pq.write_table(pa.table({"c0": ROWS[:, 0], "c1": ["a"] * len(ROWS)}), folder / "words.parquet")
    return folder / "words.parquet"


def text(folder):
    (folder / "rows.csv").write_text("1,2\n")
    return folder / "rows.csv"


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused(tmp_path, case):
    make, message = BAD[case]
    with pytest.raises(InvalidValueError, match=message):
        LargeTable(make(tmp_path), **SIZES)


def test_a_half_file_and_one_that_shrinks_are_told(tmp_path):
    path = write(tmp_path, "npy")
    data = LargeTable(path, **SIZES)
    content = path.read_bytes()
    path.write_bytes(content[:5000])
    with pytest.raises(FileError, match="has become shorter since it was opened"):
        next(stream_of(data))
    with pytest.raises(FileError, match=r"not a whole \.npy file"):
        LargeTable(path, **SIZES)


def test_a_state_of_another_file_or_a_damaged_one_is_refused(tmp_path):
    stream = stream_of(LargeTable(write(tmp_path, "npy"), **SIZES))
    state = stream.state_dict()
    with pytest.raises(InvalidValueError, match=r"belongs to 7 training rows, but .* has 1,880"):
        stream.load_state_dict(state | {"rows": 7})
    for damage in ({"position": -1}, {"position": 9999}, {"key": "x"}, {"key": -3}):
        with pytest.raises(InvalidValueError, match="saved position is damaged"):
            stream.load_state_dict(state | damage)


def test_values_that_repeat_are_warned_of(tmp_path):
    path = write(tmp_path, "npy", np.column_stack([ROWS, np.round(ROWS[:, 0])]))
    with pytest.warns(flows.errors.DataWarning, match="by 220 of its rows"):
        LargeTable(path, **{**SIZES, "quiet": False})


@pytest.mark.parametrize("kind", ["npy", "parquet"])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda data: pickle.loads(pickle.dumps(data))])
def test_a_copy_opens_the_file_again(tmp_path, kind, copied):
    data = LargeTable(write(tmp_path, kind), **SIZES)
    expected = next(stream_of(data)).x
    other = copied(data)
    torch.testing.assert_close(next(stream_of(other)).x, expected, rtol=0, atol=0)
    del other
    gc.collect()
    with (tmp_path / "unrelated").open("wb"):  # takes the number of a file that was closed
        torch.testing.assert_close(next(stream_of(data)).x, expected, rtol=0, atol=0)
    packed = pickle.dumps(data)
    write(tmp_path, kind, ROWS[:-1])
    with pytest.raises(FileError, match="has changed since it was opened"):
        pickle.loads(packed)


def test_empty_row_groups_are_passed_over(tmp_path):
    folder = write(tmp_path, "shards")
    pq.write_table(pq.read_table(folder / "0.parquet").slice(0, 0), folder / "0_empty.parquet")
    data = LargeTable(folder, **SIZES)
    stream = stream_of(data)
    assert len(set(numbers_of(torch.cat([next(stream).x for _ in range(18)])))) == 1800
