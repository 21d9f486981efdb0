"""Transforms against dense Jacobians, noise densities against quadrature, and the bound against exact probabilities."""

import copy
import itertools
import math

import pytest
import torch
from problems import assert_unbiased, perceptron
from scipy.stats import kstest, multivariate_normal, truncnorm
from torch import nn

import flows
from flows.transforms import (
    Compose,
    CopulaNoise,
    Dequantise,
    Identity,
    Logit,
    NormalMarginals,
    NormalRadius,
    Standardise,
    TruncatedNormalNoise,
    UniformNoise,
    UnitInterval,
    VariationalNoise,
    Whiten,
)

SHAPE = (2, 3, 2)


def points(n=5, shape=SHAPE):
    return torch.rand(n, *shape) * 0.9 + 0.05


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def variational(event_shape, num_levels, strength=0.3, num_layers=4):
    """A noise that is far from uniform and depends on the image."""
    noise = VariationalNoise(event_shape, num_levels, hidden=8, num_layers=num_layers)
    with torch.no_grad():
        for network in noise.networks:
            network[-1].weight.normal_(std=strength)
            network[-1].bias.normal_(std=strength)
    return noise


def together(n, event_shape, num_levels):
    """Images whose entries rise and fall together."""
    common = torch.randint(num_levels, (n, *[1] * len(event_shape)), generator=rng(7))
    return torch.minimum(levels(n, event_shape, num_levels), common).to(torch.get_default_dtype())


def noises(event_shape, num_levels):
    return {
        "copula": CopulaNoise(event_shape, num_levels).fit(together(200, event_shape, num_levels)),
        "uniform": UniformNoise(),
        "narrow": TruncatedNormalNoise(0.1),
        "wide": TruncatedNormalNoise(0.4),
        "variational": variational(event_shape, num_levels),
    }


NOISES = ["uniform", "narrow", "wide", "variational", "copula"]


def chain(event_shape=SHAPE, num_levels=4, noise=None, alpha=0.05, per="entry"):
    return Compose(
        dequantise=Dequantise(num_levels, noise),
        unit=UnitInterval(num_levels),
        logit=Logit(alpha),
        standardise=Standardise(event_shape, per),
    )


def levels(n, event_shape=SHAPE, num_levels=4, seed=3):
    return torch.randint(num_levels, (n, *event_shape), generator=rng(seed)).to(torch.get_default_dtype())


# Bijections


def assert_dense_jacobian_and_inverse(transform, x):
    y, log_det = transform(x)
    dense = torch.stack([torch.func.jacrev(lambda one: transform(one[None])[0][0])(one) for one in x])
    torch.testing.assert_close(log_det, dense.reshape(len(x), 12, 12).slogdet().logabsdet)
    back, inverse_log_det = transform.inverse(y)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_log_det, -log_det)
    return y, log_det


@pytest.mark.parametrize(
    "transform",
    [
        Identity(),
        UnitInterval(17),
        Logit(0.05),
        Logit(1e-6),
        Standardise(SHAPE),
        Standardise(SHAPE, per="channel"),
        Compose(unit=UnitInterval(3), left_out=None, logit=Logit(0.1), standardise=Standardise(SHAPE)),
    ],
    ids=lambda t: type(t).__name__,
)
def test_log_determinants_are_those_of_the_dense_jacobian(transform):
    transform = transform.double().fit(points(50))
    x = points()
    y, log_det = assert_dense_jacobian_and_inverse(transform, x)
    again, terms = transform.account(x)
    assert torch.equal(again, y)
    torch.testing.assert_close(sum(terms.values()), log_det)


def test_terms_of_a_chain_are_those_of_its_parts():
    x = levels(6)
    transform = chain(noise=TruncatedNormalNoise(0.2)).fit(levels(100))
    y, terms = transform.account(x, rng(1))
    assert list(terms) == ["dequantisation", "scaling", "logit"]
    parts = transform.transforms
    first, dequantisation = parts["dequantise"](x, rng(1))
    second, unit = parts["unit"](first)
    third, logit = parts["logit"](second)
    last, standardise = parts["standardise"](third)
    assert torch.equal(y, last)
    torch.testing.assert_close(terms["dequantisation"], dequantisation)
    torch.testing.assert_close(terms["scaling"], unit + standardise)
    torch.testing.assert_close(terms["logit"], logit)
    torch.testing.assert_close(unit, torch.full((6,), -12 * math.log(4)))
    assert torch.equal(transform(x, rng(1))[0], y)


