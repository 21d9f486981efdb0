"""Wrong Python arguments get one clear error of this package; unusual ones that mean one thing are accepted."""

import copy
import inspect
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from figures import report_figure
from torch import nn

import flows
from flows import compare, datasets, divergence, evaluation, fields, objectives, path_costs, plots, training, transforms
from flows.arguments import is_checked

CASES = yaml.safe_load((Path(__file__).parent / "arguments.yaml").read_text(encoding="utf-8"))


def namespace():
    """The names that the expressions use; in float32, as users have it."""
    field = fields.MLP((2,), hidden=(8,))
    solver = flows.ODESolver("rk4", step_size=0.25)
    flow = flows.CNF(field, solver=solver)
    conditional = flows.CNF(fields.MLP((2,), hidden=(8,), context_shape=(3,)), solver=solver)
    return {
        "flows": flows,
        "np": np,
        "pd": pd,
        "torch": torch,
        "nn": nn,
        "D": divergence,
        "E": evaluation,
        "F": fields,
        "K": path_costs,
        "O": objectives,
        "P": plots,
        "S": datasets,
        "T": transforms,
        "field": field,
        "flow": flow,
        "cflow": conditional,
        "double_flow": copy.deepcopy(flow).double(),
        "meta_flow": copy.deepcopy(flow).to("meta"),
        "x": torch.randn(4, 2),
        "c": torch.randn(4, 3),
        "moons": datasets.Moons(num_validation=10, num_test=10, num_reference=10),
        "gen": torch.Generator().manual_seed(0),
    }


def verdict(case, names):
    """What is wrong with the answer to a case; None if nothing is."""
    try:
        answer = eval(case.get("call", case.get("holds")), dict(names))
    except flows.FlowsError as error:
        expected = case.get("expect")
        return None if expected and expected in str(error) else f"says {str(error)!r}"
    except Exception as error:
        return f"raises a foreign {type(error).__name__}: {error}"
    if "call" in case:
        return f"passes silently with {answer!r}"
    return None if bool(answer) else f"is {answer!r}"


def test_wrong_arguments_get_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    names = namespace()
    found = {case["id"]: verdict(case, names) for case in CASES}
    wrong = {
        case["id"]: (case.get("call", case.get("holds")), found[case["id"]]) for case in CASES if found[case["id"]]
    }
    foreign = sum("foreign" in text for _, text in wrong.values())
    silent = sum("silently" in text for _, text in wrong.values())
    refused = sum("call" in case for case in CASES)
    report_figure(
        f"wrong arguments: {refused} cases, {foreign} foreign errors, {silent} silent; "
        f"{len(CASES) - refused} unusual arguments accepted"
    )
    assert not wrong


def test_the_corpus_is_large_and_its_cases_have_names():
    assert sum("call" in case for case in CASES) >= 200
    assert len({case["id"] for case in CASES}) == len(CASES)


PARTS = (flows, compare, datasets, divergence, evaluation, fields, objectives, path_costs, plots, training, transforms)
RESULTS = {  # made by this package for its user to read
    "Advice",
    "AUROC",
    "BitsPerDim",
    "BoundField",
    "Comparison",
    "Evaluation",
    "FieldSample",
    "GradientCheck",
    "ImportanceWeights",
    "Likelihood",
    "LogProbEstimate",
    "LossOutput",
    "Calibration",
    "Measurement",
    "OutlierScores",
    "Report",
    "Row",
    "Run",
    "Sample",
    "Solution",
    "SolverStatistics",
    "Summary",
    "Trajectory",
    "Transport",
}


def public():
    for part in PARTS:
        for name in getattr(part, "__all__", ()):
            yield f"{part.__name__}.{name}", getattr(part, name)


def test_public_functions_and_constructors_check_their_arguments():
    unchecked = []
    for path, thing in public():
        if inspect.isclass(thing):
            skipped = thing.__name__ in RESULTS or issubclass(thing, BaseException) or inspect.isabstract(thing)
            if skipped or getattr(thing, "_is_protocol", False):
                continue
        elif not inspect.isfunction(thing) or path == "flows.divergence.linearise":  # once per evaluation
            continue
        if not is_checked(thing):
            unchecked.append(path)
    assert not unchecked, "put @checked of flows/arguments.py on these"


def test_every_error_of_this_package_can_be_pickled_after_a_wrong_argument():
    with pytest.raises(flows.FlowsError) as caught:
        flows.CNF(3)
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is type(caught.value)
    assert str(again) == str(caught.value)
