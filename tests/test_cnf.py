"""The flow against closed forms: matrix exponentials, integrals, round trips, and gradients."""

import math
import traceback
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

import flows
from flows import CNF, ODESolver
from flows.divergence import Analytic, Exact, Hutchinson
from flows.fields import MLP, Adapter, ConcatSquashMLP, Linear
from flows.transforms import Standardise

TIGHT = ODESolver(rtol=1e-9, atol=1e-9)


def wavy(event_shape=(2,), hidden=(16, 16), **settings):
    """A field far from the identity, as after some training."""
    field = MLP(event_shape, hidden, num_frequencies=2, **{"activation": "silu", "sine_frequency": None, **settings})
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.mul_(1.3)
    return field


def gaussian_of(field):
    """The density that a linear field carries N(0, I) to: N(m, E Eᵀ) with E = exp A."""
    d = len(field.offset)
    block = torch.zeros(d + 1, d + 1)
    block[:d, :d], block[:d, d] = field.matrix.detach(), field.offset.detach()
    flow_map = torch.linalg.matrix_exp(block)
    linear = flow_map[:d, :d]
    return MultivariateNormal(flow_map[:d, d], linear @ linear.T), linear, flow_map[:d, d]


@pytest.mark.parametrize("event_shape", [(3,), (2, 2)])
@pytest.mark.parametrize("estimator", [Analytic(), Exact(), Exact("forward")])
def test_linear_flow_is_the_matrix_exponential(event_shape, estimator):
    d = math.prod(event_shape)
    field = Linear(event_shape, torch.randn(d, d) / 2, torch.randn(d))
    flow = CNF(field, estimator, ODESolver(rtol=1e-12, atol=1e-12))
    truth, linear, shift = gaussian_of(field)
    x = torch.randn(6, *event_shape)
    with torch.no_grad():
        torch.testing.assert_close(flow.log_prob(x), truth.log_prob(x.flatten(1)), rtol=0, atol=1e-8)
        samples = flow.sample((5,), generator=torch.Generator().manual_seed(1))
        z = flow.base.sample((5,), torch.Generator().manual_seed(1)).flatten(1)
        torch.testing.assert_close(samples.flatten(1), z @ linear.T + shift, rtol=0, atol=1e-8)
        drawn, log_prob = flow.sample_and_log_prob((2, 3))
        assert drawn.shape == (2, 3, *event_shape)
        torch.testing.assert_close(log_prob, truth.log_prob(drawn.flatten(2)), rtol=0, atol=1e-8)


