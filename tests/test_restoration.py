"""Inverse problems: draws follow the posterior in closed form, operators observe what they say."""

import pytest
import torch

import flows
from flows.bases import Empirical, Normal
from flows.errors import FlowsError
from flows.restoration import Denoising, Downsampling, Inpainting, Operator, guidance, restore
from flows.restoration.target import Target
from flows.transforms import Compose, Dequantise, NormalMarginals, Standardise, Transform, UnitInterval, Whiten

COVARIANCE = torch.tensor([[2.0, 1.2], [1.2, 1.0]], dtype=torch.float64)
MEAN = torch.tensor([1.0, -1.0], dtype=torch.float64)
FAST = flows.ODESolver("rk4", step_size=0.5)


def gaussian_flow():
    """p(x) = N(m, C): a rotation of the base, whose covariance is turned back by the time it ends."""
    angle = 0.7
    turn = torch.tensor([[0.0, -angle], [angle, 0.0]])
    back = torch.linalg.matrix_exp(-turn)
    base = Normal((2,), mean=back @ MEAN, covariance=back @ COVARIANCE @ back.T)
    solver = flows.ODESolver("rk4", step_size=0.1)
    return flows.CNF(flows.fields.Linear((2,), matrix=turn), base=base, solver=solver).double()


@pytest.mark.parametrize(
    ("operator", "start"),
    [(Denoising(), "guided"), (Inpainting(torch.tensor([True, False])), "guided"), (Denoising(), "base")],
)
def test_draws_follow_the_posterior_of_a_gaussian_from_any_start(operator, start):
    flow, sd, n = gaussian_flow(), 0.4, 1500
    seen = torch.eye(2)[:1] if isinstance(operator, Inpainting) else torch.eye(2)
    y = torch.tensor([[2.0, 0.5]])[:, : len(seen)]
    gain = COVARIANCE @ seen.T @ torch.linalg.inv(seen @ COVARIANCE @ seen.T + sd**2 * torch.eye(len(seen)))
    mean, covariance = MEAN + gain @ (y[0] - seen @ MEAN), COVARIANCE - gain @ seen @ COVARIANCE
    seed = torch.Generator().manual_seed(0)
    found = restore(flow, y, operator, sd, n, 80, 4, solver=FAST, generator=seed, start=start)
    x = found.x[:, 0]
    error = (covariance.diagonal() / n).sqrt()
    assert ((x.mean(0) - mean).abs() < 4 * error).all()
    torch.testing.assert_close(x.T.cov(), covariance, rtol=0.15, atol=0.03)
    assert 0.4 < found.acceptance.mean() < 0.95
    assert found.unresolved.double().mean() < 0.01


def test_whole_numbers_are_compared_without_rounding():
    """Levels of independent normal pixels; the known ones come back, the others keep their spread."""
    levels = torch.randint(4, 12, (500, 1, 2, 2)).double()
    transform = Compose(dequantise=Dequantise(16), unit=UnitInterval(16), scale=Standardise((1, 2, 2)))
    flow = flows.CNF(flows.fields.MLP((1, 2, 2), hidden=(4,), at_rest=True), transform=transform, solver=FAST).double()
    flow.fit_ends(levels)
    known = torch.tensor([[[True, False], [False, True]]])
    observed = levels[:3][:, known]
    found = restore(flow, observed, Inpainting(known), 0.0, 50, 60, 4, generator=torch.Generator().manual_seed(0))
    assert found.x.shape == (50, 3, 1, 2, 2)
    assert torch.equal(found.x, found.x.floor())
    assert (found.x[:, :, known] - observed).abs().mean() < 0.6
    assert 1.5 < found.x[:, :, ~known].std() < 3.5


class NormalPath(torch.nn.Module):
    """E[x₁ − x₀ | x_t] of independent N(0, I): what flow matching learns of normal data."""

    def forward(self, t, x):
        return (2 * t - 1) / (t**2 + (1 - t) ** 2) * x


def test_guided_draws_alone_explain_the_observation_and_keep_the_spread():
    levels = (8 + 2 * torch.randn(2000, 1, 2, 2)).floor().clamp(0, 15).double()
    transform = Compose(dequantise=Dequantise(16), unit=UnitInterval(16), scale=Standardise((1, 2, 2)))
    flow = flows.CNF(NormalPath(), transform=transform, event_shape=(1, 2, 2), solver=FAST).double()
    flow.fit_ends(levels)
    known = torch.tensor([[[True, False], [False, True]]])
    observed = levels[:3][:, known]
    found = restore(flow, observed, Inpainting(known), 0.0, 200, 0, generator=torch.Generator().manual_seed(0))
    assert (found.x[:, :, known] - observed).abs().mean() < 0.1
    assert 1.6 < found.x[:, :, ~known].std() < 2.4
    assert found.acceptance.isnan().all()
    assert not found.unresolved.any()
    assert found.nfe > 200


