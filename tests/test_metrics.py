"""Metrics of draws against closed forms, their standard errors against the spread over repetitions, their messages."""

import math

import pytest
import torch
from small_run import small_flow, small_gaussian
from torch.distributions import Normal

import flows
from flows.datasets import GaussianMean
from flows.evaluation import DensityEvaluator, EnergyEvaluator, Measurement
from flows.evaluation.metrics import (
    C2ST,
    CRPS,
    MMD,
    Coverage,
    EnergyScore,
    SampleMetric,
    SlicedWasserstein2,
    TwoSampleMetric,
    Wasserstein1,
    Wasserstein2,
    chosen_metrics,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_near(found, expected, errors=4.0, bias=0.0):
    assert abs(found.value - expected) < errors * found.standard_error + bias, (found, expected)


def test_the_accuracy_of_c2st_is_that_of_the_best_classifier():
    delta = 2.0
    shift = torch.tensor([delta, 0.0], dtype=torch.float64)
    best = float(Normal(0.0, 1.0).cdf(torch.tensor(delta / 2)))
    assert_near(C2ST(num_folds=3)(normal(500, 2), normal(500, 2, seed=1) + shift), best)
    same = C2ST(num_folds=3)(normal(500, 2), normal(500, 2, seed=1))
    assert_near(same, 0.5)
    assert same.standard_error == pytest.approx(0.5 / math.sqrt(1000), rel=1e-2)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [(Wasserstein1(), 3.0), (Wasserstein2(), 3.0), (SlicedWasserstein2(num_directions=400), 3.0 / math.sqrt(2))],
    ids=lambda value: getattr(value, "name", ""),
)
def test_wasserstein_distances_of_a_translation(metric, expected):
    points, shift = normal(400, 2), torch.tensor([3.0, 0.0], dtype=torch.float64)
    assert metric(points, points).value == pytest.approx(0, abs=1e-6)
    exact = metric(points, points + shift)
    if metric.name == "sliced_wasserstein2":
        assert_near(exact, expected)  # by its directions
    else:
        assert exact.value == pytest.approx(expected, abs=1e-9)
    assert_near(metric(points, normal(400, 2, seed=1) + shift), expected, bias=0.03)


def test_wasserstein_distances_of_gaussians_on_the_line():
    """Between N(0, 1) and N(0, s²), the optimal map is x ↦ s x: W1 = (s − 1) √(2/π), W2 = s − 1."""
    x, y = normal(800, 1), 3 * normal(800, 1, seed=1)
    assert_near(Wasserstein1()(x, y), 2 * math.sqrt(2 / math.pi))
    assert_near(Wasserstein2()(x, y), 2.0)
    assert_near(SlicedWasserstein2()(x, y), 2.0)


def test_mmd_of_gaussians():
    """E k = (h²/(h² + s² + t²))^(d/2) exp(−‖δ‖²/2(h² + s² + t²)) for N(·, s² I) and N(·, t² I)."""
    h, s, shift, d = 1.5, 0.7, 0.8, 2

    def kernel(one, other, gap):
        total = h**2 + one**2 + other**2
        return (h**2 / total) ** (d / 2) * math.exp(-d * gap**2 / (2 * total))

    expected = kernel(1, 1, 0) + kernel(s, s, 0) - 2 * kernel(1, s, shift)
    assert_near(MMD(bandwidth=h)(normal(1500, d), s * normal(1500, d, seed=1) + shift), expected)
    assert_near(MMD()(normal(1500, d), normal(1500, d, seed=1)), 0.0)


def test_crps_of_a_gaussian():
    mean, sd = 0.5, 2.0
    data = normal(300, 1, seed=1)
    z = (data - mean) / sd
    unit = Normal(torch.zeros((), dtype=torch.float64), 1.0)
    exact = sd * (z * (2 * unit.cdf(z) - 1) + 2 * unit.log_prob(z).exp() - 1 / math.sqrt(math.pi))
    found = CRPS()(mean + sd * normal(400, 300, 1), data)
    assert found.value == pytest.approx(float(exact.mean()), abs=0.02)
    assert found.standard_error == pytest.approx(float(exact.std()) / math.sqrt(300), rel=0.05)


def test_energy_score_of_a_gaussian():
    for d in (1, 4):
        expected = math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))
        assert_near(EnergyScore()(normal(50, 800, d), normal(800, d, seed=1)), expected)
    draws, data = normal(20, 30, 1), normal(30, 1, seed=1)
    assert EnergyScore()(draws, data).value == pytest.approx(CRPS()(draws, data).value, abs=1e-12)


@pytest.mark.parametrize("num_draws", [3, 50])
def test_coverage_is_its_level_where_draws_and_data_agree(num_draws):
    metric = Coverage(level=0.8)
    assert_near(metric(normal(num_draws, 4000, 2), normal(4000, 2, seed=1)), 0.8)
    narrow = metric(0.5 * normal(2000, 500, 1), normal(500, 1, seed=1))
    inside = 2 * float(Normal(0.0, 1.0).cdf(torch.tensor(0.5 * 1.2816))) - 1
    assert_near(narrow, inside)


