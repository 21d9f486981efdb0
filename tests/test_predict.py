"""`flows predict` and `flows evaluate` on a trained neural ODE, as a person runs them."""

import json
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import flows
from flows.cli import predict as program
from flows.cli.initial import read_initial, read_times
from flows.datasets.tables.readers import read_table
from flows.errors import DataWarning, InvalidValueError
from flows.training import load_flow

TINY = [
    "model=neural_ode",
    "data=pendulum",
    "data.num_series=20",
    "data.num_times=8",
    "data.noise=0.05",
    "model.noise=0.1",
    "field.hidden=[8]",
    "field.num_frequencies=0",
    "solver=rk4",
    "solver.step_size=0.5",
    "objective=trajectory_matching",
    "objective.trajectory_matching.steps=2",
    "objective.trajectory_matching.warmup_steps=0",
    "hardware.accelerator=cpu",
    "reporting.plot_every=null",
    "reporting.progress_bar=false",
]


class Explosion(nn.Module):
    """dx/dt = x², which ends at t = 1/x(0)."""

    event_shape = (2,)

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(1.0))

    def forward(self, t, x):
        return self.rate * x**2


@pytest.fixture
def trained(run):
    code, out, err = run("train", *TINY, "output_dir=run")
    assert code == 0, err
    assert "relative error" in out
    return run


def test_predictions_are_those_of_the_model_with_their_errors(trained, tmp_path, monkeypatch):
    code, out, err = trained(
        "predict", "checkpoint=run", "initial=[[0.5,0.1],[1.0,-0.2]]", "times=0:2:0.5", "output=new/p.csv"
    )
    assert code == 0, err
    assert "2 x 5 states, t = 0 to 2, in new/p.csv" in out
    assert (tmp_path / "new/p.png").stat().st_size > 10_000
    table, names = read_table(tmp_path / "new/p.csv")
    assert names == [
        "id",
        "time",
        "angle",
        "speed",
        *(f"{n}_{w}" for w in ("solver_error", "sd") for n in ("angle", "speed")),
    ]
    model = load_flow(tmp_path / "run")
    start = torch.tensor([[0.5, 0.1], [1.0, -0.2]], dtype=torch.float64)
    times = torch.arange(5, dtype=torch.float64) / 2
    with torch.no_grad():
        path = model.trajectory(start, times)
    found = torch.from_numpy(table).view(2, 5, 8)
    torch.testing.assert_close(found[..., 2:4], path.states.double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[..., 4:6], path.solver_error.double(), rtol=1e-5, atol=1e-9)
    assert (found[..., 6:] > 0).all()
    torch.testing.assert_close(found[0, :, 1], times)

    code, out, err = trained("predict", "checkpoint=run", "initial=new/p.csv", "id=time", "times=[0,1]", "plot=false")
    assert code == 0, err
    (file,) = (tmp_path / "run/predictions").iterdir()
    assert file.suffix == ".csv"
    assert len(read_table(file)[0]) == 20
    assert "training series went" not in out
    code, out, err = trained("predict", "checkpoint=run", "initial=[1.0,0.5]", "times=[3,13,13.5,15]", "plot=false")
    assert code == 0, err
    assert "2 of 4 times, from t = 13.5 on, lie further from the start than any training series went (10)" in out

    data = flows.datasets.Trajectories(tmp_path / "new/p.csv", id="id", columns=["angle", "speed"], split_by="time")
    assert data.ids == ["0", "1"]  # the file is one of those that training reads

    monkeypatch.setattr(program, "load_run", exploding(program.load_run))
    code, out, err = trained(
        "predict", "checkpoint=run", "initial=[1.0,0.5]", "times=0:2:0.5", "solver=dopri5", "output=e.csv"
    )
    assert code == 1
    assert re.search(r"t = (1\.0\d*|0\.99\d*)\b", err), err
    assert not (tmp_path / "e.csv").exists()


def exploding(load):
    def load_run(*arguments):
        return replace(load(*arguments), model=flows.NeuralODE(Explosion()))

    return load_run


