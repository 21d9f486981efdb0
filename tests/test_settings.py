"""Settings of a wrong name, type or value: the message names the setting, before anything is done with it."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, SupportsFloat

import pytest
import torch
from omegaconf import OmegaConf
from small_run import Memory, small_trainer
from test_config import CONF
from test_scripts import TINY

from flows.cli.config import compose
from flows.fields import MLP
from flows.training.annotations import SettingsError, check_arguments, check_type
from flows.training.building import build_dataset, build_flow
from flows.training.fabric import Fabric
from flows.training.loggers import Logger
from flows.training.runs import build_trainer
from flows.training.settings import _find_target, check_settings, instantiate, parameter_names


def settings(*overrides):
    return compose("train", overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reporting.log_every=abc", "reporting.log_every must be a whole number, got 'abc'"),
        ("optimization.ema_decay=abc", "optimization.ema_decay must be a number, got 'abc'"),
        ("optimization.gradient_clip=abc", "optimization.gradient_clip must be a number or null, got 'abc'"),
        ("reporting.plot_every=abc", "reporting.plot_every must be a whole number or null"),
        ("evaluation.batch_size=abc", "evaluation.batch_size must be a whole number"),
        ("evaluation.solver_error_points=abc", "evaluation.solver_error_points must be a whole number"),
        ("evaluation.solver_error_points=-3", "solver_error_points must be a whole number >= 0, got -3"),
        ("reporting.progress_bar=abc", "reporting.progress_bar must be true or false"),
        ("hardware.devices=abc", "^hardware.devices must be the number of processes on a CPU"),
        ("hardware.devices=2.5", "hardware.devices must be a whole number or text or a list of whole numbers"),
        ("hardware.precision=[16]", "hardware.precision must be text or a whole number, got"),
        ("hardware.precision=16", "precision 16 scales the loss .* use bf16-mixed"),
        ("hardware.strategy=3", "hardware.strategy must be text or Strategy, got 3"),
        ("reporting.loggers=[3]", r"reporting.loggers must be a list of Logger, got \[3\]"),
        ("+solver.error_control=3", "solver.error_control must be ErrorControl, got 3"),
        ("+solver.error_control=null", "solver.error_control must be ErrorControl, got null"),
        ("seed=abc", "seed must be a whole number, got 'abc'"),
        ("optimizer.weight_decay=-1", "^optimizer: Invalid weight_decay value: -1"),
        ("optimizer.lr=1", "^optimizer.lr cannot be set: every stage has its own"),
        ("seed=-1", "seed must be a whole number >= 0 and <= 9223372036854775807, got -1"),
        ("output_dir=3", "output_dir must be text or null, got 3"),
        ("optimizer.betas=3", "optimizer.betas must be a list of 2 numbers or Tensor, got 3"),
        ("optimizer.weight_decay=abc", "optimizer.weight_decay must be a number, got 'abc'"),
        ("field.hidden=64", "field.hidden must be a list of whole numbers, got 64"),
        ("field.hidden=[8,a]", r"field.hidden must be a list of whole numbers, got \[8, 'a'\]"),
        ("solver.step_size=abc", "solver.step_size must be a number or null, got 'abc'"),
        (
            "+field.depth=3",
            r"no setting field.depth; field has hidden, .*\. If an experiment .* ~field.depth",
        ),
        ("+solver.step_sise=3", r"there is no setting solver.step_sise \(did you mean step_size\?\)"),
        ("objective.flow_matching.steps=0", "^objective.flow_matching.steps must be a whole number >= 1, got 0"),
        ("objective.flow_matching.objective.target=x", "^objective.flow_matching.objective.target must be"),
        (
            "+objective.other={steps: 3}",
            r"objective.other has settings \(steps\) but is no stage of .* ~objective.other",
        ),
        ("+objective.other=3", "objective.other must be a stage, a mapping with a _target_, got 3"),
        ("+objective.context_dropout=0.1", "write objective.flow_matching.objective.context_dropout"),
        ("data.covariance=[[1,2],[3]]", "^data.mean must be d numbers and covariance d rows of d numbers"),
        ("data._target_=flows.datasets.Nothing", "^data._target_: there is no flows.datasets.Nothing"),
    ],
)
def test_a_wrong_setting_is_named_before_training(tmp_path, monkeypatch, override, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        build_trainer(settings(*TINY, override)).fit()
    assert not list(tmp_path.rglob("*.pt"))


CONDITIONAL = "data=moons_by_class"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["+field.context_shape=null"],
            "field.context_shape cannot be null, since the data give it: leave out field.con",
        ),
        (
            ["+transform.event_shape=null"],
            "transform.event_shape cannot be null, .* leave out transform.event_shape=null$",
        ),
        (["base=conditional_normal", "+base.context_shape=null"], "base.context_shape cannot be null, since the data"),
        (["encoder=embedding", "encoder.context_shape=null"], "encoder.context_shape cannot be null, since the data"),
        (["encoder=embedding", "encoder.feature=3"], r"no setting encoder.feature \(did you mean features\?\)"),
        (["encoder.features=3"], r"encoder has settings \(features\), and none is chosen; .* encoder=embedding"),
    ],
)
def test_what_the_data_give_is_not_taken_away_by_null(overrides, message):
    with pytest.raises(ValueError, match=message):
        build_trainer(settings(CONDITIONAL, *overrides))


def test_an_encoder_takes_settings_that_its_yaml_does_not_list():
    chosen = settings(CONDITIONAL, "encoder=embedding", "encoder.features=3", "encoder.hidden=[4]")
    data = build_dataset(chosen)
    assert build_flow(chosen, data.event_shape, data).encoder.features_shape == (3,)
    assert "encoder" not in settings("data=moons")  # none is chosen


def test_the_same_in_plain_python(tmp_path):
    with pytest.raises(TypeError, match="solver_error_points must be a whole number, got 'abc'"):
        small_trainer(tmp_path, solver_error_points="abc")


def targets(config):
    """All import paths in settings."""
    if isinstance(config, list):
        config = dict(enumerate(config))
    if isinstance(config, dict):
        for key, value in config.items():
            yield from [value] if key == "_target_" else targets(value)


class Unseen(MLP):
    """Of an annotation that exists for type checkers alone."""

    def __init__(self, event_shape: Sequence[int], units: "Units" = None, context_shape=None):  # noqa: F821
        super().__init__(event_shape, hidden=(4,), context_shape=context_shape)


def test_a_class_whose_annotations_cannot_be_looked_up_is_built(tmp_path):
    target = f"{Unseen.__module__}.Unseen"
    assert list(parameter_names(target)) == ["event_shape", "units", "context_shape"]
    parts = {
        "divergence": "flows.divergence.Auto",
        "solver": "flows.ODESolver",
        "transform": "flows.transforms.Identity",
    }
    config = {part: {"_target_": name} for part, name in (parts | {"field": target}).items()}
    flow = build_flow(config, (3,), context_shape=(2,))
    assert (flow.event_shape, flow.field.context_shape) == ((3,), (2,))
    with pytest.raises(SettingsError, match=r"there is no setting field.unit \(did you mean units\?\)"):
        check_settings({"_target_": target, "unit": 3}, "field")


@pytest.mark.parametrize(("precision", "kind"), [(32, "32-true"), (64, "64-true"), ("64", "64-true")])
def test_precision_is_a_number_or_text(tmp_path, precision, kind):
    overrides = [*TINY, f"hardware.precision={precision!r}", f"output_dir={tmp_path}"]
    assert build_trainer(settings(*overrides)).fabric._precision.precision == kind


def test_fabric_takes_objects_too(tmp_path):
    made = Fabric(accelerator="cpu", devices=1)
    accelerator, strategy = type(made.accelerator)(), type(made.strategy)("cpu")
    assert small_trainer(tmp_path, strategy=strategy).fabric.strategy is strategy
    assert small_trainer(tmp_path, accelerator=accelerator).fabric.accelerator is accelerator


def test_everything_in_conf_fits_its_constructor():
    for path in CONF.glob("*/*.yaml"):
        if path.parent.name not in ("experiment", "hydra"):
            text = path.read_text().replace("${data}", "data")
            text = text.replace("${solver}", "{_target_: flows.ODESolver, method: euler, step_size: 0.5}")
            loaded = OmegaConf.to_container(OmegaConf.create(text))
            loaded.pop("defaults", None)
            loaded = {name: value for name, value in loaded.items() if value != "???"}  # the user gives these
            check_settings(loaded if "_target_" in loaded else {"stages": loaded}, path.parent.name)
            for target in targets(loaded):
                found = _find_target(target, "")
                assert set(found.parameters) == set(found.hints) or not target.startswith("flows."), (
                    f"{target} in {path} lacks annotations"
                )


def test_an_experiment_goes_with_another_objective(tmp_path):
    overrides = ["experiment=quick", "objective=maximum_likelihood", "hardware.accelerator=cpu"]
    with pytest.raises(ValueError, match=r"objective.flow_matching has settings .* remove it with ~"):
        build_trainer(settings(*overrides))
    assert list(build_trainer(settings(*overrides, "~objective.flow_matching")).stages) == ["maximum_likelihood"]


def test_the_quick_experiment_suits_any_data(tmp_path):
    overrides = ["experiment=quick", "data=breast_cancer", "hardware.accelerator=cpu", f"output_dir={tmp_path}"]
    assert "quick" not in build_trainer(settings(*overrides)).stages


def test_whole_numbers_make_a_linear_field():
    field = instantiate({"_target_": "flows.fields.Linear", "matrix": [[0, 1], [-1, 0]]}, "field", event_shape=(2,))
    assert field.matrix.dtype == field.offset.dtype == torch.get_default_dtype()
    assert torch.equal(field(torch.tensor(0.0), torch.tensor([[2.0, 3.0]])), torch.tensor([[3.0, -2.0]]))


def fails(number, path="x"):
    return {"key": 1}[number]


def test_a_failure_inside_a_constructor_lists_its_settings():
    target = f"{fails.__module__}.fails"
    with pytest.raises(SettingsError, match=rf"^field: {target} fails with number=3: KeyError: 3") as caught:
        instantiate({"_target_": target, "number": 3}, "field")
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("hint", "right", "wrong"),
    [
        (int, [0, -3], [1.0, True, "1", None]),
        (float, [0, 0.5, float("inf")], [False, "0.5", [0.5]]),
        (bool, [True, False], [0, 1, "yes"]),
        (str, ["", "a"], [1, None]),
        (int | None, [None, 3], ["x"]),
        (Literal["a", "b"], ["a"], ["c", 1]),
        (Sequence[int], [[], [1, 2], (3,)], [["a"], 1, "12"]),
        (tuple[float, float], [[0.9, 0.99]], [[0.9], 3]),
        (tuple[int, ...], [[], [1, 2, 3]], [[0.5]]),
        (Mapping[str, Any], [{}, {"a": 1}], [[], "a"]),
        (str | Callable[[float], float], ["cosine", float], []),
        (torch.nn.Module, [torch.nn.ReLU()], [3, 0.5, True, "relu", None]),
        (Sequence[Logger], [[Memory()]], [[3], ["a"], [None]]),
        (Sequence[torch.nn.Module], [[torch.nn.ReLU()]], [[3], [torch.nn.ReLU(), None]]),
        (pathlib.Path, ["a", pathlib.Path("a")], [3, None]),
        (Any, [3, "a", None], []),
        (object, [3, "a", None], []),
        (SupportsFloat, [3], []),
        (str, [], [{"_target_": "torch.nn.ReLU"}]),
    ],
)
def test_types_of_plain_data(hint, right, wrong):
    for value in right:
        check_type("x", value, hint)
    for value in wrong:
        with pytest.raises(SettingsError, match=r"^x must be .*, got "):
            check_type("x", value, hint)


def test_arguments_of_a_function():
    def function(a: int, b: str = ""): ...

    check_arguments(function, {"a": 1, "b": "x", "other": None})
    with pytest.raises(SettingsError, match="b must be text, got 1"):
        check_arguments(function, {"b": 1})
