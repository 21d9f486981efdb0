"""Fitting energies without samples: known log Z, what noise does to weights, and the way through the programs."""

import math
from pathlib import Path

import pytest
import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf
from small_run import QUIET, options

from flows import CNF, ODESolver, SolverError
from flows.datasets import Batch, DoubleWell, Energy, FreeField, Funnel, MoonsByClass, NoData, Phi4
from flows.divergence import Analytic, Exact, Hutchinson
from flows.errors import InvalidValueError
from flows.evaluation import density, importance_weights
from flows.fields import MLP, Linear
from flows.models.importance import effective_sample_size, log_density_of, log_z
from flows.objectives import FlowMatching, MaximumLikelihood, ReverseKL
from flows.path_costs import KineticEnergy
from flows.training import Stage, Trainer

FILES = sorted((Path(__file__).parents[1] / "conf/data").glob("*.yaml"))
CONFIGS = {path.stem: OmegaConf.load(path) for path in FILES}
for config in CONFIGS.values():
    config.pop("defaults", None)  # what the data choose for a run
ENERGIES = [name for name, config in CONFIGS.items() if issubclass(get_class(config._target_), Energy)]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def empty(n):
    return Batch(torch.empty(n, 0))


# Energies


@pytest.mark.parametrize("name", ENERGIES)
def test_energies_are_differentiable_densities_up_to_a_constant(name):
    energy = instantiate(CONFIGS[name])
    assert energy.name == name
    x = torch.randn(3, 4, *energy.event_shape, requires_grad=True)
    log_density = energy.log_density(x)
    assert log_density.shape == (3, 4)
    (force,) = torch.autograd.grad(log_density.sum(), x)
    h = 1e-6 * torch.randn_like(x)
    with torch.no_grad():
        change = energy.log_density(x + h) - energy.log_density(x - h)
    torch.testing.assert_close(change.sum(), 2 * (force * h).sum(), rtol=1e-4, atol=1e-12)
    assert energy.has_log_prob == (energy.log_z is not None)


@pytest.mark.parametrize("name", [name for name in ENERGIES if instantiate(CONFIGS[name]).has_samples])
def test_samples_have_the_stated_entropy(name):
    energy = instantiate(CONFIGS[name])
    nll = -energy.log_prob(energy.sample(20_000, rng()))
    assert abs(nll.mean() - energy.entropy) < 4 * nll.std() / math.sqrt(len(nll))
    assert energy.reference().shape == (energy.num_reference, *energy.event_shape)


@pytest.mark.parametrize("energy", [DoubleWell(), DoubleWell(tilt=0.0), Funnel(2)], ids=["tilted", "even", "funnel"])
def test_log_z_by_quadrature(energy):
    """∫∫ exp(−U) over the plane, with the tails of the funnel's first coordinate to ±8 standard deviations."""
    if isinstance(energy, Funnel):
        first = torch.linspace(-24, 24, 2001)
        scaled = torch.linspace(-9, 9, 601)  # of the second, in its own standard deviations
        points = torch.stack(torch.meshgrid(first, scaled, indexing="ij"), -1)
        widths = torch.exp(points[..., 0] / 2)
        points = torch.stack([points[..., 0], points[..., 1] * widths], -1)
        total = (energy.log_density(points).exp() * widths).sum() * (first[1] - first[0]) * (scaled[1] - scaled[0])
    else:
        axes = torch.linspace(-6, 6, 1201), torch.linspace(-9, 9, 301)
        points = torch.cartesian_prod(*axes)
        total = energy.log_density(points).exp().sum() * (axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0])
    assert abs(total.log() - energy.log_z) < 1e-6


def test_wells_of_equal_depth_are_equally_likely():
    left = (DoubleWell(tilt=0.0).sample(20_000, rng())[:, 0] < 0).double().mean()
    assert abs(left - 0.5) < 4 * math.sqrt(0.25 / 20_000)