@pytest.mark.parametrize("per", ["entry", "channel"])
def test_standardising_comes_after_the_noise(per):
    transform = chain(num_levels=17, per=per).fit(levels(4000, num_levels=17))
    y, _ = transform(levels(4000, num_levels=17, seed=4), rng())
    over = (0,) if per == "entry" else (0, 2, 3)
    tolerance = 5 / math.sqrt(4000)
    assert y.mean(over).abs().max() < tolerance
    assert (y.std(over) - 1).abs().max() < tolerance
    standardise = transform.transforms["standardise"]
    for moment in (standardise.mean, standardise.sd):
        assert (moment == moment[:, :1, :1]).all() == (per == "channel")


def test_a_pixel_that_never_varies_is_no_obstacle_once_dequantised():
    x = levels(200)
    x[:, 0, 0, 0] = 2
    y, _ = chain().fit(x)(x)
    assert y.isfinite().all()
    with pytest.raises(ValueError, match="same value in every point"):
        Standardise(SHAPE).fit(x)


def test_the_ends_of_the_unit_interval_stay_finite():
    for dtype in (torch.float32, torch.float64):
        y, log_det = Logit(1e-6)(torch.tensor([[0.0, 1.0]], dtype=dtype))
        assert y.isfinite().all()
        assert log_det.isfinite().all()
        torch.testing.assert_close(y[0, 0], -y[0, 1])


# Noise


@pytest.mark.parametrize("name", NOISES)
def test_noise_densities_integrate_to_one(name):
    shape = (1, 1, 2)
    noise = noises(shape, 4)[name]
    middles = torch.linspace(-20, 20, 101)  # of logit(u), evenly spaced: fine cells near the faces of the cube
    grid = torch.cartesian_prod(middles, middles).sigmoid()
    volume = (grid * (1 - grid)).prod(1) * 0.4**2
    for image in levels(3, shape):
        with torch.no_grad():
            density = noise.log_prob(grid.reshape(-1, *shape), image.expand(len(grid), *shape)).exp()
        assert (density * volume).sum() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", NOISES)
def test_noise_states_the_density_of_its_own_draws(name):
    noise = noises(SHAPE, 4)[name]
    x = levels(50)
    u, log_q = noise.sample(x, rng())
    assert ((u >= 0) & (u <= 1)).all()
    torch.testing.assert_close(log_q, noise.log_prob(u, x), atol=1e-6, rtol=1e-6)
    assert not torch.equal(u, noise.sample(x, rng(1))[0])
    assert torch.equal(u, noise.sample(x, rng())[0])


@pytest.mark.parametrize("name", NOISES)
def test_draws_follow_the_density(name):
    """E_q[h/q] = ∫ h for any h: the inverse density of a draw averages to the volume of the cube."""
    noise = noises(SHAPE, 4)[name]
    image = levels(1).expand(40_000, *SHAPE) if name == "uniform" else levels(1, (1, 1, 2)).expand(40_000, 1, 1, 2)
    noise = noises((1, 1, 2), 4)[name] if name in ("variational", "copula") else noise
    with torch.no_grad():
        u, log_q = noise.sample(image, rng())
    inverse = (-log_q).exp()
    if name == "narrow":  # 1/q has no mean that a sample could find: it lives in the tails
        _, p = kstest(u.flatten().numpy(), truncnorm(-5, 5, loc=0.5, scale=0.1).cdf)
        assert p > 1e-3
        return
    assert_unbiased(inverse, 1.0)
    assert_unbiased(inverse * (u.flatten(1)[:, 0] < 0.5), 0.5)


def test_learned_noise_starts_uniform():
    noise = VariationalNoise(SHAPE, 4)
    u, log_q = noise.sample(levels(3000), rng())
    assert log_q.abs().max() < 1e-9
    assert kstest(u.detach().flatten().numpy(), "uniform").pvalue > 1e-3