def test_downsampling_is_the_mean_of_blocks():
    x = torch.randn(3, 2, 4, 6)
    small = Downsampling(2)(x)
    assert tuple(small.shape[1:]) == Downsampling(2).observed_shape((2, 4, 6)) == (2, 2, 3)
    torch.testing.assert_close(small[0, 1, 1, 2], x[0, 1, 2:4, 4:6].mean())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"observation": torch.zeros(2, 3)}, r"observations of shape \(2,\), got \(2, 3\)"),
        ({"observation": torch.zeros(0, 2)}, "one or more observations"),
        ({"observation": torch.tensor([[torch.nan, 0.0]])}, "NaN or infinite values in 1 of 1 rows.*Inpainting"),
        ({"noise_sd": 0.0}, "noise_sd must be .*> 0"),
        ({"noise_sd": -1.0}, "noise_sd must be"),
        ({"num_draws": 0}, "num_draws must be"),
        ({"num_proposals": 1}, "num_proposals must be .*or 0 for guided draws"),
        ({"num_proposals": 0, "start": "base"}, "a draw from the prior, which does not know the observation"),
        ({"operator": Downsampling(2)}, "factor=2 needs images"),
        ({"operator": Inpainting(torch.ones(3, dtype=torch.bool))}, r"known has the shape \(3,\)"),
    ],
)
def test_mistakes_are_explained(change, words):
    settings = {"observation": torch.zeros(1, 2), "operator": Denoising(), "noise_sd": 0.5, "num_proposals": 5}
    with pytest.raises(FlowsError, match=words):
        restore(gaussian_flow(), **settings | change)


def test_masks_and_bases_that_cannot_be_are_refused():
    with pytest.raises(FlowsError, match="true and false"):
        Inpainting(torch.ones(2))
    with pytest.raises(FlowsError, match="no entry is observed"):
        Inpainting(torch.zeros(2, dtype=torch.bool))
    flow = flows.CNF(flows.fields.MLP((2,)), base=Empirical(points=torch.randn(50, 2)))
    with pytest.raises(FlowsError, match="density"):
        restore(flow, torch.zeros(1, 2), Denoising(), 0.5)


def test_contexts_are_asked_for_in_their_shape():
    flow = flows.CNF(flows.fields.MLP((2,), hidden=(4,), context_shape=(3,)), solver=FAST).double()
    classes = flows.datasets.one_hot(torch.tensor([0, 2]), 3)
    assert restore(flow, torch.zeros(2, 2), Denoising(), 0.5, num_proposals=5, context=classes).x.shape == (1, 2, 2)
    with pytest.raises(FlowsError, match=r"of shape \(2, 3\), got \(2,\); classes are one-hot"):
        restore(flow, torch.zeros(2, 2), Denoising(), 0.5, num_proposals=5, context=torch.tensor([0, 2]))


def test_classes_are_given_by_name_or_number():
    flow = flows.CNF(flows.fields.MLP((2,), hidden=(4,), context_shape=(2,)), solver=FAST).double()
    flow.names = flows.models.results.DataNames(class_names=("cat", "dog"), num_classes=2)
    classes = flows.datasets.one_hot(torch.tensor([1, 1]), 2).double()
    drawn = []
    for context in (classes, "dog", ["dog", "dog"], 1):
        seed = torch.Generator().manual_seed(0)
        settings = {"num_proposals": 5, "context": context, "generator": seed}
        drawn.append(restore(flow, torch.zeros(2, 2), Denoising(), 0.5, **settings).x)
    assert all(torch.equal(x, drawn[0]) for x in drawn)
    with pytest.raises(FlowsError, match=r"class must be one of cat, dog, .* got 'dogs'; did you mean dog"):
        restore(flow, torch.zeros(2, 2), Denoising(), 0.5, num_proposals=5, context="dogs")
    with pytest.raises(FlowsError, match="context must name a class for each of 2 observations, got 1"):
        restore(flow, torch.zeros(2, 2), Denoising(), 0.5, num_proposals=5, context=["cat"])
    with pytest.raises(FlowsError, match="names classes, and the flow takes contexts of shape None"):
        restore(gaussian_flow(), torch.zeros(2, 2), Denoising(), 0.5, num_proposals=5, context="cat")
    flow.names = flows.models.results.DataNames()
    with pytest.raises(FlowsError, match=r"does not say that its contexts are classes; give a row of 2 numbers"):
        restore(flow, torch.zeros(2, 2), Denoising(), 0.5, num_proposals=5, context=1)