def test_the_quartic_field_without_coupling_is_the_free_one():
    field, free = Phi4((4, 6), mass_squared=0.49, coupling=0.0), FreeField((4, 6), mass=0.7)
    x = torch.randn(5, 1, 4, 6)
    torch.testing.assert_close(field.log_prob(x), free.log_prob(x))
    assert field.entropy == free.entropy


def test_the_quartic_action_by_hand():
    """On two sites around a ring each pair is bonded twice."""
    energy = Phi4((2,), mass_squared=-1.0, coupling=0.5)
    x = torch.tensor([[[1.0, -2.0]]])
    action = -0.5 * (1 + 4) + 0.5 * (1 + 16) + 0.5 * (9 + 9)
    torch.testing.assert_close(energy.log_density(x), torch.tensor([-action]))
    assert not energy.has_samples
    with pytest.raises(ValueError, match="an energy without samples; train with objective=reverse_kl"):
        energy.reference()
    with pytest.raises(ValueError, match="log Z of 'phi4' is unknown; use log_density"):
        energy.log_prob(x)


def test_bad_settings_are_refused():
    for build, message in [
        (lambda: Phi4(coupling=0.0, mass_squared=-1.0), "coupling must be > 0 unless mass_squared > 0"),
        (lambda: Phi4((6, 1)), "each entry of size must be a whole number >= 2, got 1"),
        (lambda: Funnel(1), "dimension must be a whole number >= 2, got 1"),
        (lambda: DoubleWell(tilt=math.inf), "tilt must be a finite number >= -10 and <= 10, got inf"),
        (lambda: Phi4().log_density(torch.zeros(3, 6, 5)), r"must hold points of shape \(\*batch, 1, 6, 6\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            build()


# Weights


def test_weights_of_gaussians_have_the_closed_form():
    """p̃ = 3 N(0, s²), q = N(0, 1): log Z = log 3, and E[w²]/E[w]² = 1/(s² √(2/s² − 1)) for s² < 2."""
    x, s = torch.randn(400_000), 0.8
    normal = torch.distributions.Normal
    log_weight = normal(0.0, s).log_prob(x) + math.log(3) - normal(0.0, 1.0).log_prob(x)
    assert abs(log_z(log_weight) - math.log(3)) < 0.01
    assert abs(effective_sample_size(log_weight) - s**2 * math.sqrt(2 / s**2 - 1)) < 0.01
    torch.testing.assert_close(effective_sample_size(torch.full((7,), 123.0)), torch.tensor(1.0))
    torch.testing.assert_close(effective_sample_size(torch.tensor([0.0] * 9 + [500.0])), torch.tensor(0.1))


def affine_flow(matrix, divergence=None, **options):
    field = Linear((2,), matrix=torch.tensor(matrix))
    return CNF(field, divergence or Exact(), ODESolver("rk4", step_size=0.05, **options))


def test_the_loss_is_the_divergence_less_log_z():
    """q = N(0, e^2a I) against 5 N(0, I): KL = e^2a − 1 − 2a in two dimensions."""
    a = 0.3
    flow = affine_flow([[a, 0.0], [0.0, a]])

    def log_density(x):
        return -x.square().sum(1) / 2 - math.log(2 * math.pi) + math.log(5)

    out = ReverseKL(log_density)(flow, empty(100_000), rng())
    truth = math.exp(2 * a) - 1 - 2 * a - math.log(5)
    assert abs(out.loss - truth) < 0.01
    assert abs(out.metrics["log_z"] - math.log(5)) < 0.01
    assert out.metrics["free_energy"] == out.loss
    assert out.statistics.nfe_forward > 0
    (gradient,) = torch.autograd.grad(out.loss, flow.field.matrix)
    assert abs(gradient[0, 0] - (math.exp(2 * a) - 1)) < 0.02  # ∂KL/∂A₁₁


def test_what_a_stochastic_divergence_does_to_the_weights():
    """A perfect flow, whose exact weights are all 1. With signs the error of log q is ±s, so that log Z rises by
    log cosh s, about s²/2, and the effective sample size falls to cosh² s / cosh 2s, about exp(−s²), as documented;
    the loss keeps its mean."""
    s = 0.4
    matrix = [[0.0, s / 2], [s / 2, 0.0]]
    exact = affine_flow(matrix)
    target = exact().log_prob
    out = ReverseKL(target)(exact, empty(100), rng())
    torch.testing.assert_close(out.metrics["effective_sample_size"], torch.tensor(1.0))
    torch.testing.assert_close(out.loss.detach(), torch.tensor(0.0), rtol=0, atol=1e-9)

    noisy = affine_flow(matrix, Hutchinson(1))
    with torch.no_grad():
        out = ReverseKL(target, exact=False)(noisy, empty(20_000), rng())
    assert abs(out.loss) < 4 * s / math.sqrt(20_000)
    assert abs(out.metrics["log_z"] - math.log(math.cosh(s))) < 0.01
    assert abs(out.metrics["log_z"] - s**2 / 2) < 0.02
    assert abs(out.metrics["effective_sample_size"] - math.cosh(s) ** 2 / math.cosh(2 * s)) < 0.01
    assert abs(out.metrics["effective_sample_size"] - math.exp(-(s**2))) < 0.03
    with pytest.raises(ValueError, match=r"Hutchinson is not exact for Linear.*choose an exact estimator"):
        ReverseKL(target)(noisy, empty(4))


def test_targets():
    assert log_density_of(DoubleWell()).__name__ == "log_density"
    assert log_density_of(torch.distributions.Normal(0.0, 1.0)).__name__ == "log_prob"
    assert log_density_of(torch.sin) is torch.sin
    with pytest.raises(TypeError, match=r"a target must have log_density\(x\) or log_prob\(x\), or be a function"):
        ReverseKL("funnel")
    with pytest.raises(ValueError, match=r"one log-density a point, of shape \(4,\), got \(4, 2\)"):
        ReverseKL(torch.sin)(affine_flow([[0.0, 0.0], [0.0, 0.0]]), empty(4))


def test_regularisers_count_here_too():
    flow = CNF(MLP((2,), (8,)), Analytic(), ODESolver("rk4", step_size=0.25))
    bare = ReverseKL(DoubleWell())(flow, empty(16), rng())
    out = ReverseKL(DoubleWell(), regularizers=[KineticEnergy(2.0)])(flow, empty(16), rng())
    torch.testing.assert_close(out.metrics["free_energy"], bare.loss.detach())
    torch.testing.assert_close(out.loss, bare.loss + 2 * out.metrics["kinetic_energy"])


def test_importance_weights_are_gathered_over_batches():
    flow = affine_flow([[0.2, 0.0], [0.0, 0.2]])

    class Normal(Energy):
        name, event_shape, log_z = "normal", (2,), math.log(2 * math.pi)

        def log_density(self, x):
            return -x.square().sum(-1) / 2

    result = importance_weights(flow, Normal(), 2500, 1000, rng())
    assert result.num_samples == 2500
    kl = math.exp(0.4) - 1 - 0.4
    assert abs(result.divergence - kl) < 4 * result.free_energy_se
    assert abs(result.log_z - math.log(2 * math.pi)) < 4 * result.log_z_se
    assert result.probe_error == 0
    rows = dict(result.table())
    assert "(known: 1.8379)" in rows["log Z"]
    assert "reverse KL" in rows


# Training


class NormalEnergy(Energy):
    """3 N(1, 0.25 I), without samples."""

    name = "normal_energy"
    event_shape = (2,)
    log_z = math.log(3)

    def log_density(self, x):
        return -2 * (x - 1).square().sum(-1) + self.log_z - math.log(2 * math.pi / 4)


def trainer(tmp_path, objective, energy, steps=60, **settings):
    torch.manual_seed(0)
    field = MLP((2,), (16,), activation="silu", sine_frequency=None)
    flow = CNF(field, Analytic(), ODESolver("rk4", step_size=0.2))
    stages = {"reverse_kl": Stage(objective, steps=steps, batch_size=64, learning_rate=2e-2)}
    arguments = options({**QUIET, "accelerator": "cpu", "ema_decay": 0.9, **settings}, flow, energy)
    return Trainer(flow, energy, stages, output_dir=tmp_path / "run", **arguments)


def test_training_finds_log_z_without_a_single_point(tmp_path):
    energy = NormalEnergy(num_validation=500, num_test=2000)
    summary = trainer(tmp_path, ReverseKL(energy), energy, plot_every=0).fit()
    found = summary.metrics
    assert abs(found["log_z"] - energy.log_z) < 0.02
    assert found["effective_sample_size"] > 0.95
    assert found["reverse_kl"] < 0.03
    figures = summary.as_dict()
    assert not [name for name in figures if "nll" in name]  # a free energy is none
    assert figures["test_log_z"] == found["log_z"]
    assert figures["validation_score"] == summary.position.best_score
    assert "ESS" in str(summary)
    lines = (tmp_path / "run/metrics.jsonl").read_text()
    for name in ("reverse_kl/effective_sample_size", "reverse_kl/log_z", "validation/free_energy", "validation/log_z"):
        assert name in lines
    assert '"validation/steps_accepted": 5' in lines


def test_an_energy_with_samples_is_tested_on_them_too(tmp_path):
    energy = DoubleWell(num_validation=100, num_test=200)
    summary = trainer(tmp_path, ReverseKL(energy), energy, steps=3).fit()
    assert summary.metrics["nll"] == pytest.approx(summary.metrics["gap"] + energy.entropy)
    assert (summary.metrics["samples"], summary.metrics["points"]) == (200, 200)


@pytest.mark.parametrize("error", [InvalidValueError("a point is infinite"), SolverError("stiff", 0.5, 1e-9)], ids=repr)
def test_an_energy_whose_samples_cannot_be_tested_keeps_its_weights(tmp_path, monkeypatch, caplog, error):
    def fails(*arguments, **settings):
        raise error

    monkeypatch.setattr(density, "likelihood", fails)
    energy = DoubleWell(num_validation=100, num_test=200)
    summary = trainer(tmp_path, ReverseKL(energy), energy, steps=3).fit()
    assert (summary.metrics.get("nll"), summary.metrics["samples"]) == (None, 200)
    assert f"the test on samples of the energy was left out: {error}" in caplog.text


def test_energies_without_samples_need_an_objective_without_data(tmp_path):
    energy = NormalEnergy()
    for objective in (FlowMatching(), MaximumLikelihood()):
        with pytest.raises(ValueError, match=r"'normal_energy' is an energy without samples.*choose objective=reverse"):
            trainer(tmp_path, objective, energy)


def test_contexts_have_no_place_where_no_data_are_used(tmp_path):
    data = MoonsByClass(num_test=10)
    flow = CNF(MLP((2,), (4,), context_shape=data.context_shape), Analytic())
    stages = {"reverse_kl": Stage(ReverseKL(DoubleWell()), steps=1, batch_size=4)}
    with pytest.raises(ValueError, match=r"ReverseKL draws .* without contexts, and the data 'moons_by_class'"):
        Trainer(flow, data, stages, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_batches_without_data_are_empty_and_resume(tmp_path):
    stream = NoData("x", 5, rng())
    assert stream.next().x.shape == (5, 0)
    stream.load_state_dict(stream.state_dict())
    energy = NormalEnergy(num_validation=50, num_test=50)
    straight = trainer(tmp_path / "a", ReverseKL(energy), energy, steps=6).fit()
    again = trainer(tmp_path / "b", ReverseKL(energy), energy, steps=6).fit()
    assert again.metrics["log_z"] == straight.metrics["log_z"]
