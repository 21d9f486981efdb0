"""The evaluator of trajectories: its figures against definitions, standard errors, and when nothing is a result."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import flows
from flows import ODESolver, plots
from flows.datasets import LotkaVolterra, Moons, Pendulum, Series, TwoBody
from flows.errors import InvalidTypeError, InvalidValueError
from flows.evaluation import CRPS, Coverage, EnergyScore, TrajectoryEvaluator, default_evaluator
from flows.evaluation.trajectory_report import predictive_figures
from flows.predictions import Mean, predict
from flows.transforms import Standardise

torch.set_default_dtype(torch.float64)


class Truth(nn.Module):
    """The velocity of a system, times 1 + push."""

    def __init__(self, data, push=0.0):
        super().__init__()
        self.event_shape, self.data = data.event_shape, data
        self.push = nn.Parameter(torch.tensor(push))

    def forward(self, t, x):
        return (1 + self.push) * self.data.velocity(t, x)


class Explosion(nn.Module):
    """dx/dt = x², which ends at t = 1/x(0)."""

    event_shape = (1,)

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(1.0))

    def forward(self, t, x):
        return self.rate * x**2


class Decay(nn.Module):
    event_shape = (1,)

    def __init__(self, rate=1.0):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate))

    def forward(self, t, x):
        return -self.rate * x


def pendulum(**settings):
    return Pendulum(**{"num_series": 40, "num_times": 12, "span": 5.0, "beyond": 2.5, **settings})


def ode(data, push=0.0, tolerance=1e-8, **settings):
    return flows.NeuralODE(Truth(data, push), ODESolver(rtol=tolerance, atol=tolerance), **settings)


def evaluator(data, **settings):
    return TrajectoryEvaluator(data, progress_bar=False, **settings)


def ragged(missing=True):
    """Decaying series of 5 to 14 points, some values missing."""
    times = [torch.linspace(0, 1 + 0.1 * n, 5 + n) + n for n in range(10)]
    values = [torch.exp(-(t - t[0]))[:, None].clone() for t in times]
    if missing:
        for x in values:
            x[2] = math.nan
    return Series(times, values, missing="mask", validation_fraction=0.3, test_fraction=0.4)


def test_figures_are_means_over_observed_values():
    data = ragged()
    model = flows.NeuralODE(Decay(0.9), ODESolver(rtol=1e-9, atol=1e-9))
    report = evaluator(data, batch_size=2).test(model)
    batch = data.part("test")
    own = batch.times - batch.times[:, :1]
    error = (torch.exp(-0.9 * own) * batch.x[:, :1, 0] - batch.x[..., 0]) ** 2
    counts = batch.observed[..., 0].clone()
    counts[:, 0] = False
    inside = own <= data.training_span * (1 + 1e-9)
    for ending, region in (("", inside), ("_beyond", ~inside)):
        chosen = counts & region
        expected = float(error[chosen].mean()) if chosen.any() else None
        assert report.metrics[f"mse{ending}"] == (expected and pytest.approx(expected, rel=1e-5))
    scale = data.reference().std(correction=0)
    assert report.metrics["relative_error"] == pytest.approx(math.sqrt(report.metrics["mse"]) / float(scale))
    assert report.metrics["values"] == int(counts.sum())
    assert report.metrics["unresolved"] is None


def test_the_standard_error_is_the_spread_over_repetitions():
    generator = torch.Generator().manual_seed(0)
    means, errors = [], []
    for _ in range(400):
        level = torch.rand(30, 1, generator=generator)  # values of one series are alike
        counts = torch.rand(30, 8, generator=generator) < 0.7
        found = Mean.of(level + 0.1 * torch.rand(30, 8, generator=generator), counts)
        means.append(found.value)
        errors.append(found.standard_error)
    assert torch.tensor(means).std().item() == pytest.approx(sum(errors) / len(errors), rel=0.15)


def test_metrics_of_draws_at_the_true_noise():
    """Draws and observations are N(state, σ²): CRPS σ/√π, energy score σ Γ(3/2)/Γ(1), coverage 90 %."""
    data = pendulum(num_series=200, noise=0.1, test_fraction=0.6, beyond=0.0)
    model = ode(data, tolerance=1e-5, noise=0.1)
    with torch.no_grad():
        model.log_noise.data = data.noise_scale.log()
    metrics = evaluator(data, metrics=["crps", "coverage"]).test(model).metrics
    # a prediction starts at an observation with noise, so its error is the noise and what becomes of that of the start
    assert metrics["crps"] == pytest.approx(float(data.noise_scale.mean()) / math.sqrt(math.pi), rel=0.5)
    found = predict(model, data, "test", 1000, None, 8)
    exact = replace(found, states=found.truth, mask=found.mask)
    sizes = data.noise_scale
    figures = predictive_figures(exact, [CRPS(), Coverage(), EnergyScore()])
    for name, expected in (("crps", float(sizes.mean()) / math.sqrt(math.pi)), ("coverage", 0.9)):
        assert abs(figures[name].value - expected) < 4 * figures[name].standard_error + 1e-12, name
        assert 0 < figures[name].standard_error < 0.1 * expected
    lower, upper = (math.gamma(1.5) * float(size) for size in (sizes.min(), sizes.max()))
    assert 0.9 * lower < figures["energy_score"].value < 1.1 * upper
    fewer = predictive_figures(exact, [CRPS(max_points=100)])["crps"]
    assert fewer.standard_error > 2 * figures["crps"].standard_error


def test_metrics_leave_missing_values_out():
    data = ragged()
    model = flows.NeuralODE(Decay(), ODESolver(rtol=1e-9, atol=1e-9), noise=0.1)
    found = predictive_figures(evaluator(data).predictions(model), [CRPS(num_draws=1000), EnergyScore(num_draws=1000)])
    exact = 0.1 * (math.sqrt(2 / math.pi) - 1 / math.sqrt(math.pi))  # observations are the states
    assert found["crps"].value == pytest.approx(exact, rel=0.05)
    assert found["energy_score"].value == pytest.approx(found["crps"].value, rel=1e-6)
    report = evaluator(data, metrics=["crps"]).test(model)
    assert report.unresolved  # the error is that of the solver
    assert report.metrics["crps"] is None
    assert report.metrics["crps_unresolved"] == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (["c2st"], r"metrics=\[c2st\] compares two samples, .* take coverage, crps or energy_score"),
        (["crps"], r"metrics=\[crps\] needs predictions with noise, and this neural ODE predicts one path; train with"),
        (["fid"], "metrics: unknown SampleMetric 'fid'"),
    ],
)
def test_metrics_that_mean_nothing_are_refused_before_training(metrics, message):
    data = pendulum()
    with pytest.raises(InvalidValueError, match=message):
        evaluator(data, metrics=metrics).check(ode(data))


def test_pieces_of_a_series_count_together():
    """Cutting series into windows does not make more of them: the standard error stays about what it was."""
    t, generator = torch.linspace(0, 10, 101), torch.Generator().manual_seed(0)
    speeds = torch.rand(20, 1, generator=generator)
    values = [(speed * t).sin()[:, None] for speed in speeds]
    whole, cut = (
        Series([t] * 20, values, window=window, test_fraction=0.5, validation_fraction=0.1) for window in (None, 11)
    )
    errors = []
    for data in (whole, cut):
        found = evaluator(data).predictions(flows.NeuralODE(Decay(0.0)))
        assert found.num_series == 10
        errors.append(found.mean(found.x.square(), "all"))
    assert errors[1].value == pytest.approx(errors[0].value)
    assert errors[1].standard_error == pytest.approx(errors[0].standard_error)
    assert evaluator(cut).test(flows.NeuralODE(Decay(0.0))).metrics["series"] == 10


def test_a_single_series_has_no_standard_error():
    found = Mean.of(torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool))
    assert found.value == 1
    assert math.isnan(found.standard_error)
    assert math.isnan(Mean.of(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)).value)


def test_errors_against_the_truth_leave_the_noise_out():
    data = pendulum(noise=0.1)
    metrics = evaluator(data).test(ode(data)).metrics
    noise = float(data.noise_scale.square().mean())
    assert metrics["mse"] == pytest.approx(noise, rel=0.3)
    assert metrics["true_mse_unresolved"] < 1e-10 if metrics["true_mse"] is None else metrics["true_mse"] < 1e-10
    assert metrics["relative_error"] == pytest.approx(0.1, rel=0.2)
    assert "true_mse" not in evaluator(pendulum()).test(ode(pendulum(), 0.1)).metrics


@pytest.mark.parametrize("transform", [None, "standardise"])
def test_intervals_cover_as_often_as_they_say(transform):
    data = pendulum(num_series=200, noise=0.1, test_fraction=0.6)
    given = None if transform is None else Standardise((2,)).fit(data.reference())
    model = ode(data, tolerance=1e-5, transform=given, noise=0.1)
    if transform is None:
        model.log_noise.data = data.noise_scale.log()
    else:  # Standardise divides by the standard deviation of all training values
        model.log_noise.data = (data.noise_scale / data.reference().std(0, correction=0)).log()
        model.field = Scaled(model.field, model.transform)
    metrics = evaluator(data).test(model).metrics
    for level in (50, 90):
        for ending in ("", "_beyond"):
            value, error = metrics[f"coverage_{level}{ending}"], metrics[f"coverage_{level}{ending}_se"]
            assert abs(value - level / 100) < 4 * error
            assert error < 0.02
    entropy = float((data.noise_scale.log() + 0.5 * math.log(2 * math.pi * math.e)).mean())
    assert metrics["nll"] == pytest.approx(entropy, abs=4 * metrics["nll_se"])


class Scaled(nn.Module):
    """A field of data space as the field of y = transform(x)."""

    def __init__(self, field, transform):
        super().__init__()
        self.event_shape, self.field, self.transform = field.event_shape, field, transform

    def forward(self, t, y):
        x, _ = self.transform.inverse(y)
        return torch.func.jvp(lambda x: self.transform(x)[0], (x,), (self.field(t, x),))[1]


def test_the_score_is_the_loss_of_training():
    data = pendulum(noise=0.1)
    for settings, loss in (({}, "mse"), ({"noise": 0.3}, "gaussian")):
        model = ode(data, 0.2, transform=Standardise((2,)).fit(data.reference()), **settings)
        evaluation = evaluator(data).validate(model)
        whole = next(iter(data.validation_batches(100, dtype=torch.float64)))
        output = flows.objectives.TrajectoryMatching(loss=loss)(model, whole)
        assert evaluation.score == pytest.approx(output.loss.item(), rel=1e-6)
        assert evaluation.metrics["mse"] == pytest.approx(output.metrics["mse"].item(), rel=1e-6)


@pytest.mark.parametrize("system", [Pendulum, TwoBody, LotkaVolterra])
def test_drift_is_that_of_the_solve(system):
    data = system(num_series=20, num_times=20, span=4.0, beyond=1.0)
    loose, tight = (evaluator(data).test(ode(data, 1e-3, tolerance)).metrics for tolerance in (1e-3, 1e-9))
    names = list(data.conserved(data.truth))
    for name in names:
        assert tight[f"drift_{name}"] < 1e-6
        assert loose[f"drift_{name}"] > 10 * tight[f"drift_{name}"]


def test_a_coarse_solve_is_no_result():
    data = pendulum()
    model = ode(data, tolerance=1e-2)
    report = evaluator(data).test(model)
    assert "solver error" in report.unresolved
    assert "set a smaller solver.rtol" in report.unresolved
    assert report.metrics["mse"] is None
    assert report.metrics["mse_unresolved"] > 0
    assert "unresolved" in str(report)
    evaluation = evaluator(data).validate(model)
    assert evaluation.unresolved is not None
    assert "mse" not in evaluation.metrics
    assert evaluator(data).test(ode(data, push=0.3, tolerance=1e-6)).unresolved is None


def test_figures_inside_stand_where_predictions_explode_beyond():
    times = torch.linspace(0, 0.8, 9).expand(12, 9)
    x0 = 0.8 + 0.02 * torch.arange(12.0)
    data = Series(list(times), [(1 / (1 / a - t))[:, None] for a, t in zip(x0, times, strict=True)])
    longer = torch.linspace(0, 4.0, 9)
    test = data.split["test"].tolist()
    everything = [longer if i in test else times[i] for i in range(12)]
    values = [torch.ones(9, 1) * a for a in x0]
    data = Series(everything, values, split_seed=0)
    assert data.split["test"].tolist() == test
    model = flows.NeuralODE(Explosion())
    report = evaluator(data).test(model)
    assert report.metrics["mse"] > 0
    assert report.metrics["mse_beyond"] is None
    assert "t = 1." in report.metrics["unresolved_beyond"]  # when it explodes
    assert "the solve stopped" in str(report)
    assert set(plots.series_figures(model, data)) == {"series", "errors"}


def test_what_does_not_suit_is_refused():
    data, moons = pendulum(), Moons(num_validation=10, num_test=10)
    model = ode(data)
    assert isinstance(default_evaluator(model, data), TrajectoryEvaluator)
    with pytest.raises(InvalidTypeError, match="time series"):
        default_evaluator(model, moons)
    with pytest.raises(InvalidTypeError, match="NeuralODE"):
        default_evaluator(flows.CNF(flows.fields.MLP((2,))), data)
    with pytest.raises(InvalidTypeError, match="needs time series"):
        TrajectoryEvaluator(moons)
    with pytest.raises(InvalidTypeError, match=r"needs a flows\.NeuralODE, got CNF"):
        evaluator(data).check(flows.CNF(flows.fields.MLP((2,))))
    with pytest.raises(InvalidValueError, match=r"have the shape \(2,\), and those of the model \(3,\)"):
        evaluator(data).check(flows.NeuralODE(flows.fields.MLP((3,))))
    with pytest.raises(InvalidValueError, match="part must be test or validation"):
        evaluator(data, part="train")
    with pytest.raises(InvalidValueError, match="max_series must be"):
        evaluator(data, max_series=0)


def test_series_are_counted_once_whatever_the_batch():
    data = pendulum(irregular=True)
    model = ode(data, 0.1)
    whole = predict(model, data, "test", 100)
    parts = predict(model, data, "test", 3, checked=4)
    torch.testing.assert_close(parts.states, whole.states, rtol=1e-5, atol=1e-6)
    assert len(parts.solver_error) == 4
    assert len(predict(model, data, "test", 3, max_series=4).states) == 4


def test_pictures_show_what_they_say():
    data = pendulum(noise=0.05)
    model = ode(data, 0.1, noise=0.05)
    pictures = evaluator(data).pictures(model)
    assert list(pictures) == ["series", "errors", "phase", "field"]
    assert pictures["errors"].axes[0].get_yscale() == "log"
    first = pictures["series"].axes[0]
    drawn = plots.predict_curves(model, data)
    lines = [line.get_ydata() for line in first.get_lines()]
    assert any(
        len(y) == drawn.states.shape[1] and torch.allclose(torch.tensor(y), drawn.states[0, :, 0]) for y in lines
    )
    torch.testing.assert_close(drawn.truth[:, 0], drawn.states[:, 0])
    texts = [text.get_text() for text in pictures["series"].legends[0].get_texts()]
    assert {"prediction", "observed", "truth", "90 % interval", "end of training span"} == set(texts)
    assert [axes.get_title() for axes in pictures["field"].axes[:2]] == ["truth", "model"]


def test_the_drawn_field_is_that_of_data_space():
    data = pendulum()
    transform = Standardise((2,)).fit(data.reference())
    x = torch.randn(5, 2)
    model = flows.NeuralODE(Scaled(Truth(data), transform), transform=transform)
    torch.testing.assert_close(plots.series._velocity(model, x, 0.0, None), data.velocity(torch.tensor(0.0), x))
