"""Bases: densities that integrate to one, draws that follow them, and what the marginal target takes from them."""

import copy
import math

import pytest
import torch
from torch import distributions as dist

import flows
from flows import CNF
from flows.bases import Base, Empirical, FlowBase, Mixture, NoDensityError, Normal, StudentT, TorchDistribution, Uniform
from flows.datasets import Batch, EightGaussians, Moons
from flows.fields import MLP
from flows.objectives import FlowMatching, MaximumLikelihood, ReverseKL
from flows.objectives.posterior import base_posterior

COVARIANCE = [[2.0, 0.5], [0.5, 1.0]]
MEANS = [[-1.0, 0.0], [1.5, 1.0], [0.0, -2.0]]
COVARIANCES = [[[0.5, 0.2], [0.2, 0.4]], [[1.0, 0.0], [0.0, 0.3]], [[0.6, -0.1], [-0.1, 0.9]]]


class Laplace(Base):
    """A stranger's base: independent Laplace entries."""

    def sample(self, shape, generator=None):
        u = torch.rand((*shape, *self.event_shape), generator=generator, dtype=self.dtype) - 0.5
        return -u.sign() * torch.log1p(-2 * u.abs())

    def log_prob(self, z):
        return (-z.abs() - math.log(2)).sum(-1)


BASES = {
    "standard": lambda: Normal(2),
    "normal": lambda: Normal(2, [1.0, -1.0], COVARIANCE),
    "diagonal": lambda: Normal(2, covariance=[0.5, 2.0]),
    "learned": lambda: Normal(2, trainable=True),
    "uniform": lambda: Uniform(2, [-1.0, 0.0], [1.0, 3.0]),
    "student_t": lambda: StudentT(2, 6.0, [1.0, 0.0], 0.7),
    "mixture": lambda: Mixture(2, weights=[1, 2, 3], means=MEANS, covariances=COVARIANCES),
    "laplace": lambda: TorchDistribution(dist.Laplace(torch.zeros(2), torch.tensor([1.0, 0.5]))),
    "stranger": lambda: Laplace(2),
}
SMOOTH = [name for name in BASES if name not in ("uniform", "laplace", "stranger")]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", BASES)
def test_draws_follow_the_density_which_integrates_to_one(name):
    base = BASES[name]()
    drawn = base.sample((40_000,), rng())
    assert (drawn.shape, drawn.dtype) == ((40_000, 2), torch.float64)
    side = torch.linspace(-25, 25, 801)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        log_p, density = base.log_prob(drawn), base.log_prob(grid).exp()
    cell = (50 / 800) ** 2
    tails = 2e-3 if name == "student_t" else 0
    assert float(density.sum()) * cell == pytest.approx(1, abs=(6e-2 if name == "uniform" else 2e-3) + tails)
    if name == "uniform":
        assert torch.equal(log_p, torch.full_like(log_p, -math.log(6)))
        return
    entropy = -(density * density.clamp_min(1e-300).log()).sum() * cell
    assert abs(-log_p.mean() - entropy) < 4 * log_p.std() / 200 + 5e-3 + 5 * tails
    for power in (1, 2):
        moment = (grid.pow(power) * density[:, None]).sum(0) * cell
        error = drawn.pow(power).std(0) / 200
        assert bool(((drawn.pow(power).mean(0) - moment).abs() < 4.5 * error + 20 * tails + 2e-3).all()), power


def test_the_torch_densities_agree():
    z = torch.randn(50, 2)
    truth = dist.MultivariateNormal(torch.tensor([1.0, -1.0]), torch.tensor(COVARIANCE))
    torch.testing.assert_close(BASES["normal"]().log_prob(z), truth.log_prob(z))
    student = dist.Independent(dist.StudentT(6.0, torch.tensor([1.0, 0.0]), torch.tensor(0.7)), 1)
    torch.testing.assert_close(BASES["student_t"]().log_prob(z), student.log_prob(z))
    parts = dist.MultivariateNormal(torch.tensor(MEANS), torch.tensor(COVARIANCES))
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.tensor([1.0, 2.0, 3.0])), parts)
    torch.testing.assert_close(BASES["mixture"]().log_prob(z), mixture.log_prob(z))
    adapted = TorchDistribution(mixture)
    assert adapted.is_positive_everywhere
    torch.testing.assert_close(adapted.log_prob(z), mixture.log_prob(z))


