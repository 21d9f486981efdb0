"""Posteriors: a Gaussian one in closed form, supports, the habits of `sbi`, calibration, reference posteriors."""

import bz2
import math

import pytest
import torch
from small_run import QUIET
from torch import nn
from torch.distributions import Distribution, Independent, Normal

import flows
from flows.datasets import Simulations, TwoMoons, box
from flows.errors import FileError
from flows.evaluation import Calibration, PosteriorEvaluator, default_evaluator
from flows.fields import MLP
from flows.inference import Inference, Posterior, infer, posterior_flow
from flows.transforms import Compose, Identity, Standardise, Unbounded

QUICK = {"num_simulations": 60, "num_test": 20}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Exact(nn.Module):
    """Carries N(0, I) to N(x/2, I/2) along straight lines: the posterior of x = θ + z for θ, z ~ N(0, I)."""

    event_shape, context_shape = (2,), (2,)

    def forward(self, t, x, context):
        scale = 1 + t * (math.sqrt(0.5) - 1)
        return context / 2 + (math.sqrt(0.5) - 1) * (x - t * context / 2) / scale


def exact():
    return Posterior(flows.CNF(Exact()))


def test_a_posterior_is_a_distribution():
    x = torch.tensor([1.0, -2.0])
    posterior = exact().given(x)
    truth = Independent(Normal(x / 2, math.sqrt(0.5)), 1)
    assert isinstance(posterior, Distribution)
    assert (posterior.batch_shape, posterior.event_shape) == ((), (2,))
    theta = posterior.sample((2000,))
    torch.testing.assert_close(posterior.log_prob(theta), truth.log_prob(theta), atol=1e-4, rtol=0)
    torch.testing.assert_close(theta.mean(0), x / 2, atol=0.08, rtol=0)
    torch.testing.assert_close(theta.std(0), torch.full((2,), math.sqrt(0.5)), atol=0.05, rtol=0)
    assert posterior.sample().shape == (2,)
    assert posterior.expand((3,)).sample((4,)).shape == (4, 3, 2)
    assert posterior.support.check(theta).all()


def test_observations_may_come_with_the_call_and_in_batches():
    posterior, x = exact(), torch.randn(5, 2)
    theta = posterior.sample((7,), x)
    assert theta.shape == (7, 5, 2)
    log_p = posterior.log_prob(theta, x)
    torch.testing.assert_close(log_p[:, 1], posterior.given(x[1]).log_prob(theta[:, 1]))
    assert posterior.given(x).batch_shape == (5,)
    assert posterior.sample((3,), x[:1]).shape == (3, 2)  # a batch of one, as `sbi` has it
    assert posterior.sample((3,), [1.0, 2.0]).shape == (3, 2)
    estimate = posterior.estimate_log_prob(theta[:, 0], x[0])
    assert (estimate.value - posterior.log_prob(theta[:, 0], x[0])).abs().max() < 1e-6
    assert estimate.solver_error.max() < 1e-3


def test_parameters_and_observations_broadcast_as_in_torch():
    x, theta = torch.randn(5, 2), torch.randn(3, 1, 2)
    posterior = exact().given(x)
    truth = Independent(Normal(x / 2, math.sqrt(0.5)), 1)
    for given in (theta[0, 0], theta, theta.expand(3, 5, 2)):
        torch.testing.assert_close(posterior.log_prob(given), truth.log_prob(given), atol=1e-4, rtol=0)
        assert posterior.estimate_log_prob(given).value.shape == truth.log_prob(given).shape


def test_the_map_is_the_mode():
    x = torch.tensor([1.0, -2.0])
    found = exact().map(x, num_init=50, num_to_optimize=3, steps=60)
    torch.testing.assert_close(found, x / 2, atol=0.02, rtol=0)


def bounded_flow():
    transform = Compose(unbounded=Unbounded(2, ([0.0, -1.0], [1.0, math.inf])), standardise=Standardise(2))
    return flows.CNF(MLP(2, hidden=(8,), context_shape=2), transform=transform)


