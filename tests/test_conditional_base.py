"""A base that depends on the context: its density, its fit, and the flow in its units."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

import flows
from flows import CNF, Posterior
from flows.bases import ConditionalMixture, ConditionalNormal, MixtureFrame
from flows.bases.quantiles import LogNormalQuantile
from flows.datasets import Batch, Table
from flows.encoders import Standardised
from flows.errors import FlowsError, InvalidTypeError, InvalidValueError
from flows.fields import MLP
from flows.objectives import FlowMatching, MaximumLikelihood
from flows.solvers import ODESolver
from flows.training import build_flow
from flows.training.runs import build_trainer
from flows.transforms import Standardise

SLOPES = torch.tensor([[1.0, -0.5], [2.0, 1.0]], dtype=torch.float64)
FACTOR = torch.tensor([[1.0, 0.0], [0.8, 0.6]], dtype=torch.float64)
PARTS = {
    "transform": {"_target_": "flows.transforms.Standardise"},
    "divergence": {"_target_": "flows.divergence.Auto"},
    "solver": {"_target_": "flows.solvers.ODESolver"},
}
LIKELIHOOD = {
    "_target_": "flows.training.Stage",
    "objective": {"_target_": "flows.objectives.MaximumLikelihood"},
    "steps": 2,
    "batch_size": 8,
}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def known(context):
    """N(c S, (0.05 + 0.3 c₀)² F Fᵀ)."""
    return MultivariateNormal(context @ SLOPES, scale_tril=(0.05 + 0.3 * context[:, :1, None]) * FACTOR)


@pytest.fixture(scope="module")
def pairs():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        context = torch.rand(1000, 2, dtype=torch.float64)
        return known(context).sample(), 5 + 100 * context  # in units that need scaling


BASES = {
    "full": lambda: ConditionalNormal(2, 2, hidden=(16,), steps=300),
    "diagonal": lambda: ConditionalNormal(2, 2, hidden=(16,), covariance_type="diagonal", steps=300),
    "mixture": lambda: ConditionalMixture(2, 2, num_components=3, hidden=(16,), steps=300),
}


@pytest.fixture(scope="module", params=list(BASES))
def flow(request, pairs):
    """A flow that is fitted but not trained; its field is no longer at rest."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = BASES[request.param]()
        solver = ODESolver(rtol=1e-8, atol=1e-8)
        parts = {"base": base, "solver": solver, "transform": Standardise(2), "encoder": Standardised(2).fit(pairs[1])}
        flow = CNF(MLP(2, hidden=(8,), context_shape=2), **parts).double()
        return flow.fit_ends(*pairs)


def test_frames_are_inverted_and_their_volume_is_that_of_autograd(flow, pairs):
    points, context = (part[:5] for part in pairs)
    frame = flow.base.frame(context)
    u, log_det = frame.relative(points)
    back, inverse = frame.absolute(u)
    torch.testing.assert_close(back, points)
    torch.testing.assert_close(inverse, -log_det)
    for i in range(5):
        own = flow.base.frame(context[i : i + 1])
        jacobian = torch.autograd.functional.jacobian(lambda y, own=own: own.relative(y[None])[0][0], points[i])
        torch.testing.assert_close(jacobian.det().abs().log(), log_det[i])


def test_at_rest_the_flow_has_the_density_of_the_fitted_normal(flow, pairs):
    if isinstance(flow.base, ConditionalMixture):
        pytest.skip("has no normal distribution")
    points, context = (part[:50] for part in pairs)
    still = CNF(MLP(2, hidden=(8,), context_shape=2, at_rest=True).double(), base=flow.base, transform=flow.transform)
    y, log_det = flow.transform(points)
    frame = flow.base.frame(context)
    relative = lambda y, c: flow.base.frame(c[None]).relative(y[None])[0][0]  # noqa: E731
    whitening = torch.func.vmap(torch.func.jacrev(relative))(y, context)
    expected = MultivariateNormal(frame.mean, precision_matrix=whitening.mT @ whitening).log_prob(y) + log_det
    torch.testing.assert_close(still.log_prob(points, context), expected)


def test_the_fit_finds_mean_and_covariance(flow, pairs):
    if not flow.base._below[0]:
        pytest.skip("correlated noise has no diagonal covariance")
    points, context = pairs
    still = CNF(MLP(2, hidden=(8,), context_shape=2, at_rest=True).double(), base=flow.base, transform=flow.transform)
    excess = (known((context - 5) / 100).log_prob(points) - still.log_prob(points, context)).mean()
    assert -0.05 < excess < 0.1
    plain = CNF(MLP(2, hidden=(8,), context_shape=2, at_rest=True).double(), transform=flow.transform)
    assert plain.log_prob(points, context).mean() < still.log_prob(points, context).mean() - 1


