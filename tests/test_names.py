"""Parts by their lower-case names, which come from the classes and agree with the choices of the shell."""

import numpy as np
import pytest
import torch
from small_run import small_gaussian, small_trainer

import flows
from flows import bases, fields, objectives, transforms
from flows.cli.config import compose
from flows.cli.help import config_folder
from flows.errors import FlowsError
from flows.solvers import as_solver
from flows.training import Optimization, Stage
from flows.training.settings import instantiate

SOLVERS = sorted(path.stem for path in (config_folder() / "solver").glob("*.yaml"))


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_by_name_are_those_of_the_shell(name):
    chosen = instantiate(compose("train", [f"solver={name}"])["solver"], "solver")
    if chosen.method == name:
        assert as_solver(name) == chosen
    else:  # settings under a name of their own, which the shell alone knows
        with pytest.raises(FlowsError, match=f"unknown method '{name}'"):
            as_solver(name)


def test_a_flow_takes_names():
    flow = flows.CNF(
        "mlp", event_shape=2, divergence="hutchinson", solver="rk4", base="student_t", transform="standardise"
    )
    assert isinstance(flow.field, fields.MLP)
    assert isinstance(flow.base, bases.StudentT)
    assert isinstance(flow.transform, transforms.Standardise)
    assert flow.sample(10).shape == (10, 2)
    flow.solver, flow.base = "dopri8", "normal"
    assert flow.solver == flows.ODESolver("dopri8")
    assert isinstance(flow.base, bases.Normal)
    ode = flows.NeuralODE("mlp", event_shape=2, solver="dopri8", transform="standardise")
    assert ode.solver == flows.ODESolver("dopri8")


def test_training_takes_names(tmp_path):
    stage = Stage("flow_matching", 10, optimizer="sgd")
    assert stage.objective == objectives.FlowMatching()
    assert stage.optimizer is torch.optim.SGD
    assert Optimization("adamw").optimizer is torch.optim.AdamW
    trainer = small_trainer(tmp_path, stages={"one": stage})
    assert trainer.stages["one"].batch_size == Stage(objectives.FlowMatching(), 10).batch_size
    named = flows.Trainer(trainer.model, trainer.dataset, "maximum_likelihood", steps=3)
    assert isinstance(named.stages["maximum_likelihood"].objective, objectives.MaximumLikelihood)


WRONG = {
    "solver": (lambda: flows.CNF("mlp", event_shape=2, solver="rk5"), "solver: unknown method 'rk5'; .*dopri5.*rk4"),
    "steps": (
        lambda: flows.NeuralODE("mlp", event_shape=2, solver="rk4"),
        r"in the unit of the times; write flows.ODESolver\('rk4', step_size=...\)",
    ),
    "base": (lambda: flows.CNF("mlp", event_shape=2, base="gauss"), "base: unknown Base 'gauss'; .*normal, student_t"),
    "transform": (lambda: flows.CNF("mlp", event_shape=2, transform="x"), "transform: unknown .*standardise"),
    "field": (
        lambda: flows.CNF("mpl", event_shape=2),
        "field: unknown Field 'mpl'; expected one of .*; did you mean 'mlp'",
    ),
    "shape": (lambda: flows.CNF("mlp"), r"field='mlp' needs .*such as event_shape=2"),
    "objective": (lambda: Stage("flow_machting", 3), "objective: unknown Objective 'flow_machting'; .*flow_matching"),
    "of a trainer": (
        lambda: flows.Trainer(flows.CNF("mlp", event_shape=2), small_gaussian(), "likelihood", steps=1),
        "objective: unknown Objective 'likelihood'; .*maximum_likelihood",
    ),
    "optimizer": (lambda: Optimization("adamww"), "optimizer: torch has no 'adamww'; expected one of .*adamw"),
    "class": (lambda: flows.CNF(fields.MLP), r"field must be .*got the class MLP"),
    "array": (
        lambda: flows.CNF("mlp", event_shape=2).log_prob(np.zeros((3, 2))),
        r"x must be a torch.Tensor, got an array .*; write torch.as_tensor\(x\)",
    ),
}


@pytest.mark.parametrize(("call", "words"), [*WRONG.values()], ids=[*WRONG])
def test_unknown_names_list_the_choices(call, words):
    with pytest.raises(FlowsError, match=words):
        call()


def test_tables_keep_the_columns_of_a_data_frame():
    import pandas as pd

    frame = pd.DataFrame(np.random.default_rng(0).normal(size=(50, 2)), columns=["a", "b"])
    assert flows.datasets.Table(frame).columns == ["a", "b"]