def test_a_bounded_posterior_has_the_support_of_the_prior():
    posterior = Posterior(bounded_flow()).given(torch.zeros(2))
    theta = posterior.sample((500,))
    assert ((theta[:, 0] > 0) & (theta[:, 0] < 1) & (theta[:, 1] > -1)).all()
    outside = torch.tensor([[0.5, 0.0], [1.5, 0.0], [0.5, -1.0], [0.0, 0.0]])
    assert posterior.log_prob(outside).isinf().tolist() == [False, True, True, True]
    assert posterior.support.check(outside).tolist() == [True, False, True, True]
    u, v = torch.cartesian_prod(*[(torch.arange(150) + 0.5) / 150] * 2).T  # θ₂ + 1 = v/(1 − v)
    with torch.no_grad():
        density = posterior.log_prob(torch.stack([u, v / (1 - v) - 1], 1)).exp() / (1 - v) ** 2
    assert density.mean() == pytest.approx(1, abs=0.05)
    assert posterior.support.check(posterior.map(num_init=20, num_to_optimize=2, steps=3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Posterior(flows.CNF(MLP(2))), "needs a flow that takes the observation as its context"),
        (lambda: exact().sample((2,)), r"needs an observation: pass x=..., or write posterior.given\(x\)"),
        (lambda: exact().given(torch.zeros(3)), r"must have the shape \(2,\), as the simulations had, got \(3,\)"),
        (lambda: exact().log_prob(torch.zeros(2), torch.zeros(2) / 0), "observation holds NaN or infinite"),
        (
            lambda: Posterior(bounded_flow()).log_prob(torch.tensor([[0.5, 0.0], [torch.nan, 0.0]]), torch.zeros(2)),
            "1 of the parameters to evaluate hold NaN",
        ),
        (lambda: exact().given(torch.zeros(2, dtype=torch.cfloat)), "must hold real numbers, got torch.complex64"),
        (
            lambda: exact().log_prob(torch.zeros(4, 2), torch.zeros(5, 2)),
            r"shape \(4, 2\) do not broadcast with observations of the batch shape \(5,\): expected \(\*batch, 2\)",
        ),
        (
            lambda: Inference(box([0.0], [1.0])).append_simulations(torch.rand(4, 1), torch.rand(5, 1)),
            r"each row of parameters needs its observation, got theta of shape \(4, 1\) and x of shape \(5, 1\)",
        ),
        (lambda: Posterior(exact().flow, box([0.0], [1.0])), r"prior has parameters of shape \(1,\), and the flow"),
        (lambda: exact().given("rainy"), "must be a tensor or an array of numbers, got str"),
        (lambda: exact().map(torch.zeros(4, 2)), r"map takes one observation, got a batch of shape \(4, 2\)"),
        (lambda: Inference(box([0.0], [1.0])).train(), "call append_simulations"),
        (lambda: Inference(box([0.0], [1.0])).build_posterior(), r"call train\(\) before build_posterior"),
        (lambda: Inference(Normal), "it is a class"),
        (lambda: infer(lambda theta: theta, torch.rand), "has no sample and no log_prob"),
        (
            lambda: (
                Inference(box([0.0], [1.0]))
                .append_simulations(torch.rand(4, 1), torch.rand(4, 3))
                .append_simulations(torch.rand(4, 1), torch.rand(4, 2))
            ),
            r"x must have rows of the shape \(3,\), as before, got \(4, 2\)",
        ),
    ],
)
def test_bad_observations_and_orders_are_told(call, message):
    with pytest.raises(flows.FlowsError, match=message):
        call()


def test_inference_as_sbi_does_it():
    prior = box([-1.0, -1.0], [1.0, 1.0])
    theta = prior.sample((120,))
    inference = Inference(prior).append_simulations(theta[:80], theta[:80]).append_simulations(theta[80:], theta[80:])
    flow = inference.train(steps=3, polish=0)
    posterior = inference.build_posterior().set_default_x(torch.zeros(1, 2))
    assert posterior.flow is flow is inference.build_posterior(flow).flow
    assert posterior.sample((5,)).shape == (5, 2)
    assert posterior.log_prob(torch.tensor([[2.0, 0.0]])).isinf().all()
    assert posterior.prior.event_shape == (2,)