ONE = torch.ones(2, dtype=torch.float64)
DISTRIBUTIONS = {
    "gumbel": lambda: dist.Gumbel(0 * ONE, ONE),  # its transforms hold their inverses
    "logistic": lambda: dist.TransformedDistribution(
        dist.Uniform(0 * ONE, ONE), [dist.SigmoidTransform().inv, dist.AffineTransform(ONE, 2 * ONE)]
    ),
    "log_normal": lambda: dist.LogNormal(0 * ONE, ONE),
    "weibull": lambda: dist.Weibull(ONE, 2 * ONE),
    "von_mises": lambda: dist.VonMises(0 * ONE, ONE),  # keeps tensors that it computes at first use
    "beta": lambda: dist.Beta(2 * ONE, 3 * ONE),
    "dirichlet": lambda: dist.Dirichlet(2 * ONE),
    "low_rank": lambda: dist.LowRankMultivariateNormal(0 * ONE, ONE[:, None], ONE),
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(3)), dist.Independent(dist.Normal(torch.arange(6.0).view(3, 2), 1.0), 1)
    ),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distributions_of_torch_keep_their_density_in_copies_and_in_single_precision(name):
    stated = DISTRIBUTIONS[name]()
    base = TorchDistribution(stated)
    z = base.sample((20,), rng())
    expected = stated.log_prob(z)
    expected = expected.flatten(1).sum(1) if expected.ndim > 1 else expected
    torch.testing.assert_close(base.log_prob(z), expected)
    copied = copy.deepcopy(base)
    torch.testing.assert_close(copied.log_prob(z), expected)
    assert torch.equal(copied.sample((20,), rng()), z)
    single = copied.float()
    assert single.log_prob(z.float()).dtype == single.sample((2,)).dtype == torch.float32
    torch.testing.assert_close(base.log_prob(z), expected)  # the copy has tensors of its own


@pytest.mark.parametrize("shape", [(3,), (2, 2), (1, 2, 3)])
def test_bases_of_any_event_shape(shape):
    points = torch.randn(200, *shape) * 2 + 1
    bases = [
        Normal(shape, fit=True),
        Normal(shape, fit=True, covariance_type="diagonal"),
        Normal(shape, covariance=torch.rand(shape) + 0.5),
        Uniform(shape, -1.0, torch.rand(shape)),
        StudentT(shape, scale=torch.rand(shape) + 0.5),
        Mixture(shape, 2, "spherical"),
        TorchDistribution(dist.Laplace(torch.zeros(shape), torch.ones(shape))),
        Empirical(points=points),
    ]
    for base in bases:
        assert base.fit(points) is base
        drawn = base.sample((4, 5), rng())
        assert drawn.shape == (4, 5, *shape)
        assert torch.equal(drawn, base.sample((4, 5), rng()))
        if base.has_density:
            assert base.log_prob(drawn).shape == (4, 5)
    torch.testing.assert_close(bases[0].mean, points.flatten(1).mean(0))
    torch.testing.assert_close(bases[0].factor @ bases[0].factor.T, points.flatten(1).T.cov())
    torch.testing.assert_close(bases[1].factor.diagonal().square(), points.flatten(1).var(0))


def test_a_mixture_finds_its_components():
    data = EightGaussians(num_reference=4000)
    base = Mixture(2, 8).fit(data.reference())
    angles = torch.arange(8) * (math.pi / 4)
    centres = data.radius * torch.stack([angles.cos(), angles.sin()], 1)
    assert torch.cdist(centres, base.mean).amin(1).max() < 0.1
    excess = data.log_prob(data.reference()).mean() - base.log_prob(data.reference()).mean()
    assert -0.02 < excess < 0.02
    with pytest.raises(ValueError, match=r"num_components=8 need at least as many points .* got 5; choose fewer"):
        Mixture(2, 8).fit(torch.randn(5, 2))
    with pytest.raises(ValueError, match=r"Mixture has not been fitted to data; call flow.fit_ends"):
        Mixture(2).sample((3,))


def apart():
    """A mixture whose components hardly touch, so that a point tells its component."""
    covariances = torch.tensor([[[1.0, 0.6], [0.6, 0.5]], [[0.3, 0.0], [0.0, 1.5]], [[0.5, -0.3], [-0.3, 0.7]]])
    return Mixture(2, weights=[0.2, 0.3, 0.5], means=[[-9.0, 0.0], [9.0, 0.0], [0.0, 9.0]], covariances=covariances)


