"""Simulators: priors and their supports, what user functions may be and return, benchmark tasks, messages."""

import math
import random

import numpy as np
import pytest
import torch
from torch.distributions import (
    Dirichlet,
    Exponential,
    Gamma,
    Independent,
    LogNormal,
    MultivariateNormal,
    Normal,
    Poisson,
    Uniform,
)

import flows
from flows.datasets import (
    SIR,
    SLCP,
    BernoulliGLM,
    GaussianMixturePosterior,
    LotkaVolterraPosterior,
    Prior,
    Simulations,
    Simulator,
    TwoMoons,
    box,
)
from flows.errors import DataWarning
from flows.transforms import Unbounded

COUNTS = Independent(Poisson(torch.ones(2)), 1)
UNIT = box([0.0, 0.0], [1.0, 1.0])
SMALL = {"num_simulations": 40, "num_test": 10}


@pytest.mark.parametrize(
    "simulate",
    [
        lambda theta: np.sin(theta) + 0.1 * np.random.randn(*theta.shape),
        lambda theta: np.linspace(0, 1, 4) * theta[0] + theta[1] + np.random.randn(4),
        lambda theta: np.eye(2) @ theta + np.random.randn(2),
        lambda theta: np.stack([theta[:, 0], np.array(theta[:, 1])], 1) + np.random.randn(len(theta), 2),
    ],
    ids=["elementwise", "a curve", "a matrix", "batches"],
)
def test_simulators_in_numpy_get_arrays(simulate):
    data = Simulator(simulate, UNIT, **SMALL)  # warnings of NumPy about tensors would be errors here
    batch = data.held_out("test")
    assert len(batch.x) == len(batch.context) == 10
    again = Simulator(simulate, UNIT, **SMALL).held_out("test")
    assert torch.equal(batch.context, again.context)


