"""Data of a run are recognised: what differs is named, and test points that were trained on are counted."""

import copy
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from small_run import small_gaussian, small_table, small_trainer

from flows.datasets import (
    Checkerboard,
    Digits,
    DoubleWell,
    Gaussian,
    GaussianMean,
    ImageFiles,
    Images,
    LabelledImages,
    Phi4,
    Table,
    Tabular,
)
from flows.datasets.recognition.comparison import compare
from flows.datasets.recognition.recognition import recognised, refuse_other_data, without_noise
from flows.errors import DataWarning, InvalidValueError
from flows.training.checkpoint import describe, fingerprint_entry

VALUES = np.random.default_rng(0).normal(size=(300, 3)) * [1.0, 2.0, 30.0] + [0.0, 5.0, 1e6]


def stored(dataset):
    return describe(dataset) | fingerprint_entry(dataset)


def table(values=VALUES, columns=("a", "b", "c"), **settings):
    return Table(values, columns=list(columns), **settings)


def changed(row, column, value):
    values = VALUES.copy()
    values[row, column] = value
    return values


def trained_on(one, other, part="test"):
    """Count by comparing every row with every other."""
    known = {tuple(row) for row in one._parts["train"].tolist()}
    return sum(tuple(row) in known for row in other._parts[part].tolist())