def test_density_integrates_to_one():
    flow = CNF(wavy(), solver=ODESolver(rtol=1e-6, atol=1e-6), transform=Standardise((2,)))
    flow.transform.fit(torch.randn(100, 2) * torch.tensor([2.0, 0.5]) + 1)
    with torch.no_grad():
        samples = flow.sample((500,))
        low, high = samples.amin(0) - 2 * samples.std(0), samples.amax(0) + 2 * samples.std(0)
        sides = [torch.linspace(a, b, 91) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
        grid = torch.cartesian_prod(*sides)
        total = flow.log_prob(grid).exp().sum() * (sides[0][1] - sides[0][0]) * (sides[1][1] - sides[1][0])
    assert abs(total - 1) < 1e-3


def test_log_prob_and_samples_belong_together():
    """The mean of −log p over samples is the entropy, computed here by quadrature over the density."""
    flow = CNF(wavy(), solver=ODESolver(rtol=1e-5, atol=1e-5))
    with torch.no_grad():
        x, log_prob = flow.sample_and_log_prob((2000,), generator=torch.Generator().manual_seed(0))
        sides = torch.linspace(-7, 7, 81)
        density = flow.log_prob(torch.cartesian_prod(sides, sides)).exp()
        moment = (density * torch.cartesian_prod(sides, sides).square().sum(-1)).sum() * (sides[1] - sides[0]) ** 2
        entropy = -(density * density.log()).nan_to_num().sum() * (sides[1] - sides[0]) ** 2
    assert abs(-log_prob.mean() - entropy) < 4 * log_prob.std() / 2000**0.5
    squares = x.square().sum(-1)
    assert abs(squares.mean() - moment) < 4 * squares.std() / 2000**0.5


def test_round_trip_and_opposite_log_density_changes():
    flow = CNF(wavy(), solver=ODESolver(rtol=1e-8, atol=1e-8))
    x = torch.randn(50, 2)
    with torch.no_grad():
        there = flow.transport(x, (1.0, 0.0))
        back = flow.transport(there.x, (0.0, 1.0))
    torch.testing.assert_close(back.x, x, rtol=0, atol=1e-6)
    torch.testing.assert_close(back.log_density_change, -there.log_density_change, rtol=0, atol=1e-6)


def test_transport_through_several_times():
    flow = CNF(wavy(), solver=TIGHT)
    x = torch.randn(3, 4, 2)
    with torch.no_grad():
        path = flow.transport(x, (0.0, 0.25, 1.0))
        assert path.x.shape == (3, 3, 4, 2)
        assert path.log_density_change.shape == (3, 3, 4)
        torch.testing.assert_close(path.x[0], x)
        torch.testing.assert_close(path.x[2], flow.transport(x, (0.0, 1.0)).x, rtol=0, atol=1e-7)
        assert flow.transport(x, (0.0, 1.0), log_density=False).log_density_change is None


@pytest.mark.parametrize("field", [wavy(), ConcatSquashMLP((2,), (8, 8, 8))])
@pytest.mark.parametrize("estimator", [Analytic(), Exact(), Hutchinson(3)])
def test_adjoint_and_backprop_gradients_agree(field, estimator):
    field = field.double()
    x = torch.randn(5, 2)
    gradients = []
    for gradient in ("backprop", "adjoint"):
        flow = CNF(field, estimator, ODESolver(rtol=1e-9, atol=1e-9, gradient=gradient))
        points = x.clone().requires_grad_()
        loss = flow.log_prob(points, generator=torch.Generator().manual_seed(2)).mean()
        gradients.append(torch.autograd.grad(loss, [points, *field.parameters()], allow_unused=True))
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_adjoint_reaches_the_context_and_forgets_no_earlier_forward():
    field = wavy(context_shape=(3,))
    x, context = torch.randn(5, 2), torch.randn(5, 3)
    gradients = {}
    for gradient in ("backprop", "adjoint"):
        flow = CNF(field, Hutchinson(2), ODESolver(rtol=1e-9, atol=1e-9, gradient=gradient))
        c = context.clone().requires_grad_()
        loss = flow.log_prob(x, c, torch.Generator().manual_seed(1)).mean()
        flow.log_prob(torch.randn(5, 2), torch.randn(5, 3), torch.Generator().manual_seed(9))  # a later forward
        gradients[gradient] = torch.autograd.grad(loss, [c, *field.parameters()])
    for a, b in zip(gradients["backprop"], gradients["adjoint"], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_backprop_gradient_is_the_finite_difference():
    field = wavy(hidden=(6,))
    flow = CNF(field, solver=TIGHT)
    x = torch.randn(4, 2)
    weight = field.layers[0].weight
    (gradient,) = torch.autograd.grad(flow.log_prob(x).sum(), weight)
    direction = torch.randn_like(weight)
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            weight.add_(direction, alpha=sign * 1e-5)
            values.append(flow.log_prob(x).sum())
            weight.sub_(direction, alpha=sign * 1e-5)
    torch.testing.assert_close((gradient * direction).sum(), (values[0] - values[1]) / 2e-5, rtol=1e-5, atol=1e-6)


def test_probes_are_drawn_once_a_solve(monkeypatch):
    drawn = []
    original = Hutchinson.draw_probes
    monkeypatch.setattr(Hutchinson, "draw_probes", lambda *a, **k: drawn.append(1) or original(*a, **k))
    flow = CNF(wavy(), Hutchinson(2))
    statistics = flow.estimate_log_prob(torch.randn(4, 2)).statistics
    assert len(drawn) == 1
    assert statistics.nfe_forward > 10


def test_estimate_has_the_errors_that_it_states():
    field = wavy()
    x = torch.randn(300, 2)
    with torch.no_grad():
        truth = CNF(field, Analytic(), TIGHT).log_prob(x)
        exact = CNF(field, Analytic(), ODESolver(rtol=1e-4, atol=1e-4)).estimate_log_prob(x)
        noisy = CNF(field, Hutchinson(16), ODESolver(rtol=1e-6, atol=1e-6)).estimate_log_prob(x, solver_error=False)
    assert exact.standard_error.eq(0).all()
    true_error = (exact.value - truth).abs()
    assert (exact.solver_error - true_error).abs().mean() < 0.1 * true_error.mean()
    assert noisy.solver_error is None
    z_scores = (noisy.value - truth) / noisy.standard_error
    assert 0.8 < z_scores.square().mean() < 1.6  # Student's t with 15 degrees of freedom has variance 1.15
    single = CNF(field, Hutchinson(1)).estimate_log_prob(x, solver_error=False)
    assert single.standard_error.isnan().all()


def test_the_solver_error_of_two_steps_is_not_that_against_themselves():
    field, x = wavy(), torch.randn(300, 2)
    with torch.no_grad():
        estimate = CNF(field, Analytic(), ODESolver(rtol=0.1, atol=0.1)).estimate_log_prob(x)
        truth = CNF(field, Analytic(), TIGHT).log_prob(x)
    assert estimate.statistics.accepted == 2
    true_error = (estimate.value - truth).abs()
    assert (estimate.solver_error - true_error).abs().mean() < 0.1 * true_error.mean()


def test_fixed_step_solver_error_comes_from_a_tenth_of_the_step():
    flow = CNF(wavy(), Analytic(), ODESolver("euler", step_size=0.1))
    x = torch.randn(20, 2)
    with torch.no_grad():
        estimate = flow.estimate_log_prob(x)
        finer = CNF(flow.field, Analytic(), ODESolver("euler", step_size=0.01)).log_prob(x)
    torch.testing.assert_close(estimate.solver_error, (estimate.value - finer).abs())
    assert estimate.solver_error.max() > 1e-3


def test_distribution_with_and_without_context():
    flow = CNF(wavy(context_shape=(3,)), solver=TIGHT)
    context = torch.randn(4, 3, requires_grad=True)
    p = flow(context)
    assert isinstance(p, torch.distributions.Distribution)
    assert p.batch_shape == (4,)
    assert p.event_shape == (2,)
    x = p.rsample((5,))
    assert x.shape == (5, 4, 2)
    assert torch.autograd.grad(x.sum(), context)[0].abs().sum() > 0
    assert not p.sample((2,)).requires_grad
    log_prob = p.log_prob(x.detach())
    assert log_prob.shape == (5, 4)
    one = flow(context[1]).log_prob(x[:, 1].detach())
    torch.testing.assert_close(log_prob[:, 1], one, rtol=0, atol=1e-7)
    assert p.expand((5, 4)).log_prob(x.detach()).shape == (5, 4)
    assert p.support.check(x).all()
    drawn, log_q = p.rsample_and_log_prob((2,))
    torch.testing.assert_close(log_q, p.log_prob(drawn), rtol=0, atol=1e-6)

    plain = CNF(wavy())()
    assert plain.batch_shape == ()
    assert plain.sample().shape == (2,)
    assert plain.sample((3,)).shape == (3, 2)
    assert plain.expand((3,)).sample((2,)).shape == (2, 3, 2)
    assert plain.log_prob(torch.randn(2)).shape == ()


def test_one_context_is_shared_by_a_batch():
    flow = CNF(wavy(context_shape=(3,)), solver=TIGHT)
    x, context = torch.randn(4, 2), torch.randn(3)
    with torch.no_grad():
        torch.testing.assert_close(flow.log_prob(x, context), flow.log_prob(x, context.expand(4, 3)))
        assert flow.sample((6,), context).shape == (6, 2)
        with pytest.raises(
            ValueError, match=r"a context of shape \(5, 3\) does not broadcast .* batch of shape \(4,\)"
        ):
            flow.log_prob(x, torch.randn(5, 3))


class ThirdParty(nn.Module):
    """A network that has never heard of this package."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, t, x):
        return self.net(torch.cat([x, t.expand(len(x), 1)], 1))


def test_any_module_is_a_field_as_it_is():
    flow = CNF(ThirdParty(), event_shape=(2,), solver=TIGHT)
    assert flow.divergence.bind(flow.bind()) == Exact()
    x = flow.sample((4,)).detach()
    flow.log_prob(x).mean().backward()
    assert all(p.grad is not None for p in flow.parameters())


def test_noise_is_drawn_where_and_as_the_field_is():
    assert CNF(MLP((2,), (4,)).to("meta")).base.sample((3,)).device.type == "meta"
    lazy = CNF(Adapter(torch.nn.LazyLinear(2), (2,), ("x",)))  # whose weights have no shape yet
    assert lazy.log_prob(torch.randn(3, 2)).shape == (3,)
    frozen = MLP((2,), (4,)).to(torch.bfloat16).requires_grad_(False)
    mixed = Adapter(torch.nn.Sequential(frozen.out, torch.nn.Linear(2, 2)), (2,), ("x",))
    assert CNF(mixed).dtype == torch.float64
    single = CNF(MLP((2,), (4,)).float(), solver=ODESolver("rk4", step_size=0.5))  # float64 is the default here
    assert single.sample((3,)).dtype == torch.float32


def test_log_prob_under_no_grad_has_no_graph_and_keeps_dtype():
    for dtype in (torch.float32, torch.float64):
        for estimator in (Analytic(), Exact(), Hutchinson(2)):
            flow = CNF(wavy(), estimator).to(dtype)
            with torch.no_grad():
                log_prob = flow.log_prob(torch.randn(3, 2, dtype=dtype))
                x = flow.sample((2,))
            assert log_prob.dtype == x.dtype == dtype
            assert not log_prob.requires_grad


def test_the_flow_speaks_data_space():
    scale = torch.tensor([3.0, 0.1])
    points = torch.randn(500, 2) * scale + 5
    flow = CNF(Linear((2,), torch.zeros(2, 2)), transform=Standardise((2,)).fit(points))
    truth = torch.distributions.Independent(torch.distributions.Normal(points.mean(0), points.std(0)), 1)
    x = points[:7]
    with torch.no_grad():
        torch.testing.assert_close(flow.log_prob(x), truth.log_prob(x))
        samples = flow.sample((4000,))
    assert ((samples.mean(0) - points.mean(0)).abs() < 4 * points.std(0) / 4000**0.5).all()
    copy = CNF(Linear((2,)), transform=Standardise((2,)))
    copy.load_state_dict(flow.state_dict())
    torch.testing.assert_close(copy.log_prob(x), truth.log_prob(x))


def test_errors_say_what_came_and_what_to_do():
    flow = CNF(MLP((2,), (4,)))
    with pytest.raises(ValueError, match=r"expected points of shape \(\*batch, 2\), got \(5, 3\)"):
        flow.log_prob(torch.randn(5, 3))
    x = torch.randn(5, 2)
    x[3, 1] = torch.nan
    with pytest.raises(ValueError, match="1 of 5 points hold NaN or infinite values, the first at index 3"):
        flow.log_prob(x)
    with pytest.raises(ValueError, match=r"ThirdParty does not state its event_shape; pass event_shape=\(2,\)"):
        CNF(ThirdParty())
    with pytest.raises(ValueError, match=r"the field's event_shape is \(2,\), and \(3,\) was given"):
        CNF(MLP((2,), (4,)), event_shape=(3,))
    with pytest.raises(TypeError, match=r"Analytic\(\) needs a field with .*, and ThirdParty has none; choose Auto"):
        CNF(ThirdParty(), Analytic(), event_shape=(2,)).log_prob(torch.randn(3, 2))

    class Wrong(nn.Module):
        def forward(self, t, x):
            return x[:, :1]

    wrong = CNF(Wrong(), event_shape=(2,))
    for use in (lambda: wrong.log_prob(torch.randn(3, 2)), lambda: wrong.sample((3,))):
        with pytest.raises(ValueError, match=r"one velocity a point, of shape \(3, 2\), got \(3, 1\)"):
            use()
    with pytest.raises(ValueError, match=r"of shape \(3, 2\), got \(3, 1\)"):
        flows.objectives.FlowMatching()(wrong, flows.datasets.Batch(torch.randn(3, 2)))


def test_standardise_errors():
    with pytest.raises(ValueError, match=r"entry \(1,\) of the data has the same value in every point"):
        Standardise((2,)).fit(torch.tensor([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]]))
    with pytest.raises(ValueError, match=r"at least two points of shape \(2,\) to standardise by, got \(4, 3\)"):
        Standardise((2,)).fit(torch.randn(4, 3))


def test_gradients_are_finite_where_the_error_estimate_is_exactly_zero():
    """A linear field has a constant divergence, so the error of the log-density is 0, where a root has no slope."""
    flow = CNF(Linear((2,)))
    flow.log_prob(torch.randn(8, 2)).mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in flow.parameters())


@pytest.mark.parametrize("points", [torch.zeros(3, 2, dtype=torch.float32), torch.zeros(3, 2, dtype=torch.int64)])
def test_points_of_another_dtype_are_refused(points) -> None:
    flow = CNF(MLP((2,), (4,)))
    with pytest.raises(ValueError, match=rf"points are {points.dtype} and the flow is torch.float64; convert"):
        flow.log_prob(points)


class Watched(nn.Module):
    """A linear field that notes the functions of this package below which it is evaluated."""

    event_shape = (2,)

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(2))
        self.frames = []

    def forward(self, t, x):
        package = str(Path(flows.__file__).parent)
        stack = traceback.extract_stack()[:-1]
        self.frames.append([frame.name for frame in stack if frame.filename.startswith(package)])
        return x @ self.matrix


class WatchedClosedForm(Watched):
    def value_and_divergence(self, t, x):
        return self.forward(t, x), self.matrix.trace().expand(len(x))


@pytest.mark.parametrize("kind", [Watched, WatchedClosedForm])
def test_few_functions_stand_between_log_prob_and_the_network(kind):
    """At most 13, with the network's own and the watch over strangers, after the check of the arguments."""
    field = kind()
    CNF(field).log_prob(torch.randn(3, 2))
    deepest = max(field.frames, key=len)
    assert deepest[:2] == ["call", "log_prob"]
    assert len(deepest) <= 13, deepest


class Still(nn.Module):
    """A conditional field without parameters, which cannot say where noise should be drawn."""

    event_shape, context_shape = (2,), (3,)

    def forward(self, t, x, context):
        return 0 * x


def test_a_guided_flow_draws_noise_as_the_flow_does():
    flow = CNF(Still(), solver=ODESolver("euler", step_size=0.5)).to(torch.float32)  # float64 is the default here
    context = torch.zeros(3, dtype=torch.float32)
    assert flow.guided(2.0).sample((4,), context).dtype == torch.float32
    assert flow.to("meta").guided(2.0).device.type == "meta"


class Wide(flows.bases.Base):
    """N(0, 9)."""

    def sample(self, shape, generator=None):
        return 3 * torch.randn(*shape, *self.event_shape, generator=generator, dtype=self.dtype)

    def log_prob(self, z):
        return torch.distributions.Normal(0.0, 3.0).log_prob(z).sum(-1)


def test_a_flow_may_start_elsewhere():
    flow = CNF(Linear((2,), torch.zeros(2, 2)), base=Wide((2,)))
    x = torch.randn(5, 2)
    with torch.no_grad():
        torch.testing.assert_close(flow.log_prob(x), flow.base.log_prob(x))
        drawn, log_prob = flow.sample_and_log_prob((2000,))
    torch.testing.assert_close(log_prob, flow.base.log_prob(drawn))
    assert abs(drawn.std() / 3 - 1) < 0.1
    assert (flow.float().dtype, flow.device.type) == (torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"the base's event_shape is \(3,\), and the field's is \(2,\)"):
        CNF(Linear((2,)), base=Wide((3,)))
    with pytest.raises(TypeError, match=r"base must be a flows.bases.Base or None.* class Standardise"):
        CNF(Linear((2,)), base=Standardise((2,)))