def test_infer_gives_equal_posteriors_for_equal_seeds(tmp_path):
    def simulate(theta):
        return theta + 0.1 * torch.randn_like(theta)

    one, other = (infer(simulate, box([0], [1]), 40, steps=2, polish=1, num_test=5) for _ in range(2))
    assert all(map(torch.equal, one.flow.state_dict().values(), other.flow.state_dict().values()))
    infer(simulate, box([0], [1]), 40, steps=2, polish=0, num_test=5, output_dir=tmp_path / "run")
    assert (tmp_path / "run/summary.json").exists()


@pytest.mark.slow
def test_a_posterior_is_learned():
    """θ ~ U(−1, 1), x = θ + 0.2 z: the posterior is a normal cut at the bounds."""
    prior = box([-1.0], [1.0])
    posterior = infer(lambda theta: theta + 0.2 * torch.randn_like(theta), prior, 4000, steps=1500, polish=20)
    for x in (-0.9, 0.1):
        grid = torch.linspace(-1, 1, 2002)[1:-1].unsqueeze(1)
        truth = (-((grid[:, 0] - x) ** 2) / 0.08).exp()
        truth = truth / truth.sum()
        with torch.no_grad():  # a graph of the solve would take gigabytes
            learned = posterior.log_prob(grid, torch.tensor([x])).exp() * 2 / 2001
        assert (truth - learned).abs().sum() / 2 < 0.12  # total variation


# Calibration


def pairs(n=600, scale=1.0, shift=0.0, draws=99):
    theta = torch.randn(n, 2)
    x = theta + torch.randn(n, 2)
    return Calibration.of(x / 2 + shift + scale * math.sqrt(0.5) * torch.randn(draws, n, 2), theta)


def test_an_exact_posterior_is_calibrated():
    found = pairs()
    assert found.p_value > 1e-3
    assert found.coverage_error < 1.63 / math.sqrt(600)  # Kolmogorov's 1 % point
    levels = torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(found.expected_coverage(levels), levels.double(), atol=0.08, rtol=0)


@pytest.mark.parametrize("draws", [2, 9])
def test_few_draws_do_not_bias_the_coverage(draws):
    found = pairs(n=6000, draws=draws)
    for level in (0.3, 0.9):
        coverage = float(found.expected_coverage(torch.tensor([level]))[0])
        assert abs(coverage - level) < 4 * found.coverage_se(level)


@pytest.mark.parametrize(("scale", "shift"), [(0.6, 0.0), (1.6, 0.0), (1.0, 0.4)])
def test_wrong_posteriors_are_not(scale, shift):
    found = pairs(scale=scale, shift=shift)
    assert found.p_value < 1e-3
    if not shift:
        coverage = float(found.expected_coverage(torch.tensor([0.8]))[0])
        assert (coverage < 0.7) if scale < 1 else (coverage > 0.85)


def test_p_values_of_uniform_ranks_are_uniform():
    found = [Calibration(torch.randint(0, 100, (400, 1)), torch.rand(400), 99).p_value for _ in range(200)]
    share = sum(p < 0.2 for p in found) / 200
    assert share == pytest.approx(0.2, abs=0.12)


def test_calibration_tells_wrong_shapes():
    with pytest.raises(ValueError, match=r"draws \(L, n, d\) for each .* got \(5, 3\) and \(3, 2\)"):
        Calibration.of(torch.zeros(5, 3), torch.zeros(3, 2))


# The evaluator


