"""Benchmarks that train: against the clock, beside other packages, and with path costs."""

import csv
import json

import pytest
import torch
from torch import nn

from benchmarks import gpu, regularisation
from benchmarks.baselines import own_matching
from benchmarks.entropy_gap import compare, timed
from benchmarks.entropy_gap_report import line, save
from benchmarks.entropy_gap_report import picture as picture_of_curves
from benchmarks.recipes import recipe, settings
from benchmarks.time_budget import train_and_look
from benchmarks.training import after_equal_time, installed, matchings, measure
from benchmarks.training_report import STEP, nll_table, picture, timing_table
from flows.datasets import EightGaussians, Gaussian, SwissRoll
from flows.fields import ConcatSquashMLP, Linear
from flows.objectives import FlowMatching, LossOutput, MaximumLikelihood, Objective
from flows.training import Stage


class Falling(Objective):
    """A loss that falls with the only weight, for ever."""

    def __call__(self, model, batch, generator=None):
        return LossOutput(model.weight.sum())


def test_training_by_time_ends_with_averaged_weights_and_shows_the_model_on_the_way():
    dataset = Gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]], num_validation=10, num_test=10, num_reference=10)
    model = nn.Linear(2, 1, bias=False)
    stages = {
        "first": Stage(Falling(), seconds=0.3, batch_size=4, learning_rate=0.01, schedule="constant"),
        "second": Stage(Falling(), seconds=0.2, batch_size=4, learning_rate=0.01, schedule="constant"),
    }

    def look(model):
        return model.weight.sum().item()

    seen = train_and_look(model, dataset, stages, look, [0.1, 0.4], ema_decay=0.9, progress=False)
    for seconds, found in zip([0.1, 0.4, 0.5], seen, strict=True):
        assert seconds <= found.seconds < seconds + 0.2
    assert seen[0].steps < seen[1].steps < seen[2].steps
    assert seen[0].value > seen[1].value > seen[2].value == look(model)


def test_stages_that_solve_share_their_part_of_the_time():
    matching, likelihood = Stage(FlowMatching(), 1), Stage(MaximumLikelihood(), 1)

    def seconds(stages, share):
        return {name: stage.seconds for name, stage in timed(stages, 60, share).items()}

    assert seconds({"a": matching, "b": likelihood}, 0.25) == {"a": 45, "b": 15}
    assert seconds({"a": likelihood, "b": matching, "c": likelihood}, 0.5) == {"a": 15, "b": 30, "c": 15}
    assert seconds({"a": matching}, 0.25) == seconds({"a": likelihood}, 0.25) == {"a": 60}
    assert seconds({"a": matching, "b": likelihood}, 0.0) == {"a": 60}


def test_every_package_gives_the_same_likelihood_and_gradient():
    torch.manual_seed(0)
    field = ConcatSquashMLP((2,), (8, 8, 8))
    methods, missing = installed(field)
    assert {"flows", "FFJORD's way", "zuko"} <= {method.name for method in methods}
    assert len(methods) + len(missing) == 4
    x = torch.randn(20, 2)
    results = {}
    for method in methods:
        value = method(x)
        value.mean().backward()
        results[method.name] = value.detach(), method.field.layers[1].linear.weight.grad.clone()
    expected, expected_gradient = results["flows"]
    for value, gradient in results.values():
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-3)
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-4)


def test_evaluations_are_counted():
    class Counting(Linear):
        calls = 0

        def forward(self, *arguments):
            Counting.calls += 1
            return super().forward(*arguments)

    methods, _ = installed(Counting((2,)))
    for method in methods[1:]:
        Counting.calls = 0
        forward, backward = method.evaluations_of_a_step(torch.randn(5, 2))
        assert forward + backward == Counting.calls
        assert forward > 0
        assert (backward > 0) == (method.name in ("FFJORD's way", "zuko"))


def test_flow_matching_of_every_package_has_the_same_loss():
    """Of a field that is zero it is E(x₁ − x₀)² = 2 for standard normal data."""
    field = Linear((2,))
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.zero_()
    x = torch.randn(4000, 2)
    found, missing = matchings(field, "independent")
    assert len(found) + len(missing) == 2
    for _, loss in found.values():
        assert loss(x).item() == pytest.approx(2, abs=0.15)
    assert own_matching(field, "optimal_transport")(x[:200]).item() < 0.5


def test_the_comparison_of_training_measures_and_prints_all(tmp_path):
    dataset = EightGaussians(num_test=40, num_reference=100)
    report = measure(dataset, 8, 10, 2, 0.0, hidden=(4, 4, 4), progress=False)
    report.nll = after_equal_time(dataset, 0.02, 8, (4, 4, 4), progress=False)
    assert set(report.times[STEP]) == set(report.evaluations) == set(report.agreement)
    assert all(seconds > 0 for times in report.times.values() for seconds in times.values())
    assert max(report.agreement.values()) < 1e-2
    assert all(steps > 0 for _, _, steps in report.nll.values())
    lines = [*timing_table(report), *nll_table(report, dataset.entropy, 0.02)]
    (own,) = (line for line in lines if line.startswith("flows ") and "+" in line)
    assert own.split()[2] == "1.00"
    picture(report, dataset.entropy).savefig(tmp_path / "training.png")


