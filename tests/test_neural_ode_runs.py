"""Runs that train a neural ODE: settings, resuming, loading, and what is refused."""

import pytest
import torch
from small_run import QUIET, stopping_at

import flows
from flows.cli.config import compose
from flows.cli.train import check_parts
from flows.errors import FlowsError
from flows.evaluation import Evaluation, Evaluator, Report
from flows.objectives import DerivativeMatching, TrajectoryMatching
from flows.training import (
    Hardware,
    Reporting,
    Stage,
    Trainer,
    check_trusted,
    load_checkpoint,
    load_flow,
    save_checkpoint,
)
from flows.training.building import build_flow, build_model, model_parts
from flows.training.loading import load_run
from flows.training.runs import build_trainer, completed
from flows.training.settings_text import read_settings, settings_text

DATA = {"_target_": "flows.datasets.Spiral", "num_series": 20, "num_times": 12, "span": 2.0, "beyond": 1.0}
FIELD = {"_target_": "flows.fields.MLP", "hidden": [8], "num_frequencies": 0}
SOLVER = {"_target_": "flows.ODESolver", "rtol": 1e-4, "atol": 1e-4}
STAGES = {
    "derivative_matching": Stage(DerivativeMatching(), steps=4, batch_size=5, warmup_steps=0),
    "trajectory_matching": Stage(TrajectoryMatching(loss="gaussian"), steps=5, batch_size=6, warmup_steps=1),
}
CONFIG = {
    "data": DATA,
    "model": {"_target_": "flows.NeuralODE", "noise": 0.1},
    "transform": {"_target_": "flows.transforms.Standardise"},
    "field": FIELD,
    "solver": SOLVER,
    "objective": {
        "derivative_matching": {
            "_target_": "flows.training.Stage",
            "objective": {"_target_": "flows.objectives.DerivativeMatching"},
            "steps": 4,
        }
    },
}


class Score(Evaluator):
    """The mean square error on the validation part."""

    def __init__(self, dataset):
        self.dataset = dataset

    def validate(self, model):
        assert isinstance(model, flows.NeuralODE)
        batch = next(self.dataset.validation_batches(100, dtype=model.dtype))
        with torch.no_grad():
            error = TrajectoryMatching()(model, batch).metrics["mse"].item()
        return Evaluation(error, {"mse": error})

    def test(self, model):
        return Report(self.validate(model).metrics, [])


def trainer(folder, stages=STAGES, **settings):
    data = flows.datasets.Spiral(**{key: value for key, value in DATA.items() if key != "_target_"})
    torch.manual_seed(0)
    model = build_model(CONFIG, data.event_shape, data)
    options = {"evaluator": Score(data), "hardware": Hardware(accelerator="cpu"), "reporting": Reporting(**QUIET)}
    return Trainer(model, data, stages, output_dir=folder, config=CONFIG, **options, **settings)


def assert_same(one, two):
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_run_resumes_bit_for_bit_and_is_loaded(tmp_path):
    whole = trainer(tmp_path / "whole")
    summary = whole.fit()
    assert summary.position.step == 9
    for stop in (2, 6):
        folder = tmp_path / f"stopped{stop}"
        interrupted = trainer(folder)
        stopping_at(interrupted.dataset, stop)
        with pytest.raises(flows.training.TrainingInterrupted):
            interrupted.fit()
        trainer(folder, resume=folder).fit()
        assert_same(*(load_checkpoint(tmp_path / name / "checkpoints/last.pt")["model"] for name in ("whole", folder)))
    loaded = flows.load(tmp_path / "whole")
    assert isinstance(loaded, flows.NeuralODE)
    assert not loaded.training
    x0, times = torch.randn(3, 2), torch.linspace(0, 1, 4)
    assert torch.equal(loaded(x0, times), whole.model.eval()(x0, times))
    filled = load_flow(tmp_path / "whole", flow=build_model(CONFIG, (2,)))
    assert torch.equal(filled(x0, times), loaded(x0, times))
    run = load_run(tmp_path / "whole")
    assert run.model.noise.shape == (2,)
    with pytest.raises(FlowsError, match=r"holds a NeuralODE, and this needs a flows.CNF"):
        run.flow  # noqa: B018


