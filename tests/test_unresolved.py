"""Figures that cannot be right are no results: they read "unresolved" and select nothing."""

import json
import math

import pytest
import torch
from small_run import Memory, small_trainer
from torch import nn

import flows
from flows import ODESolver, plots
from flows.datasets import Energy, Gaussian, Table
from flows.errors import FieldWarning
from flows.evaluation import DensityEvaluator, EnergyEvaluator, importance_weights
from flows.models.importance import WeightSums
from flows.models.mass import Mass, box, mass
from flows.models.resolution import bound_fault, solver_fault
from flows.training import Stage

RATE = 6.0  # of a linear field, too stiff for long steps


@pytest.fixture(autouse=True)
def _coarse_masses():
    """Masses are those of a real run here."""


class Jump(nn.Module):
    """v = a sign(x1) + 0.001 x: the halves of the plane move apart, and a solve backwards puts mass into the gap."""

    def __init__(self, speed, dimension=2):
        super().__init__()
        self.event_shape = (dimension,)
        self.speed = nn.Parameter(torch.tensor(speed))

    def forward(self, t, x):
        return self.speed * torch.cat([x[:, :1].sign(), torch.zeros_like(x[:, 1:])], 1) + 1e-3 * x


def normal(dimension=2, number=400, scale=1.0):
    return Gaussian([0.0] * dimension, (scale**2 * torch.eye(dimension)).tolist(), number, number, 200)


def stiff(solver, rate=RATE, dimension=2):
    """A flow that stretches N(0, 1) by exp(rate)."""
    return flows.CNF(flows.fields.Linear((dimension,), rate * torch.eye(dimension)), solver=solver)


def evaluator(dataset, **settings):
    return DensityEvaluator(dataset, progress_bar=False, **settings)


HIDDEN = {  # each would leave a lenient comparison of a solve with itself
    "euler": {"method": "euler", "step_size": 0.25},
    "one step": {"method": "rk4", "step_size": 1.0},
    "longer than the solve": {"method": "euler", "step_size": 1e6},
    "midpoint": {"method": "midpoint", "step_size": 1e3},
    "adams": {"method": "explicit_adams", "step_size": 50.0},
    "loose": {"rtol": 0.99, "atol": 1e8, "method": "adaptive_heun"},
    "scipy": {"method": "scipy_solver", "rtol": 0.99, "atol": 1e8, "gradient": "adjoint"},
    "forced": {"method": "bosh3", "min_step": 0.5},
    "huge minimum": {"method": "bosh3", "min_step": 1e6},
}


@pytest.mark.parametrize("settings", HIDDEN.values(), ids=HIDDEN)
@pytest.mark.parametrize(("points", "checked"), [(1, 2000), (5, 2000), (None, 0)])
def test_a_coarse_solve_is_unresolved(settings, points, checked):
    """However few points there are, and however few of them were asked to be checked."""
    flow = stiff(ODESolver(**settings))
    judge = evaluator(normal(scale=math.exp(RATE)), points=points, solver_error_points=checked)
    report = judge.test(flow)
    assert "solver error" in report.unresolved
    assert "step_size" in report.unresolved or "rtol" in report.unresolved
    assert report.metrics["nll"] is None
    assert report.metrics["gap"] is None
    assert math.isfinite(report.metrics["nll_unresolved"])
    rows = dict(report.rows)
    assert rows["NLL"].startswith("unresolved")
    assert rows["gap"] == "unresolved"
    assert rows["unresolved"] == report.unresolved
    validation = judge.validate(flow)
    assert validation.unresolved is not None
    assert not {"nll", "gap"} & validation.metrics.keys()


@pytest.mark.parametrize("points", [1, 2, 5, None])
def test_a_fine_solve_is_a_result(points):
    judge = evaluator(normal(scale=math.exp(RATE)), points=points)
    report = judge.test(stiff(ODESolver()))
    assert report.unresolved is None
    assert report.metrics["unresolved"] is None
    assert "nll_unresolved" not in report.metrics
    assert judge.validate(stiff(ODESolver())).unresolved is None


def test_a_tighter_solve_that_fails_leaves_the_figure_unresolved():
    class NeverTight(ODESolver):
        def tighter(self, factor=100.0):
            return ODESolver(max_steps=1)

    flow = stiff(NeverTight(), 2.0)
    estimate = flow.estimate_log_prob(torch.randn(5, 2))
    assert estimate.value.isfinite().all()
    assert estimate.solver_error.isnan().all()
    report = evaluator(normal()).test(flow)
    assert "solver error is unknown" in report.unresolved
    assert report.metrics["solver_error"] is None