@pytest.mark.parametrize(
    ("prior", "bounds"),
    [
        (box([-1, 0], [1, 3]), ([-1, 0], [1, 3])),
        (Uniform(torch.zeros(2), torch.ones(2)), ([0, 0], [1, 1])),
        (Independent(LogNormal(torch.zeros(2), torch.ones(2)), 1), ([0, 0], [math.inf] * 2)),
        (Gamma(torch.ones(2), torch.ones(2)), ([0, 0], [math.inf] * 2)),
        (MultivariateNormal(torch.zeros(2), torch.eye(2)), None),
        (Independent(Normal(torch.zeros(3), 1.0), 1), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_bounds_of_a_prior_are_those_of_its_support(prior, bounds):
    found = Prior(prior)
    assert (found.bounds is None) == (bounds is None)
    if bounds is not None:
        for one, other in zip(found.bounds, bounds, strict=True):
            torch.testing.assert_close(one, torch.tensor(other, dtype=torch.float64))
    theta = torch.as_tensor(prior.sample((5,)))
    expected = prior.log_prob(theta).reshape(5, -1).sum(1)
    torch.testing.assert_close(found.log_prob(theta), expected)


def test_a_prior_has_no_density_outside():
    found = Prior(UNIT).log_prob(torch.tensor([[0.5, 0.5], [0.5, 1.5], [-0.1, 0.5]]))
    assert found.tolist() == [0.0, -math.inf, -math.inf]


class PairOfPriors(torch.distributions.Distribution):
    """Independent priors side by side, as `sbi` joins them."""

    def __init__(self):
        self.parts = [Uniform(torch.zeros(1), 2 * torch.ones(1)), Exponential(torch.ones(1))]
        super().__init__(torch.Size(), torch.Size([2]), validate_args=False)

    @property
    def support(self):
        return torch.distributions.constraints.cat([part.support for part in self.parts], dim=-1, lengths=[1, 1])

    def sample(self, shape=()):
        return torch.cat([part.sample(shape) for part in self.parts], -1)

    def log_prob(self, theta):
        return sum(part.log_prob(one).squeeze(-1) for part, one in zip(self.parts, theta.split(1, -1), strict=True))


def test_bounds_of_independent_priors_side_by_side():
    low, high = Prior(PairOfPriors()).bounds
    assert (low.tolist(), high.tolist()) == ([0.0, 0.0], [2.0, math.inf])


@pytest.mark.parametrize(
    ("simulate", "shape"),
    [
        (lambda theta: theta + 0.1 * torch.randn_like(theta), (2,)),  # a row or a batch
        (lambda theta: torch.stack([theta[0], theta[0] * theta[1], theta[1]]), (3,)),  # a row
        (lambda theta: float(theta[0] + theta[1]), (1,)),  # a number
        (lambda theta: np.random.poisson(10 * np.asarray(theta), (5, 2)), (5, 2)),  # whole numbers of NumPy
        (lambda theta: theta[:, :1] ** 2, (1,)),  # a batch
        (lambda theta: [float(theta[0]), random.random()], (2,)),  # a list
    ],
)
def test_simulators_of_many_kinds(simulate, shape):
    data, again = (Simulator(simulate, UNIT, **SMALL) for _ in range(2))
    assert (data.event_shape, data.context_shape) == ((2,), shape)
    batch = data.train_stream(8, torch.Generator().manual_seed(0)).next()
    assert batch.context.shape == (8, *shape)
    torch.testing.assert_close(data.reference(), again.reference())
    torch.testing.assert_close(data.reference_contexts(), again.reference_contexts())
    assert (len(data.reference()), data.num_validation, data.num_test) == (38, 2, 10)
    other = Simulator(simulate, UNIT, **SMALL, seed=1)
    assert not torch.equal(other.reference(), data.reference())


@pytest.mark.parametrize(
    "simulate",
    [
        lambda theta: theta + 0.1 * torch.randn(2),  # a batch would share the noise
        lambda theta: np.asarray(theta) + np.array([0.1 * np.random.randn(), 0.0]),
        lambda theta: torch.cat([theta / theta.norm(), torch.randn_like(theta)], -1),  # a batch would mix its rows
        lambda theta: theta - theta.mean(),
    ],
)
def test_a_simulator_of_one_row_that_runs_with_a_batch_still_gets_one_row(simulate):
    seen = []

    def told(theta):
        seen.append(tuple(theta.shape))
        return simulate(theta)

    Simulator(told, UNIT, **SMALL)
    assert seen[-50:] == [(2,)] * 50


def test_each_simulation_has_its_own_noise():
    data = Simulator(lambda theta: theta + 0.1 * torch.randn(2), UNIT, num_simulations=3000, num_test=10)
    noise = data.reference_contexts() - data.reference()
    assert len(noise.mul(1e4).round().unique(dim=0)) > 2500
    torch.testing.assert_close(noise.std(0), torch.full((2,), 0.1), atol=0.01, rtol=0)


def test_parameters_that_rounding_puts_on_an_edge_move_inside():
    """The box [1000, 1001] has 16,384 numbers of float32, so that draws reach its edges."""
    low, high = torch.full((2,), 1000.0), torch.full((2,), 1001.0)
    prior = Independent(Uniform(low, high), 1)
    data = Simulator(lambda theta: theta, prior, num_simulations=20_000, num_test=10, vectorised=True)
    theta = data.reference()
    Unbounded(2, data.bounds).check(theta)
    assert (theta < 1000.0001).any() or (theta > 1000.9999).any()
    edges = torch.tensor([[1000.0, 1000.5], [1000.5, 1001.0]]).expand(50, 2, 2).reshape(100, 2)
    Unbounded(2, data.bounds).check(Simulations(edges, edges, prior).reference())
    exact = Independent(Uniform(low.double(), high.double()), 1)  # draws that are edges only in float32
    near = torch.full((100, 2), 1000.00001, dtype=torch.float64)
    Unbounded(2, data.bounds).check(Simulations(near, edges, exact).reference())


def test_observations_that_are_all_equal_are_refused():
    theta = UNIT.sample((100,))
    with pytest.raises(flows.FlowsError, match="all 90 observations of the training part are equal"):
        Simulations(theta, torch.zeros(100, 2), UNIT)


def test_simulations_leave_the_global_random_numbers_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state().clone(), np.random.get_state()[1].copy()
    Simulator(lambda theta: theta + np.random.randn(), UNIT, **SMALL)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def test_pairs_stay_together_and_streams_resume():
    data = Simulator(lambda theta: 2 * theta, UNIT, **SMALL)
    stream = data.train_stream(5, torch.Generator().manual_seed(0))
    for _ in range(9):
        batch = stream.next()
        torch.testing.assert_close(batch.context, 2 * batch.x)
    state = stream.state_dict()
    expected = stream.next()
    again = data.train_stream(5, torch.Generator())
    again.load_state_dict(state)
    torch.testing.assert_close(again.next().x, expected.x)


def test_invalid_simulations_are_dropped_and_counted():
    def simulate(theta):
        return torch.where(theta[:, :1] < 0.25, torch.nan, theta)

    with pytest.warns(DataWarning, match=r"of 50 simulations hold NaN .* were left out \(invalid=drop\)"):
        data = Simulator(simulate, UNIT, **SMALL, invalid="drop")
    assert data.num_dropped == 50 - len(data.reference()) - data.num_validation - data.num_test > 0
    assert (data.reference()[:, 0] >= 0.25).all()


def failing(theta):
    raise KeyError("no such rate")


def of_changing_shape(theta):
    return torch.zeros(2 if theta[0] < 0.5 else 3)


class NoDensity(torch.distributions.Distribution):
    def sample(self, shape=()):
        return torch.zeros(*shape, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Simulator(failing, UNIT, **SMALL), r"the simulator fails for the parameters \[0\..*KeyError.*no such"),
        (
            lambda: Simulator(lambda theta: theta * torch.nan, UNIT, **SMALL),
            r"40 of 40 simulations hold NaN .* first for the parameters \[0\..*; set invalid=drop",
        ),
        (lambda: Simulator(lambda theta: theta * torch.nan, UNIT, **SMALL, invalid="drop"), "none is left"),
        (
            lambda: Simulator(of_changing_shape, UNIT, **SMALL, vectorised=False),
            r"one shape: it returned \([23],\) for the parameters \[.* and \([23],\) for \[",
        ),
        (lambda: Simulator(lambda theta: theta[0], UNIT, **SMALL, vectorised=True), "if it takes a single row"),
        (lambda: Simulator(lambda theta: theta + 1j, UNIT, **SMALL), "must return real numbers"),
        (lambda: Simulator(lambda theta: theta[..., :0], UNIT, **SMALL), "observation must hold at least one number"),
        (lambda: Simulator(lambda theta: torch.zeros_like(theta), UNIT, **SMALL), "all .* are equal, so they say"),
        (
            lambda: Simulator(lambda theta: "high", UNIT, **SMALL),
            "must return real numbers.*got str for the parameters",
        ),
        (lambda: Simulator(lambda theta: theta, Normal, **SMALL), "has no values, it is a class"),
        (lambda: Simulator(lambda theta: theta, torch.rand, **SMALL), "has no sample and no log_prob"),
        (lambda: Simulator(lambda theta: theta, NoDensity(validate_args=False), **SMALL), "has no density"),
        (lambda: Simulator(lambda theta: theta, Uniform(0.0, 1.0), **SMALL), r"sample\(\(2,\)\) must have the shape"),
        (lambda: Simulator(lambda theta: theta, UNIT, num_simulations=1), "num_simulations must be"),
        (lambda: Simulator(lambda theta: theta, UNIT, **SMALL, invalid="keep"), "invalid"),
        (
            lambda: Simulator(lambda theta: theta + torch.randn(2), UNIT, **SMALL, vectorised=True),
            r"simulations share their noise; draw them for each row, such as torch.randn_like",
        ),
        (
            lambda: Simulator(lambda theta: theta, COUNTS, **SMALL),
            "has no density, as its parameters are whole numbers",
        ),
        (lambda: Prior(Dirichlet(torch.ones(3))), "add up to 1; leave the last one out"),
        (lambda: box([0, 1], [1, 1]), "each below its high one"),
        (lambda: Simulations(torch.rand(9, 2), torch.rand(8, 2)), "got 9 rows and 8 observations"),
        (lambda: Simulations(torch.rand(90, 2), torch.rand(90, 2), box([0], [1])), r"prior has parameters of shape"),
        (
            lambda: Simulations(torch.rand(90, 2) + 1, torch.rand(90, 2), UNIT),
            "parameters lie outside the support of the prior",
        ),
        (lambda: Simulations(torch.rand(90, 2), torch.rand(90, 2).log() / 0), "observations of 90 of 90 simulations"),
    ],
)
def test_bad_simulators_and_priors_are_told(call, message):
    with pytest.raises(flows.FlowsError, match=message):
        call()


# The tasks of the benchmark


def test_two_moons_have_the_published_density():
    """With r and a from x and θ: r ~ N(0.1, 0.01²), a uniform."""
    theta = torch.tensor([[0.2, -0.4]]).expand(4000, -1)
    data = TwoMoons(**SMALL)
    x = data.run(theta)
    centre = torch.tensor([0.25 - 0.2 / math.sqrt(2), -0.6 / math.sqrt(2)])
    offset = x - centre
    radius, angle = offset.norm(dim=1), torch.atan2(offset[:, 1], offset[:, 0])
    assert radius.mean() == pytest.approx(0.1, abs=1e-3)
    assert radius.std() == pytest.approx(0.01, rel=0.1)
    assert angle.abs().max() <= math.pi / 2
    assert angle.var() == pytest.approx(math.pi**2 / 12, rel=0.1)


def test_slcp_has_the_stated_moments():
    theta = torch.tensor([[0.7, -2.9, 1.2, 0.9, 0.6]])
    x = SLCP(**SMALL).run(theta.expand(20_000, -1)).view(-1, 2)
    torch.testing.assert_close(x.mean(0), theta[0, :2], atol=0.02, rtol=0)
    sd, covariance = torch.tensor([1.44, 0.81]), torch.cov(x.T)
    torch.testing.assert_close(covariance.diagonal().sqrt(), sd, atol=0.02, rtol=0)
    assert covariance[0, 1] / sd.prod() == pytest.approx(math.tanh(0.6), abs=0.02)


def test_the_mixture_has_two_scales_in_one_batch():
    x = GaussianMixturePosterior(**SMALL).run(torch.zeros(20_000, 2))
    assert x.var() == pytest.approx((1 + 0.01) / 2, rel=0.05)
    assert (x.abs() < 0.2).all(1).float().mean() == pytest.approx(0.5 * 0.0251 + 0.5 * 0.911, abs=0.02)


def test_the_neuron_has_sufficient_statistics():
    """At weights 0 spikes are fair coins: the statistics have the mean ½ Σ and the variance ¼ Σ²."""
    task = BernoulliGLM(**SMALL)
    design = task.design()
    x = task.run(torch.zeros(5000, 10))
    torch.testing.assert_close(x.mean(0), design.sum(0) / 2, atol=0.4, rtol=0)
    torch.testing.assert_close(x.var(0), design.square().sum(0) / 4, rtol=0.15, atol=0)
    assert design[3, 3] == design[2, 2] == design[0 + 1, 1]  # the input at time 0


def test_the_epidemic_keeps_its_first_integral():
    """Without recovery the infected follow a logistic curve: I = N/(1 + (N − 1) exp(−βt))."""
    task = SIR(**SMALL)
    x = task.run(torch.tensor([[0.3, 1e-6]]).expand(500, -1)).mean(0) / 1000
    times = 17.0 * torch.arange(10)
    torch.testing.assert_close(x, 1 / (1 + (1e6 - 1) * (-0.3 * times).exp()), atol=5e-3, rtol=0)


def test_predators_and_prey_keep_their_first_integral():
    """δX − γ log X + βY − α log Y is constant along a path; the noise is log-normal of scale 0.1."""
    theta = torch.tensor([[0.7, 0.05, 0.9, 0.05]], dtype=torch.float64).expand(400, -1)
    x = LotkaVolterraPosterior(**SMALL).run(theta)
    paths = x.log().mean(0).exp().view(2, 10)
    alpha, beta, gamma, delta = theta[0]
    kept = delta * paths[0] - gamma * paths[0].log() + beta * paths[1] - alpha * paths[1].log()
    start = delta * 30 - gamma * math.log(30) + beta
    torch.testing.assert_close(kept, start.expand(10), atol=0.05, rtol=0)
    assert x.log().std(0).mean() == pytest.approx(0.1, rel=0.1)


# The transform of bounded priors


def test_the_support_is_carried_to_the_whole_line_with_its_exact_determinant():
    inf = math.inf
    transform = Unbounded(4, bounds=([0.0, -1.0, -inf, -inf], [inf, 1.0, 2.0, inf]))
    x = torch.tensor([[2.0, 0.5, 1.0, 7.0], [1e-3, -0.99, -40.0, -3.0]], dtype=torch.float64)
    y, log_det = transform(x)
    for row, value in zip(x, log_det, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda point: transform(point[None])[0][0], row)
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], value)
    back, other = transform.inverse(y)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(other, -log_det)


def test_samples_never_reach_a_bound():
    transform = Unbounded(1, bounds=(-3.0, 3.0))
    x, _ = transform.inverse(torch.tensor([[-200.0], [200.0], [60.0]]))
    transform.check(x)
    assert transform(x)[0].isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Unbounded(2, bounds=([0, 1], [1, 1])), r"low must be below high: at entry \(1,\) they are 1 and 1"),
        (lambda: Unbounded(2, bounds=3.0), "bounds must be a pair, low and high"),
        (lambda: Unbounded(2, bounds=([0, 0, 0], [1, 1, 1])), r"an array of shape \(2,\)"),
        (
            lambda: Unbounded(2, bounds=(0.0, 1.0)).check(torch.tensor([[0.5, 0.5], [0.5, 1.0]])),
            r"1 of 2 points lie outside the support or on its edge: entry \(1,\) of point 1 is 1, and its bounds",
        ),
    ],
)
def test_bad_bounds_are_told(call, message):
    with pytest.raises(flows.FlowsError, match=message):
        call()
