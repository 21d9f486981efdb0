"""The comparison of image models: baselines are judged by the account of flows, and samples by a classifier."""

import math
import time

import pytest
import torch

import flows
from benchmarks import image_baselines as fitting
from benchmarks import image_classes, images, unet_step
from benchmarks.densities import Gaussian, Mixture, Spline, spline_flow
from benchmarks.image_judge import Judge, frechet, nearest, told_apart
from benchmarks.recipes import settings
from benchmarks.time_budget import CpuBudget, train
from flows.datasets import Digits
from flows.errors import MissingPackageError
from flows.evaluation import likelihood
from flows.transforms import Compose, Dequantise, NormalMarginals, Whiten

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def digits():
    return Digits()


@pytest.fixture
def transform(digits):
    parts = {"dequantise": Dequantise(17), "marginals": NormalMarginals(SHAPE, 17), "whiten": Whiten(SHAPE, 0.02)}
    return Compose(**parts).fit(digits.reference())


def test_a_standard_normal_is_the_flow_that_stays_where_it_is(digits, transform):
    """So differences between models are not due to different accounts."""
    model = Gaussian(transform, SHAPE, torch.zeros(2, 64), floor=1.0)
    solver = flows.ODESolver("euler", step_size=1.0)
    flow = flows.CNF(flows.fields.MLP(SHAPE, hidden=(1,)), solver=solver, transform=transform)
    torch.nn.init.zeros_(flow.field.out.weight)
    torch.nn.init.zeros_(flow.field.modulation.heads.weight)
    torch.nn.init.zeros_(flow.field.out.bias)
    for draws in (1, 3):
        bits = [
            likelihood(m, digits.test_batches(50), torch.Generator().manual_seed(0), num_draws=draws).bits_per_dim
            for m in (model, flow)
        ]
        assert bits[0].parts == pytest.approx(bits[1].parts, abs=1e-5)
        assert bits[0].standard_error == pytest.approx(bits[1].standard_error, abs=1e-5)


def test_a_mixture_of_one_is_the_gaussian(digits, transform):
    points = fitting.flow_points(digits, transform, seed=0, least=2000)
    one, other = Gaussian(transform, SHAPE, points, 1e-9), Mixture(transform, SHAPE, points, 1, 1e-9)
    y = points[:50]
    torch.testing.assert_close(one.log_density(y), other.log_density(y), rtol=1e-3, atol=1e-3)  # n or n - 1
    assert one.num_parameters == other.num_parameters == 64 + 64 * 65 // 2


def test_every_baseline_is_fitted_and_beats_what_it_starts_from(digits, transform):
    start = Gaussian(transform, SHAPE, torch.zeros(2, 64), floor=1.0)
    for name in ("gaussian", "mixture", "nsf"):
        found = fitting.BASELINES[name](digits, transform, seconds=0.0, seed=0)
        assert found.validation_nll < fitting.validation_nll(start, digits), name
        assert found.validation_nll == pytest.approx(fitting.validation_nll(found.model, digits), abs=1e-3)
        assert found.model.num_parameters > 2000


def test_a_shrunk_mixture_of_one_is_the_gaussian(digits, transform):
    points = fitting.flow_points(digits, transform, seed=0, least=2000)
    one = Gaussian(transform, SHAPE, points, 1e-6)
    other = fitting.ShrunkMixture(transform, SHAPE, points, num_components=1, shrinkage=500.0)
    torch.testing.assert_close(one.log_density(points[:50]), other.log_density(points[:50]), rtol=1e-3, atol=0)
    assert one.num_parameters == other.num_parameters


@pytest.mark.slow
def test_the_multiscale_flow_trains_for_its_time_and_is_tested_on_few_images(digits, transform):
    found = fitting.fit_ffjord(digits, transform, seconds=2.0, seed=0)
    assert found.seconds >= 2.0
    one, many = images.evaluate(found.model, digits, 1, most_images=3)
    assert one is many
    assert one.num_points == 3


def test_a_budget_of_the_cpu_ends_a_stage(digits, transform):
    class Slow(fitting.NegativeLogLikelihood):
        def __call__(self, model, batch, generator=None):
            begun = time.process_time()
            while time.process_time() - begun < 0.02:
                pass
            return super().__call__(model, batch, generator)

    budget, model = CpuBudget(0.1), Spline(transform, SHAPE, num_transforms=1, hidden=4, bins=4)
    stage = flows.training.Stage(Slow(), steps=1000, batch_size=4, schedule=budget)
    train(model, digits, {"likelihood": stage}, callbacks=[budget], progress=False)
    assert 1 <= budget.steps <= 5
    assert budget.used >= 0.1
    assert (budget(0.0), budget.done) == (0, 1)


def test_the_first_stage_gets_the_time_that_the_others_leave(monkeypatch):
    config = settings("data=moons", "objective=flow_matching_then_likelihood")
    config["objective"]["maximum_likelihood"]["steps"] = 40
    monkeypatch.setattr(images, "seconds_per_step", lambda trainer, stage: 0.5 if stage.steps == 40 else 0.1)
    found = images.shortened(config, 30.0)["objective"]
    assert (found["flow_matching"]["steps"], found["maximum_likelihood"]["steps"]) == (100, 40)