def write_reference(folder, name="1_reference_posterior_samples.csv.bz2", columns=2):
    (folder / "1_observation.csv").write_text("data_1,data_2\n0.1,0.2\n")
    rows = "\n".join(",".join(f"{value:.5f}" for value in row) for row in torch.rand(60, columns).tolist())
    text = ",".join(f"parameter_{i + 1}" for i in range(columns)) + f"\n{rows}\n"
    (folder / name).write_bytes(bz2.compress(text.encode()))


def evaluator(data, **settings):
    quick = {"progress_bar": False, "calibration_points": 20, "calibration_draws": 9, "reference_points": 60}
    return PosteriorEvaluator(data, **quick | settings)


def test_a_run_reports_calibration_and_reference_posteriors(tmp_path):
    write_reference(tmp_path)
    data = TwoMoons(**QUICK)
    flow = posterior_flow(data)
    report = evaluator(data, reference=tmp_path).test(flow)
    assert {"nll", "sbc_p", "coverage_90", "coverage_90_se", "coverage_error"} <= set(report.metrics)
    assert 0.5 < report.metrics["reference_c2st"] <= 1
    assert report.headline[0] == "reference_c2st"
    assert "reference posteriors" in str(report)
    assert evaluator(data, reference=tmp_path).test(flow).metrics == report.metrics
    pictures = evaluator(data).pictures(flow)
    assert {"ranks", "coverage", "samples"} <= set(pictures)
    without = evaluator(data, calibration_points=0).test(flow)
    assert "sbc_p" not in without.metrics


def test_simulations_have_a_posterior_evaluator_by_default():
    data = Simulations(torch.rand(90, 2), torch.rand(90, 3), box([0, 0], [1, 1]))
    assert isinstance(default_evaluator(posterior_flow(data), data), PosteriorEvaluator)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, r"reference must be a folder with K_observation.csv|holds no reference posteriors"),
        (lambda folder: (folder / "1_observation.csv").write_text("a\n1\n"), "without 1_reference_posterior_samples"),
    ],
)
def test_missing_references_are_told_before_training(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(FileError, match=message):
        evaluator(TwoMoons(**QUICK), reference=tmp_path)


def test_references_of_another_task_are_told(tmp_path):
    write_reference(tmp_path, columns=3)
    data = TwoMoons(**QUICK)
    with pytest.raises(ValueError, match=r"parameters of shape \(3,\), and the data have \(2,\) and \(2,\)"):
        evaluator(data, reference=tmp_path).test(posterior_flow(data))
    with pytest.raises(ValueError, match=r"use evaluation=density"):
        evaluator(flows.datasets.Moons(num_validation=5, num_test=5)).check(flows.CNF(MLP(2), transform=Identity()))


# Runs from the shell


def test_a_simulator_of_ones_own_is_trained_from_the_shell(tmp_path, run, monkeypatch):
    (tmp_path / "epidemic.py").write_text(
        "import torch\n"
        "from flows.datasets import box\n\n"
        "def prior():\n    return box([0.0, 0.0], [1.0, 1.0])\n\n"
        "def simulate(theta):\n    return torch.cat([theta, theta + torch.randn_like(theta)], -1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    quiet = [f"reporting.{name}={'null' if value is None else value}" for name, value in QUIET.items()]
    settings = [
        "data=simulator",
        "data.simulate={_target_: epidemic.simulate, _partial_: true}",
        "data.prior={_target_: epidemic.prior}",
        "data.num_simulations=60",
        "data.num_test=20",
        "evaluation.calibration_draws=9",
        "field.hidden=[8]",
        "objective=flow_matching",
        "objective.flow_matching.steps=3",
        *[setting for setting in quiet if "loggers" not in setting and "callbacks" not in setting],
        f"output_dir={tmp_path / 'run'}",
    ]
    code, *told = run("train", *settings)
    assert code == 0, told
    flow = flows.load(tmp_path / "run", trust=["epidemic"])
    theta = Posterior(flow).sample((50,), torch.zeros(4))
    assert ((theta > 0) & (theta < 1)).all()
    with pytest.raises(flows.FlowsError, match=r"trust=\[epidemic\]"):
        flows.load(tmp_path / "run")