def test_shades_where_levels_are_expected_are_warned_of():
    transform = Compose(dequantise=Dequantise(16), unit=UnitInterval(16))
    flow = flows.CNF(flows.fields.MLP((1, 2, 2), hidden=(4,)), transform=transform, solver=FAST)
    shades = torch.tensor([[[[0.0, 0.5], [1.0, 0.25]]]])
    with pytest.warns(flows.errors.DataWarning, match="levels from 0 to 15.*For shades from 0 to 1, multiply by 15"):
        restore(flow, shades, Denoising(), 0.1, num_proposals=5)
    restore(flow, 15 * shades, Denoising(), 0.1, num_proposals=5)  # warnings are errors here


def test_a_base_in_units_of_the_context_and_a_uniform_base():
    """x | c is narrow around 5 + 3c, so observations hardly move it; a uniform base has a density without a slope."""
    c = torch.rand(400, 1)
    x = 5 + 3 * c + 0.1 * torch.randn(400, 1)
    base = flows.bases.ConditionalNormal((1,), context_shape=(1,))
    flow = flows.CNF(flows.fields.MLP((1,), (4,), context_shape=(1,), at_rest=True), base=base, solver=FAST).double()
    flow.fit_ends(x, c)
    seed, given = torch.Generator().manual_seed(0), torch.tensor([[0.5]])
    settings = {"num_draws": 200, "num_proposals": 60, "generator": seed, "context": given}
    found = restore(flow, torch.tensor([[6.5]]), Denoising(), 0.3, **settings)
    assert abs(float(found.x.mean()) - 6.5) < 0.1
    box = flows.CNF(flows.fields.MLP((2,), (4,)), base=torch.distributions.Uniform(torch.zeros(2), torch.ones(2)))
    assert restore(box.double(), torch.zeros(1, 2), Denoising(), 0.5, num_proposals=5, solver=FAST).x.isfinite().all()


def test_data_space_without_rounding_keeps_the_noise_and_the_slope():
    transform = Compose(dequantise=Dequantise(16), unit=UnitInterval(16), scale=Standardise((2,)))
    flow = flows.CNF(flows.fields.MLP((2,), hidden=(4,)), transform=transform).double()
    levels = torch.randint(0, 16, (50, 2)).double()
    flow.fit_ends(levels)
    y = flow.to_flow_space(levels).requires_grad_()
    x = flow.to_data_space(y, rounded=False)
    assert torch.equal(x.floor(), levels)
    assert not torch.equal(x, levels)
    assert torch.equal(flow.to_data_space(y), levels)
    (slope,) = torch.autograd.grad(x.sum(), y)
    assert (slope > 0).all()
    plain = flows.CNF(flows.fields.MLP((2,)), transform=Standardise((2,)))
    assert torch.equal(plain.to_data_space(y.detach(), rounded=False), plain.to_data_space(y.detach()))


class Swirl(torch.nn.Module):
    def forward(self, t, x):
        return torch.sin(x).flip(-1)


def test_a_latent_is_found_whose_coarse_solve_ends_at_a_point():
    flow = flows.CNF(Swirl(), event_shape=(2,), solver=flows.ODESolver("euler", step_size=0.25)).double()
    y = torch.randn(20, 2, dtype=torch.float64)
    y[3] = torch.nan
    target = Target(flow, Denoising(), torch.zeros(20, 2), 1.0, 1, None, None)
    with torch.no_grad():
        z = guidance._latents(target, y)
        good = [row for row in range(20) if row != 3]
        small = Target(flow, Denoising(), torch.zeros(19, 2), 1.0, 1, None, None)
        once, there = small.points(small.latents(y[good]))[0], small.points(z[good])[0]
    assert z[3].isnan().all()
    assert (there - y[good]).norm() < 0.05 * (once - y[good]).norm()


