"""The defaults of the classes are the only ones: a yaml holds what differs from them, and says why."""

import re

import pytest
import torch
import yaml

import flows
from flows.cli.config import compose
from flows.cli.help import config_folder
from flows.objectives import FlowMatching
from flows.training.building import build_flow
from flows.training.settings import TARGET, _as_settings, _default, _find_target, complete, instantiate

CONF = config_folder()
YAMLS = sorted(path for path in CONF.glob("*/*.yaml") if path.parent.name != "experiment")


def values(node, path="", default=None):
    """Every value in a yaml: its place, its line, what it is, and the default of its parameter (`...`: none)."""
    if isinstance(node, yaml.MappingNode):
        settings = {key.value: value for key, value in node.value}
        defaults = defaults_of(settings[TARGET].value) if TARGET in settings else {}
        for key, value in settings.items():
            if key not in (TARGET, "_partial_", "defaults"):
                yield from values(value, f"{path}.{key}" if path else key, defaults.get(key, ...))
    else:
        yield path, node.end_mark.line, yaml.safe_load(yaml.serialize(node)), default


def defaults_of(target):
    found, defaults = _find_target(target, ""), {}
    for name, parameter in found.parameters.items():
        try:
            defaults[name] = _as_settings(_default(found.function, parameter))
        except TypeError:
            continue
    return defaults


def as_number(value):
    """Yaml reads 1e-5 as text, unlike Hydra."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def faults(text):
    lines = text.splitlines()
    for path, line, value, default in values(yaml.compose(text)):
        if default is not ... and as_number(value) == as_number(default):
            yield f"{path}: {value!r} repeats the default of its class; leave it out"
        elif "#" not in lines[line]:
            yield f"{path}: {value!r} differs from the default {default!r}; say why in a comment on its line"


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_yaml_holds_what_differs_from_the_class_and_says_why(path):
    assert list(faults(path.read_text())) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("_target_: flows.ODESolver\nmethod: flow5 # why", "method: 'flow5' repeats the default"),
        ("_target_: flows.ODESolver\nrtol: 1e-5 # why", "rtol: '1e-5' repeats the default"),
        ("_target_: flows.ODESolver\nadjoint_seminorm: true # why", "adjoint_seminorm: True repeats the default"),
        ("a:\n  _target_: flows.fields.MLP\n  hidden: [128, 128] # why", r"a.hidden: \[128, 128\] repeats"),
        ("_target_: flows.ODESolver\nmethod: rk4", "method: 'rk4' differs from the default 'flow5'; say why"),
        ("_target_: flows.datasets.Gaussian\nmean: [1]", "say why"),
    ],
)
def test_faults_are_seen(text, fault):
    assert any(re.search(fault, found) for found in faults(text))


def test_a_run_from_the_shell_is_a_run_from_python():
    config = compose("train", ["output_dir=x"])
    assert instantiate(config["divergence"]) == flows.divergence.Auto()
    assert instantiate(config["solver"]) == flows.ODESolver()
    stages = {name: instantiate(stage) for name, stage in config["objective"].items()}
    assert list(stages) == ["flow_matching", "maximum_likelihood"]
    assert stages["flow_matching"].objective == FlowMatching()
    assert all(cost.weight == 0 for cost in stages["maximum_likelihood"].objective.regularizers)
    assert instantiate(config["optimizer"]).func is torch.optim.Adam
    assert not instantiate(config["optimizer"]).keywords
    torch.manual_seed(0)
    shell = build_flow(config, (2,))
    torch.manual_seed(0)
    python = flows.CNF(flows.fields.MLP(event_shape=(2,)), transform=flows.transforms.Standardise((2,)))
    assert (shell.divergence, shell.solver) == (python.divergence, python.solver)
    assert repr(shell) == repr(python)
    assert shell.state_dict().keys() == python.state_dict().keys()
    assert all(
        torch.equal(one, other)
        for one, other in zip(shell.state_dict().values(), python.state_dict().values(), strict=True)
    )


def test_completed_settings_build_the_same_objects():
    config = compose("train", ["output_dir=x", "data=gaussian", "solver=rk4", "divergence=hutchinson"])
    completed = complete(config)
    assert completed["solver"]["max_steps"] == flows.ODESolver().max_steps
    assert completed["solver"]["error_control"][TARGET] == "flows.solvers.ErrorControl"
    assert completed["field"]["hidden"] == [128, 128]
    assert "event_shape" not in completed["field"]
    assert "lr" not in completed["optimizer"]
    assert complete(completed) == completed
    for part in ("solver", "divergence"):
        assert instantiate(completed[part], part) == instantiate(config[part], part)
    assert yaml.safe_load(yaml.safe_dump(completed)) == completed