def test_table_states_paired_differences(digits, transform):
    points = fitting.flow_points(digits, transform, seed=0, least=2000)
    rows = []
    for floor in (0.01, 1.0):
        model = Gaussian(transform, SHAPE, points, floor)
        one, many = images.evaluate(model, digits, 2)
        rows.append(images.Row("a model", "a setting", one, many, 1.0, model.num_parameters))
    _, first, second = images.table(rows, SHAPE)
    assert f"{rows[0].one.bits_per_dim.value:.4f} ± {rows[0].one.bits_per_dim.standard_error:.4f}" in first
    gap = (rows[1].many.nll - rows[0].many.nll) / (64 * math.log(2))
    assert f"{gap:+.4f} ± " in second
    assert "+" not in first


def test_a_base_alone_has_its_own_density(digits, transform):
    base = flows.bases.Normal(SHAPE, fit=True).fit(fitting.flow_points(digits, transform, 0, 2000).view(-1, *SHAPE))
    found = images.alone(flows.CNF(flows.fields.MLP(SHAPE, hidden=(4,)), base=base, transform=transform))
    x = digits.reference()[:20].double()
    y, log_det = transform(x, torch.Generator().manual_seed(0))
    log_prob = found.log_prob(x, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(log_prob, base.log_prob(y) + log_det)


def test_samples_are_judged_by_their_class(digits):
    conditional = Digits(conditional=True)
    batch = next(conditional.test_batches(1000))

    class Real:
        """Draws test images of the class, or of any."""

        device, dtype = torch.device("cpu"), torch.float64

        def __init__(self, obeys):
            self.obeys = obeys

        def sample(self, shape, context, generator):
            found = []
            for label in context.argmax(1).tolist():
                chosen = (batch.context.argmax(1) == label).nonzero().flatten() if self.obeys else torch.arange(300)
                found.append(chosen[torch.randint(len(chosen), (), generator=generator)])
            return batch.x[torch.stack(found)]

    good, bad = (image_classes.classify_samples(Real(obeys), conditional, 20) for obeys in (True, False))
    assert good.real > 0.97
    assert good.share == pytest.approx(good.real, abs=0.03)
    assert bad.share == pytest.approx(0.1, abs=4 * bad.standard_error)
    assert bad.standard_error == pytest.approx(math.sqrt(0.1 * 0.9 / 200), rel=0.2)


def test_a_missing_spline_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zuko.flows", None)
    with pytest.raises(MissingPackageError, match=r"needs zuko, which is not installed: pip install -e '\.\[bench\]'"):
        spline_flow()
    with pytest.raises(MissingPackageError, match="zuko"):
        Spline(Dequantise(17), SHAPE)


def test_a_missing_unet_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchcfm.models.unet", None)
    with pytest.raises(MissingPackageError, match="torchcfm's, which is not installed: pip install torchcfm"):
        unet_step.torchcfm_unet()
    monkeypatch.setitem(__import__("sys").modules, "diffusers.models", None)
    with pytest.raises(MissingPackageError, match="that of diffusers, which is not installed: pip install diffusers"):
        unet_step.DiffusersUNet()


def test_variants_of_the_unet_step_take_the_same_step():
    """The fused attention has other products, of the same values."""
    x = torch.randn(2, *unet_step.SHAPE)
    network = flows.fields.UNet(unet_step.SHAPE, channels=4, multipliers=(1, 1))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter))
    before = network(torch.tensor(0.5), x)
    unet_step.fused_attention_step(network, 2)
    torch.testing.assert_close(network(torch.tensor(0.5), x), before)
    for name in ("bf16", "channels last"):
        weights = [parameter.clone() for parameter in network.parameters()]
        unet_step.VARIANTS[name](network, 2)()
        assert any(bool((old != new).any()) for old, new in zip(weights, network.parameters(), strict=True))


def test_frechet_distance_is_that_of_normal_distributions():
    """‖m − m′‖² + Σ (s − s′)² for covariances that commute, and 0 for the same points."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    z = (z - z.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(z.T.cov())).T  # moments 0 and I
    scale, shift = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([0.3, 0.0, -1.0]).double()
    expected = shift.square().sum() + (scale - 1).square().sum()
    assert frechet(z * scale + shift, z) == pytest.approx(float(expected), rel=1e-6)
    assert frechet(z, z) == pytest.approx(0, abs=1e-9)


def test_a_judge_reads_classes_and_boosting_tells_copies_from_other_images(digits):
    judge = Judge(digits, steps=200)
    test = digits.held_out("test").x.float()
    assert (judge.classes(test) == digits.labels("test")).double().mean() > 0.8
    training = digits.reference()
    assert nearest(training[:20], training) == 0
    assert nearest(test, training) == pytest.approx(16.64, abs=0.01)
    half = test[:150], test[150:300]
    assert abs(told_apart(*half, folds=2).value - 0.5) < 0.15
    assert told_apart(half[0], 16 - half[1], folds=2).value > 0.95
    assert judge.frechet(16 - half[1], test) > 5 * judge.frechet(half[0], test)