@pytest.mark.parametrize(
    ("metric", "shift"),
    [(Wasserstein1(), 1.0), (Wasserstein2(), 1.0), (SlicedWasserstein2(50), 1.0), (MMD(1.0), 0.0), (MMD(1.0), 1.0)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_standard_errors_are_the_spread_over_repetitions(metric, shift):
    found = [metric(normal(120, 2, seed=2 * i), normal(120, 2, seed=2 * i + 1) + shift) for i in range(60)]
    spread = torch.tensor([one.value for one in found], dtype=torch.float64).std()
    stated = torch.tensor([one.standard_error for one in found], dtype=torch.float64).mean()
    assert stated == pytest.approx(float(spread), rel=0.35)


def test_a_run_reports_metrics_by_name():
    dataset = small_gaussian()
    flow = small_flow(dataset)
    evaluator = DensityEvaluator(dataset, metrics=["mmd", Coverage(level=0.5)], progress_bar=False)
    report = evaluator.test(flow)
    assert {"mmd", "mmd_se", "coverage", "coverage_se"} <= set(report.metrics)
    assert evaluator.test(flow).metrics == report.metrics
    assert [name for name, _ in report.rows][-2:] == ["mmd", "coverage"]
    assert "mmd" not in DensityEvaluator(dataset, progress_bar=False).test(flow).metrics


def test_metrics_of_a_conditional_flow_use_the_contexts():
    """A field that moves N(0, I) by the context has the conditional density of the data."""

    class Moving(torch.nn.Module):
        event_shape, context_shape = (2,), (2,)

        def forward(self, t, x, context):
            return context + 0 * x

    dataset = GaussianMean(2, sd=1.0, num_validation=10, num_test=1000, num_reference=10)
    metrics = ["coverage", "crps", "mmd"]
    found = DensityEvaluator(dataset, metrics=metrics).measured(flows.CNF(Moving()))
    assert_near(found["coverage"], 0.9)
    assert_near(found["crps"], 1 / math.sqrt(math.pi))
    assert_near(found["mmd"], 0.0)
    wrong = DensityEvaluator(dataset, metrics=metrics).measured(flows.CNF(Moving(), event_shape=2).guided(0.0))
    assert wrong["mmd"].value > 5 * wrong["mmd"].standard_error
    assert wrong["coverage"].value < 0.85


def test_an_energy_with_samples_reports_metrics():
    dataset = flows.datasets.DoubleWell(num_validation=20, num_test=80, num_reference=50)
    evaluator = EnergyEvaluator(dataset, metrics=["sliced_wasserstein2"], progress_bar=False)
    report = evaluator.test(small_flow(dataset))
    assert report.metrics["sliced_wasserstein2"] > 0
    assert "sliced_wasserstein2_se" in report.metrics
    assert "sliced wasserstein2" in dict(report.rows)
    without = flows.datasets.Phi4([4])
    with pytest.raises(ValueError, match=r"metrics=\[c2st\] compares draws with samples .* 'phi4.*' has none"):
        EnergyEvaluator(without, metrics=["c2st"])


class Mean(TwoSampleMetric):
    def compare(self, draws, data):
        return Measurement(float(draws.mean() - data.mean()), math.nan)


def test_a_metric_of_ones_own_has_a_name():
    (metric,) = chosen_metrics(["mean"])
    assert isinstance(metric, SampleMetric)
    assert str(metric(torch.ones(2, 1), torch.zeros(2, 1))) == "1.0000"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: chosen_metrics(["fid"]), "metrics: unknown SampleMetric 'fid'; expected one of .*c2st"),
        (lambda: chosen_metrics("c2st"), r"metrics must be a list, such as \[c2st\]"),
        (lambda: chosen_metrics(["mmd", "mmd"]), "each metric once, got mmd 2 times"),
        (lambda: C2ST(num_folds=1), "num_folds must be .* >= 2, got 1"),
        (lambda: MMD(bandwidth=0.0), "bandwidth must be .* > 0, got 0.0; or use 'median'"),
        (lambda: Coverage(level=1.0), "level must be .* < 1, got 1.0"),
        (lambda: MMD()(normal(9, 2), normal(9, 3)), r"one shape, got draws \(9, 2\) and data \(9, 3\)"),
        (lambda: MMD()(normal(3, 2), normal(9, 2)), "mmd needs four points of each sample, got 3 and 9"),
        (lambda: MMD()(torch.ones(9, 2), torch.ones(9, 2)), "median distance is 0; set bandwidth"),
        (lambda: C2ST()(normal(4, 2), normal(9, 2)), "c2st with 5 folds .* got 4 and 9"),
        (lambda: CRPS()(normal(9, 2), normal(9, 2)), r"two or more draws for each point, \(S, n, \*event\)"),
        (lambda: CRPS()(normal(3, 9, 2), normal(9, 2).log()), "crps: .* of 9 data hold NaN or infinite values"),
        (lambda: Wasserstein2()(normal(1, 2), normal(9, 2)), "wasserstein2 needs at least two draws"),
    ],
)
def test_bad_arguments_are_told(call, message):
    with pytest.raises(flows.FlowsError, match=message):
        call()