def test_noise_of_a_copula_simulates_its_probabilities():
    """The mean of p/q over draws is P of the cells under the normal copula, by quadrature of its distribution."""
    noise = CopulaNoise((2,), 3, shrinkage=0.0).fit(together(500, (2,), 3))
    slope, spread = float(noise.weights[1, 0]), float(noise.spread[1])
    assert slope > 0.3
    covariance = torch.tensor([[1.0, slope], [slope, spread**2 + slope**2]])
    normal = torch.distributions.MultivariateNormal(torch.zeros(2), covariance)
    x = torch.cartesian_prod(torch.arange(3), torch.arange(3)).double()
    u, log_q = noise.sample(x.repeat(4000, 1), rng())
    share, below = (table.gather(1, x.long().T).T for table in (noise.shares, noise.below))
    z = torch.special.ndtri(below.repeat(4000, 1) + u * share.repeat(4000, 1))
    log_p = normal.log_prob(z) + (share.log().repeat(4000, 1) + z.square() / 2 + math.log(2 * math.pi) / 2).sum(1)
    found = (log_p - log_q).exp().view(4000, 9)
    edges = torch.special.ndtri(torch.stack([below, (below + share).clamp(max=1 - 1e-15)]).clamp(min=1e-15))
    exact = [
        multivariate_normal([0, 0], covariance.numpy()).cdf(high, lower_limit=low) for low, high in edges.unbind(1)
    ]
    for draws, truth in zip(found.T, exact, strict=True):
        assert_unbiased(draws, float(truth))
    assert found.std(0).max() < 0.2 * torch.tensor(exact).max()  # uniform noise: 0.5
    blind = CopulaNoise((2,), 3, shrinkage=0.999).fit(together(500, (2,), 3)).sample(x, rng())[1]
    assert blind.abs().max() < 0.01
    assert log_q.abs().max() > 0.3