def test_the_settings_of_a_file_describe_its_weights(tmp_path):
    trainer(tmp_path / "run").fit()
    path = tmp_path / "run/checkpoints/last.pt"
    content = load_checkpoint(path)
    config = read_settings(content["config"])
    for changes, message in (
        ({"field": {**FIELD, "hidden": [100_000]}}, "the model of the settings needs a tensor of"),
        ({"model": {"_target_": "flows.NeuralODE"}}, "log_noise is unexpected"),
        ({"model": {"_target_": "flows.CNF"}}, "do not describe a model: they have no divergence"),
        ({"model": {"_target_": "os.system"}}, "model"),
        ({"model": {"_target_": "flows.fields.MLP"}}, "model"),
        ({"model": 3}, "model"),
        ({"solver": None}, "do not describe a model: they have no solver"),
        ({"model": {"_target_": "flows.NeuralODE", "noise": -1.0}}, "model.noise must be a finite number > 0"),
    ):
        save_checkpoint(tmp_path / "x.pt", content | {"config": settings_text(config | changes)})
        with pytest.raises(FlowsError, match=message):
            flows.load(tmp_path / "x.pt")


def test_the_model_decides_which_parts_there_are():
    assert model_parts(compose("train", ["output_dir=x"]))[:4] == ["transform", "field", "divergence", "solver"]
    config = compose("train", ["output_dir=x", "model=neural_ode", "model.noise=0.2"])
    assert model_parts(config) == ["transform", "field", "solver"]
    assert "divergence" not in config
    model = build_model(config, (2,))
    assert isinstance(model, flows.NeuralODE)
    torch.testing.assert_close(model.noise, torch.full((2,), 0.2))
    check_trusted(config)
    check_parts(config, ["model=neural_ode", "solver=rk4"])
    with pytest.raises(FlowsError, match=r"divergence cannot be chosen here: flows.NeuralODE has no such part"):
        check_parts(config, ["divergence=exact"])
    with pytest.raises(FlowsError, match=r"model must be a flows.CNF here, got NeuralODE"):
        build_flow(config, (2,))


def test_settings_of_before_describe_a_flow():
    config = {part: value for part, value in compose("train", ["output_dir=x"]).items() if part != "model"}
    assert isinstance(build_model(config, (2,)), flows.CNF)
    assert completed(config)["model"] == {"_target_": "flows.CNF"}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"noise": 0}, "model.noise must be a finite number > 0, got 0"),
        ({"noise": "much"}, "model.noise must be a number or null, got 'much'"),
        ({"noize": 0.1}, r"there is no setting model.noize \(did you mean noise\?\); model has noise"),
        ({"solver": None}, "model.solver cannot be set: it is a part of its own, solver=..."),
        ({"event_shape": [3]}, "model.event_shape cannot be set: the data give it"),
    ],
)
def test_wrong_settings_of_the_model_are_named(model, message):
    with pytest.raises(FlowsError, match=message):
        build_model({**CONFIG, "model": {"_target_": "flows.NeuralODE", **model}}, (2,))


def test_data_and_model_of_different_kinds_are_refused(tmp_path):
    moons = {"_target_": "flows.datasets.Moons", "num_validation": 10, "num_test": 10}
    with pytest.raises(FlowsError, match=r"'moons' are single points; choose time series, or use model=cnf .*moons"):
        build_trainer({**CONFIG, "data": moons})
    cnf = {**CONFIG, "model": {"_target_": "flows.CNF"}, "divergence": {"_target_": "flows.divergence.Exact"}}
    with pytest.raises(FlowsError, match=r"'spiral' are time series, .* got CNF; use model=neural_ode .*spiral"):
        build_trainer(cnf)
