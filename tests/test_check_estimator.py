"""`check_estimator` passes what is right and names what is wrong; estimators with parameters of their own."""

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

import flows
from flows.divergence import (
    DivergenceEstimator,
    EstimatorCheckError,
    FieldSample,
    Gaussian,
    Hutchinson,
    Probing,
    Rademacher,
    check_estimator,
    linearise,
)
from flows.errors import InvalidValueError

YAMLS = sorted((Path(flows.__file__).parents[1] / "conf" / "divergence").glob("*.yaml"))


@pytest.mark.parametrize("path", YAMLS, ids=[path.stem for path in YAMLS])
def test_every_estimator_passes(path):
    passed = check_estimator(instantiate(OmegaConf.load(path)), event_shapes=[(5,), (2, 2, 3)], draws=4000)
    names = [check.name for check in passed]
    assert names == ["shapes", "probes", "batches", "dtypes", "bias", "variance", "gradients", "norm", "budget"] * 2
    assert all(str(check.event_shape) in str(check) for check in passed)


def test_it_takes_names_and_fields():
    field = flows.fields.MLP(event_shape=(3,), hidden=(8,))
    with torch.no_grad():
        for weights in field.parameters():
            weights.normal_()
    passed = check_estimator(Probing(2), field, draws=1000)
    assert {check.event_shape for check in passed} == {(3,)}
    with pytest.raises(InvalidValueError, match="hutchison"):
        check_estimator("hutchison")


@dataclass(frozen=True)
class Signs(DivergenceEstimator):
    """Hutchinson's, K draws; subclasses break one promise each."""

    num_probes: int = 4

    def draw_probes(self, x, generator=None):
        return Rademacher().draw(self.num_probes, x, generator)

    def __call__(self, t, x, probes):
        value, products = linearise(self.field, t, x)
        return FieldSample(value, (products(probes) * probes).flatten(2).sum(2))


class Biased(Signs):
    def __call__(self, t, x, probes):
        sample = super().__call__(t, x, probes)
        return replace(sample, estimates=1.1 * sample.estimates)


class SaysExact(Signs):
    is_exact = True


class Proud(Signs):
    """States half of its standard error."""

    def standard_error(self, estimates):
        return super().standard_error(estimates) / 2


class OneProbeAgain(Signs):
    """K copies of one estimate have no spread."""

    def draw_probes(self, x, generator=None):
        return Rademacher().draw(1, x, generator).expand(self.num_probes, *x.shape)


class WrongFormula(Signs):
    def variance(self, jacobian):
        return Gaussian().variance(jacobian, 1)


class WrongShape(Signs):
    def __call__(self, t, x, probes):
        sample = super().__call__(t, x, probes)
        return replace(sample, estimates=sample.estimates.mean(0))


class Unseeded(Signs):
    def draw_probes(self, x, generator=None):
        return super().draw_probes(x)


class NewAtEachCall(Signs):
    """Draws at each evaluation, so that the right-hand side of a solve is noise."""

    def draw_probes(self, x, generator=None):
        return None

    def __call__(self, t, x, probes):
        return super().__call__(t, x, Rademacher().draw(self.num_probes, x))


class Shared(Signs):
    """One probe for the whole batch."""

    def draw_probes(self, x, generator=None):
        return super().draw_probes(x[:1], generator).expand(-1, *x.shape)


class Detached(Signs):
    def __call__(self, t, x, probes):
        sample = super().__call__(t, x, probes)
        return replace(sample, estimates=sample.estimates.detach())


class HalfTheGradient(Signs):
    def __call__(self, t, x, probes):
        sample = super().__call__(t, x, probes)
        return replace(sample, estimates=(sample.estimates + sample.estimates.detach()) / 2)


class Mixing(Signs):
    def __call__(self, t, x, probes):
        sample = super().__call__(t, x, probes)
        return replace(sample, estimates=sample.estimates + 0.1 * (x - x.mean(0)).flatten(1).sum(1))


class InDouble(Signs):
    def __call__(self, t, x, probes):
        sample = super().__call__(t, x, probes)
        return replace(sample, estimates=sample.estimates.double())


class LengthOne(Signs):
    """Knows points (d,) alone."""

    def __call__(self, t, x, probes):
        value, products = linearise(self.field, t, x)
        return FieldSample(value, (products(probes) * probes).sum(2))


class Spendthrift(Signs):
    def with_budget(self, num_products, field):
        return replace(self, num_probes=num_products + 1)


class WrongNorm(Signs):
    def with_jacobian_norm(self, t, x, probes, directions):
        sample = super().with_jacobian_norm(t, x, probes, directions)
        return replace(sample, squared_jacobian_norm=2 * sample.squared_jacobian_norm)