def test_conjugate_gradients_solve_the_normal_equations():
    """Aᵀ (A V Aᵀ + s²)⁻¹ (y − A x), with variances of several orders of magnitude."""
    matrix, variance = torch.randn(3, 5, dtype=torch.float64), 10 ** torch.linspace(-3, 1, 5, dtype=torch.float64)

    class Mixed(Operator):
        def observed_shape(self, event_shape):
            return (3,)

        def forward(self, x):
            return x @ matrix.T

    flow = flows.CNF(flows.fields.MLP((5,), hidden=(4,))).double()
    y, x = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    target = Target(flow, Mixed(), y, 0.5, 1, None, None)
    gram = matrix @ (variance[:, None] * matrix.T) + 0.25 * torch.eye(3)
    expected = torch.linalg.solve(gram, (y - x @ matrix.T).T).T @ matrix
    torch.testing.assert_close(guidance._pull(target, x, y, variance.expand(7, 5)), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fails", ["solve", "point"])
def test_chains_start_from_the_base_where_guidance_fails(monkeypatch, fails):
    def no_solve(*given):
        raise flows.solvers.SolverError("too stiff", t=0.5, dt=0.0)

    def no_point(target, z, generator):
        return torch.full_like(z, torch.inf)

    monkeypatch.setattr(guidance, "_guided", no_solve if fails == "solve" else no_point)
    drawn = []
    for start in ("guided", "base"):
        settings = {"num_proposals": 5, "solver": FAST, "start": start}
        seed = torch.Generator().manual_seed(0)
        drawn.append(restore(gaussian_flow(), torch.zeros(3, 2), Denoising(), 0.5, generator=seed, **settings).x)
    assert torch.equal(*drawn)


def test_guidance_takes_transforms_that_mix_entries_and_domains_with_an_end():
    """Whitened levels in float32, and positive numbers behind a logarithm."""
    levels = torch.randint(4, 12, (500, 1, 2, 2)).float()
    levels[:, :, 1] = levels[:, :, 0]
    transform = Compose(dequantise=Dequantise(16), whiten=Whiten((1, 2, 2)))
    flow = flows.CNF(NormalPath(), transform=transform, event_shape=(1, 2, 2), solver=FAST).float()
    flow.fit_ends(levels)
    upper = torch.tensor([[[True, True], [False, False]]])
    found = restore(flow, levels[:20][:, upper], Inpainting(upper), 0.0, num_draws=4, num_proposals=0)
    assert found.x.dtype == torch.float32
    assert (found.x - levels[:20]).abs().mean() < 2  # the lower row repeats the upper one; other rows differ by 2.6
    positive = flows.CNF(flows.fields.MLP((2,), hidden=(4,), at_rest=True), transform=Logarithm(), solver=FAST).double()
    found = restore(positive, torch.tensor([[-3.0, 2.0]]), Denoising(), 0.5, num_draws=50, num_proposals=0)
    assert (found.x > 0).all()
    assert found.x.isfinite().all()


class Logarithm(Transform):
    def forward(self, x, generator=None):
        return x.log(), -x.log().flatten(1).sum(1)

    def inverse(self, y):
        return y.exp(), y.flatten(1).sum(1)


class Rounding(Transform):
    """A stranger's dequantiser, which rounds in `inverse` and says nothing of `unrounded`."""

    def forward(self, x, generator=None):
        return x + torch.rand_like(x), x.new_zeros(len(x))

    def inverse(self, y):
        return y.floor(), y.new_zeros(len(y))


class Levels(Rounding):
    num_levels = 16


class Blind(Denoising):
    def forward(self, x):
        return x.round()


@pytest.mark.parametrize(
    ("transform", "operator", "words"),
    [
        (Levels(), Denoising(), r"Levels makes 16 levels continuous.*define unrounded\(y\), which returns x \+ u"),
        (Rounding(), Denoising(), r"no slope at 2 draws.*transform Rounding or the operator Denoising rounds"),
        (None, Blind(), r"no slope at 2 draws.*the operator Blind rounds, or cuts the gradient"),
    ],
)
def test_what_rounds_without_a_word_is_refused(transform, operator, words):
    flow = flows.CNF(flows.fields.MLP((2,), hidden=(4,)), transform=transform, solver=FAST)
    with pytest.raises(FlowsError, match=words):
        restore(flow, torch.full((2, 2), 3.0), operator, 0.5, num_proposals=5)


def test_unrounded_points_go_back_to_flow_space():
    transform = Compose(dequantise=Dequantise(16), marginals=NormalMarginals((2,), 16))
    flow = flows.CNF(flows.fields.MLP((2,), hidden=(4,)), transform=transform).double()
    y = torch.randn(50, 2, dtype=torch.float64)
    torch.testing.assert_close(flow.to_flow_space(flow.to_data_space(y, rounded=False), rounded=False), y)
    assert flow.to_flow_space(torch.tensor([[16.0, -0.1]]).double(), rounded=False).isfinite().all()


def test_restoration_takes_its_gradients_in_inference_mode():
    flow, observation = gaussian_flow(), torch.zeros(1, 2)
    with torch.inference_mode():
        found = restore(flow, observation, Denoising(), 0.5, num_proposals=5)
    assert found.x.isfinite().all()


def test_levels_as_integers_go_to_flow_space_unrounded():
    flow = flows.CNF(flows.fields.MLP((2,), (3,)), transform=Dequantise(16))
    levels = torch.randint(0, 16, (4, 2))
    found = flow.to_flow_space(levels, rounded=False)
    torch.testing.assert_close(found, levels.to(found.dtype))