def test_new_points_widen_the_scales_and_leave_the_means(pairs):
    context = torch.rand(400, 1, generator=rng(), dtype=torch.float64)
    points = 3 * torch.sin(6 * context) + 0.05 * torch.randn(400, 1, generator=rng(1), dtype=torch.float64)
    base = ConditionalNormal(1, 1, hidden=(64, 64), steps=400).double()
    base.fit(points, contexts=context)
    with torch.no_grad():
        before = base.frame(context)
        base._widen(points, base._features(context).flip(0))  # points that the network does not predict
        after = base.frame(context)
    torch.testing.assert_close(after.mean, before.mean)
    torch.testing.assert_close(after.log_scale - before.log_scale, torch.full_like(after.mean, math.log(3)))


def mixture_of_two():
    """Two components in the plane with context-free parameters, as frames of five points and as a distribution."""
    centre = torch.tensor([[-2.0, 1.0], [1.5, 0.0]], dtype=torch.float64)
    log_width, log_weight = torch.tensor([[0.1, -1.0], [-0.5, 0.3]], dtype=torch.float64), torch.tensor([0.4, -0.3])
    zeros = torch.zeros(5, 2, dtype=torch.float64)
    parts = [part.double().expand(5, *part.shape) for part in (log_weight, centre, log_width)]
    components = torch.distributions.Independent(torch.distributions.Normal(centre, log_width.exp()), 1)
    weights = torch.distributions.Categorical(logits=log_weight.double())
    return MixtureFrame(zeros, zeros, None, *parts), torch.distributions.MixtureSameFamily(weights, components)


def test_the_frame_of_a_mixture_makes_it_a_standard_normal():
    frame, mixture = mixture_of_two()
    points = torch.tensor([[0, 0], [-2, 1], [3, -2], [40, 1], [-60, 50.0]], dtype=torch.float64)  # far into the tails
    u, log_det = frame.relative(points)
    normal = torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(normal.log_prob(u).sum(1) + log_det, mixture.log_prob(points))
    torch.testing.assert_close(frame.log_density(points), mixture.log_prob(points))
    torch.testing.assert_close(frame.absolute(u)[0], points)
    first = torch.distributions.Normal(torch.tensor([-2.0, 1.5]).double(), torch.tensor([0.1, -0.5]).double().exp())
    share = torch.tensor([0.4, -0.3]).double().softmax(0)
    torch.testing.assert_close(normal.cdf(u[:3, 0]), (share * first.cdf(points[:3, :1])).sum(1))


def test_gradients_pass_through_the_frame_of_a_mixture():
    frame, _ = mixture_of_two()
    y = torch.randn(5, 2, generator=rng(), dtype=torch.float64).requires_grad_()
    parts = [part.clone().requires_grad_() for part in (frame.log_weight, frame.centre, frame.log_width)]
    built = lambda *parts: MixtureFrame(frame.mean, frame.log_scale, None, *parts)  # noqa: E731
    assert torch.autograd.gradcheck(lambda y, *parts: built(*parts).relative(y), (y, *parts))
    assert torch.autograd.gradcheck(lambda u, *parts: built(*parts).absolute(u), (y, *parts))


def test_quantiles_reach_far_into_the_tail():
    u = -torch.tensor([0.0, 1.0, 5.0, 30.0, 50.0, 1e4], dtype=torch.float64)
    torch.testing.assert_close(LogNormalQuantile.apply(torch.special.log_ndtr(u)), u, rtol=1e-12, atol=1e-12)
    log_p = torch.special.log_ndtr(u[1:4]).requires_grad_()
    assert torch.autograd.gradcheck(LogNormalQuantile.apply, (log_p,))
    assert torch.autograd.gradgradcheck(LogNormalQuantile.apply, (log_p,))