@pytest.mark.parametrize("speed", [0.4, -0.4])
def test_a_jump_is_found_by_the_mass(speed):
    """The solver error is small, and so is the gap where the entropy is unknown."""
    torch.manual_seed(0)
    data = Table(torch.randn(1000, 2), validation_fraction=0.2, test_fraction=0.4)
    flow = flows.CNF(Jump(speed), solver=ODESolver("rk4", step_size=0.1))
    judge = evaluator(data)
    with pytest.warns(FieldWarning, match="jumps in x, near"):
        report = judge.test(flow)
    # Points of the gap come from 0, and points that meet there have none of the mass N(0, 1) had before.
    expected = 1 + 2 * speed / math.sqrt(2 * math.pi) if speed > 0 else 1 - math.erf(-speed / math.sqrt(2))
    assert report.metrics["solver_error"] < 0.05
    assert report.metrics["mass"] == pytest.approx(expected, abs=0.02)
    assert "mass" in report.unresolved
    assert "jump of the field" in report.unresolved
    assert report.metrics["nll"] is None
    assert dict(report.rows)["mass"].startswith(f"{report.metrics['mass']:.3f}")
    if speed > 0:  # what flatters the likelihood is found in validation, too
        assert "mass" in judge.validate(flow).unresolved


def sharp(width):
    """A flow whose density is a filament: N(0, 1) times N(0, width²)."""
    matrix = torch.diag(torch.tensor([0.0, math.log(width)]))
    return flows.CNF(flows.fields.Linear((2,), matrix), solver=ODESolver(rtol=1e-6, atol=1e-6))


@pytest.mark.parametrize(
    ("width", "seed"),
    [(1.0, 0), (1e-2, 0), (1e-3, 1)]
    + [pytest.param(width, seed, marks=pytest.mark.slow) for width in (1e-1, 1e-3, 1e-4, 1e-5) for seed in (0, 2, 3)],
)
def test_a_sharp_density_gives_no_false_alarm(width, seed):
    """Also where the data lie elsewhere, the box cuts the density, or cells are wider than it."""
    flow, generator = sharp(width), torch.Generator().manual_seed(seed)
    for low, high in (((-3, -3), (3, 3)), ((0, -1), (4, 3)), ((-0.5, 0), (0.5, 1))):
        found = mass(flow, low, high, generator=generator)
        assert found.fault is None
        inside = 0.5 * (math.erf(high[0] / math.sqrt(2)) - math.erf(low[0] / math.sqrt(2)))
        inside *= 0.5 * (math.erf(high[1] / width / math.sqrt(2)) - math.erf(low[1] / width / math.sqrt(2)))
        assert found.inside == pytest.approx(inside, abs=5 * max(found.standard_error, found.largest_error))
        assert mass(flow, low, high, generator=generator, samples=False).fault is None


@pytest.mark.parametrize("dimension", [1, 2])
def test_the_mass_of_a_normal_distribution_is_one(dimension):
    flow = stiff(ODESolver(rtol=1e-7, atol=1e-7), 0.5, dimension)
    flow.divergence = flows.divergence.Hutchinson()  # whose noise an exponential would turn into a bias
    found = mass(flow, *box(torch.randn(5000, dimension)))
    assert abs(found.total - 1) < 0.01
    assert isinstance(flow.divergence, flows.divergence.Hutchinson)
    assert Mass(1.3, 0.01, 1.0).fault is not None
    assert Mass(0.3, 0.01, None).fault is None  # without samples it may lie outside
    assert Mass(1.3, 0.08, 1.0).fault is None


def test_the_bounds_of_a_figure():
    solver = ODESolver()
    assert solver_fault(None, 0.1, solver) is None
    assert solver_fault(0.049, 0.001, solver) is None
    assert solver_fault(0.2, 0.3, solver) is None
    assert "0.2 nats" in solver_fault(0.2, 0.1, solver)
    assert "0.2 nats" in solver_fault(0.2, math.nan, solver)
    assert "unknown" in solver_fault(math.nan, 1.0, solver)
    assert bound_fault("gap", -0.39, 0.1, 10_000, solver) is None
    assert "gap of -0.4100 ± 0.1000" in bound_fault("gap", -0.41, 0.1, 10_000, solver)
    assert bound_fault("gap", -0.41, 0.1, 5, solver) is None  # five points may agree by chance
    assert bound_fault("gap", -40.0, 0.1, 5, solver) is not None
    assert bound_fault("gap", -5.0, math.nan, 1, solver) is None
    assert bound_fault("gap", -1e-6, 0.0, 100, solver) is None