OTHER_TABLES = {
    "a row appended": (
        lambda: table(np.vstack([VALUES, [[0.1, 0.2, 0.3]]])),
        r"1 row was added \(301 rows, 300 in the run\)",
    ),
    "rows removed": (lambda: table(VALUES[:290]), r"missing \(290 rows, 300 in the run\)"),
    "rows reversed": (lambda: table(VALUES[::-1]), "split is another one, as the rows come in another order"),
    "a value changed": (lambda: table(changed(7, 1, 4.0)), r"values changed in the column 'b'"),
    "renamed": (lambda: table(columns=("a", "b", "d")), r"columns were renamed: 'c' is now 'd'"),
    "names exchanged": (lambda: table(columns=("b", "a", "c")), r"'b' holds what was 'a', 'a' holds what was 'b'"),
    "test_fraction": (lambda: table(test_fraction=0.5), r"test_fraction is 0.5, 0.1 in the run"),
    "validation_fraction": (lambda: table(validation_fraction=0.2), r"validation_fraction is 0.2, 0.1 in the run"),
    "split_seed": (lambda: table(split_seed=1), r"split_seed is 1, 0 in the run"),
    "split_by": (lambda: table(split_by="content"), r"split_by is content, position in the run"),
    "groups": (lambda: table(groups=np.arange(300) // 10), r"groups is True, False in the run"),
    "other rows": (
        lambda: table(np.random.default_rng(1).normal(size=(300, 3))),
        r"no training row of the run is among them",
    ),
    "a column more": (
        lambda: table(np.hstack([VALUES, VALUES[::-1, :1] ** 2]), "abcd"),
        r"4 columns, .* \('d' added\); set columns=\[a,b,c\]",
    ),
    "a column less": (lambda: table(VALUES[:, :2], "ab"), r"2 columns, those of the run 3 \('c' missing\)"),
    "rounded and reversed": (
        lambda: table(np.round(VALUES[::-1], 6)),
        r"the rows are those of the run up to rounding, in another order or split",
    ),
}


@pytest.mark.parametrize("case", OTHER_TABLES)
def test_another_table_is_named_and_refused(case):
    build, message = OTHER_TABLES[case]
    run, other = table(), build()
    with pytest.raises(InvalidValueError, match=message):
        refuse_other_data(stored(run), other)
    if other.event_shape == (3,):
        with pytest.warns(DataWarning, match=message):
            _, found = recognised(stored(run), other, "test")
        exact = table(VALUES[::-1]) if case == "rounded and reversed" else other
        assert found.trained_on("test") == (trained_on(run, exact), other.num_test)
        assert found.trained_on("validation")[0] == trained_on(run, exact, "validation")


@pytest.mark.parametrize("part", ["hashes", "without", "steps", "chance", "chance_without"])
def test_an_edited_entry_for_rounded_rows_is_damaged(part):
    entry = copy.deepcopy(stored(table()))
    rounded = entry["fingerprint"]["rounded"]
    rounded[part] = rounded[part][:1] if part != "chance" else "much"
    with pytest.raises(InvalidValueError, match=r"data in the checkpoint is damaged.*another checkpoint"):
        recognised(entry, table(VALUES[::-1] + 1e-4), "test")


def test_the_count_is_that_of_a_comparison_by_hand():
    run, other = table(), table(VALUES[::-1])
    assert 0 < trained_on(run, other) < other.num_test
    with pytest.warns(DataWarning, match=rf"{trained_on(run, other)} of 30 test points are training points of the run"):
        recognised(stored(run), other, "test")


def test_many_rows_are_counted_from_a_sample(monkeypatch):
    monkeypatch.setattr("flows.datasets.recognition.fingerprint.MAX_KEPT", 1000)
    values = torch.randn(20_000, 2).numpy()
    run, other = Table(values), Table(values, test_fraction=0.3)
    found = compare(stored(run), other)
    assert len(stored(run)["fingerprint"]["trained"]) == 1000
    expected = trained_on(run, other)
    sampled = other.num_test * found.share
    assert abs(found.trained_on("test")[0] - expected) < 4 * other.num_test * (0.25 / sampled) ** 0.5
    assert found.trained_on_in_words("test").startswith("about ")


@pytest.mark.parametrize("kind", ["parquet", "npy", "text", "ulp", "moved"])
def test_the_same_table_in_another_file_is_the_same(kind, tmp_path):
    path, other = tmp_path / "table.csv", tmp_path / f"other.{kind if kind in ('parquet', 'npy') else 'csv'}"
    rows = "\n".join(",".join(map(repr, row)) for row in VALUES.tolist())
    names = "" if kind == "npy" else "a,b,c\n"
    path.write_text(names + rows)
    run = stored(Tabular(path))
    if kind == "parquet":
        pq.write_table(pa.table(dict(zip("abc", VALUES.T, strict=True))), other)
    elif kind == "npy":
        np.save(other, VALUES)
    elif kind == "text":
        other.write_text(names + "\n".join(",".join(f"{v:.17e}" for v in row) for row in VALUES.tolist()))
    elif kind == "ulp":  # as a reader that does not round to the nearest number
        other.write_text(names + "\n".join(",".join(map(repr, row)) for row in np.nextafter(VALUES, 1e9).tolist()))
    else:
        path.rename(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert recognised(run, Tabular(other), "test")[1].differences == []
        refuse_other_data(run, Tabular(other))


def six_digits(values):
    return np.array([[float(f"{value:.6g}") for value in row] for row in values.tolist()])


NORMAL = np.random.default_rng(4).normal(size=(600, 3))
ROUNDED = {
    "float32": lambda rows: rows.astype(np.float32),
    "six digits": six_digits,
    "noise": lambda rows: rows + 1e-6 * np.random.default_rng(5).normal(size=rows.shape),
}


@pytest.mark.parametrize("case", ROUNDED)
def test_rounded_rows_are_recognised(case):
    run, exact, other = table(NORMAL), table(NORMAL[::-1]), table(ROUNDED[case](NORMAL[::-1]))
    expected = trained_on(run, exact)
    assert expected > 30
    words = rf"{expected} of 60 test points are training points of the run up to rounding, so the figures reward memory"
    with pytest.warns(DataWarning, match=words):
        recognised(stored(run), other, "test")
    with pytest.raises(InvalidValueError, match="those of the run up to rounding, in another order or split"):
        refuse_other_data(stored(run), other)
    again = table(ROUNDED[case](NORMAL))
    with pytest.warns(DataWarning, match="values are rounded otherwise.* the run goes on with these values"):
        refuse_other_data(stored(run), again)
    with pytest.warns(DataWarning, match="values are rounded otherwise.*; 0 of 60 test points"):
        recognised(stored(run), again, "test")


CHANGES = {
    "scaled": lambda column: 10 * column,
    "negated": lambda column: -column,
    "shifted": lambda column: column + 3.0,
}


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.parametrize("rounded", [False, True])
def test_rows_with_a_changed_column_are_counted_by_the_others(case, rounded):
    values = NORMAL[::-1].copy()
    values[:, 1] = CHANGES[case](values[:, 1])
    run, other = table(NORMAL), table(values.astype(np.float32) if rounded else values)
    expected = trained_on(run, table(NORMAL[::-1]))
    with pytest.warns(DataWarning, match="values changed in the column 'b'") as told:
        _, found = recognised(stored(run), other, "test")
    assert abs(found.trained_on("test")[0] - expected) <= 2
    assert "test points equal training points of the run in all columns but 'b'" in str(told[0].message)


def test_where_rows_cannot_be_compared_it_is_said():
    run = table(NORMAL[:, :1], "a")
    with pytest.warns(DataWarning, match="0 of 60 test points .* column was changed cannot be recognised"):
        recognised(stored(run), table(10 * NORMAL[::-1, :1], "a"), "test")


@pytest.mark.parametrize("columns", [1, 2, 3, 8])
def test_new_rows_are_not_taken_for_rounded_ones(columns):
    for seed, scale in ((6, 1.0), (7, 1e-3)):
        run = Table(np.exp(np.random.default_rng(seed).normal(size=(600, columns))), quiet=True)
        other = Table(scale * np.random.default_rng(seed + 10).normal(size=(600, columns)), quiet=True)
        assert compare(stored(run), other).trained_on("test") == (0, 60)


def test_rounded_rows_are_counted_from_a_sample(monkeypatch):
    monkeypatch.setattr("flows.datasets.recognition.rounded_rows.MAX_KEPT", 3000)
    values = np.random.default_rng(8).normal(size=(10_000, 3))
    run, entry = table(values), stored(table(values))
    assert entry["fingerprint"]["rounded"]["hashes"].numel() == 3000
    assert entry["fingerprint"]["rounded"]["without"].numel() <= 3000
    found = compare(entry, table(values[::-1].astype(np.float32)))
    expected = trained_on(run, table(values[::-1]))
    assert abs(found.trained_on("test")[0] - expected) < 4 * (expected * 0.7 / 0.3) ** 0.5
    assert found.trained_on_in_words("test").startswith("about ")


@pytest.mark.parametrize("names", [("a", "b", "c"), None])
def test_permuted_columns_are_put_right(names):
    run, order = Table(VALUES, columns=names), [2, 0, 1]
    other = Table(VALUES[:, order], columns=None if names is None else [names[i] for i in order])
    with pytest.raises(InvalidValueError, match=r"columns come in another order; set columns=\["):
        refuse_other_data(stored(run), other)
    with pytest.warns(DataWarning, match="columns come in another order"):
        right, found = recognised(stored(run), other, "test")
    assert not found.differences
    for split in ("validation", "test"):
        assert torch.equal(right.held_out(split).x, run.held_out(split).x)
    assert torch.equal(right.reference(), run.reference())
    streams = [data.train_stream(10, torch.Generator().manual_seed(0)) for data in (right, run)]
    assert torch.equal(next(streams[0]).x, next(streams[1]).x)


def test_permuted_columns_with_a_row_more_are_put_right():
    other = table(np.vstack([VALUES, [[0.1, 0.2, 0.3]]])[:, ::-1], "cba")
    with pytest.warns(DataWarning) as told:
        right, found = recognised(stored(table()), other, "test")
    assert "another order" in str(told[0].message)
    assert "1 row was added" in str(told[1].message)
    assert right.columns == ["a", "b", "c"]
    assert found.trained_on("test")[0] == trained_on(table(), right) > 0


def test_noise_is_part_of_the_data():
    values = np.round(VALUES, 1)
    settings = [None, ["a"], ["a", "b"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        tables = [table(values, dequantise_columns=columns) for columns in settings]
    for other in (tables[0], tables[2]):
        with pytest.raises(InvalidValueError, match=r"noise is .* in the run"):
            refuse_other_data(stored(tables[1]), other)
    refuse_other_data(stored(tables[1]), tables[1])


def test_samples_of_noisy_columns_are_rounded_to_the_values_of_the_data():
    values = np.c_[np.arange(300) % 7 * 0.5 + 0.25, VALUES[:, 0]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        dataset = Table(values, columns=["a", "b"], dequantise_columns=["a"])
    noisy = dataset.held_out("test").x
    rounded, names = without_noise(stored(dataset), noisy)
    assert names == ["a"]
    assert torch.equal(rounded, dataset._parts["test"])
    assert not torch.equal(noisy, rounded)
    assert without_noise(stored(table()), noisy) == (noisy, [])


def test_a_split_by_content_survives_appending_and_reordering():
    run = table(split_by="content")
    more = np.vstack([VALUES, np.random.default_rng(3).normal(size=(50, 3))])[::-1][:, [1, 2, 0]]
    other = Table(more, columns=["b", "c", "a"], split_by="content").reordered([2, 0, 1])
    with pytest.warns(DataWarning, match=r"50 rows were added .* 0 of \d+ test points are training points"):
        recognised(stored(run), other, "test")
    again = table(VALUES[::-1], split_by="content")
    refuse_other_data(stored(run), again)
    assert torch.equal(again.reference(), run.reference())
    for part, fraction in {"validation": 0.1, "test": 0.1}.items():
        assert abs(len(run.split[part]) - 300 * fraction) < 4 * (300 * fraction) ** 0.5


def test_copies_stay_together_in_a_split_by_content():
    with pytest.warns(DataWarning, match="600 of 900 rows are duplicates .* all in the same part") as told:
        copied = table(np.repeat(VALUES, 3, axis=0), split_by="content")
    assert not [warning for warning in told if "memory" in str(warning.message)]
    parts = {part: {tuple(row) for row in rows.tolist()} for part, rows in copied._parts.items()}
    assert not parts["train"] & (parts["test"] | parts["validation"])


@pytest.mark.parametrize("split_by", ["position", "content"])
def test_groups_stay_together(split_by):
    groups = np.random.default_rng(0).integers(60, size=300)
    dataset = table(groups=groups, split_by=split_by)
    members = {part: set(groups[rows.numpy()].tolist()) for part, rows in dataset.split.items()}
    assert not members["train"] & members["test"] | members["train"] & members["validation"]
    assert torch.equal(torch.cat(list(dataset.split.values())).sort().values, torch.arange(300))
    if split_by == "position":
        assert all(abs(len(dataset.split[part]) - 30) <= 5 for part in ("validation", "test"))
    with pytest.raises(InvalidValueError, match="has 2 groups, needed at least one in each"):
        table(groups=groups % 2)
    with pytest.raises(InvalidValueError, match="groups must have one entry for each of 300 rows"):
        table(groups=groups[:-1])


PIXELS = torch.randint(256, (200, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(3, (200,), generator=torch.Generator().manual_seed(1))


def images(pixels=PIXELS, labels=LABELS, seed=0, fraction=0.1, **settings):
    parts = LabelledImages(pixels, labels).split(0.1, fraction, seed)
    return Images(parts, **{"num_classes": 3, "conditional": True, **settings})


OTHER_IMAGES = {
    "another seed": (lambda: images(seed=1), "the split is another one"),
    "another fraction": (lambda: images(fraction=0.3), "the split is another one"),
    "reversed": (lambda: images(PIXELS.flip(0), LABELS.flip(0)), "the split is another one"),
    "one more": (
        lambda: images(torch.cat([PIXELS, PIXELS[:1] // 2]), torch.cat([LABELS, LABELS[:1]])),
        "1 row was added",
    ),
    "one pixel": (lambda: images(torch.cat([PIXELS[:1] // 2, PIXELS[1:]])), "are missing"),
    "classes renumbered": (lambda: images(labels=(LABELS + 1) % 3), "classes are numbered otherwise"),
    "classes": (lambda: images(num_classes=4), "number of classes is 4, 3 in the run"),
    "levels": (lambda: images(num_levels=300), "number of levels is 300, 256 in the run"),
    "contexts": (lambda: images(conditional=False), r"shape of contexts is null, \[3\] in the run"),
}


@pytest.mark.parametrize("case", OTHER_IMAGES)
def test_other_images_are_named(case):
    build, message = OTHER_IMAGES[case]
    other = build()
    with pytest.raises(InvalidValueError, match=message):
        refuse_other_data(stored(images()), other)
    refuse_other_data(stored(other), other)


def test_mirrored_training_images_are_no_other_data_but_no_run_goes_on_with_them():
    assert not compare(stored(images()), images(flip=True)).differences
    with pytest.raises(InvalidValueError, match="flip is True, False in the run"):
        refuse_other_data(stored(images()), images(flip=True))


def test_a_folder_of_pictures_with_a_file_more_or_renamed(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(40):
        Image.fromarray(np.random.default_rng(i).integers(256, size=(4, 4), dtype=np.uint8)).save(
            folder / f"{i:02}.png"
        )
    run = stored(ImageFiles(path=folder))
    folder.rename(tmp_path / "moved")
    moved = tmp_path / "moved"
    refuse_other_data(run, ImageFiles(path=moved))
    with pytest.raises(InvalidValueError, match="split_seed is 1, 0 in the run"):
        refuse_other_data(run, ImageFiles(path=moved, split_seed=1))
    (moved / "05.png").rename(moved / "zz.png")
    with pytest.raises(InvalidValueError, match="the split is another one, as the rows come in another order"):
        refuse_other_data(run, ImageFiles(path=moved))
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(moved / "00b.png")
    with pytest.warns(DataWarning, match=r"1 row was added .* \d of 4 test points are training points"):
        recognised(run, ImageFiles(path=moved), "test")


def gaussian(mean=1.0, **settings):
    return Gaussian([mean, 0.0], [[1.0, 0.0], [0.0, 1.0]], **settings)


OTHER_DENSITIES = {
    "a parameter": (gaussian(), gaussian(2.0), r"mean is \[2.0, 0.0\], \[1.0, 0.0\] in the run"),
    "sizes": (gaussian(), gaussian(num_test=7), r"num_test is 7, 100000 in the run"),
    "energy": (DoubleWell(), DoubleWell(tilt=0.5), r"tilt is 0.5, 1.0 in the run"),
    "lattice": (Phi4(), Phi4(coupling=1.0), r"coupling is 1.0"),
    "contexts": (GaussianMean(), GaussianMean(sd=0.9), "another density|sd is 0.9"),
}


@pytest.mark.parametrize("case", OTHER_DENSITIES)
def test_another_density_is_named(case):
    run, other, message = OTHER_DENSITIES[case]
    with pytest.raises(InvalidValueError, match=message):
        refuse_other_data(stored(run), other)
    refuse_other_data(stored(run), run)
    refuse_other_data(stored(other), other)


def test_a_density_whose_parameter_is_hidden_is_known_by_its_draws():
    class Hidden(Checkerboard):
        name = "hidden"
        factor = 1.0

        def sample(self, n, generator):
            return self.factor * super().sample(n, generator)

    run, other = Hidden(), Hidden()
    refuse_other_data(stored(run), Hidden())
    other.factor = 1.01
    with pytest.raises(InvalidValueError, match="hidden is another density than in the run"):
        refuse_other_data(stored(run), other)


def test_a_run_is_not_resumed_with_other_data(tmp_path):
    small_trainer(tmp_path / "run", small_table()).fit()
    values = torch.cat(list(small_table()._parts.values()))
    with pytest.raises(InvalidValueError, match="other data or another split"):
        small_trainer(
            tmp_path / "run", Table(values, validation_fraction=10 / 81, test_fraction=10 / 81), resume=tmp_path / "run"
        )
    small_trainer(tmp_path / "drawn").fit()
    other = small_gaussian()
    other.mean += 1
    other._drawn.clear()
    with pytest.raises(InvalidValueError, match="mean is"):
        small_trainer(tmp_path / "drawn", other, resume=tmp_path / "drawn")


def test_digits_name_their_split():
    with pytest.raises(InvalidValueError, match=r"test_fraction is 0.3, 0.2 in the run"):
        refuse_other_data(stored(Digits()), Digits(test_fraction=0.3))


def test_a_damaged_fingerprint_is_said():
    content = stored(table())
    content["fingerprint"] = {**content["fingerprint"], "trained": "no tensor"}
    with pytest.raises(InvalidValueError, match="fingerprint of the data in the checkpoint is damaged"):
        compare(content, table())
