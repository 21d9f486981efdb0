"""Flows from one data set to another: couplings, their contexts, the distance that judges them, runs from the shell."""

import itertools
import json
import math

import pytest
import torch
from small_run import QUIET, small_table

import flows
from flows import CNF
from flows.bases import Empirical, Mixture, Uniform
from flows.datasets import Batch, Density, EightGaussians, Moons
from flows.evaluation import DensityEvaluator, DistanceEvaluator, default_evaluator
from flows.fields import MLP
from flows.objectives import FlowMatching
from flows.objectives.couplings import OptimalTransport, PartialTransport, Sinkhorn, UnbalancedTransport
from flows.training import Hardware, Reporting, Stage, Trainer
from flows.training.annotations import SettingsError
from flows.training.building import build_model
from flows.training.loading import load_flow


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("weight", [0.5, 20.0])
def test_the_context_is_a_part_of_the_cost(weight):
    """The assignment is the best one by ‖x₀ − x₁‖² + w ‖(c_i − c_j)/s‖², found by trying all."""
    noise, data, context = torch.randn(3, 6, 2)
    columns = context / context.std(0, correction=0)
    cost = torch.cdist(data, noise).square() + weight * torch.cdist(columns, columns).square()
    first, second = OptimalTransport(context_weight=weight).pairs(noise, data, context)
    best = min(float(cost[range(6), order].sum()) for order in map(list, itertools.permutations(range(6))))
    assert float(cost[second, first].sum()) == pytest.approx(best)


def test_a_weight_keeps_noise_independent_of_continuous_contexts():
    """x = c + noise: transport without contexts gives large noise to large contexts, and the weight undoes that."""
    generator = rng()
    context = torch.rand(512, 1, generator=generator) * 4
    data = context + 0.1 * torch.randn(512, 1, generator=generator)
    noise = torch.randn(512, 1, generator=generator)
    correlations, costs = [], []
    for weight in (1e-3, 10.0, 1000.0):
        first, second = OptimalTransport(context_weight=weight).pairs(noise, data, context)
        together = torch.cat([noise[first], context[second]], 1).T
        correlations.append(float(torch.corrcoef(together)[0, 1]))
        costs.append(float((noise[first] - data[second]).square().mean()))
    assert correlations[0] > 0.9
    assert abs(correlations[1]) < 0.2
    assert abs(correlations[2]) < 0.05
    assert costs[0] < costs[1] <= costs[2] < float((noise - data).square().mean()) + 1e-9
    with pytest.warns(UserWarning, match=r"all contexts differ.*set a context_weight, such as 10"):
        OptimalTransport().pairs(noise, data, context)
    for kind in (OptimalTransport, Sinkhorn, UnbalancedTransport, PartialTransport):
        with pytest.raises(ValueError, match="context_weight must be a finite number > 0"):
            kind(context_weight=0)


def test_partial_transport_is_the_best_of_all_choices():
    noise, data = torch.randn(2, 5, 2)
    cost = torch.cdist(data, noise).square()
    first, second = PartialTransport(0.6).pairs(noise, data)
    assert len(first) == len(set(first.tolist())) == len(set(second.tolist())) == 3
    best = min(
        float(cost[list(rows), list(columns)].sum())
        for rows in itertools.combinations(range(5), 3)
        for columns in itertools.permutations(range(5), 3)
    )
    assert float(cost[second, first].sum()) == pytest.approx(best)
    first, second = PartialTransport(1.0).pairs(noise, data)
    assert torch.equal(second.argsort(), second.argsort())
    torch.testing.assert_close(noise[first][second.argsort()], OptimalTransport().couple(noise, data))
    with pytest.raises(ValueError, match="share must be a finite number > 0 and <= 1"):
        PartialTransport(1.5)


