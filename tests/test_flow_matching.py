"""The flow matching family: its targets, paths and couplings against closed forms for Gaussians."""

import itertools
import math

import pytest
import torch
from problems import dense_divergence
from scipy.optimize import linear_sum_assignment

import flows
from flows import CNF, ODESolver
from flows.datasets import Batch, MoonsByClass, one_hot
from flows.divergence import Analytic, Auto, Exact, Hutchinson, Probing
from flows.fields import MLP, Adapter, Guided
from flows.objectives import FlowMatching, MaximumLikelihood, ProbabilityPath
from flows.objectives.couplings import Independent, OptimalTransport, Sinkhorn
from flows.objectives.paths import Coefficients, Cosine, Linear, VariancePreserving
from flows.objectives.posterior import posterior_moments

PATHS = [Linear(), Linear(sigma_min=0.1), Cosine(), VariancePreserving()]
SD = 0.5  # of the data, N(1, SD²) in each coordinate


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def column(t):
    return t.reshape(-1, 1)


class GaussianVelocity(torch.nn.Module):
    """E[a′x₁ + b′x₀ | x_t] for x₁ ~ N(1, SD² I)."""

    sd = SD

    def __init__(self, path):
        super().__init__()
        self.path = path

    def forward(self, t, x):
        a, b, a_rate, b_rate = self.path.coefficients(column(t))
        gain = (x - a) / (a**2 * self.sd**2 + b**2)
        return a_rate * (1 + a * self.sd**2 * gain) + b_rate * b * gain