def test_companions_come_from_the_component_of_the_point():
    base = apart()
    points = base.sample((20_000,), rng())
    drawn, middles = base.companions(points, rng(1))
    component = torch.cdist(points, base.mean).argmin(1)
    assert torch.equal(middles, base.mean[component])
    torch.testing.assert_close(torch.cdist(drawn, base.mean).argmin(1), component)
    for k, factor in enumerate(base.factor):
        own = drawn[component == k]
        torch.testing.assert_close(own.mean(0), base.mean[k], atol=0.06, rtol=0)
        torch.testing.assert_close(own.T.cov(), factor @ factor.T, atol=0.06, rtol=0)
        assert torch.corrcoef(torch.stack([own[:, 0], points[component == k][:, 0]]))[0, 1].abs() < 0.06
    normal = Normal(2, mean=[1.0, 2.0], covariance=[[2.0, 0.5], [0.5, 1.0]])
    drawn, middles = normal.companions(points, rng(1))
    assert torch.equal(drawn, normal.sample((20_000,), rng(1)))
    assert torch.equal(middles, normal.mean.expand(20_000, 2))
    assert torch.equal(StudentT(2).companions(points, rng(1))[1], torch.zeros(20_000, 2))


@pytest.mark.parametrize("path", ["cosine", "linear"])
def test_flow_matching_leaves_a_mixture_that_is_right(path):
    """Around the means the cosine path asks for no velocity, so the gradient at rest vanishes in expectation."""
    torch.manual_seed(0)
    base = apart()
    flow = CNF(MLP((2,), hidden=(8,), at_rest=True), base=base)
    objective = FlowMatching(path=path, coupling="components", time_power=3.0)
    generator, found = rng(), []
    for _ in range(150):
        loss = objective(flow, Batch(base.sample((200,), generator)), generator).loss
        found.append(torch.autograd.grad(loss, flow.field.out.weight)[0].flatten())
    gradients = torch.stack(found)
    sigmas = gradients.mean(0).abs() / (gradients.std(0) / math.sqrt(150))
    assert (sigmas < 4).all() == (path == "cosine")


def test_components_need_noise_that_is_the_base_of_every_context():
    flow = CNF(MLP((2,), hidden=(8,), context_shape=(1,)), base=apart())
    batch = Batch(torch.randn(4, 2), torch.randn(4, 1))
    with pytest.raises(ValueError, match="components differ between contexts"):
        FlowMatching(coupling="components")(flow, batch)
    with pytest.raises(ValueError, match="cannot pair noise that has been drawn already"):
        flows.objectives.couplings.Components().pair(torch.zeros(3, 2), torch.zeros(3, 2))


def test_shrinkage_keeps_small_components_from_overfitting():
    """A huge one gives every component the covariance of all points; a small one helps held-out points."""
    torch.manual_seed(0)
    points = torch.randn(400, 20) @ torch.randn(20, 20)
    train, held_out = points[:150], points[150:]
    found = {nu: Mixture(20, 4, shrinkage=nu).fit(train) for nu in (0.0, 30.0, 1e9)}
    scores = {nu: float(base.log_prob(held_out).mean()) for nu, base in found.items()}
    assert scores[30.0] > scores[0.0] + 5
    factor = found[1e9].factor
    torch.testing.assert_close(factor @ factor.mT, train.T.cov().expand(4, 20, 20), rtol=1e-3, atol=1e-2)
    fitted = [float(base.log_prob(train).mean()) for base in found.values()]
    assert fitted[0] > fitted[1] > fitted[2]
    with pytest.raises(ValueError, match=r"a mixture of 4 components cannot be fitted .* shrinkage"):
        Mixture(20, 4).fit(torch.ones(30, 20))
    with pytest.raises(ValueError, match="shrinkage must be"):
        Mixture(2, shrinkage=-1.0)


