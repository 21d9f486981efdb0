"""Runs that train a neural ODE: settings, resuming, loading, and what is refused."""

import pytest
import torch

import flows
from flows.cli.config import compose
from flows.cli.train import check_parts
from flows.errors import FlowsError
from flows.objectives import DerivativeMatching, TrajectoryMatching
from flows.training import (
    Stage,
    check_trusted,
)
from flows.training.runs import build_flow, build_model, build_trainer, completed, model_parts

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