def test_the_unbalanced_plan_solves_its_problem():
    """No small change of the plan lowers ⟨π, C⟩ + ε KL(π ‖ u) + τ KL(π1 ‖ u) + τ KL(πᵀ1 ‖ u)."""
    noise, data = torch.randn(2, 7, 2)
    epsilon, tau = 0.4, 0.7
    coupling = UnbalancedTransport(epsilon, tau, 10_000, 1e-12)
    log_plan = coupling.log_plan(noise, data).requires_grad_()

    def kl(p, q):
        return (p * (p / q).log() - p + q).sum()

    plan, even = log_plan.exp(), torch.full((7,), 1 / 7)
    cost = torch.cdist(data, noise).square()
    total = (plan * cost).sum() + epsilon * kl(plan, even[:, None] * even)
    total = total + tau * (kl(plan.sum(1), even) + kl(plan.sum(0), even))
    (slope,) = torch.autograd.grad(total, log_plan)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-9)
    balanced = Sinkhorn(epsilon, 10_000, 1e-10).log_plan(noise, data)
    torch.testing.assert_close(
        UnbalancedTransport(epsilon, 1e7, 20_000, 1e-12).log_plan(noise, data), balanced, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("coupling", [UnbalancedTransport(0.1, 1.0), PartialTransport(0.9)])
def test_outliers_are_left_out(coupling):
    generator = rng()
    data, noise = torch.randn(2, 60, 2, generator=generator)
    data[:3] += 50
    _, second = coupling.pairs(noise, data, None, generator)
    assert not set(second.tolist()) & {0, 1, 2}
    flow = CNF(MLP(2, hidden=(4,)))
    found = FlowMatching(coupling=coupling)(flow, Batch(data), generator)
    assert found.loss < 20  # which one pair with an outlier exceeds


def small_flow(base, data):
    torch.manual_seed(0)
    flow = CNF(MLP(2, hidden=(16, 16)), base=base, solver=flows.ODESolver("rk4", step_size=0.1))
    return flow.fit_ends(data.reference())


def test_the_distance_of_a_flow_that_is_right():
    """A field at rest carries the data to the data: the distance is that of two samples, and the energy is 0."""

    class Rest(torch.nn.Module):
        def forward(self, t, x):
            return 0 * x

    data = EightGaussians(num_validation=400, num_test=1000, num_reference=5000)
    flow = CNF(Rest(), base=Empirical(dataset=data), event_shape=(2,)).fit_ends(data.reference())
    evaluator = default_evaluator(flow, data, progress_bar=False)
    assert isinstance(evaluator, DistanceEvaluator)
    evaluator.check(flow)
    report = evaluator.test(flow)
    assert report.metrics["path_energy"] == 0
    floor = report.metrics["wasserstein2_of_data"]
    assert report.metrics["wasserstein2"] == pytest.approx(floor, abs=3 * report.metrics["wasserstein2_se"] + 0.05)
    assert "between two samples of the data" in str(report)
    assert evaluator.validate(flow).score < 0.3
    assert set(evaluator.pictures(flow)) == {"samples", "trajectories", "evolution"}
    moved = CNF(Rest(), base=Empirical(points=data.reference() + 3), event_shape=(2,))
    assert evaluator.test(moved).metrics["wasserstein2"] == pytest.approx(3 * math.sqrt(2), abs=0.2)
    assert evaluator.validate(moved).score == pytest.approx(3, abs=0.3)  # ‖δ‖/√d
    with pytest.raises(TypeError, match=r"evaluation=density needs the density of the base, but Empirical"):
        DensityEvaluator(data).check(flow)
    with pytest.raises(
        TypeError, match=r"evaluation=density needs a base whose density is positive.*evaluation=distance"
    ):
        DensityEvaluator(data).check(CNF(Rest(), base=Uniform(2), event_shape=(2,)))


def test_the_least_energy_is_the_cost_of_exact_transport():
    """A constant field is the optimal flow between two copies: both figures are ‖shift‖²."""

    class Shift(torch.nn.Module):
        def forward(self, t, x):
            return torch.ones_like(x) * 2

    data = EightGaussians(num_test=600)
    flow = CNF(Shift(), base=Empirical(points=data.held_out("test").x[:300] - 2), event_shape=(2,))
    energy = DistanceEvaluator(data, progress_bar=False).path_energy(flow)
    assert energy.path_energy.value == pytest.approx(8)
    assert energy.transport_cost.value == pytest.approx(8, abs=1.0)
    assert energy.metrics()["excess_energy"] == pytest.approx(8 / energy.transport_cost.value - 1)


class Shifted(Density):
    """Moons with another name, moved."""

    name = "shifted"

    def sample(self, n, generator):
        return Moons().sample(n, generator) + 1


@pytest.mark.parametrize(
    "base", ["moons", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mixture", "learned", "student_t"))]
)
def test_a_run_resumes_bit_for_bit_and_is_loaded(base, tmp_path):
    """The base is saved with its averaged weights; a resumed run ends where an uninterrupted one does."""
    data = EightGaussians(num_validation=50, num_test=60, num_reference=200)
    kinds = {
        "moons": lambda: Empirical(dataset=Shifted(num_reference=90)),
        "mixture": lambda: Mixture(2, 3, trainable=True),
        "learned": lambda: flows.bases.Normal(2, fit=True, trainable=True),
        "student_t": lambda: flows.bases.StudentT(2, trainable=True),
    }

    def trainer(folder, steps=6, **options):
        stages = {"flow_matching": Stage(FlowMatching(coupling="sinkhorn"), steps=4, batch_size=16)}
        second = FlowMatching(coupling="sinkhorn") if base == "moons" else flows.objectives.MaximumLikelihood()
        stages["second"] = Stage(second, steps=steps - 4, batch_size=16, learning_rate=0.05)
        hardware, reporting = Hardware(accelerator="cpu"), Reporting(**QUIET)
        flow = small_flow(kinds[base](), data)
        return Trainer(flow, data, stages, hardware=hardware, reporting=reporting, output_dir=folder, **options)

    whole = trainer(tmp_path / "whole")
    whole.fit()
    trainer(tmp_path / "part", steps=5).fit()
    again = trainer(tmp_path / "again", resume=tmp_path / "part")
    again.fit()
    own, other = (
        torch.load(tmp_path / name / "checkpoints" / "last.pt", weights_only=True) for name in ("whole", "again")
    )
    for name, tensor in own["ema"].items():
        assert torch.equal(tensor, other["ema"][name]), name
    loaded = load_flow(tmp_path / "whole", flow=small_flow(kinds[base](), data))
    assert torch.equal(loaded.sample(5, generator=rng()), whole.model.sample(5, generator=rng()))
    if base == "learned":
        start = kinds[base]().fit(data.reference())
        assert not torch.allclose(own["model"]["base.mean"], start.mean, atol=1e-3)


TINY = [
    "data.num_validation=40",
    "data.num_test=60",
    "data.num_reference=300",
    "field.hidden=[8]",
    "reporting.plot_every=null",
    "reporting.progress_bar=false",
    "hardware.accelerator=cpu",
    "objective.flow_matching.steps=3",
    "objective.flow_matching.batch_size=32",
]


def test_from_data_to_data_from_the_shell(run, tmp_path):
    source = ["base=empirical", "data@base.dataset=circles", "base.dataset.num_reference=70"]
    code, out, err = run("train", "data=8gaussians", *source, *TINY, "output_dir=run")
    assert code == 0, err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {"test_wasserstein2", "test_path_energy", "test_transport_cost", "test_excess_energy"} <= set(summary)
    flow = load_flow(tmp_path / "run")
    assert flow.base.points.shape == (70, 2)
    code, out, err = run("sample", "checkpoint=run", "num_samples=10", "device=cpu")
    assert code == 0, err
    code, out, err = run("evaluate", "checkpoint=run", "device=cpu")
    assert code == 0, err
    assert "path energy" in out
    code, out, err = run("train", "data=8gaussians", "base=moons", "objective=maximum_likelihood", *TINY[:7])
    assert code == 2
    assert "MaximumLikelihood needs the density of the base, but Empirical (of 'moons') is a source of points" in err
    code, out, err = run("train", "data=8gaussians", "base=moons", "evaluation=density", *TINY)
    assert code == 2
    assert "evaluation=density needs the density of the base" in err
    code, out, err = run("train", "data=breast_cancer", "base=moons", *TINY[3:7])
    assert code == 2
    assert "has points of shape (2,), and the data of shape" in err
    energy = ["data=phi4", "objective=reverse_kl", "objective.reverse_kl.steps=1", "transform=identity"]
    code, out, err = run("train", *energy, "base=mixture", *TINY[3:7])
    assert code == 2
    assert "Mixture is fitted to training data, and 'phi4' is an energy without samples" in err


def test_a_mixture_is_fitted_in_flow_space():
    data = small_table()
    config = {
        "base": {"_target_": "flows.bases.Mixture", "num_components": 2},
        "transform": {"_target_": "flows.transforms.Standardise"},
        "field": {"_target_": "flows.fields.MLP", "hidden": [4]},
        "divergence": {"_target_": "flows.divergence.Auto"},
        "solver": {"_target_": "flows.ODESolver"},
    }
    flow = build_model(config, (2,), data)
    mean = (flow.base.log_weight.exp()[:, None] * flow.base.mean).sum(0)
    torch.testing.assert_close(mean, torch.zeros(2), rtol=0, atol=1e-3)  # of standardised points
    config["base"]["num_components"] = 1000
    with pytest.raises(SettingsError, match=r"base: num_components=1000 need at least as many points .* got 61"):
        build_model(config, (2,), data)


def test_a_flow_that_starts_at_rest_ends_no_worse_than_its_base(tmp_path):
    """Steps that lead away are not kept: the best weights are those of the start, and a resumed run knows them."""
    data = EightGaussians(num_validation=200, num_test=60, num_reference=500)

    def trainer(folder, steps=3, **options):
        torch.manual_seed(0)
        base = Mixture(2, 8, trainable=True)
        flow = CNF(MLP(2, hidden=(8,), at_rest=True), base=base, solver=flows.ODESolver("rk4", step_size=0.25))
        stage = Stage(flows.objectives.MaximumLikelihood(), steps=steps, batch_size=16, learning_rate=0.1)
        flow.fit_ends(data.reference())
        hardware, reporting = Hardware(accelerator="cpu"), Reporting(**QUIET | {"validate_every": 1})
        evaluator = DensityEvaluator(data, solver_error_points=8, progress_bar=False)
        return Trainer(
            flow, data, {"likelihood": stage}, evaluator=evaluator, hardware=hardware, reporting=reporting,
            output_dir=folder, **options,
        )  # fmt: skip

    whole = trainer(tmp_path / "whole")
    x = data.held_out("validation").x
    start = -float(whole.model.base.log_prob(x).detach().mean())
    summary = whole.fit()
    scores = [
        (line["step"], line["validation/score"])
        for line in map(json.loads, (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines())
        if "validation/score" in line
    ]
    assert [step for step, _ in scores] == [0, 1, 2, 3]
    assert scores[0][1] == pytest.approx(start, abs=1e-5)
    with torch.no_grad():
        end = -float(whole.model.log_prob(x).mean())
    assert end == pytest.approx(min(score for _, score in scores), abs=1e-5)
    assert end <= start + 1e-6
    assert summary.position.best_step == 0
    trainer(tmp_path / "part", steps=1).fit()
    again = trainer(tmp_path / "again", resume=tmp_path / "part")
    assert again.fit().position.best_step == 0
    for file in ("last", "best"):
        own, other = (
            torch.load(tmp_path / run / "checkpoints" / f"{file}.pt", weights_only=True) for run in ("whole", "again")
        )
        for name, tensor in own["ema"].items():
            assert torch.equal(tensor, other["ema"][name]), (file, name)


def test_other_starts_are_not_validated(tmp_path):
    """A flow from N(0, I) knows nothing of the data, so its first weights are no candidate."""
    data = EightGaussians(num_validation=50, num_test=60, num_reference=100)
    flow = CNF(MLP(2, hidden=(4,)), solver=flows.ODESolver("rk4", step_size=0.5))
    stages = {"flow_matching": Stage(FlowMatching(), steps=1, batch_size=16)}
    hardware, reporting = Hardware(accelerator="cpu"), Reporting(**QUIET)
    summary = Trainer(
        flow, data, stages, hardware=hardware, reporting=reporting, output_dir=tmp_path / "run"
    ).fit()  # fmt: skip
    assert summary.position.best_step == 1


class Stubborn(DensityEvaluator):
    """Cannot judge the weights that it sees first."""

    seen = 0

    def validate(self, model):
        type(self).seen += 1
        if self.seen == 1:
            raise flows.errors.InvalidValueError("these weights have no score")
        return super().validate(model)


def test_a_start_without_a_score_is_trained_all_the_same(tmp_path, caplog):
    data = EightGaussians(num_validation=50, num_test=60, num_reference=100)
    flow = small_flow(flows.bases.StudentT(2), data)
    trainer = Trainer(
        flow,
        data,
        {"flow_matching": Stage(FlowMatching(), steps=1, batch_size=16)},
        evaluator=Stubborn(data, progress_bar=False),
        hardware=Hardware(accelerator="cpu"),
        reporting=Reporting(**QUIET),
        output_dir=tmp_path / "run",
    )
    assert trainer.fit().position.best_step == 1
    assert "these weights were not compared with the best" in caplog.text