@pytest.mark.parametrize("name", [name for name in BASES if name != "standard"])
@pytest.mark.parametrize("restricted", [False, True])
def test_the_posterior_of_a_pool_is_bayes_rule(name, restricted):
    """E[x₁ | x_t] = Σ x_j p₀((x_t − a x_j)/b) / Σ p₀(...), and its divergence by differences."""
    base, (queries, size) = BASES[name](), (6, 9)
    pool = torch.randn(size, 2) / 2
    ends, noise = pool[:queries], base.sample((queries,), rng()).detach()
    a, b = torch.rand(2, queries, 1) * 0.6 + 0.3
    possible = torch.rand(queries, size) < 0.5 if restricted else torch.ones(queries, size, dtype=torch.bool)
    possible = possible | torch.eye(queries, size, dtype=torch.bool)

    def mean_at(x):
        with torch.no_grad():
            z = (x[:, None] - a[:, None] * pool) / b[:, None]
            return base.log_prob(z).masked_fill(~possible, -torch.inf).softmax(1) @ pool

    x = a * ends + b * noise
    mean = mean_at(x)
    found, curvature = base_posterior(base, noise, ends, a, b, pool, possible, mean - ends)
    torch.testing.assert_close(found, mean)
    assert not found.requires_grad
    if base.is_positive_everywhere:
        steps = 1e-5 * torch.eye(2)
        divergence = sum((mean_at(x + s) - mean_at(x - s))[:, i] / 2e-5 for i, s in enumerate(steps))
        torch.testing.assert_close(curvature, divergence, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["uniform", "normal", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mixture", "student_t"))]
)
def test_the_marginal_target_is_the_conditional_expectation(name):
    """Against a Monte Carlo of E[x₁ | x_t]: x₁ from the data, weighed by the density of x_t given x₁."""
    base, data = BASES[name](), BASES["mixture"]()
    generator = rng(3)
    batches, queries = 3000, 4
    t = torch.tensor([0.3, 0.5, 0.7, 0.85]).unsqueeze(1)
    x1, x0 = data.sample((queries,), generator), base.sample((queries,), generator)
    x = t * x1 + (1 - t) * x0
    many = data.sample((400_000,), generator)
    with torch.no_grad():
        log_weight = torch.stack([base.log_prob((p - s * many) / (1 - s)) for p, s in zip(x, t, strict=True)])
        truth = log_weight.softmax(1) @ many
    # x_t drawn from the path, as in training: the own end is one of the pool, the rest are fresh
    sums, total = torch.zeros(queries, 2), torch.zeros(queries, 1)
    for i in range(queries):
        own = torch.multinomial(log_weight[i].exp(), batches, replacement=True, generator=generator)
        ends = many[own]
        noise = (x[i] - t[i] * ends) / (1 - t[i])
        pool = torch.cat([ends[:, None], data.sample((batches, 15), generator)], 1)
        means = torch.cat(
            [
                base_posterior(base, n[None], e[None], t[i : i + 1], 1 - t[i : i + 1], p)[0]
                for n, e, p in zip(noise[:400], ends[:400], pool[:400], strict=True)
            ]
        )
        error = means.std(0) / 20 + 3e-3
        assert bool(((means.mean(0) - truth[i]).abs() < 4.5 * error).all()), (name, i)
        sums[i], total[i] = means.mean(0), 1
    assert sums.isfinite().all()


def trained(base, objective, steps=150, data=None, batch_size=256, rate=5e-3, hidden=(32, 32)):
    """The mean NLL on fresh points after a few steps, less the entropy."""
    data = BASES["normal"]() if data is None else data
    torch.manual_seed(0)
    flow = CNF(MLP(2, hidden=hidden), base=base, solver=flows.ODESolver("rk4", step_size=0.1))
    flow.fit_base(data.sample((3000,), rng(1)))
    optimizer, generator = torch.optim.Adam(flow.parameters(), rate), rng()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps) + 1e-4
        optimizer.zero_grad()
        objective(flow, Batch(data.sample((batch_size,), generator)), generator).loss.backward()
        optimizer.step()
    x = data.sample((4000,), rng(2))
    with torch.no_grad():
        return float((data.log_prob(x) - flow.log_prob(x)).mean())


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("student_t", "mixture", "laplace", "stranger")]