def test_what_cannot_be_predicted_is_told_in_a_paragraph(trained, tmp_path):
    (tmp_path / "starts.csv").write_text("angle,velocity\n0.1,0.2\n")
    cases = {
        (
            "initial=[1.0]",
            "times=[0,1]",
        ): r"a state of this model has 2 numbers (angle, speed), and initial has the shape (1,)",
        ("initial=[1.0,0.5]", "times=[0,1,1]"): "times must increase",
        ("initial=[1.0,0.5]", "times=0:1"): "start:end:step such as 0:10:0.1",
        ("initial=[1.0,0.5]", "times=[0,1]", "context=[1]"): "takes no context",
        ("initial=starts.csv", "times=[0,1]"): "lacks the columns speed",
        ("initial=nowhere.csv", "times=[0,1]"): "no file of initial states at nowhere.csv",
        ("initial=[1.0,0.5]", "times=[0,1]", "output=p.txt"): "output must end in .csv",
        ("initial=[1.0,0.5]",): "times=... must be given",
    }
    for arguments, words in cases.items():
        code, _, err = trained("predict", "checkpoint=run", *arguments)
        assert code == 2
        assert words in err, err
        assert err.strip().startswith("Error: ")
        assert "Traceback" not in err
    code, _, err = trained("sample", "checkpoint=run")
    assert code == 2
    assert "NeuralODE" in err


def test_evaluate_works_on_such_runs(trained, tmp_path):
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    code, out, err = trained("evaluate", "checkpoint=run", "output=again.json")
    assert code == 0, err
    again = json.loads((tmp_path / "again.json").read_text())
    for name in ("mse", "relative_error", "nll", "coverage_90", "mse_beyond"):
        assert again[name] == pytest.approx(summary[f"test_{name}"], rel=1e-4)
    changes = (
        "data.noise=0.5",
        "data.span=14",
        "points=3",
        "part=validation",
        "solver.step_size=0.1",
        "output=other.json",
    )
    with pytest.warns(DataWarning, match="differ from those of the run"):
        code, out, err = trained("evaluate", "checkpoint=run", *changes)
    other = json.loads((tmp_path / "other.json").read_text())
    assert code == 0, err
    assert (other["series"], other["part"], other["solver"]["step_size"]) == (min(3, 2), "validation", 0.1)
    assert "caution" in out
    assert other["training_span"] == summary["test_training_span"] == 10  # that of the run, not of the other data
    assert other["mse_beyond"] is not None  # of validation series that go on to 14
    for wrong in ("outliers=shuffled", "divergence=exact", "num_draws=4"):
        code, _, err = trained("evaluate", "checkpoint=run", wrong)
        assert code == 2
        assert f"{wrong.split('=')[0]} is for densities" in err
    code, _, err = trained("evaluate", "checkpoint=run", "data=moons")
    assert code == 2
    assert "time series" in err


def test_a_range_of_times_ends_where_its_steps_meet_the_end():
    assert read_times("0:1:0.1").tolist() == pytest.approx([k / 10 for k in range(11)])
    assert read_times("0:1:0.3").tolist() == pytest.approx([0, 0.3, 0.6, 0.9])
    assert read_times("2:0:-1").tolist() == [2, 1, 0]
    for text in ("0:1:0", "0:1:2", "0:1:-1", "0:inf:1", "a:1:1", "1:1:1"):
        with pytest.raises(InvalidValueError, match="times"):
            read_times(text)
    with pytest.raises(InvalidValueError, match="take a larger step"):
        read_times("0:1:1e-9")
    with pytest.raises(InvalidValueError, match="two or more finite numbers"):
        read_times([0.0])