def test_a_mixture_finds_two_branches():
    context = torch.rand(1000, 1, generator=rng(), dtype=torch.float64)
    sign = torch.randn(1000, 1, generator=rng(1), dtype=torch.float64).sign()
    points = (1 + context) * sign + 0.1 * torch.randn(1000, 1, generator=rng(2), dtype=torch.float64)
    densities = {}
    for base in (ConditionalNormal(1, 1, hidden=(16,), steps=300), ConditionalMixture(1, 1, 3, (16,), steps=300)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            flow = CNF(MLP(1, (8,), context_shape=1, at_rest=True), base=base).double().fit_ends(points, context)
        densities[type(base)] = float(flow.log_prob(points, context).mean().detach())
    best = -0.5 * math.log(2 * math.pi * math.e * 0.01) - math.log(2)
    assert best - 0.1 < densities[ConditionalMixture] < best + 0.05
    assert densities[ConditionalNormal] < best - 1


def test_draws_have_the_density_that_they_report(flow, pairs):
    context = pairs[1][:3]
    x, log_prob = flow.sample_and_log_prob((4,), context, rng())
    assert x.shape == (4, 3, 2)
    torch.testing.assert_close(log_prob, flow.log_prob(x, context), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(x, flow.sample((4,), context, rng()), rtol=1e-4, atol=1e-4)
    one = flow(context[0])
    assert one.sample((6,)).shape == (6, 2)
    torch.testing.assert_close(one.log_prob(x[:, 0]), flow.log_prob(x[:, 0], context[:1].expand(4, 2)))


def test_the_density_integrates_to_one(pairs):
    points, context = pairs[0][:, :1], pairs[1]
    base = ConditionalNormal(1, 2, hidden=(8,), steps=50)
    encoder = Standardised(2).fit(context)
    field = MLP(1, hidden=(8,), sine_frequency=None, context_shape=2)
    flow = CNF(field, base=base, encoder=encoder).double().fit_ends(points, context)
    grid = torch.linspace(-3, 6, 20001, dtype=torch.float64)
    with torch.no_grad():
        density = flow.log_prob(grid[:, None], context[7]).exp()
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=1e-4)


def test_flow_space_and_data_space_are_inverses(flow, pairs):
    points, context = (part[:9] for part in pairs)
    y = flow.to_flow_space(points, context)
    torch.testing.assert_close(flow.to_data_space(y, context), points)
    latent = flow.transport(y, context=context)
    expected = flow.base.log_prob(latent.x) - latent.log_density_change
    volume = flow.transform(points)[1] + flow.base.frame(context).relative(flow.transform(points)[0])[1]
    torch.testing.assert_close(flow.log_prob(points, context), expected + volume)


def test_flow_matching_recovers_what_the_normal_misses():
    context = torch.rand(4000, 1, generator=rng(), dtype=torch.float64)
    noise = torch.rand(4000, 1, generator=rng(1), dtype=torch.float64)
    data = Table(10 * context + 0.01 * noise, context=context, quiet=True)  # uniform, of a thousandth of the width
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = ConditionalNormal(1, 1, hidden=(8,), steps=100)
        flow = CNF(MLP(1, (16,), activation="silu", context_shape=1, at_rest=True), base=base, transform=Standardise(1))
        flow.fit_ends(data.reference(), data.reference_contexts())
        held_out = data.held_out("test")
        before = -float(flow.log_prob(held_out.x, held_out.context).mean().detach())
        assert before == pytest.approx(math.log(0.01) + 0.5 * math.log(2 * math.pi * math.e / 12), abs=0.1)
        optimizer = torch.optim.Adam(flow.field.parameters(), 1e-2)
        stream, generator = data.train_stream(128, rng()), rng()
        for _ in range(100):
            optimizer.zero_grad()
            FlowMatching()(flow, next(stream), generator).loss.backward()
            optimizer.step()
    after = -float(flow.log_prob(held_out.x, held_out.context).mean().detach())
    assert after < before - 0.05


@pytest.mark.parametrize("trainable", [False, True])
def test_the_likelihood_trains_it_only_if_asked(pairs, trainable):
    base = ConditionalNormal(2, 2, hidden=(4,), steps=2, trainable=trainable)
    flow = CNF(MLP(2, hidden=(4,), context_shape=2), base=base).double().fit_ends(*pairs)
    MaximumLikelihood()(flow, Batch(pairs[0][:8], pairs[1][:8])).loss.backward()
    gradients = [parameter.grad is not None and bool(parameter.grad.any()) for parameter in base.parameters()]
    assert base.is_trained == trainable
    assert any(gradients) if trainable else not any(gradients)


def test_a_posterior_has_its_map(pairs):
    base = ConditionalNormal(2, 2, hidden=(16,), steps=300)
    flow = CNF(MLP(2, hidden=(4,), context_shape=2, at_rest=True), base=base, transform=Standardise(2))
    flow.double().fit_ends(*pairs)
    context = pairs[1][3]
    found = Posterior(flow).given(context).map(num_init=20, num_to_optimize=1, steps=40, learning_rate=0.1)
    mean = flow.transform.inverse(flow.base.frame(context[None]).mean)[0][0]
    torch.testing.assert_close(found, mean, rtol=0, atol=0.02)


def test_a_run_keeps_it(tmp_path):
    context = torch.rand(60, 2, generator=rng(), dtype=torch.float64)
    data = Table(known(context).sample(), context=context, quiet=True)
    config = {
        "field": {"_target_": "flows.fields.MLP", "hidden": [4], "at_rest": True},
        "base": {"_target_": "flows.bases.ConditionalNormal", "steps": 5, "hidden": [4]},
    }
    config = {**PARTS, **config, "output_dir": str(tmp_path / "run"), "objective": {"likelihood": LIKELIHOOD}}
    config["reporting"] = {"plot_every": None, "progress_bar": False}
    trained = build_trainer(config, dataset=data)
    trained.fit()
    batch = data.held_out("test")
    loaded = flows.load(tmp_path / "run")
    torch.testing.assert_close(
        loaded.log_prob(batch.x, batch.context), trained.model.log_prob(batch.x, batch.context), check_device=False
    )


def test_columns_of_a_table_are_its_contexts():
    generator = np.random.default_rng(0)
    kind = generator.choice(["a", "b"], 200)
    y = np.where(kind == "a", 0.0, 5.0) + 0.1 * generator.normal(size=200)
    data = Table(y[:, None], context={"kind": kind, "u": generator.normal(size=200)}, quiet=True)
    config = {
        **PARTS,
        "field": {"_target_": "flows.fields.MLP", "hidden": [4], "at_rest": True},
        "base": {"_target_": "flows.bases.ConditionalNormal", "steps": 400, "hidden": [8]},
    }
    flow = build_flow(config, (1,), data)
    with torch.no_grad():
        drawn = flow.sample(200, context=flow.encoder.contexts({"kind": "b", "u": 0.3}))
    assert abs(float(drawn.mean()) - 5) < 0.3
    assert float(drawn.std()) < 0.5


def test_a_loaded_run_knows_its_categories(tmp_path):
    generator = np.random.default_rng(0)
    context = {"kind": generator.choice(["a", "b", "c"], 60), "u": generator.normal(size=60)}
    data = Table(generator.normal(size=(60, 1)), context=context, quiet=True)
    config = {
        "field": {"_target_": "flows.fields.MLP", "hidden": [4], "at_rest": True},
        "base": {"_target_": "flows.bases.ConditionalMixture", "steps": 5, "hidden": [4]},
    }
    config = {**PARTS, **config, "output_dir": str(tmp_path), "objective": {"likelihood": LIKELIHOOD}}
    config["reporting"] = {"plot_every": None, "progress_bar": False}
    trained = build_trainer(config, dataset=data)
    trained.fit()
    loaded, context = flows.load(tmp_path), {"kind": "c", "u": 0.2}
    x = loaded.sample(5, context, rng())
    torch.testing.assert_close(x, trained.model.sample(5, context, rng()), check_device=False)


def test_misuse_is_explained(pairs):
    points, context = pairs

    def unfitted():
        return CNF(MLP(2, hidden=(4,), context_shape=2), base=ConditionalNormal(2, 2, hidden=(4,), steps=2)).double()

    with pytest.raises(
        InvalidValueError, match=r"not been fitted to data; call flow.fit_ends\(data.reference\(\), data"
    ):
        unfitted().log_prob(points, context)
    with pytest.raises(InvalidValueError, match="not been fitted"):
        unfitted().sample(3, context[0])
    with pytest.raises(
        InvalidValueError, match=r"fitted to points and the context of each, got none; call flow.fit_ends"
    ):
        unfitted().fit_ends(points)
    with pytest.raises(InvalidValueError, match="the context of each, got 3 for 1000 points"):
        unfitted().fit_ends(points, context[:3])
    with pytest.raises(InvalidValueError, match=r"1 of 1000 points hold NaN or infinite values, the first at index 7"):
        unfitted().fit_ends(points.index_fill(0, torch.tensor(7), math.nan), context)
    flow = unfitted().fit_ends(points, context)
    for call in (lambda: flow.log_prob(points), lambda: flow.sample(3), lambda: flow.to_flow_space(points)):
        with pytest.raises(InvalidValueError, match=r"ConditionalNormal depends on the context: pass context="):
            call()
    with pytest.raises(FlowsError, match=r"a context must have the shape \(2,\)"):
        flow.log_prob(points, context[:, :1])
    with pytest.raises(
        InvalidValueError, match=r"depends on contexts of shape \(3,\), and the flow takes contexts of shape"
    ):
        CNF(MLP(2, context_shape=2), base=ConditionalNormal(2, 3))
    with pytest.raises(InvalidValueError, match=r"depends on contexts of shape \(3,\), and the flow takes none"):
        CNF(MLP(2), base=ConditionalNormal(2, 3))
    with pytest.raises(
        InvalidTypeError, match=r"context_dropout=0.1 trains the flow without contexts.*ConditionalNormal"
    ):
        FlowMatching(context_dropout=0.1)(flow, Batch(points[:8], context[:8]))
    config = {
        **PARTS,
        "field": {"_target_": "flows.fields.MLP"},
        "base": {"_target_": "flows.bases.ConditionalNormal"},
    }
    with pytest.raises(
        FlowsError, match=r"base: it depends on contexts, and the data 'moons' have none; choose another"
    ):
        build_flow(config, (2,), flows.datasets.Moons(num_validation=10, num_test=10))