@pytest.mark.parametrize("target", ["marginal", pytest.param("sampled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["normal", *SLOW])
def test_flow_matching_from_any_density_reaches_the_entropy(name, target):
    """The data is a normal of known density; a target that supposes N(0, I) leaves the flow nats away."""
    assert -0.02 < trained(BASES[name](), FlowMatching(target)) < (0.25 if target == "sampled" else 0.1)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
@pytest.mark.parametrize("kind", [Normal, StudentT, Mixture])
def test_a_trained_base_gets_its_gradient_from_the_likelihood(kind, gradient):
    options = {"means": MEANS, "covariances": COVARIANCES} if kind is Mixture else {}
    base = kind(2, trainable=True, **options)
    solver = flows.ODESolver("rk4", step_size=0.1, gradient=gradient)
    flow = CNF(MLP(2, hidden=(8,)), solver=solver, base=base)
    with torch.no_grad():
        for parameter in flow.field.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng()))
    x = torch.randn(16, 2)
    MaximumLikelihood()(flow, Batch(x)).loss.backward()
    for name, parameter in base.named_parameters():
        gradient, index = parameter.grad, (-1,) * parameter.ndim
        with torch.no_grad():
            values = []
            for step in (1e-5, -1e-5):
                parameter[index] += step
                values.append(-flow.log_prob(x).mean())
                parameter[index] -= step
        slope = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close(gradient[index], slope, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize("kind", [pytest.param(Normal, marks=pytest.mark.slow), StudentT])
def test_the_reverse_kl_trains_a_base_through_its_draws(kind):
    """With a fixed field, draws lead the base to where the flow has the moments of the target."""
    target = dist.MultivariateNormal(torch.tensor([1.0, -2.0]), torch.tensor([[0.5, 0.0], [0.0, 2.0]]))
    flow = CNF(MLP(2, hidden=(4,)), solver=flows.ODESolver("euler", step_size=0.5), base=kind(2, trainable=True))
    flow.field.requires_grad_(False)
    objective, generator = ReverseKL(target), rng()
    optimizer = torch.optim.Adam(flow.base.parameters(), 0.1)
    for step in range(120):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 120)
        optimizer.zero_grad()
        objective(flow, Batch(torch.zeros(128, 0)), generator).loss.backward()
        optimizer.step()
    drawn = flow.sample((20_000,), generator=rng()).detach()
    assert bool(((drawn.mean(0) - target.loc).abs() < 0.25).all())
    assert bool((drawn.var(0) / target.variance - 1).abs().amax() < 0.4)


def test_objectives_refuse_bases_by_name():
    batch, field = Batch(torch.randn(8, 2)), MLP(2, hidden=(4,))
    source = CNF(field, base=Empirical(points=torch.randn(20, 2)))
    nested = CNF(field, base=CNF(MLP(2, hidden=(4,))))
    box = CNF(field, base=Uniform(2))
    learned = CNF(field, base=Mixture(2, means=MEANS, trainable=True))
    energy = ReverseKL(lambda x: -x.square().sum(-1))
    refused = [
        (source, MaximumLikelihood(), "MaximumLikelihood needs the density of the base, but Empirical is a source"),
        (box, MaximumLikelihood(), "MaximumLikelihood needs a base whose density is positive everywhere.* of Uniform"),
        (source, energy, "ReverseKL needs the density of the base, but Empirical"),
        (box, energy, "ReverseKL needs a base whose density is positive everywhere"),
        (learned, energy, "differentiates through draws of the base, and those of a trained Mixture have no gradient"),
        (source, FlowMatching("marginal"), "target='marginal' weighs all pairs .* and the base Empirical has none"),
        (nested, FlowMatching("marginal"), "and the base FlowBase takes a solve for each value"),
        (
            box,
            FlowMatching(divergence_weight=0.1),
            "score of the base, and the base Uniform is not positive everywhere",
        ),
        (source, FlowMatching(divergence_weight=0.1), "the base Empirical has no density in closed form"),
    ]
    for flow, objective, words in refused:
        with pytest.raises(TypeError, match=words):
            objective(flow, batch, rng())
        with pytest.raises(TypeError, match=words):
            objective.check(flow, EightGaussians())
    for flow in (source, nested, box, learned):  # what "auto" leaves out
        assert FlowMatching()(flow, batch, rng()).loss.isfinite()
    for call in (source.log_prob, source.estimate_log_prob):
        with pytest.raises(NoDensityError, match=r"Empirical is a source of points and has no density.*flow_matching"):
            call(torch.randn(3, 2))
    with pytest.raises(NoDensityError, match="has no density"):
        source.sample_and_log_prob(3)
    assert source.sample((3,)).shape == (3, 2)


def test_bases_that_do_not_suit_are_refused():
    field = MLP(2, hidden=(4,))
    refused = [
        (Normal(3), r"the base's event_shape is \(3,\), and the field's is \(2,\)"),
        (dist.Normal(0.0, 1.0), r"the base Normal draws points of shape \(\), and the field's event_shape is \(2,\)"),
        (dist.Poisson(torch.ones(2)), "starts from a continuous distribution, and Poisson is discrete"),
        (
            dist.Laplace(torch.zeros(2, requires_grad=True), torch.ones(2)),
            r"Laplace has parameters that need gradients .* use flows.bases.Normal\(..., trainable=True\)",
        ),
        (torch.nn.Linear(2, 2), "base must be a flows.bases.Base or None, or a torch.distributions.Distribution or a"),
        (Normal, "got the class Normal"),
        ("gauss", "base: unknown Base 'gauss'; expected one of .*student_t"),
    ]
    for base, words in refused:
        with pytest.raises((TypeError, ValueError), match=words):
            CNF(field, base=base)
        flow = CNF(field)
        with pytest.raises((TypeError, ValueError), match=words):
            flow.base = base
    wrong = [
        (lambda: Normal(2, covariance=[[1.0, 2.0], [2.0, 1.0]]), "covariance must be positive definite"),
        (lambda: Normal(2, covariance=[[1.0, 0.5], [0.2, 1.0]]), "covariance must be symmetric"),
        (lambda: Normal(2, covariance=-1.0), "covariance must have variances above 0"),
        (
            lambda: Normal(2, mean=[1.0, 2.0, 3.0]),
            r"mean must be one number or numbers of shape \(2,\), got shape \(3,\)",
        ),
        (lambda: Normal(2, mean="zero"), "mean must be a number or numbers"),
        (lambda: Normal(2, mean=[0.0, math.nan]), "mean must be finite"),
        (lambda: Normal(2, mean=0.0, fit=True), "fit=True takes mean and covariance from the data"),
        (
            lambda: Normal(2, fit=True).fit(torch.ones(10, 2)),
            "covariance of the data must be positive definite.*constant",
        ),
        (lambda: Uniform(2, 1.0, 0.0), "low must lie below high"),
        (lambda: StudentT(2, 0.0), "df must be a finite number > 0"),
        (lambda: StudentT(2, scale=0.0), "scale must be above 0"),
        (lambda: Mixture(2, 0), "num_components must be a whole number >= 1"),
        (lambda: Mixture(2, weights=[1.0, 2.0]), "belong to given means"),
        (lambda: Mixture(2, means=MEANS, weights=[1.0, 2.0]), r"weights must be one number or numbers of shape \(3,\)"),
        (lambda: Mixture(2, means=MEANS, covariances=[1.0, 1.0, -1.0]), "covariances must be symmetric and positive"),
        (lambda: Empirical(points=torch.tensor([[0.0, math.inf]])), "1 of 1 points hold NaN or infinite values"),
        (
            lambda: Empirical(3, dataset=Moons()),
            r"source 'moons' has points of shape \(2,\), and the data of shape \(3,\)",
        ),
        (lambda: FlowBase(torch.nn.Linear(2, 2)), "needs event_shape, sample and log_prob, and Linear lacks"),
    ]
    for build, words in wrong:
        with pytest.raises((TypeError, ValueError), match=words):
            build()
    with pytest.raises(ValueError, match=r"Empirical has no points yet; call flow.fit_ends"):
        Empirical(2).sample((3,))


def test_a_base_follows_the_flow():
    """Moved, copied, saved and loaded with it; a distribution of torch and another flow, too."""
    bases = [BASES[name]() for name in BASES] + [CNF(MLP(2, hidden=(4,))), Empirical(points=torch.randn(9, 2))]
    for base in bases:
        flow = CNF(MLP(2, hidden=(4,)), base=base)
        assert flow.float().base.sample((3,), rng()).dtype == torch.float32
        flow.double()
        twin = copy.deepcopy(flow)
        other = CNF(MLP(2, hidden=(4,)), base=copy.deepcopy(base) if isinstance(base, Base) else base)
        for tensor in other.state_dict().values():
            assert not tensor.is_floating_point() or tensor.add_(1) is tensor
        other.load_state_dict(flow.state_dict())
        for again in (twin, other):
            close = {"rtol": 1e-5, "atol": 1e-5}  # fixed frequencies of the field went through float32
            torch.testing.assert_close(again.sample(4, generator=rng()), flow.sample(4, generator=rng()), **close)
            if flow.base.has_density:
                torch.testing.assert_close(again.log_prob(torch.ones(1, 2)), flow.log_prob(torch.ones(1, 2)), **close)


def test_a_source_in_data_units_goes_through_the_transform():
    source, data = Moons(num_reference=300), EightGaussians(num_reference=500)
    flow = CNF(MLP(2, hidden=(4,)), base=Empirical(dataset=source), transform=flows.transforms.Standardise((2,)))
    flow.fit_ends(data.reference())
    back = flow.transform.inverse(flow.base.points)[0]
    torch.testing.assert_close(back, source.reference())
    assert flow.base.dataset is None
    with pytest.raises(NoDensityError, match=r"Empirical \(of 'moons'\) is a source of points"):
        flow.log_prob(torch.zeros(1, 2))


@pytest.mark.parametrize("name", ["mixture", "normal", "laplace"])
def test_autocast_does_not_round_a_base(name):
    """Draws, densities and the marginal target are those of the base's own precision."""
    base = BASES[name]().float()
    pool = torch.randn(6, 2, dtype=torch.float32)
    a, b = torch.full((2, 6, 1), 0.5, dtype=torch.float32)

    def found():
        z = base.sample((6,), rng())
        mean, curvature = base_posterior(base, z, pool, a, b, pool, None, torch.zeros_like(pool))
        return z, base.log_prob(z), mean, curvature

    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = found()
    for one, other in zip(rounded, found(), strict=True):
        assert torch.equal(one, other)


def test_the_support_of_a_distribution_follows_its_parameters():
    """Loaded, it is that of the saved one; events and batches are told apart."""
    narrow, wide = (TorchDistribution(dist.Uniform(torch.zeros(2), width * torch.ones(2))) for width in (1.0, 5.0))
    narrow.load_state_dict(wide.state_dict())
    z = torch.tensor([[3.0, 3.0], [3.0, 6.0]])
    expected = torch.tensor([-2 * math.log(5), -math.inf])
    torch.testing.assert_close(narrow.log_prob(z), expected)
    assert narrow.float().support.base_constraint.upper_bound.dtype == torch.float32
    simplex = TorchDistribution(dist.Dirichlet(torch.ones(2, 3)))
    drawn = simplex.sample((4,), rng())
    assert simplex.log_prob(drawn).shape == (4,)
    state = torch.get_rng_state()
    assert bool((simplex.log_prob(drawn + 1) == -math.inf).all())
    assert torch.equal(state, torch.get_rng_state())  # a density draws nothing


def test_a_flow_within_bounds_is_no_base_for_the_likelihood():
    """Its density is 0 outside, also where it is the base of a base."""
    inner = CNF(MLP(2, hidden=(4,)), transform=flows.transforms.Unbounded(2, bounds=(0.0, 1.0)))
    for base in (inner, CNF(MLP(2, hidden=(4,)), base=inner)):
        flow = CNF(MLP(2, hidden=(4,)), base=base)
        assert not flow.base.is_positive_everywhere
        with pytest.raises(TypeError, match="MaximumLikelihood needs a base whose density is positive everywhere"):
            MaximumLikelihood()(flow, Batch(torch.rand(4, 2)))
    free = CNF(MLP(2, hidden=(4,)), transform=flows.transforms.Unbounded(2))
    scaled = CNF(MLP(2, hidden=(4,)), transform=flows.transforms.Standardise((2,)))
    assert all(CNF(MLP(2, hidden=(4,)), base=base).base.is_positive_everywhere for base in (free, scaled))


def test_a_fixed_flow_stays_in_evaluation_mode():
    """Training moves no running statistics of a base whose weights are fixed."""

    class Normed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))

        def forward(self, t, x):
            return self.layers(x)

    inner = CNF(Normed(), event_shape=2).eval()
    flow = CNF(MLP(2, hidden=(4,)), base=inner).train()
    before = copy.deepcopy(flow.base.state_dict())
    MaximumLikelihood()(flow, Batch(torch.randn(8, 2))).loss.backward()
    assert flow.training
    assert not flow.base.flow.field.training
    for name, tensor in flow.base.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_normal_that_is_to_be_fitted_says_so():
    base = Normal(2, fit=True)
    for use in (lambda: base.sample((3,)), lambda: base.log_prob(torch.zeros(1, 2))):
        with pytest.raises(ValueError, match=r"Normal\(fit=True\) has not been fitted to data; call flow.fit_ends"):
            use()
    fitted = Normal(2, fit=True).fit(torch.randn(50, 2))
    base.load_state_dict(fitted.state_dict())
    assert torch.equal(base.sample((3,), rng()), fitted.sample((3,), rng()))