# Paths


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_paths_lead_from_noise_to_data_at_the_stated_rates(path):
    ends = path.coefficients(torch.tensor([0.0, path.last_time]))
    torch.testing.assert_close(ends.data, torch.tensor([0.0, 1.0]), rtol=0, atol=7e-3)
    torch.testing.assert_close(ends.noise, torch.tensor([1.0, getattr(path, "sigma_min", 0)]), rtol=0, atol=2e-3)
    t = torch.linspace(0.01, 0.99, 50, requires_grad=True)
    a, b, a_rate, b_rate = path.coefficients(t)
    for value, rate in ((a, a_rate), (b, b_rate)):
        (derivative,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        torch.testing.assert_close(rate, derivative)
    if not isinstance(path, Linear):
        torch.testing.assert_close(a**2 + b**2, torch.ones_like(t))


def test_the_variance_preserving_path_follows_its_diffusion():
    """With s = 1 − t, d a²/ds = −β a² and d b²/ds = β (1 − b²): the moments of dx = −½ β x ds + √β dw."""
    path = VariancePreserving(0.2, 7.0)
    t = torch.linspace(0, 0.99, 30)
    a, b, a_rate, b_rate = path.coefficients(t)
    beta = 0.2 + (1 - t) * 6.8
    torch.testing.assert_close(-2 * a * a_rate, -beta * a**2)
    torch.testing.assert_close(-2 * b * b_rate, beta * (1 - b**2))


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_the_marginal_velocity_of_every_path_carries_the_base_to_the_data(path):
    """At t = 1 the data has the variance a² SD² + b², and the density follows."""
    flow = CNF(GaussianVelocity(path), event_shape=(2,), solver=ODESolver(rtol=1e-9, atol=1e-9))
    x = 1 + SD * torch.randn(5, 2)
    a, b = path.coefficients(torch.tensor([0.0, path.last_time]))[:2]
    variance = a**2 * SD**2 + b**2  # at t = 0 not quite that of N(0, I) for a diffusion
    start, end = (torch.distributions.Normal(a[i], variance[i].sqrt()) for i in (0, 1))
    moved = flow.transport(x, (path.last_time, 0.0))
    change = (start.log_prob(moved.x) - end.log_prob(x)).sum(1)
    torch.testing.assert_close(moved.log_density_change, change, rtol=0, atol=1e-6)


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize(("target", "power"), [("sampled", 1.0), ("marginal", 1.0), ("marginal", 1.5)])
def test_every_path_and_target_is_minimised_by_the_marginal_velocity(path, target, power):
    """The gradient of the loss vanishes there, in the direction of each of several functions of t and x."""
    x = 1 + SD * torch.randn(40, 500, 2)
    velocity = GaussianVelocity(path)

    class Perturbed(torch.nn.Module):
        event_shape = (2,)

        def forward(self, t, x):
            t = column(t)
            features = torch.stack([torch.ones_like(x), x, t * x, (t < 0.3) * x, torch.sin(3 * x)])
            # Late in the path the targets of a diffusion scatter so much that they would drown the rest.
            return velocity(t, x) + (t < 0.95) * torch.tensordot(weights, features, 1)

    flow = CNF(Perturbed())
    gradients = []
    for i, batch in enumerate(x):
        weights = torch.zeros(5, requires_grad=True)
        loss = FlowMatching(target, path=path, time_power=power)(flow, Batch(batch), rng(i)).loss
        gradients.append(torch.autograd.grad(loss, weights)[0])
    gradients = torch.stack(gradients)
    error = gradients.std(0) / math.sqrt(len(gradients))
    assert (gradients.mean(0).abs() < 4 * error).all(), gradients.mean(0) / error
    assert error.max() < (0.05 if target == "marginal" else 0.2)  # so that the statement means something


# The marginal target

CENTRES = torch.tensor([[1.2, 0.0], [-0.8, 0.9], [-0.5, -1.1]], dtype=torch.float64)


def mixture(*shape):
    return CENTRES[torch.randint(3, shape)] + 0.3 * torch.randn(*shape, 2)


def test_the_marginal_target_is_unbiased_and_its_scatter_falls_with_the_pool():
    """Against the closed form of a mixture of Gaussians, at fixed x_t, with x₁ from its posterior given x_t.

    The pool is as small as four points: the target is the mean given x_t *and* the pool, so it has no bias at all.
    """
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.8, 0.9])
    a, b = Linear().coefficients(column(t))[:2]
    position = a * mixture(6) + b * torch.randn(6, 2)
    variance = a**2 * 0.09 + b**2
    offset = position[:, None] - a[:, None] * CENTRES
    component = (-offset.square().sum(2) / (2 * variance)).softmax(1)
    means = CENTRES + (a * 0.09 / variance)[:, None] * offset
    truth = (component[..., None] * means).sum(1)

    scatter = []
    for size, repeats in ((4, 8000), (16, 4000), (64, 1000)):
        which = torch.multinomial(component, repeats, replacement=True)  # (6, R)
        own = means.gather(1, which[..., None].expand(-1, -1, 2)) + (0.3 * b / variance.sqrt())[:, None] * torch.randn(
            6, repeats, 2
        )
        found = torch.stack(
            [
                posterior_moments(position, a, b, pool, torch.eye(6, 6 + size - 1) + (torch.arange(5 + size) > 5) > 0)[
                    0
                ]
                for pool in torch.cat([own.transpose(0, 1), mixture(repeats, size - 1)], 1)
            ]
        )
        error = found.std(0) / math.sqrt(repeats)
        assert ((found.mean(0) - truth).abs() < 4.5 * error).all()
        scatter.append(found.std(0).square().mean().sqrt())
    assert scatter[0] > 1.5 * scatter[1] > 1.5**2 * scatter[2]