FAULTS = {
    Biased: r"'bias' on points of shape \(7,\): the mean of 10,000 draws is .* and the trace is .*: a bias of",
    SaysExact: r"'bias'.*states to be exact, and its estimates are off by",
    Proud: r"'variance'.*the squared standard error is 0.2\d times the variance",
    OneProbeAgain: r"'variance'.*the squared standard error is 0 times.*independent",
    WrongFormula: r"'variance'.*variance\(jacobian\) is .*, and that of 10,000 draws is",
    WrongShape: r"'shapes'.*estimates has the shape \(5,\), and \(4, 5\) is due",
    Unseeded: r"'probes'.*one seed of the generator gives different probes",
    NewAtEachCall: r"'probes'.*two calls with the same probes differ by .*must be in draw_probes",
    Shared: r"'probes'.*all samples of a batch have the same error",
    Detached: r"'gradients'.*do not depend on x and the parameters",
    HalfTheGradient: r"'gradients'.*the gradient with respect to x, along one direction, is .* for the trace",
    Mixing: r"'batches'.*moving the other samples changes an estimate by",
    InDouble: r"'dtypes'.*estimates are torch.float64 for points in torch.float32",
    LengthOne: r"'shapes' on points of shape \(4, 3\): estimates has the shape \(4, 5, 3\)",
    Spendthrift: r"'budget'.*with_budget\(\d, field\) costs",
    WrongNorm: r"'norm'.*the squared norm is .* in the mean, and .* is right",
}


@pytest.mark.parametrize("kind", FAULTS, ids=[kind.__name__ for kind in FAULTS])
def test_what_is_wrong_is_named_with_its_figures(kind):
    with pytest.raises(EstimatorCheckError, match=f"{kind.__name__} fails the check {FAULTS[kind]}"):
        check_estimator(kind())


def test_it_leaves_global_random_numbers_alone():
    before = torch.get_rng_state()
    check_estimator(Signs(), event_shapes=[(2,)], draws=500)
    assert torch.equal(torch.get_rng_state(), before)


@dataclass(frozen=True)
class Learned(DivergenceEstimator):
    """Hutchinson's with probes that a module scales by coordinate; biased unless the scales are ±1."""

    scales: nn.Module = field(default_factory=lambda: nn.Linear(2, 2, bias=False))
    bonus: nn.Parameter = field(default_factory=lambda: nn.Parameter(torch.ones(1)))
    num_probes: int = 2

    def draw_probes(self, x, generator=None):
        return self.scales(Rademacher().draw(self.num_probes, x, generator))  # a learnable distribution

    def __call__(self, t, x, probes):
        value, products = linearise(self.field, t, x)
        return FieldSample(value, self.bonus * (products(probes) * probes).flatten(2).sum(2))


def flow_with(estimator, gradient):
    torch.manual_seed(0)
    field = flows.fields.MLP(event_shape=(2,), hidden=(8,))
    with torch.no_grad():
        for weights in field.parameters():
            weights.normal_(std=0.5)
    solver = flows.ODESolver("rk4", step_size=0.02, gradient=gradient)
    return flows.CNF(field, divergence=estimator, solver=solver)


def gradients(gradient):
    torch.manual_seed(1)
    flow = flow_with(Learned(), gradient)
    flow.log_prob(torch.ones(5, 2), generator=torch.Generator().manual_seed(0)).sum().backward()
    return {name: p.grad for name, p in flow.named_parameters()}


def test_an_estimator_learns_under_every_way_to_the_gradient():
    truth = gradients("backprop")
    assert {"estimator.0.weight", "estimator.1.0"} <= truth.keys()
    assert all(g is not None and g.abs().max() > 1e-3 for g in truth.values())
    for name, tolerance in (("checkpoint", 1e-10), ("adjoint", 1e-4)):
        found = gradients(name)
        assert found.keys() == truth.keys()
        for key in truth:
            torch.testing.assert_close(found[key], truth[key], rtol=tolerance, atol=tolerance)


def test_samples_reach_the_parameters_of_the_estimator_as_well():
    for gradient in ("backprop", "checkpoint", "adjoint"):
        flow = flow_with(Learned(), gradient)
        flow.sample_and_log_prob((4,))[1].sum().backward()
        assert flow.divergence.bonus.grad.abs() > 1e-3


def test_an_estimator_with_parameters_can_be_replaced():
    flow = flow_with(Learned(), "backprop")
    names = flow.state_dict().keys()
    twin = copy.deepcopy(flow)
    assert twin.divergence.scales is twin.estimator[0]
    assert twin.divergence.scales is not flow.divergence.scales
    for other in (Hutchinson(2), Learned(), "exact", Module(), Hutchinson(2), Module(), Learned()):
        flow.divergence = other
        assert flow.divergence is other or other == "exact"
        flow.log_prob(torch.ones(3, 2)).sum().backward()
    assert flow.state_dict().keys() == names
    flow.divergence = "exact"
    assert not [name for name in flow.state_dict() if name.startswith("estimator")]


class Module(nn.Module, DivergenceEstimator):
    """An estimator that is a module itself."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def draw_probes(self, x, generator=None):
        return Rademacher().draw(1, x, generator)

    def __call__(self, t, x, probes):
        value, products = linearise(self.field, t, x)
        return FieldSample(value, self.factor * (products(probes) * probes).flatten(2).sum(2))


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_an_estimator_may_be_a_module(gradient):
    flow = flow_with(Module(), gradient)
    assert dict(flow.named_parameters())["estimator.0.factor"] is flow.divergence.factor
    flow.log_prob(torch.ones(5, 2)).sum().backward()
    assert flow.divergence.factor.grad.abs() > 1e-3
    flow.float()
    assert flow.divergence.factor.dtype == torch.float32


def test_steps_that_would_forget_the_estimator_are_not_compiled(caplog):
    flow = flow_with(Learned(), "backprop")
    flow.solver = replace(flow.solver, compile=True)
    flow.log_prob(torch.ones(3, 2))
    assert "solver steps run uncompiled: Learned has parameters of its own" in caplog.text