def test_groups_of_a_copula_are_pixels_apart():
    images = together(300, (2, 4, 6), 4)
    noise = CopulaNoise((2, 4, 6), 4, stride=2).fit(images)
    sizes = torch.tensor([0, *noise.ends]).diff()
    assert sizes.tolist() == [6] * 8
    group = noise.order[:6]
    assert {(int(i) // 6 % 2, int(i) % 6 % 2) for i in group} == {(0, 0)}
    u, log_q = noise.sample(images[:20], rng())
    torch.testing.assert_close(noise.log_prob(u, images[:20]), log_q)
    means = noise.weights
    assert means[:6].count_nonzero() == 0  # the first group follows nobody
    assert means[6:12, :6].count_nonzero() == 36
    assert means[6:12, 6:].count_nonzero() == 0
    whole = CopulaNoise((2, 4, 6), 4).fit(images)
    bound = lambda n: float(n.sample(images, rng())[1].mean())  # noqa: E731
    assert bound(whole) > bound(noise) > 0.5  # entropy falls with what the noise knows


def test_noise_of_a_copula_is_saved_with_its_flow(tmp_path):
    noise = CopulaNoise((1, 4, 4), 4, stride=2).fit(together(100, (1, 4, 4), 4))
    flow = flows.CNF(flows.fields.MLP((1, 4, 4), hidden=(4,)), transform=chain((1, 4, 4), 4, noise))
    flows.save(flow, tmp_path / "images.flow")
    x = together(5, (1, 4, 4), 4)
    loaded = flows.load(tmp_path / "images.flow")
    assert torch.equal(loaded.log_prob(x, generator=rng()), flow.log_prob(x, generator=rng()))


def test_a_wide_truncated_normal_is_uniform():
    u, log_q = TruncatedNormalNoise(1e3).sample(levels(10), rng())
    assert log_q.abs().max() < 1e-4
    torch.testing.assert_close(u, UniformNoise().sample(levels(10), rng())[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_gives_the_image_back(name, dtype):
    dequantise = Dequantise(256, noises(SHAPE, 256)[name].to(dtype))
    x = levels(300, num_levels=256).to(dtype)
    y, log_det = dequantise(x, rng())
    back, inverse_log_det = dequantise.inverse(y)
    assert torch.equal(back, x)
    assert y.dtype == log_det.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(inverse_log_det, -log_det, atol=1e-6, rtol=1e-6)


def test_noise_of_nearly_one_does_not_reach_the_next_level():
    class Top(UniformNoise):
        def sample(self, x, generator=None):
            return torch.full_like(x, 1 - 2**-24), x.new_zeros(len(x))

    x = torch.arange(256, dtype=torch.float32)[:, None]
    dequantise = Dequantise(256, Top())
    assert torch.equal(dequantise.inverse(dequantise(x)[0])[0], x)


def test_samples_are_levels():
    y = torch.linspace(-3, 9, 200).reshape(-1, 1)
    x, _ = Dequantise(5).inverse(y)
    assert x.unique().tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(x[(y > 0) & (y < 5)], y[(y > 0) & (y < 5)].floor())


# The bound


def flow_over(event_shape, num_levels, noise, alpha=0.05):
    """A flow far from the identity over dequantised data."""
    torch.manual_seed(1)
    return flows.CNF(
        perceptron(event_shape, (16, 16), scale=1.6),
        solver=flows.ODESolver("rk4", step_size=0.1),
        transform=chain(event_shape, num_levels, noise, alpha).fit(levels(200, event_shape, num_levels)),
    )


@pytest.mark.parametrize("name", ["uniform", "wide", "variational", "copula"])
def test_probabilities_of_all_images_sum_to_one(name):
    """All 16 images of 2 × 1 pixels with 4 levels; the mean over draws of p/q is unbiased for P."""
    shape, num_draws = (1, 2, 1), 2500
    flow = flow_over(shape, 4, noises(shape, 4)[name], alpha=1e-3)
    images = torch.tensor(list(itertools.product(range(4), repeat=2)), dtype=torch.float64).reshape(-1, *shape)
    with torch.no_grad():
        draws = flow.log_prob(images.repeat(num_draws, 1, 1, 1), generator=rng()).reshape(num_draws, 16)
    probabilities = (draws.logsumexp(0) - math.log(num_draws)).exp()
    assert probabilities.max() > 3 * probabilities.min()
    assert probabilities.sum() == pytest.approx(1, abs=0.01)


class Nothing(nn.Module):
    """The field of the identity."""

    event_shape = (3,)

    def forward(self, t, x):
        return 0 * x


def normal_cells(transform, num_levels):
    """log P of every level under a standard normal in flow space, (L, 3)."""
    standardise = transform.transforms["standardise"]
    edges = (
        torch.arange(num_levels + 1, dtype=torch.float64)[:, None] / num_levels - standardise.mean
    ) / standardise.sd
    return torch.special.ndtr(edges).diff(dim=0).log()


@pytest.mark.parametrize("sd", [None, 0.25])
def test_bound_rises_to_the_probability_of_the_cell(sd):
    """Under a normal, cells have known probabilities: one draw stays below, many draws reach them."""
    noise = UniformNoise() if sd is None else TruncatedNormalNoise(sd)
    transform = Compose(dequantise=Dequantise(5, noise), unit=UnitInterval(5), standardise=Standardise((3,)))
    x = levels(40, (3,), 5)
    flow = flows.CNF(Nothing(), solver=flows.ODESolver("euler", step_size=1.0), transform=transform.fit(x))
    exact = normal_cells(transform, 5)[x.long(), torch.arange(3)].sum(1)
    batches = lambda: [flows.datasets.Batch(x[:30]), flows.datasets.Batch(x[30:])]  # noqa: E731
    truth = float(-exact.mean())
    found = {k: flows.evaluation.likelihood(flow, batches(), rng(k), num_draws=k) for k in (1, 4, 100)}
    averaged = torch.stack([flow.log_prob(x, generator=rng(seed)) for seed in range(50)])
    assert (averaged.mean(0) < exact + 4 * averaged.std(0) / math.sqrt(50)).all()
    assert -averaged.mean() > truth
    assert found[1].nll > found[4].nll > found[100].nll
    assert found[100].nll == pytest.approx(truth, abs=4 * found[100].draw_standard_error + 1e-3)
    assert found[4].draw_standard_error > found[100].draw_standard_error > 0


def test_bits_per_dim_add_up_to_the_whole():
    shape = (1, 2, 2)
    flow = flow_over(shape, 4, TruncatedNormalNoise(0.3))
    x = levels(60, shape)
    batches = [flows.datasets.Batch(part) for part in x.split(25)]
    for num_draws in (1, 3):
        result = flows.evaluation.likelihood(flow, batches, rng(), num_draws=num_draws)
        bits = result.bits_per_dim
        expected = ["model", "dequantisation", "scaling", "logit", *(["importance_weighting"] if num_draws > 1 else [])]
        assert list(bits.parts) == expected
        assert bits.value == pytest.approx(result.nll / (4 * math.log(2)), rel=1e-12)
        assert bits.standard_error == pytest.approx(result.standard_error / (4 * math.log(2)), rel=1e-12)
        assert ("bits/dim", str(bits)) in result.table()
    assert bits.parts["importance_weighting"] < 0
    value, *parts = (float(part) for part in str(bits).replace("±", "= ").replace("=", " ").split() if "." in part)
    assert sum(parts[1:]) == pytest.approx(value, abs=3e-4)


def test_terms_of_a_continuous_flow():
    flow = flows.CNF(perceptron((2,)), transform=Standardise((2,)).fit(torch.randn(50, 2)))
    x = torch.randn(4, 3, 2)
    estimate = flow.estimate_log_prob(x, solver_error=False)
    assert set(estimate.terms) == {"model", "scaling"}
    torch.testing.assert_close(sum(estimate.terms.values()), estimate.value)
    assert estimate.terms["scaling"].shape == (4, 3)
    result = flows.evaluation.likelihood(flow, [flows.datasets.Batch(torch.randn(5, 2))])
    assert result.bits_per_dim is None
    with pytest.raises(
        ValueError, match=r"num_draws = 2 are draws of dequantisation noise, and .* Standardise, adds none"
    ):
        flows.evaluation.likelihood(flow, [flows.datasets.Batch(torch.randn(5, 2))], num_draws=2)
    with pytest.raises(ValueError, match="num_draws must be a whole number >= 1, got 0"):
        flows.evaluation.likelihood(flow, [flows.datasets.Batch(torch.randn(5, 2))], num_draws=0)


def test_the_flow_speaks_levels():
    flow = flow_over((1, 2, 2), 4, None)
    x, log_prob = flow.sample_and_log_prob((500,), generator=rng())
    assert set(x.unique().tolist()) <= {0, 1, 2, 3}
    assert flow().support.check(x).all()
    assert not flow().support.check(x + 0.5).any()
    assert torch.equal(flow.sample((500,), generator=rng()), x)
    # u comes from the flow here and from q in log_prob: above the truth and below it, on average
    below = torch.stack([flow.log_prob(x, generator=rng(seed)) for seed in range(3)]).mean(0)
    assert log_prob.mean() > below.mean()
    one, two = flow.log_prob(x, generator=rng(1)), flow.log_prob(x, generator=rng(2))
    assert not torch.equal(one, two)
    assert torch.equal(one, flow.log_prob(x, generator=rng(1)))


def test_learned_noise_tightens_the_bound_and_flow_matching_leaves_it_alone():
    shape = (1, 2, 2)
    noise = VariationalNoise(shape, 4, hidden=16)
    flow = flow_over(shape, 4, noise)
    x = levels(256, shape)
    batch = flows.datasets.Batch(x)
    flows.objectives.FlowMatching()(flow, batch, rng()).loss.backward()
    assert all(parameter.grad is None for parameter in noise.parameters())
    before = flow.log_prob(x, generator=rng(9)).mean().item()
    optimizer = torch.optim.Adam(noise.parameters(), lr=1e-2)
    for step in range(20):
        optimizer.zero_grad()
        flows.objectives.MaximumLikelihood()(flow, batch, rng(step)).loss.backward()
        optimizer.step()
    assert flow.log_prob(x, generator=rng(9)).mean().item() > before + 0.02


@pytest.mark.parametrize("name", NOISES)
def test_mixed_precision_leaves_the_density_of_the_noise_consistent(name):
    transform = chain(noise=noises(SHAPE, 4)[name]).float().fit(levels(50).float())
    with torch.autocast("cpu", torch.bfloat16):
        y, log_det = transform(levels(40).float(), rng())
        back, inverse = transform.inverse(y)
    assert y.dtype == log_det.dtype == torch.float32
    assert torch.equal(back, levels(40).float())
    torch.testing.assert_close(inverse, -log_det, atol=0.2, rtol=0.01)


def test_mixed_precision_leaves_data_their_digits():
    data = torch.rand(100, *SHAPE).float()
    transform = Whiten(SHAPE).fit(data.double()).float()
    expected, _ = transform(data)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = transform(data)
        back, _ = transform.inverse(y)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    torch.testing.assert_close(back, data)


def test_flow_matching_draws_fresh_noise():
    """With one image, a zero field and the noise of the base fixed, only dequantisation can change the loss."""

    class Frozen(flows.bases.Normal):
        def sample(self, shape, generator=None):
            return torch.zeros(*shape, *self.event_shape)

    transform = Compose(dequantise=Dequantise(4), unit=UnitInterval(4))
    flow = flows.CNF(Nothing(), transform=transform)
    flow.base = Frozen((3,))
    batch = flows.datasets.Batch(torch.ones(1, 3))
    losses = [flows.objectives.FlowMatching()(flow, batch, rng(seed)).loss for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


# Bad input


def test_values_that_are_no_levels():
    flow = flow_over((1, 2, 2), 4, None)
    for value, text in ((4.0, "4"), (-1.0, "-1"), (0.5, "0.5")):
        x = levels(3, (1, 2, 2))
        x[1, 0, 1, 0] = value
        with pytest.raises(
            ValueError, match=rf"whole numbers from 0 to 3, got {text} at index \(1, 0, 1, 0\) \(1 such values\); pass"
        ):
            flow.log_prob(x)
    with pytest.raises(ValueError, match=r"the logit takes values from 0 to 1, got 1.5 \(1 values outside\); scale"):
        Logit().check(torch.tensor([[0.5, 1.5]]))


def test_bad_settings():
    with pytest.raises(ValueError, match=r"alpha must be a finite number > 0 and < 0\.5, got 0"):
        Logit(0)
    with pytest.raises(ValueError, match="sd must be a finite number > 0, got 0; for uniform noise use UniformNoise"):
        TruncatedNormalNoise(0)
    with pytest.raises(ValueError, match="num_levels must be a whole number >= 2 and <= 16777216, got 1"):
        Dequantise(1)
    with pytest.raises(ValueError, match=r"variational noise needs images .* got \(7,\); for other data use Uniform"):
        VariationalNoise((7,), 4)
    with pytest.raises(ValueError, match="num_layers must be a whole number >= 1 and <= 1000, got 0"):
        VariationalNoise(SHAPE, 4, num_layers=0)
    with pytest.raises(ValueError, match="per must be 'entry' or 'channel', got 'pixel'"):
        Standardise(SHAPE, per="pixel")
    with pytest.raises(ValueError, match="Compose needs at least one transform"):
        Compose(logit=None)
    with pytest.raises(ValueError, match=r"'noise' dequantises and must come first, got \['logit', 'noise'\]"):
        Compose(logit=Logit(), noise=Dequantise(4))


# Marginals and covariance


def test_marginals_alone_are_the_independent_shares_of_the_levels():
    x = torch.randint(4, (300, *SHAPE), generator=rng(0)).double() * (torch.rand(300, *SHAPE, generator=rng(1)) < 0.5)
    transform = Compose(dequantise=Dequantise(4), marginals=NormalMarginals(SHAPE, 4, 0.5, 1e-9)).double().fit(x)
    flow = flows.CNF(nn.Identity(), transform=transform, event_shape=SHAPE).double()
    unseen = levels(20).double()
    y, log_det = transform(unseen, rng(5))
    counts = torch.stack([(x.flatten(1) == level).sum(0) for level in range(4)])  # (L, d)
    shares = ((counts + 0.5) / (300 + 4 * 0.5)).log().gather(0, unseen.flatten(1).long())
    torch.testing.assert_close(flow.base.log_prob(y) + log_det, shares.sum(1), rtol=0, atol=1e-6)
    z = torch.randn(20_000, *SHAPE, generator=rng(6), dtype=torch.float64)
    drawn = transform.inverse(z)[0].flatten(1)
    frequencies = torch.stack([(drawn == level).double().mean(0) for level in range(4)])
    torch.testing.assert_close(frequencies, (counts + 0.5) / (300 + 4 * 0.5), rtol=0, atol=0.02)


@pytest.mark.parametrize("whiten", [False, True], ids=["marginals", "whitened"])
def test_marginals_and_whitening_have_the_dense_jacobian(whiten):
    mixing = torch.randn(12, 12, generator=rng(0)).double()
    data = 2 + torch.einsum("ij,nj->ni", mixing, torch.randn(500, 12, generator=rng(1)).double()).view(-1, *SHAPE)
    x = data[:5]
    transform = Whiten(SHAPE, shrinkage=0.3)
    if not whiten:
        data = levels(500).double() + torch.rand(500, *SHAPE, generator=rng(1)).double()
        x, transform = data[:5], NormalMarginals(SHAPE, 4)
    transform = transform.double().fit(data)
    assert_dense_jacobian_and_inverse(transform, x)


@pytest.mark.parametrize("axes", ["pixels", "principal"])
def test_whitened_data_have_unit_covariance_and_the_likelihood_of_their_gaussian(axes):
    mixing = torch.randn(12, 12, generator=rng(0)).double()
    data = 3 + torch.einsum("ij,nj->ni", mixing, torch.randn(500, 12, generator=rng(1)).double()).view(-1, *SHAPE)
    transform = Whiten(SHAPE, axes=axes).double().fit(data)
    y, log_det = transform(data)
    torch.testing.assert_close(y.flatten(1).T.cov(), torch.eye(12).double())
    torch.testing.assert_close(transform.inverse(y)[0], data)
    if axes == "pixels":
        torch.testing.assert_close(transform.inverse_root, transform.inverse_root.T)
    normal = torch.distributions.MultivariateNormal(data.flatten(1).mean(0), data.flatten(1).T.cov())
    base = flows.CNF(nn.Identity(), event_shape=SHAPE).double().base
    torch.testing.assert_close(base.log_prob(y) + log_det, normal.log_prob(data.flatten(1)))


@pytest.mark.parametrize("axes", ["pixels", "principal"])
def test_an_inner_transform_acts_on_principal_components_and_turns_back(axes):
    data = heavy_tailed(500)[0]
    whiten = Whiten(SHAPE, robust=True, axes=axes, inner=NormalRadius(SHAPE, 2, num_quantiles=16)).fit(data)
    chain = Compose(whiten=Whiten(SHAPE, robust=True, axes="principal"), radius=NormalRadius(SHAPE, 2, 16)).fit(data)
    assert_dense_jacobian_and_inverse(whiten, data[:8])
    (y, log_det), (expected, expected_log_det) = whiten(data), chain(data)
    torch.testing.assert_close(log_det, expected_log_det)
    if axes == "principal":
        torch.testing.assert_close(y, expected)
    else:  # turned as plain whitening turns
        plain = [Whiten(SHAPE, robust=True, axes=a).fit(data).inverse_root for a in ("principal", "pixels")]
        turn = torch.linalg.solve(*plain)
        torch.testing.assert_close(y.flatten(1), expected.flatten(1) @ turn, rtol=1e-4, atol=1e-4)
    assert not whiten.is_affine


def test_too_few_points_to_whiten_by_are_shrunk_or_refused():
    few = torch.randn(8, *SHAPE)
    with pytest.raises(ValueError, match=r"do not vary in 5 of 12 directions, .* or set shrinkage"):
        Whiten(SHAPE).fit(few)
    assert Whiten(SHAPE, shrinkage=0.5).fit(few)(few)[0].isfinite().all()
    with pytest.raises(ValueError, match="shrinkage must be a finite number >= 0 and < 1, got 1"):
        Whiten(SHAPE, shrinkage=1)


def test_marginals_are_of_levels_that_were_not_scaled():
    with pytest.raises(ValueError, match=r"levels from 0 to 4, got 4.5 \(1 values outside\)"):
        NormalMarginals((1,), 4).check(torch.tensor([[4.5]]))
    with pytest.raises(ValueError, match="pseudo_count must be a finite number > 0, got 0"):
        NormalMarginals((1,), 4, pseudo_count=0)
    with pytest.raises(ValueError, match=r"alpha must be a finite number > 0 and < 0\.5"):
        NormalMarginals((1,), 4, alpha=0.5)
    with pytest.raises(ValueError, match=r"shape \(1,\) to count levels in, got \(3, 2\)"):
        NormalMarginals((1,), 4).fit(torch.zeros(3, 2))


def heavy_tailed(n, seed=1, freedom=2.0):
    """Points (n, *SHAPE) of an elliptical density whose covariance does not exist, and the shape of it."""
    mixing = torch.randn(12, 12, generator=rng(0))
    normal = torch.randn(n, 12, generator=rng(seed))
    chi2 = torch.distributions.Chi2(torch.tensor(freedom))
    torch.manual_seed(seed)
    scale = (freedom / chi2.sample((n, 1))).sqrt()
    return ((scale * normal) @ mixing.T).view(-1, *SHAPE), mixing @ mixing.T


@pytest.mark.parametrize("groups", [1, 2])
def test_the_radius_has_the_dense_jacobian_and_an_inverse(groups):
    data, _ = heavy_tailed(500)
    transform = NormalRadius(SHAPE, groups, num_quantiles=16).fit(data)
    x = data[:8]
    assert_dense_jacobian_and_inverse(transform, x)
    assert transform(torch.cat([1e6 * x, 1e-6 * x]))[1].isfinite().all()  # far from all data


def test_radii_become_those_of_normal_points():
    data, _ = heavy_tailed(4000)
    y, _ = NormalRadius(SHAPE, num_quantiles=200, bandwidth=0.02).fit(data)(data)
    assert kstest(y.flatten(1).square().sum(1).numpy(), "chi2", (12,)).statistic < 0.02
    cosine = nn.functional.cosine_similarity(y.flatten(1), data.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(4000))
    with pytest.raises(ValueError, match="must cut 12 entries into equal groups of at least 5, got 3"):
        NormalRadius(SHAPE, 3)
    with pytest.raises(ValueError, match="in the origin, which has no direction"):
        NormalRadius(SHAPE).check(torch.zeros(1, *SHAPE))


def test_robust_whitening_finds_the_shape_where_there_is_no_covariance():
    data, shape = heavy_tailed(4000)
    errors = {}
    for robust in (False, True):
        root = Whiten(SHAPE, robust=robust).fit(data).inverse_root
        left = root @ shape @ root.T
        errors[robust] = (12 * left / left.trace() - torch.eye(12)).norm()
    directions = nn.functional.normalize(Whiten(SHAPE, robust=True).fit(data)(data)[0].flatten(1))
    torch.testing.assert_close(12 * directions.T @ directions / 4000, torch.eye(12), rtol=0, atol=1e-3)  # Tyler's law
    assert errors[True] < 0.35  # sd of an entry of a covariance of 4,000 normal points: 12/√4000 in all
    assert errors[False] > 2 * errors[True]


@pytest.mark.parametrize("groups", [1, 2])
def test_the_inverse_of_the_radius_has_the_dense_jacobian_and_gradients(groups):
    transform = NormalRadius(SHAPE, groups, num_quantiles=16).fit(heavy_tailed(500)[0]).double()
    y = torch.randn(6, *SHAPE, generator=rng(3)).double() * torch.tensor([0.05, 0.3, 1, 1, 1.5, 3]).view(-1, 1, 1, 1)
    _, log_det = transform.inverse(y)
    dense = torch.stack([torch.func.jacrev(lambda one: transform.inverse(one[None])[0][0])(one) for one in y])
    torch.testing.assert_close(log_det, dense.reshape(6, 12, 12).slogdet().logabsdet)
    assert torch.autograd.gradcheck(lambda y: transform.inverse(y)[1], y.requires_grad_())


def test_points_far_out_keep_their_digits():
    data, _ = heavy_tailed(500)
    transform = NormalRadius(SHAPE, num_quantiles=16).fit(data)
    steps = torch.logspace(-6, 6, 49)  # z from −13 to 24
    x = nn.functional.normalize(data[:49].flatten(1)).view(-1, *SHAPE) * steps.view(-1, *[1] * len(SHAPE))
    y, log_det = transform(x)
    back, inverse_log_det = transform.inverse(y)
    torch.testing.assert_close(back, x, rtol=1e-4, atol=0)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=1e-4, atol=1e-2)
    exact, exact_log_det = copy.deepcopy(transform).double()(x.double())
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(log_det.double(), exact_log_det, rtol=1e-5, atol=1e-3)
    assert (y.flatten(1).norm(dim=1).diff() > 0).all()
    double, far = copy.deepcopy(transform).double(), x[::8].double()
    dense = torch.stack([torch.func.jacrev(lambda one: double(one[None])[0][0])(one) for one in far])
    torch.testing.assert_close(exact_log_det[::8], dense.reshape(-1, 12, 12).slogdet().logabsdet)


@pytest.mark.parametrize("robust", [False, True])
def test_entries_that_do_not_vary_are_refused_to_whiten_by(robust):
    points = torch.randn(50, *SHAPE, generator=rng(0))
    dependent, constant = points.clone(), points.clone()
    dependent.flatten(1)[:, 3] = dependent.flatten(1)[:, 1]
    constant.flatten(1)[:, 3] = 2.0
    for bad in (dependent, constant):
        with pytest.raises(ValueError, match="50 points do not vary in 1 of 12 directions"):
            Whiten(SHAPE, robust=robust).fit(bad)


def test_robust_whitening_allows_points_in_the_mean():
    half = torch.randn(50, *SHAPE, generator=rng(0), dtype=torch.float64)
    points = torch.cat([half, -half, torch.zeros(1, *SHAPE, dtype=torch.float64)])
    with_centre, without = (Whiten(SHAPE, robust=True).double().fit(some) for some in (points, points[:-1]))
    assert with_centre.mean.norm() < 1e-9
    scale = with_centre.root.trace() / without.root.trace()
    torch.testing.assert_close(with_centre.root / scale, without.root, rtol=1e-6, atol=1e-6)