def test_the_gap_of_a_small_part_is_no_false_alarm():
    """Of a thousand parts of three points, nearly none is called impossible."""
    values = torch.randn(1000, 3)
    found = [bound_fault("gap", float(v.mean()), float(v.std()) / 3**0.5, 3, ODESolver()) for v in values]
    assert sum(fault is not None for fault in found) <= 1


def coarse_trainer(folder, solver, **settings):
    dataset = normal(number=60, scale=math.exp(RATE))
    objective = flows.objectives.MaximumLikelihood()
    stages = {"likelihood": Stage(objective, steps=6, batch_size=8, learning_rate=1e-4)}
    return small_trainer(folder, dataset, stages, stiff(solver), **settings)


def test_unresolved_weights_are_never_the_best(tmp_path):
    memory = Memory()
    summary = coarse_trainer(tmp_path, ODESolver("euler", step_size=0.25), loggers=[memory]).fit()
    assert summary.validation_score is None
    assert not (tmp_path / "checkpoints" / "best.pt").exists()
    content = json.loads((tmp_path / "summary.json").read_text())
    assert content["test_nll"] is None
    assert "solver error" in content["test_unresolved"]
    assert math.isfinite(content["test_nll_unresolved"])
    assert "unresolved" in str(summary)
    assert not memory.series("validation/nll")
    assert not memory.series("validation/score")
    assert len(memory.series("validation/nll_unresolved")) == 2
    assert any("validation is unresolved" in text for _, text in memory.series("warnings"))


def test_weights_that_are_resolved_later_become_the_best(tmp_path):
    """An impossible score of before does not outrank them."""
    trainer = coarse_trainer(tmp_path, ODESolver("euler", step_size=0.25))
    flow = trainer.model

    class Repair:
        def on_step_end(self, run):
            if run.position.step == 3:
                run.state.ema.module.solver = flow.solver = ODESolver()

    trainer.fabric._callbacks.append(Repair())
    summary = trainer.fit()
    assert summary.position.best_step == 6
    assert summary.metrics["unresolved"] is None


class Known(Energy):
    """exp(log_z) times a normal density, without a sampler."""

    name = "known"

    def __init__(self, covariance, log_z=1.5, number=4000):
        super().__init__(number, number, 100, (len(covariance),))
        self.normal = torch.distributions.MultivariateNormal(torch.zeros(len(covariance)), covariance)
        self.log_z = self.stated = log_z

    def log_density(self, x):
        return self.normal.log_prob(x) + self.stated


def probed(noise, num_probes, dimension=10, sign=None):
    """A flow that samples its energy exactly, and the energy; log q has probe noise of this standard error."""
    matrix = torch.randn(dimension, dimension, generator=torch.Generator().manual_seed(3))
    matrix = (matrix + matrix.T).fill_diagonal_(0.0)
    matrix = matrix if sign is None else sign * matrix.abs()
    matrix *= noise * math.sqrt(num_probes / 2) / matrix.norm()  # 2 ‖A‖² is the variance of one probe
    half = torch.linalg.matrix_exp(matrix)
    estimator = flows.divergence.Hutchinson(num_probes)
    flow = flows.CNF(flows.fields.Linear((dimension,), matrix), estimator, ODESolver("rk4", step_size=0.1))
    return flow, Known(half @ half.T)


@pytest.mark.parametrize("sign", [None, 1.0, -1.0])  # the noise is symmetric, skewed to the right, to the left
@pytest.mark.parametrize(("noise", "num_probes"), [(0.2, 2), (0.4, 2), (0.4, 4)])
def test_log_z_is_corrected_for_the_noise_of_probes(noise, num_probes, sign):
    flow, energy = probed(noise, num_probes, sign=sign)
    found = importance_weights(flow, energy, 20_000, 20_000, torch.Generator().manual_seed(1))
    assert found.probe_error == pytest.approx(noise, rel=0.1)
    raw = found.log_z + found.probe_bias
    assert raw - energy.log_z > 0.75 * noise**2 / 2
    assert abs(found.log_z - energy.log_z) < 4 * found.log_z_se
    assert abs(found.log_z - energy.log_z) < 0.35 * found.probe_bias
    assert found.effective_sample_size > 1 - 0.5 * noise**2  # it is 1 without noise, exp(−noise²) with it
    assert found.unresolved_weights is None
    assert any(name == "probe bias" for name, _ in found.table())
    assert found.metrics()["log_z_probe_bias"] == found.probe_bias