def test_entropy_gap_compares_with_a_spline_flow_and_saves_the_curves(tmp_path):
    config = recipe("moons")
    config["field"]["hidden"] = [8, 8]
    config["solver"] |= {"rtol": 1e-3, "atol": 1e-3}
    for stage in config["objective"].values():
        stage["batch_size"] = 16
    pair = compare(config, 0.2, 0.3, test_points=200, looks=3, progress=False)
    for outcome in (pair.flow, pair.spline):
        assert outcome.data == "moons"
        assert outcome.seconds >= 0.2 == outcome.budget
        assert len(outcome.curve) == 3
        assert 0 < outcome.gap < 3
        assert outcome.curve[-1].value == pytest.approx(outcome.gap, abs=0.3)  # other points
    assert pair.difference == pytest.approx(pair.spline.gap - pair.flow.gap, abs=1e-6)
    assert line(pair).split()[:2] == ["moons", "0.2"]
    save([pair], tmp_path)
    with open(tmp_path / "entropy_gap.csv") as file:
        assert len(list(csv.DictReader(file))) == 6
    assert json.loads((tmp_path / "entropy_gap.json").read_text())["pairs"][0]["flow"]["gap"] == pair.flow.gap
    assert (tmp_path / "entropy_gap.png").exists()
    (panel,) = (axes for axes in picture_of_curves([pair]).axes if axes.get_visible())
    assert panel.get_title() == "moons"
    assert [len(curve.get_xdata()) for curve in panel.lines] == [3, 1, 3, 1]


def test_entropy_gap_refuses_data_without_an_entropy():
    with pytest.raises(ValueError, match=r"density of vectors with a known entropy.*got breast_cancer"):
        compare(recipe("breast_cancer"), 0.1)


def test_regularisation_measures_what_the_costs_save():
    case = regularisation.CASES["swissroll"]
    tiny = (
        "field.hidden=[16,16]",
        "data.num_test=100",
        "data.num_validation=100",
        "objective.maximum_likelihood.steps=20",
        "objective.maximum_likelihood.warmup_steps=0",
        "objective.maximum_likelihood.batch_size=32",
    )
    *outcomes, error = regularisation.compare(settings(*case.overrides, *tiny), 10.0, progress=False)
    plain, regularised = outcomes
    assert regularised.path_costs["kinetic_energy"] < plain.path_costs["kinetic_energy"]
    assert regularised.path_costs["jacobian_norm"] < plain.path_costs["jacobian_norm"]
    assert plain.nll - plain.gap == pytest.approx(SwissRoll().entropy)
    assert 0 < error < plain.standard_error + regularised.standard_error


@pytest.mark.parametrize(
    ("nll", "verdict"), [(1.5, "+0.5000 ± 0.0010 nats, more than"), (1.01, "+0.0100 ± 0.0010 nats, within")]
)
def test_regularisation_says_what_the_costs_have_bought(nll, verdict):
    costs = {"kinetic_energy": 1.0, "jacobian_norm": 2.0}
    plain, regularised = (
        regularisation.Outcome(name, value, 0.1, 0.5, 1e-4, nfe, costs, 60.0)
        for name, value, nfe in (("unregularised", 1.0, 90.0), ("kinetic + Frobenius", nll, 36.0))
    )
    case = regularisation.Case((), 0.3, 0.02)
    *_, last = regularisation.table("swissroll", case, plain, regularised, 1e-3)
    assert last == f"2.5 times fewer evaluations with weights 0.3; NLL {verdict} 0.02"


@pytest.mark.parametrize("data", list(regularisation.CASES))
def test_settings_of_each_regularisation_case_are_of_one_likelihood(data):
    config = settings(*regularisation.CASES[data].overrides)
    (stage,) = config["objective"].values()
    assert stage["objective"]["_target_"] == "flows.objectives.MaximumLikelihood"


def test_a_density_with_an_experiment_of_its_name_trains_by_it():
    assert recipe("gaussian") == settings("data=gaussian")
    assert recipe("moons")["objective"] == settings("experiment=moons")["objective"]


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_runs_on_a_cpu():
    rows = list(gpu.report("cpu", batch=4, points=6, images=2, channels=8, seconds=0.01, hidden=(3,)))
    assert not [row for row in rows if row.startswith("failed")]
    assert sum("compiled" in row and "first call" in row for row in rows) == 4
