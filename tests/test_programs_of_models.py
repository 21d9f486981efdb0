"""Files of `flows.save` hold a model and no run: what each program does with one, or what it says."""

import pytest
import torch

import flows

MOONS = ["data=moons", "data.num_test=20", "data.num_validation=20"]


@pytest.fixture(autouse=True, scope="module")
def models(tmp_path_factory):
    """A flow, a conditional one and a neural ODE in files."""
    folder = tmp_path_factory.mktemp("models")
    flow = flows.CNF(flows.fields.MLP((2,), hidden=(4,)), solver="midpoint").float()
    conditional = flows.CNF(flows.fields.MLP((2,), hidden=(4,), context_shape=(1,)), solver="midpoint").float()
    ode = flows.NeuralODE(flows.fields.MLP((2,), hidden=(4,)), solver="dopri5").float()
    for name, model in {"flow": flow, "conditional": conditional, "ode": ode}.items():
        flows.save(model, folder / f"{name}.flow")
    return folder


@pytest.mark.parametrize(
    ("program", "model", "settings", "words"),
    [
        ("evaluate", "flow", [], "the file holds a model and no data; choose some, such as data=moons"),
        ("compare_estimators", "flow", [], "the file holds a model and no data; choose some, such as data=moons"),
        ("sample", "conditional", [], "need contexts of shape (1,), and"),
        ("sample", "conditional", MOONS, "needs contexts of shape (1,), and the data 'moons' has none"),
        ("evaluate", "conditional", MOONS, "needs contexts of shape (1,), and the data 'moons' has none"),
        ("sample", "flow", ["field=mlp"], "field cannot be chosen here: a trained model keeps its own"),
        ("sample", "ode", [], "for states of a neural ODE there is flows predict"),
        (
            "evaluate",
            "ode",
            ["data=spiral", "divergence=exact"],
            "divergence is for densities, and the model is a neural ODE",
        ),
        (
            "predict",
            "flow",
            ["initial=[1,2]", "times=[0,1]"],
            "holds a CNF, and only a flows.NeuralODE predicts states",
        ),
        (
            "train",
            "flow",
            [],
            "holds a model alone, and a run goes on from its checkpoint: give the folder of the run.",
        ),
        ("train", "ode", ["objective=reflow"], "holds a model alone, and a teacher is a run, whose data are learned"),
    ],
)
def test_what_a_file_lacks_is_said(run, models, program, model, settings, words):
    name = {"train": "teacher" if settings else "resume"}.get(program, "checkpoint")
    code, out, err = run(program, f"{name}={models / model}.flow", *settings)
    assert (code, out) == (2, ""), err
    assert words in " ".join(err.split())
    assert "checkpoint of the run" not in err


def test_data_can_be_chosen_for_a_file(run, models, tmp_path):
    few = ["num_samples=5", "progress_bar=false"]
    code, out, err = run("sample", f"checkpoint={models}/flow.flow", *few, "output=alone.png")
    assert code == 0, err
    assert "of the samples alone: the file holds no data to compare them with; data=... chooses some" in out
    code, out, err = run("sample", f"checkpoint={models}/flow.flow", *few, *MOONS, "output=both.png")
    assert code == 0, err
    assert "alone" not in out
    assert (tmp_path / "both.png").stat().st_size > 0


def test_states_of_a_file_are_predicted(run, models, tmp_path):
    start = ["initial=[1.0,0.5]", "times=[0,0.5,1]", "output=x.csv", "plot=false"]
    code, _, err = run("predict", f"checkpoint={models}/ode.flow", *start)
    assert code == 0, err
    states = (
        flows.load(models / "ode.flow").trajectory(torch.tensor([[1.0, 0.5]]), torch.tensor([0.0, 0.5, 1.0])).states
    )
    rows = [line.split(",")[2:4] for line in (tmp_path / "x.csv").read_text().splitlines()[1:]]
    torch.testing.assert_close(torch.tensor([[float(x) for x in row] for row in rows]), states[0].detach())
