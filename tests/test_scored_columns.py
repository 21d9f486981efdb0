"""Files of rows to score, and models that were saved: what would be taken for something else is refused or said."""

import numpy as np
import pandas as pd
import pytest
import torch

import flows
from flows.samples import class_number


@pytest.fixture
def trained(run):
    """A run on the columns a, b, c, whose ranges do not overlap."""
    rng = np.random.default_rng(0)
    pd.DataFrame(rng.normal([0, 100, 10_000], 1, (60, 3)), columns=list("abc")).to_csv("t.csv", index=False)
    quick = ("steps=2", "solver=rk4", "solver.step_size=0.5", "field.hidden=[4]", "reporting.plot_every=null")
    code, _, err = run(
        "train", "data=tabular", "data.path=t.csv", *quick, "output_dir=r", "reporting.progress_bar=false"
    )
    assert code == 0, err
    return run


def test_columns_by_other_names_and_in_another_order_are_not_taken_by_position(trained):
    rows = pd.read_csv("t.csv").iloc[:5] + 0.01
    rows.rename(columns={"b": "B"})[["c", "a", "B"]].to_csv("moved.csv", index=False)
    code, _, err = trained("evaluate", "checkpoint=r", "data.path=moved.csv")
    assert (code, "lacks 'b'" in err) == (2, True)
    rows.insert(0, "id", 1.0)
    rows[["id", "a", "b"]].to_csv("other.csv", index=False)
    code, _, err = trained("evaluate", "checkpoint=r", "data.path=other.csv")
    assert (code, "lacks 'c'" in err) == (2, True)


def test_rows_of_a_large_table_are_numbered_as_in_the_file(tmp_path):
    rows = np.random.default_rng(0).normal(size=(60, 2))
    np.save(tmp_path / "l.npy", rows)
    data = flows.datasets.LargeTable(tmp_path / "l.npy", num_validation=5, num_test=7, num_reference=10)
    for part in ("validation", "test"):
        np.testing.assert_allclose(rows[data.row_numbers(part).numpy()], data.held_out(part).x.numpy())


def test_numbers_name_classes_that_are_called_by_numbers():
    names = ["001", "007", "010"]
    assert [class_number(label, 3, names) for label in (1, 7, "010")] == [0, 1, 2]
    with pytest.raises(flows.FlowsError, match="class must be one of 001"):
        class_number(0, 3, names)
    assert class_number(1, 2, ["cat", "dog"]) == 1


def test_levels_of_sixteen_bits_share_one_scale(tmp_path):
    images = np.random.default_rng(0).integers(0, 200, (1200, 4, 4)).astype(np.uint16)
    images[1100:] *= 300  # beyond the first block
    np.save(tmp_path / "u16.npy", images)
    with pytest.warns(flows.errors.DataWarning):
        data = flows.datasets.ImageFiles(path=tmp_path / "u16.npy", mode="L")
    found = torch.cat([data.reference(), *(data.held_out(part).x for part in ("validation", "test"))])
    assert sorted(found.sum((1, 2, 3)).tolist()) == sorted((images >> 8).sum((1, 2)).tolist())


def test_a_density_estimator_keeps_its_settings_and_takes_what_it_was_fitted_on(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 2))
    model = flows.DensityEstimator(steps=np.int64(3), polish=0, hidden=np.array([4, 4]), random_state=0)
    model.fit(pd.DataFrame(x), context=pd.DataFrame(rng.normal(size=(40, 1))))
    again = flows.load(flows.save(model, tmp_path / "m.flow"))
    assert (again.steps, list(again.hidden)) == (3, [4, 4])
    words = np.array(["u", "v"] * 20)
    model = flows.DensityEstimator(steps=3, polish=0, hidden=(4, 4), random_state=0).fit(pd.DataFrame(x), context=words)
    assert model.score_samples(x[:2], context=words[:2]).shape == (2,)
    assert flows.DensityEstimator(steps=3, polish=0, hidden=(4, 4)).fit(pd.DataFrame(x)).sample(1).shape == (1, 2)