@pytest.mark.parametrize(("noise", "num_probes"), [(0.7, 2), (3.0, 2), (0.3, 1)])
def test_log_z_is_refused_where_the_noise_is_too_large_to_correct(noise, num_probes):
    flow, energy = probed(noise, num_probes)
    judge = EnergyEvaluator(energy, divergence=flow.divergence, progress_bar=False)
    report = judge.test(flow)
    assert report.metrics["log_z"] is report.metrics["effective_sample_size"] is None
    assert dict(report.rows)["log Z"].startswith("unresolved")
    assert "take an exact divergence" in report.unresolved
    assert report.metrics["free_energy"] == pytest.approx(-energy.log_z, abs=5 * report.metrics["free_energy_se"])
    evaluation = judge.validate(flow)
    assert evaluation.unresolved is None  # the free energy is not biased
    assert "log_z" not in evaluation.metrics


def test_exact_weights_are_left_as_they_are():
    log_weight = torch.randn(1000)
    sums = WeightSums.of(log_weight, torch.zeros(1000), 1)
    assert sums.log_z == pytest.approx(float(log_weight.exp().mean().log()))
    assert sums.probe_bias == 0
    flow, energy = probed(0.5, 2)
    judge = EnergyEvaluator(energy, progress_bar=False)  # exact, since ten products are affordable
    report = judge.test(flow)
    assert report.unresolved is None
    assert report.metrics["log_z"] == pytest.approx(energy.log_z, abs=1e-5)


@pytest.mark.parametrize("settings", [HIDDEN[name] for name in ("euler", "loose", "forced")])
def test_samples_of_a_coarse_solve_are_unresolved(settings):
    flow = stiff(ODESolver(**settings))
    energy = Known(math.exp(2 * RATE) * torch.eye(2), number=500)
    judge = EnergyEvaluator(energy, progress_bar=False, solver_error_points=0)
    report, evaluation = judge.test(flow), judge.validate(flow)
    figures = ("free_energy", "log_z", "effective_sample_size", "reverse_kl")
    assert [report.metrics[name] for name in figures] == [None] * 4
    assert "solver" in report.unresolved
    assert "solver" in evaluation.unresolved
    assert not set(figures) & evaluation.metrics.keys()
    assert dict(report.rows)["free energy"].startswith("unresolved")


def test_a_free_energy_below_the_known_log_z_is_unresolved():
    energy = Known(math.exp(0.2) * torch.eye(2))
    energy.log_z -= 0.5  # of a density that has more
    flow = flows.CNF(flows.fields.Linear((2,), 0.1 * torch.eye(2)))
    report = EnergyEvaluator(energy, progress_bar=False).test(flow)
    assert "reverse KL" in report.unresolved
    assert report.metrics["reverse_kl"] is None
    assert report.metrics["reverse_kl_unresolved"] < -0.4


class Squashed(nn.Module):
    """`Jump` under two contexts: it takes the second alone."""

    event_shape, context_shape = (2,), (2,)

    def forward(self, t, x, context):
        return 0.4 * context[:, 1:] * torch.cat([x[:, :1].sign(), torch.zeros_like(x[:, 1:])], 1)


def titles(figure):
    return " ".join(axes.get_title() for axes in figure.axes)


def test_pictures_of_densities_that_cannot_be_right_are_marked():
    data, fine = normal(), ODESolver("rk4", step_size=0.1)
    with pytest.warns(FieldWarning, match="jumps in x, near"):
        marked = titles(plots.density(flows.CNF(Jump(0.4), solver=fine), data, 48))
    assert "unresolved: mass 1.3" in marked
    coarse = stiff(ODESolver("euler", step_size=0.5), 3.0)
    assert "unresolved: solver error" in titles(plots.density(coarse, normal(scale=math.exp(3.0)), 48))
    for flow in (stiff(fine, 0.1), sharp(1e-3), stiff(fine, 3.0)):  # right, thinner than a pixel, cut by the picture
        assert "unresolved" not in titles(plots.density(flow, data, 48))
    noisy = flows.CNF(flows.fields.Linear((2,), torch.tensor([[0.0, 2.0], [2.0, 0.0]])), flows.divergence.Hutchinson())
    assert "unresolved" not in titles(plots.density(noisy, data, 48))


def test_only_the_class_whose_density_cannot_be_right_is_marked():
    data = flows.datasets.MoonsByClass(num_validation=200, num_test=10, num_reference=200)
    flow = flows.CNF(Squashed(), solver=ODESolver("rk4", step_size=0.1))
    marks = [axes.get_title() for axes in plots.class_densities(flow, data, 32).axes]
    assert ["unresolved" in mark for mark in marks] == [False, False, False, True]
    assert "mass" in evaluator(data).test(flow).unresolved  # the worst of both classes