def test_the_marginal_target_needs_an_independent_coupling():
    with pytest.raises(ValueError, match="coupling OptimalTransport pairs them; use target='sampled'"):
        FlowMatching("marginal", coupling="optimal_transport")
    for bad, message in [
        ({"target": "mean"}, "target must be 'auto', 'sampled' or 'marginal', got 'mean'"),
        (
            {"target": "sampled", "num_queries": 4},
            "num_queries needs target='marginal' or a coupling",
        ),
        ({"path": "zigzag"}, "unknown ProbabilityPath 'zigzag'; expected one of cosine, linear, variance_preserving"),
        ({"coupling": "none"}, "unknown Coupling 'none'"),
        ({"context_dropout": 1.0}, "context_dropout must be a finite number >= 0 and < 1, got 1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            FlowMatching(**bad)
    assert FlowMatching(path="variance_preserving").path == VariancePreserving()
    assert FlowMatching(coupling="optimal_transport", num_queries=4).num_queries == 4


@pytest.mark.parametrize(
    ("dimension", "coupling", "same"),
    [
        (8, "independent", {"target": "marginal", "num_queries": 3}),
        (9, "independent", {"target": "sampled"}),
        (8, "optimal_transport", {"target": "sampled", "num_queries": 3}),
    ],
)
def test_the_automatic_target_is_marginal_in_low_dimensions(dimension, coupling, same):
    flow = CNF(MLP((dimension,), hidden=(8,)))
    batch = Batch(torch.randn(7, dimension))
    auto = FlowMatching(num_queries=3, coupling=coupling)(flow, batch, rng(1)).loss
    assert torch.equal(auto, FlowMatching(**same, coupling=coupling)(flow, batch, rng(1)).loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("power", [0.5, 1.0, 1.5, 3.0])
def test_times_are_drawn_by_their_power(power, dtype):
    times = []

    class Recorder(MLP):
        def forward(self, t, x, context=None):
            times.append(t)
            return super().forward(t, x, context)

    flow = CNF(Recorder((2,), hidden=(4,))).to(dtype)
    loss = FlowMatching("sampled", time_power=power)(flow, Batch(mixture(100_000).to(dtype)), rng()).loss
    t = times[-1]  # after those of the examination
    assert loss.isfinite()
    assert t.min() >= 0
    assert t.max() < 1
    for late in (0.1, 0.5, 0.9, 0.99):
        share = (1 - late) ** (1 / power)
        assert abs((t > late).double().mean() - share) < 4.5 * math.sqrt(share * (1 - share) / len(t))


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_losses_at_times_by_the_likelihood_differ_by_a_divergence_of_kullback_and_leibler(path):
    """∫ w (loss − least loss) dt = KL(data ‖ model) of the noised densities at the last time, for normal ones."""
    own, other = GaussianVelocity(path), GaussianVelocity(path)
    other.sd = 0.9
    data = Batch(1 + SD * torch.randn(100_000, 2, generator=rng(3)))

    def loss(field):
        flow = CNF(field, event_shape=(2,))
        return float(FlowMatching("sampled", path=path, time_weighting="likelihood")(flow, data, rng(4)).loss)

    t = torch.linspace(0, path.last_time, 200_001, dtype=torch.float64)
    a, b, a_rate, b_rate = path.coefficients(t)
    kept = b >= 0.02
    weight = (a / (b * (a_rate * b - a * b_rate)))[kept]
    total = torch.trapezoid(weight, t[kept])
    p, q = ((a * sd) ** 2 + b**2 for sd in (SD, other.sd))
    ratio = (p / q)[kept][-1]
    divergence = ratio - 1 - ratio.log()  # of two coordinates
    assert 2 * total * (loss(other) - loss(own)) == pytest.approx(float(divergence), rel=0.05)


def test_the_latest_times_leave_the_marginal_target_its_digits(monkeypatch):
    """There one point of the batch explains x_t, and the marginal target is the sampled one, far from zero as well."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.full(shape, 1 - 1e-3, dtype=options["dtype"]))
    flow, batch = CNF(MLP((2,), hidden=(4,))).float(), Batch((100 + mixture(50)).float())
    marginal, sampled = (
        FlowMatching(target, time_power=3.0, divergence_weight=0)(flow, batch, rng()).loss
        for target in ("marginal", "sampled")
    )
    torch.testing.assert_close(marginal, sampled)


# The divergence


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("target", ["sampled", "marginal"])
def test_the_divergence_is_matched_without_bias_for_every_path_and_target(path, target):
    """At the marginal velocity the gradient of the divergence's error vanishes, in the direction of several fields."""
    velocity = GaussianVelocity(path)

    class Perturbed(torch.nn.Module):
        event_shape = (2,)

        def forward(self, t, x):
            t = column(t)
            features = torch.stack([x, t * x, (t < 0.3) * x, torch.sin(3 * x), x.flip(1) ** 2 * x])
            return velocity(t, x) + (t < 0.95) * torch.tensordot(weights, features, 1)

    flow, gradients = CNF(Perturbed(), Exact()), []
    for i, batch in enumerate(1 + SD * torch.randn(40, 500, 2)):
        weights = torch.zeros(5, requires_grad=True)
        losses = [
            FlowMatching(target, None, path, divergence_weight=weight)(flow, Batch(batch), rng(i)).loss
            for weight in (1.0, 0.0)
        ]
        gradients.append(torch.autograd.grad(losses[0] - losses[1], weights)[0])
    gradients = torch.stack(gradients)
    error = gradients.std(0) / math.sqrt(len(gradients))
    # With few points behind a late x_t, their mean is off by its scatter; the error of the divergence by its square.
    assert (gradients.mean(0).abs() < 4 * error).all(), gradients.mean(0) / error
    assert error.max() < (0.03 if target == "marginal" else 0.1)  # so that the statement means something


def test_the_error_of_the_divergence_is_that_of_a_known_field():
    """A constant added to v leaves div v, and adds t ‖constant‖² to what b div u is taken for, through m_v."""
    velocity, shift = GaussianVelocity(Linear()), torch.tensor(0.7, requires_grad=True)

    class Shifted(torch.nn.Module):
        event_shape = (2,)

        def forward(self, t, x):
            return velocity(t, x) + shift * torch.ones_like(x)

    batch, errors = Batch(1 + SD * torch.randn(20000, 2)), []
    for field in (velocity, Shifted()):
        flow = CNF(field, Exact(), event_shape=(2,))
        plain = FlowMatching("marginal", 500, divergence_weight=0)(flow, batch, rng())
        full = FlowMatching("marginal", 500, divergence_weight=2.0)(flow, batch, rng())
        errors.append(full.metrics["divergence_error"])
        torch.testing.assert_close(full.loss, plain.loss + 2 * errors[-1])
        assert torch.equal(full.metrics["velocity_error"], plain.loss)
    assert errors[0] < 0.05  # the scatter of what 20,000 points tell of the divergence
    torch.testing.assert_close(errors[1], torch.tensor((2 * 0.7**2) ** 2 / 3 / 2), rtol=0.15, atol=0)
    # What b div u is taken for is held fixed, so of the shift only the velocity's error has a gradient.
    torch.testing.assert_close(*(torch.autograd.grad(part.loss, shift)[0] for part in (full, plain)))


@pytest.mark.parametrize("shape", [(2,), (3, 2), (11,)])
def test_the_spread_of_the_posterior_is_that_of_its_weights(shape):
    pool, position, near, offset = (torch.randn(size, *shape) for size in (50, 300, 300, 300))
    a, b = torch.rand(2, 300, *[1] * len(shape)) + 0.1
    possible = torch.rand(300, 50) < 0.5
    log_weights = torch.distributions.Normal((a[:, None] * pool), b[:, None]).log_prob(position[:, None]).flatten(2)
    weights = log_weights.sum(2).masked_fill(~possible, -torch.inf).softmax(1)
    mean, spread = posterior_moments(position, a, b, pool, possible, (near, offset))
    torch.testing.assert_close(mean, torch.tensordot(weights, pool, 1))
    squares = (pool - (near + offset)[:, None]).flatten(2).square().sum(2)
    torch.testing.assert_close(spread, (weights * squares).sum(1))


def test_the_latest_times_leave_the_divergence_its_digits(monkeypatch):
    """There one point of the batch explains x_t, and both targets are the same, far from zero as well."""

    class Outward(torch.nn.Module):
        def forward(self, t, x):
            return x

    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.full(shape, 1 - 1e-4, dtype=options["dtype"]))
    flow, batch = CNF(Outward(), event_shape=(2,)).float(), Batch((100 + mixture(50)).float())
    marginal, sampled = (
        FlowMatching(target, time_power=1.5, divergence_weight=1.0)(flow, batch, rng()).metrics["divergence_error"]
        for target in ("marginal", "sampled")
    )
    assert sampled < 10  # as v is wrong by no more than the noise
    torch.testing.assert_close(marginal, sampled, rtol=1e-4, atol=0)


def test_matching_the_divergence_takes_an_exact_one():
    flow, batch = CNF(Adapter(torch.nn.Tanh(), (40,), ("x",)), Hutchinson(2)), Batch(torch.randn(8, 40))
    with pytest.raises(ValueError, match=r"divergence_weight=0.1 needs an exact divergence, but neither Hutchinson"):
        FlowMatching(divergence_weight=0.1)(flow, batch, rng())
    flow.divergence = Exact()
    assert FlowMatching(divergence_weight=0.1)(flow, batch, rng()).loss.isfinite()
    with pytest.raises(ValueError, match="coupling Sinkhorn pairs them; use divergence_weight=0 with it"):
        FlowMatching(coupling="sinkhorn", divergence_weight=0.1)
    with pytest.raises(ValueError, match="divergence_weight must be a finite number >= 0, got -1; or use 'auto'"):
        FlowMatching(divergence_weight=-1)
    with pytest.raises(TypeError, match="must be a number or 'auto', got None"):
        FlowMatching(divergence_weight=None)
    with pytest.raises(ValueError, match="or 'auto', got 'often'"):
        FlowMatching(divergence_weight="often")


def test_the_divergence_is_matched_by_default_settings_where_that_is_exact_and_quiet():
    batch, auto = Batch(mixture(8)), FlowMatching()
    small, noisy, large = CNF(MLP((2,))), CNF(MLP((2,)), Hutchinson(2)), CNF(MLP((9,)))
    dear = CNF(Adapter(torch.nn.Tanh(), (5,), ("x",)))
    assert [auto.divergence(flow) for flow in (small, noisy, large, dear)] == [Auto(), Auto(), None, None]
    assert not FlowMatching("sampled").divergence(small)
    assert not FlowMatching("marginal").divergence(large)
    assert not FlowMatching(coupling="sinkhorn").divergence(small)
    assert not FlowMatching(divergence_weight=0).divergence(small)
    assert MaximumLikelihood().divergence(noisy) == Hutchinson(2)
    assert "divergence_error" in auto(small, batch, rng()).metrics
    noisy.field = small.field  # by an exact divergence all the same, so that runs with any estimator compare
    torch.testing.assert_close(auto(noisy, batch, rng()).loss, auto(small, batch, rng()).loss)


@pytest.mark.parametrize(
    "estimator",
    [Analytic(), Probing(2), Hutchinson(2, "orthonormal"), Hutchinson(2, "coordinates"), Exact("forward")],
    ids=repr,
)
def test_every_exact_estimator_matches_the_same_divergence(estimator):
    flow, batch = CNF(MLP((2,), hidden=(8,))), Batch(mixture(30))
    objective = FlowMatching("marginal", divergence_weight=1.0)
    expected = objective(flow, batch, rng()).loss
    flow.divergence = estimator
    torch.testing.assert_close(objective(flow, batch, rng()).loss, expected)


def test_a_dropped_context_matches_the_divergence_over_all_contexts():
    """The points of both classes then count, as without any context."""
    flow = CNF(MLP((2,), hidden=(8,), context_shape=(2,)))
    x, context = mixture(60), one_hot(torch.arange(60) // 30, 2)
    always = FlowMatching("marginal", context_dropout=1 - 1e-12, divergence_weight=1.0)
    dropped = always(flow, Batch(x, context), rng()).metrics["divergence_error"]
    same = FlowMatching("marginal", context_dropout=1e-300, divergence_weight=1.0)  # which draws as many numbers
    blank = same(flow, Batch(x, torch.zeros(60, 2)), rng()).metrics["divergence_error"]
    torch.testing.assert_close(dropped, blank)
    assert not torch.isclose(dropped, same(flow, Batch(x, context), rng()).metrics["divergence_error"])


def test_the_divergence_is_matched_by_context():
    """Two classes far apart: what the other one is like does not matter to the divergence."""
    flow = CNF(MLP((2,), hidden=(8,), context_shape=(2,)))
    x, context = torch.cat([mixture(30), 50 + mixture(30)]), one_hot(torch.arange(60) // 30, 2)
    objective = FlowMatching("marginal", num_queries=30, divergence_weight=1.0)
    both = objective(flow, Batch(x, context), rng()).metrics["divergence_error"]
    one = objective(flow, Batch(x[:30], context[:30]), rng()).metrics["divergence_error"]
    torch.testing.assert_close(both, one)


def test_a_setting_out_of_range_is_refused():
    for build, message in [
        (lambda: FlowMatching(time_power=0), "time_power must be a finite number > 0, got 0; 1 draws times uniformly"),
        (lambda: FlowMatching(time_weighting="late"), "time_weighting must be 'uniform' or 'likelihood', got 'late'"),
        (lambda: FlowMatching(time_weighting="likelihood", time_power=2), "leave one of them out"),
        (lambda: Linear(1.0), "sigma_min must be a finite number >= 0 and < 1, got 1.0"),
        (lambda: VariancePreserving(2, 1), "beta_max must be a finite number >= 2, got 1"),
        (lambda: Sinkhorn(0), "regularisation must be a finite number > 0, got 0"),
        (lambda: Sinkhorn(max_iterations=0), "max_iterations must be a whole number >= 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            build()


# Couplings


def test_optimal_transport_sorts_on_the_line():
    noise, data = torch.randn(200, 1), 1 + SD * torch.randn(200, 1)
    coupled = OptimalTransport().couple(noise, data)
    assert torch.equal(coupled[data[:, 0].argsort()], noise.sort(0).values)


def test_optimal_transport_has_the_least_cost_of_all_assignments():
    noise, data = torch.randn(6, 2, 2), torch.randn(6, 2, 2)
    cost = (OptimalTransport().couple(noise, data) - data).square().sum()
    every = [(noise[list(order)] - data).square().sum() for order in itertools.permutations(range(6))]
    torch.testing.assert_close(cost, torch.stack(every).min())


@pytest.mark.parametrize(("n", "dimension", "spread"), [(1, 2, 1.0), (60, 2, 3.0), (40, 16, 0.1), (5, 2, 0.0)])
def test_optimal_transport_searches_less_for_the_same_assignment(n, dimension, spread):
    noise, data = torch.randn(n, dimension, generator=rng()), spread * torch.randn(n, dimension, generator=rng(1)) + 1
    cost = torch.cdist(data, noise).square()
    rows, columns = linear_sum_assignment(cost.numpy())
    found = OptimalTransport().pair(noise, data)
    assert sorted(found.tolist()) == list(range(n))
    torch.testing.assert_close(cost[range(n), found].sum(), cost[rows, columns].sum())


def test_optimal_transport_of_gaussians_tends_to_the_linear_map():
    """x₁ = 1 + SD x₀ is the optimal map, along which velocities are a function of x_t: the targets scatter less."""
    noise, data = torch.randn(1000, 2), 1 + SD * torch.randn(1000, 2)
    error = [(1 + SD * coupling.couple(noise, data) - data).std() for coupling in (Independent(), OptimalTransport())]
    assert error[1] < 0.2 * error[0]
    flow = CNF(MLP((2,), (8,)))
    objectives = (FlowMatching(coupling=name) for name in ("independent", "optimal_transport"))
    independent, optimal = (objective(flow, Batch(data), rng()).loss for objective in objectives)
    assert optimal < independent


def test_sinkhorn_has_uniform_marginals():
    noise, data = torch.randn(60, 2), torch.randn(40, 2) + 1
    plan = Sinkhorn(0.3, tolerance=1e-9).log_plan(noise, data).exp()
    torch.testing.assert_close(plan.sum(1), torch.full((40,), 1 / 40))
    torch.testing.assert_close(plan.sum(0), torch.full((60,), 1 / 60), rtol=0, atol=1e-10)


def test_sinkhorn_lies_between_optimal_and_independent():
    noise, data = torch.randn(40, 2), 1 + SD * torch.randn(40, 2)
    cost = torch.cdist(data, noise).square()
    best = cost[linear_sum_assignment(cost.numpy())].mean()
    costs = [
        (Sinkhorn(regularisation, 20_000, 1e-4).log_plan(noise, data).exp() * cost).sum()
        for regularisation in (0.01, 0.3, 3.0, 1e4)
    ]
    assert best - 1e-9 < costs[0] < best + 0.02
    assert costs[0] < costs[1] < costs[2] < costs[3]
    torch.testing.assert_close(costs[3], cost.mean(), rtol=1e-3, atol=0)


def test_sinkhorn_of_gaussians_has_the_closed_form_covariance():
    """cov(x₀, x₁) = ½(√(4 s² + ε²/4) − ε/2) for N(0, 1) and N(m, s²). [Janati et al. 2020, arXiv:2006.02572]"""
    quantiles = torch.special.ndtri((torch.arange(400) + 0.5) / 400).unsqueeze(1)
    for epsilon in (0.2, 1.0, 4.0):
        plan = Sinkhorn(epsilon, tolerance=1e-6).log_plan(quantiles, 1 + SD * quantiles).exp()
        covariance = ((1 + SD * quantiles - 1) @ quantiles.T * plan).sum()
        truth = 0.5 * (math.sqrt(4 * SD**2 + epsilon**2 / 4) - epsilon / 2)
        assert abs(covariance - truth) < 5e-3


def test_sinkhorn_draws_from_its_plan():
    noise, data = torch.randn(5, 1), torch.randn(5, 1)
    coupling = Sinkhorn(0.5)
    plan = coupling.log_plan(noise, data).exp()
    generator = rng()
    draws = torch.stack([coupling.pair(noise, data, generator) for _ in range(1000)])
    found = torch.nn.functional.one_hot(draws, 5).double().mean(0) / 5
    assert ((found - plan).abs() < 4 * (plan / 5 / 1000).sqrt() + 1e-12).all()


@pytest.mark.parametrize("coupling", [OptimalTransport(), Sinkhorn()], ids=["exact", "sinkhorn"])
def test_couplings_stay_within_a_context(coupling):
    context = one_hot(torch.randint(3, (60,)), 3)
    noise, data = torch.randn(60, 2), torch.randn(60, 2)
    marked = torch.cat([noise, 100 * context.argmax(1, keepdim=True)], 1)  # the noise carries its first owner's class
    coupled = coupling.couple(marked, torch.cat([data, torch.zeros(60, 1)], 1), context)
    assert torch.equal(coupled[:, 2], marked[:, 2])
    distinct = torch.arange(60.0).unsqueeze(1)
    with pytest.warns(UserWarning, match="all contexts differ: noise and data stay independent"):
        assert torch.equal(coupling.couple(noise, data, distinct), noise)
    assert torch.equal(coupling.couple(noise[:4], data[:4], distinct[:4]), noise[:4])  # chance, and no warning


# Guidance


def test_dropped_contexts_are_zero_and_average_over_all_classes():
    """A field that reports what it is given: with dropout p, a share p of the contexts is zero."""
    seen = []

    class Spy(torch.nn.Module):
        event_shape = (2,)

        def forward(self, t, x, context):
            seen.append(context)
            return 0 * x

    batch = MoonsByClass().draw(4000, rng())
    for target in ("sampled", "marginal"):
        FlowMatching(target, num_queries=None, context_dropout=0.2)(CNF(Spy()), batch, rng(1))
        dropped = (seen[-1] == 0).all(1)
        assert abs(dropped.double().mean() - 0.2) < 4 * math.sqrt(0.16 / 4000)
        assert torch.equal(seen[-1][~dropped], batch.context[~dropped])


def test_guidance_extrapolates_from_no_context():
    field = MLP((2,), (16, 16), context_shape=(3,))
    x, t, context = torch.randn(7, 2), torch.tensor(0.3), torch.tensor([[0.0, 1.0, 0.0]])
    given, without = field(t, x, context.expand(7, 3)), field(t, x, torch.zeros(7, 3))
    for weight in (0.0, 1.0, 2.5):
        guided = Guided(field, weight)
        value, divergence = guided.bind(context.expand(7, 3)).value_and_divergence(t, x)
        torch.testing.assert_close(value, without + weight * (given - without))
        torch.testing.assert_close(value, guided(t, x, context.expand(7, 3)))
        torch.testing.assert_close(divergence, dense_divergence(guided.bind(context), t, x))


def test_a_guided_flow_shares_its_parameters_and_has_a_density():
    field = MLP((2,), (8,), activation="silu", sine_frequency=None, context_shape=(2,))
    flow = CNF(field, Analytic(), ODESolver("rk4", step_size=0.1))
    context, x = torch.tensor([1.0, 0.0]), torch.randn(9, 2)
    torch.testing.assert_close(flow.guided(1.0).log_prob(x, context), flow.log_prob(x, context))
    torch.testing.assert_close(flow.guided(0.0).log_prob(x, context), flow.log_prob(x, torch.zeros(2)))
    assert list(flow.guided(2.0).parameters()) == list(flow.parameters())
    drawn, log_prob = flow.guided(2.0).sample_and_log_prob((9,), context)
    torch.testing.assert_close(flow.guided(2.0).log_prob(drawn, context), log_prob, rtol=0, atol=1e-4)


class ClassOfNormals(torch.nn.Module):
    """The exact velocity of straight paths from N(0, I) to N(m, s² I), m = mean of the class; no class means m = 0."""

    event_shape, context_shape, s = (2,), (2,), 0.4
    means = torch.tensor([[1.0, -0.5], [-0.3, 0.8]], dtype=torch.float64)

    def forward(self, t, x, context):
        rate = (self.s**2 * t - (1 - t)) / ((1 - t) ** 2 + (self.s * t) ** 2)
        mean = context @ self.means
        return mean + rate * (x - t * mean)


def test_guidance_of_normal_classes_moves_their_means():
    """v∅ + w (v − v∅) = (w m)(1 − t r) + r x is the velocity of N(w m, s² I), so this is the guided density."""
    field = ClassOfNormals()
    flow = CNF(field, Exact(), ODESolver(rtol=1e-9, atol=1e-9)).double()
    x, context = torch.randn(20, 2, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    for weight in (0.0, 1.0, 2.5):
        mean = weight * field.means[1]
        expected = torch.distributions.Normal(mean, torch.full_like(mean, field.s)).log_prob(x).sum(1)
        torch.testing.assert_close(flow.guided(weight).log_prob(x, context), expected, rtol=0, atol=1e-6)
        drawn = flow.guided(weight).sample((4000,), context, rng())
        error = field.s / 4000**0.5
        assert (drawn.mean(0) - weight * field.means[1]).abs().max() < 4 * error
        assert drawn.std(0).tolist() == pytest.approx([field.s] * 2, abs=3 * error)


def test_guidance_of_weight_one_is_the_flow_itself():
    flow = CNF(MLP((2,), (8,), context_shape=(2,)))
    x, context = torch.randn(5, 2), torch.tensor([0.0, 1.0])
    assert torch.equal(flow.guided(1.0).log_prob(x, context), flow.log_prob(x, context))
    assert torch.equal(flow.guided(1.0).sample((5,), context, rng()), flow.sample((5,), context, rng()))


def test_guidance_needs_a_base_without_contexts():
    base = flows.bases.ConditionalNormal((2,), context_shape=(2,))
    flow = CNF(MLP((2,), (8,), context_shape=(2,)), base=base)
    with pytest.raises(ValueError, match=r"the base ConditionalNormal depends on the context; sample without guidance"):
        flow.guided(2.0)


def test_guidance_without_a_closed_form_or_a_context():
    network = Adapter(torch.nn.Linear(2, 2), (2,), ("context",), context_shape=(2,))
    guided = Guided(network, 2.0)
    assert guided.bind().value_and_divergence is None
    x, context = torch.randn(4, 2), torch.randn(4, 2)
    bias = network.module.bias
    torch.testing.assert_close(guided(torch.tensor(0.0), x, context), 2 * network.module(context) - bias)
    flow = CNF(MLP((2,), (8,), context_shape=(2,)), Hutchinson(2), ODESolver("rk4", step_size=0.5)).guided(1.5)
    assert flow.log_prob(x, context).isfinite().all()
    with pytest.raises(ValueError, match="guidance needs a field with a context_shape, and MLP has none"):
        Guided(MLP((2,), (8,)), 2.0)


def test_paths_and_couplings_extend_by_a_class():
    class Squared(ProbabilityPath):
        def coefficients(self, t):
            return t**2, 1 - t, 2 * t, -torch.ones_like(t)

    assert isinstance(FlowMatching(path="squared").path, Squared)


@pytest.mark.parametrize("kind", ["linear", "rounded", "cosine", "variance preserving", "bent"])
def test_points_between_noise_and_data_follow_the_coefficients(kind):
    class Bent(Linear):
        def coefficients(self, t):
            return Coefficients(t**2, 1 - t, 2 * t, -torch.ones_like(t))

    kinds = {"rounded": Linear(0.1), "cosine": Cosine(), "variance preserving": VariancePreserving(), "bent": Bent()}
    path = kinds.get(kind, Linear())
    t = torch.rand(6, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * path.last_time
    noise, data = torch.randn(2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    a, b, a_rate, b_rate = path.coefficients(t)
    position, velocity = path.between(t, noise, data)
    torch.testing.assert_close(position, a * data + b * noise)
    torch.testing.assert_close(velocity, a_rate * data + b_rate * noise)