def test_contexts_come_inline_or_from_columns(tmp_path):
    path = tmp_path / "starts.csv"
    path.write_text("who,x,y,dose\na,1,2,0.5\nb,3,4,0.7\n")
    found = read_initial(str(path), ["x", "y"], (2,), None, (1,), ["dose"], "who")
    assert found.ids == ["a", "b"]
    assert found.states.tolist() == [[1, 2], [3, 4]]
    assert found.context.tolist() == [[0.5], [0.7]]
    given = read_initial([1.0, 2.0], ["x", "y"], (2,), [0.3], (1,))
    assert given.context.tolist() == [[0.3]]
    with pytest.raises(InvalidValueError, match=r"needs the context dose of each initial state"):
        read_initial([1.0, 2.0], ["x", "y"], (2,), None, (1,), ["dose"])
    with pytest.raises(InvalidValueError, match=r"needs a context of shape \(1,\)"):
        read_initial([1.0, 2.0], ["x", "y"], (2,), None, (1,))
    with pytest.raises(InvalidValueError, match="has 1 numbers"):
        read_initial([1.0, 2.0], ["x", "y"], (2,), [1.0, 2.0], (1,))
    with pytest.raises(InvalidValueError, match=r"has 2 numbers \(x, y\), and initial has the shape \(3,\)"):
        read_initial([1.0, 2.0, 3.0], ["x", "y"], (2,))
    with pytest.raises(InvalidValueError, match="NaN or infinite"):
        read_initial([1.0, float("nan")], ["x", "y"], (2,))


def driven_table(path, lengths):
    """Series that are driven by u, in long form; sample times of u are those of the series."""
    rows = ["id,time,x,u,dose"]
    for i, length in enumerate(lengths):
        rows += [f"{i},{0.25 * k},{(i + k) % 3 / 2},{(k + i) % 2},{i % 2}" for k in range(length)]
    path.write_text("\n".join(rows))


def test_a_run_with_inputs_predicts_and_is_evaluated_on_tables_of_any_length(run, tmp_path):
    driven_table(tmp_path / "train.csv", [6, 7, 8, 6, 7, 8])
    driven_table(tmp_path / "other.csv", [9, 11, 10, 12])
    tiny = [word for word in TINY if not word.startswith(("data", "field", "model"))]
    data = ["data=trajectories", "data.path=train.csv", "data.id=id", "data.columns=[x]", "data.input_columns=[u]"]
    code, _, err = run("train", *data, *tiny)
    assert code == 2
    assert "inputs that change in time, u, and the field MLP would read the whole table" in err
    assert "field=forced" in err
    forced = ("field=forced", "field.field.hidden=[8]", "data.context_columns=[dose]")
    code, _, err = run("train", *data, *tiny, *forced, "output_dir=run")
    assert code == 0, err
    with pytest.warns(DataWarning, match="differ from those of the run") as told:
        code, _, err = run("evaluate", "checkpoint=run", "data.path=other.csv")
    assert code == 0, err
    assert "shape of contexts" not in str(told[0].message)

    (tmp_path / "u.csv").write_text("dose,time,u\n1,0,0.5\n1,2,1\n1,3,-1\n")
    arguments = ("predict", "checkpoint=run", "initial=[0.4]", "times=[0,1,3]", "plot=false", "output=p.csv")
    code, _, err = run(*arguments, "context=u.csv")
    assert code == 0, err
    model = load_flow(tmp_path / "run")
    table = torch.tensor([[[0.0, 0.5, 1], [2, 1, 1], [3, -1, 1]]], dtype=torch.float64)
    with torch.no_grad():
        states = model.trajectory(torch.tensor([[0.4]], dtype=torch.float64), [0.0, 1.0, 3.0], table).states
    found = torch.from_numpy(read_table(tmp_path / "p.csv", ["x"])[0])
    torch.testing.assert_close(found.view(1, 3, 1), states.double(), rtol=1e-6, atol=1e-6)
    assert run(*arguments, "context=[[0,0.5,1],[2,1,1],[3,-1,1]]")[0] == 0
    assert torch.equal(found, torch.from_numpy(read_table(tmp_path / "p.csv", ["x"])[0]))
    (tmp_path / "wrong.csv").write_text("time,u\n0,1\n3,1\n")
    (tmp_path / "short.csv").write_text("time,u,dose\n0,1,1\n2,1,1\n")
    for context, words in {
        "context=null": "driven by inputs: give context=inputs.csv, with the columns time, u, dose",
        "context=wrong.csv": "lacks the columns dose of the inputs",
        "context=[1,2,3]": "got the shape (3,)",
        "context=short.csv": "end at t = 2, and states are wanted until t = 3",
    }.items():
        code, _, err = run(*arguments, context)
        assert code == 2
        assert words in err