def test_curves_count_unresolved_validations():
    metrics = {"train/nll": [(1, 3.0), (2, 2.0)], "validation/nll_unresolved": [(1, -60.0), (2, -61.0)]}
    assert "2 validations unresolved" in titles(plots.curves(metrics))


def test_outliers_of_an_unresolved_likelihood_are_unresolved():
    data = normal(scale=math.exp(RATE))
    for solver, resolved in ((ODESolver(), True), (ODESolver("euler", step_size=0.25), False)):
        flow, judge = stiff(solver), evaluator(data)
        scores = judge.outliers(flow, judge.likelihood(flow))
        assert (scores.unresolved is None) == resolved
        assert ("unresolved" in dict(scores.table())["AUROC"]) != resolved
        assert (scores.as_dict()["auroc_nll"] is None) != resolved


class Layered(nn.Module):
    """A field with one more layer in the middle."""

    event_shape = (3,)

    def __init__(self, layer):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), layer, nn.Linear(8, 3))

    def forward(self, t, x):
        return self.net(x)


class Attending(nn.Module):
    event_shape = (3,)

    def __init__(self, **settings):
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True, **settings)

    def forward(self, t, x):
        return self.attention(x[:, None], x[:, None], x[:, None], need_weights=False)[0][:, 0]


UNSTEADY = {
    "dropout": (lambda: Layered(nn.Dropout(0.1)), "field.net.2: Dropout is random in training mode"),
    "alpha": (lambda: Layered(nn.AlphaDropout(0.1)), "field.net.2: AlphaDropout is random"),
    "nested": (lambda: Layered(nn.Sequential(nn.Dropout1d(0.2))), "field.net.2.0: Dropout1d is random"),
    "slope": (lambda: Layered(nn.RReLU()), "field.net.2: RReLU is random .* nn.LeakyReLU"),
    "batch": (lambda: Layered(nn.BatchNorm1d(8)), "field.net.2: BatchNorm1d normalises .* nn.GroupNorm"),
    "attention": (lambda: Attending(dropout=0.1), "field.attention: MultiheadAttention is random"),
    "scripted": (lambda: torch.jit.script(Layered(nn.Dropout(0.1))), "field.net.2: Dropout is random"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(("build", "message"), UNSTEADY.values(), ids=UNSTEADY)
def test_layers_that_no_solve_can_go_through_are_refused_by_name(build, message):
    """In training mode; evaluation is as it should be."""
    flow = flows.CNF(build(), event_shape=3)
    x = torch.randn(4, 3)
    for solve in (
        lambda: flow.log_prob(x),
        lambda: flow.sample((4,)),
        lambda: flow.draw((4,)),
        lambda: flow.transport(x),
    ):
        with pytest.raises(ValueError, match=message) as error:
            solve()
        assert "Call eval() on the model" in str(error.value)
    assert flow.eval().log_prob(x).isfinite().all()
    with pytest.raises(ValueError, match=message):
        flow.train().log_prob(x)


def test_layers_that_are_steady_pass():
    for layer in (
        nn.Dropout(0.0),
        nn.LayerNorm(8),
        nn.GroupNorm(2, 8),
        nn.BatchNorm1d(8).eval(),
        nn.Dropout(0.3).eval(),
    ):
        assert flows.CNF(Layered(layer)).log_prob(torch.randn(4, 3)).isfinite().all()
    untracked = flows.CNF(Layered(nn.BatchNorm1d(8, track_running_stats=False))).eval()
    with pytest.raises(ValueError, match=r"BatchNorm1d .* in every mode.* track_running_stats=True"):
        untracked.log_prob(torch.randn(4, 3))


def test_training_with_dropout_is_refused_before_it_begins_where_it_solves(tmp_path):
    data = normal(3)
    matching = {"matching": Stage(flows.objectives.FlowMatching(), steps=2, batch_size=8)}
    flow = flows.CNF(Layered(nn.Dropout(0.1)))
    summary = small_trainer(tmp_path / "matching", data, matching, flow).fit()  # solves in evaluation mode alone
    assert summary.metrics["nll"] is not None
    likely = {**matching, "likelihood": Stage(flows.objectives.MaximumLikelihood(), steps=2, batch_size=8)}
    with pytest.raises(ValueError, match=r"field\.net\.2: Dropout is random in training mode"):
        small_trainer(tmp_path / "both", data, likely, flow.train())
