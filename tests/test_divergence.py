"""The divergence of any function, and what the estimators say when they cannot give it."""

import functools

import numpy as np
import pytest
import torch
from problems import at_work
from torch import nn

import flows
from flows.divergence import (
    Analytic,
    Auto,
    Bottleneck,
    DivergenceEstimator,
    Exact,
    Gaussian,
    Hutchinson,
    ProbeFamily,
    Probing,
    Rademacher,
    divergence,
)
from flows.fields import MLP, ConcatSquashMLP, ConvNet, Field, Linear, Potential, bind
from flows.naming import by_name


class Mixing(nn.Module):
    """A function whose Jacobian is neither diagonal nor symmetric, on points of any shape."""

    def __init__(self, event_shape):
        super().__init__()
        d = torch.Size(event_shape).numel()
        self.ndim = len(event_shape)
        self.matrix = nn.Parameter(torch.randn(d, d))

    def forward(self, x):
        flat = x.flatten(-self.ndim)
        return ((flat @ self.matrix.T).sin() * flat.cos()).view_as(x)


def dense_divergence(f, x, event_ndim):
    """The trace of the d × d Jacobian of one point at a time."""
    batch_shape = x.shape[: x.ndim - event_ndim]
    points = x.reshape(-1, *x.shape[x.ndim - event_ndim :])
    d = points[0].numel()
    traces = [torch.func.jacrev(lambda p: f(p[None])[0])(point).reshape(d, d).trace() for point in points]
    return torch.stack(traces).reshape(batch_shape)


EVENTS = [((5,), (4,)), ((5,), (6, 3)), ((2, 3), (4,)), ((3,), (2, 3, 3))]


@pytest.mark.parametrize(("batch_shape", "event_shape"), EVENTS)
@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("chunk_size", [None, 1, 3, 100])
def test_exact_is_the_dense_trace(batch_shape, event_shape, mode, chunk_size):
    f = Mixing(event_shape)
    x = torch.randn(*batch_shape, *event_shape)
    value = divergence(f, x, len(event_shape), Exact(mode, chunk_size))
    assert value.shape == batch_shape
    torch.testing.assert_close(value, dense_divergence(f, x, len(event_shape)), rtol=0, atol=1e-12)


def test_summing_the_gradient_of_ones_is_not_the_divergence():
    """The popular answer sums all entries of the Jacobian; only for a diagonal one is that the trace."""

    def popular(f, x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(f(x), x, torch.ones_like(x))[0].sum(-1)

    x = torch.randn(5, 4)
    mixing = Mixing((4,))
    truth = dense_divergence(mixing, x, 1)
    assert (popular(mixing, x) - truth).abs().min() > 0.01
    torch.testing.assert_close(divergence(mixing, x), truth)
    torch.testing.assert_close(popular(torch.sin, x), divergence(torch.sin, x))


def test_unbatched_point_of_a_function_that_takes_only_that():
    matrix = torch.randn(3, 3)
    torch.testing.assert_close(divergence(lambda x: matrix.mv(x), torch.randn(3)), matrix.trace())


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_gradients_are_those_of_the_dense_trace(mode):
    f = Mixing((3,))
    x = torch.randn(4, 3, requires_grad=True)
    ours = torch.autograd.grad(divergence(f, x, estimator=Exact(mode)).square().sum(), [x, f.matrix])
    dense = torch.autograd.grad(dense_divergence(f, x, 1).square().sum(), [x, f.matrix])
    torch.testing.assert_close(ours, dense)


@pytest.mark.parametrize("estimator", [Exact(), Exact("forward"), Hutchinson(2), Hutchinson(2, mode="forward")])
def test_no_grad_gives_the_value_without_a_graph(estimator):
    f = Mixing((3,))
    x = torch.randn(4, 3)
    with torch.no_grad():
        value = divergence(f, x, estimator=estimator, generator=torch.Generator().manual_seed(1))
    assert not value.requires_grad
    torch.testing.assert_close(
        value, divergence(f, x, estimator=estimator, generator=torch.Generator().manual_seed(1)).detach()
    )


def test_a_field_is_evaluated_once_for_value_and_divergence():
    calls = []
    f = Mixing((3,))

    def counting(t, x):
        calls.append(1)
        return f(x)

    x = torch.randn(4, 3)
    sample = at_work(Exact(), counting, (3,))(torch.zeros(()), x)
    torch.testing.assert_close(sample.value, f(x))
    assert len(calls) == 1


@pytest.mark.parametrize("probes", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased_with_the_stated_variance(probes):
    f = Mixing((4,))
    x = torch.randn(1, 4)
    n = 40_000
    estimator = Hutchinson(2, probes)
    draws = divergence(f, x.expand(n, 4), estimator=estimator, generator=torch.Generator().manual_seed(3)).detach()
    jacobian = torch.func.jacrev(lambda p: f(p[None])[0])(x[0])
    variance = estimator.probes.variance(jacobian, 2)
    assert abs(draws.mean() - jacobian.trace()) < 4 * (variance / n).sqrt()
    kurtosis = ((draws - draws.mean()) ** 4).mean() / draws.var() ** 2
    assert abs(draws.var() / variance - 1) < 4 * ((kurtosis - 1) / n).sqrt()


def test_rademacher_has_no_noise_on_a_diagonal_jacobian():
    x = torch.randn(6, 5)
    torch.testing.assert_close(divergence(torch.sin, x, estimator=Hutchinson()), x.cos().sum(-1))


def test_probe_families_by_name_and_object():
    assert isinstance(Hutchinson(probes="Gaussian").probes, Gaussian)
    assert isinstance(Hutchinson(probes=Rademacher()).probes, Rademacher)
    with pytest.raises(ValueError, match=r"unknown ProbeFamily 'uniform'; expected one of .*gaussian.*rademacher"):
        Hutchinson(probes="uniform")
    with pytest.raises(TypeError, match=r"probes must be a .*ProbeFamily or one of the names coordinates"):
        Hutchinson(probes=3)
    import flows.training.compile  # noqa: F401 (has a private estimator)

    with pytest.raises(ValueError, match=r"unknown DivergenceEstimator '_compiled'; expected one of analytic, auto"):
        by_name(DivergenceEstimator, "_compiled")


def test_a_new_probe_family_is_one_class():
    class Scaled(ProbeFamily):
        def draw(self, num_probes, x, generator=None):
            return Rademacher().draw(num_probes, x, generator)

        def variance(self, jacobian, num_probes):
            return Rademacher().variance(jacobian, num_probes)

    x = torch.randn(3, 2)
    torch.testing.assert_close(divergence(torch.sin, x, estimator=Hutchinson(probes="scaled")), x.cos().sum(-1))


def test_errors_say_what_came_and_what_to_do():
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"num_probes must be >= 1, got 0; for no sampling noise use Exact\(\)"):
        Hutchinson(0)
    with pytest.raises(ValueError, match="mode must be 'reverse' or 'forward', got 'backward'"):
        Exact("backward")
    with pytest.raises(ValueError, match=r"chunk_size must be >= 1, or None for one product at a time.*, got 0"):
        Exact(chunk_size=0)
    with pytest.raises(ValueError, match=r"event_ndim must be between 1 and x.ndim = 2, got 3"):
        divergence(torch.sin, x, event_ndim=3)
    with pytest.raises(ValueError, match=r"x must be a floating point tensor, got torch.int64"):
        divergence(torch.sin, torch.ones(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"one velocity a point, of shape \(3, 4\), got \(3, 1\)"):
        divergence(lambda x: x.sum(-1, keepdim=True), x)
    with pytest.raises(TypeError, match="must return a tensor, got tuple"):
        divergence(lambda x: (x, x), x)
    with pytest.raises(ValueError, match="autograd cannot trace the field's value to x"):
        divergence(lambda x: x.detach() * 2, x)
    with pytest.raises(TypeError, match=r"Analytic\(\) needs a field with value_and_divergence.*, and Mixing has none"):
        divergence(Mixing((4,)), x, estimator=Analytic())
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"use torch.no_grad\(\)"):
        divergence(torch.sin, x)


def test_analytic_works_in_inference_mode():
    field = MLP((3,), (8, 8))
    x = torch.randn(4, 3)
    with torch.inference_mode():
        sample = at_work(Analytic(), field)(torch.zeros(()), x)
    torch.testing.assert_close(sample.divergence, divergence(lambda x: field(torch.zeros(()), x), x).detach())


def test_linear_field_has_the_trace_of_its_matrix():
    field = Linear((2, 3))
    x = torch.randn(4, 2, 3)
    value = divergence(lambda x: field(torch.zeros(()), x), x, event_ndim=2)
    torch.testing.assert_close(value, field.matrix.trace().expand(4))


class Product(Field):
    """A local field times a global one: nothing that it holds is true of it."""

    def __init__(self) -> None:
        super().__init__((1, 9, 9), None)
        self.field = ConvNet((1, 9, 9), (3,))

    def forward(self, t, x, context=None):
        return self.field(t, x) * x.mean((1, 2, 3), keepdim=True)


def test_what_a_field_holds_says_nothing_about_it() -> None:
    assert at_work(Probing(3), Product().field).is_exact
    assert not at_work(Probing(3), Product()).is_exact


def test_channels_are_no_axis_of_the_grid() -> None:
    field = ConvNet((6, 6, 6), (4,))
    assert at_work(Probing(3, grid_ndim=2), field).is_exact
    assert at_work(Probing(3, grid_ndim=1), field).is_exact
    assert not at_work(Probing(3, grid_ndim=3), field).is_exact


class Squares:
    """x² with what a structured function offers, all without time."""

    bottleneck_width = 3

    def __call__(self, x):
        return x.square()

    def value_and_divergence(self, x):
        return x.square(), 2 * x.sum(1)

    def encode(self, x):
        return x

    def decode(self, h):
        return h.square()


@pytest.mark.parametrize("estimator", [Analytic(), Bottleneck(exact=True), Exact()])
def test_structured_functions_without_time(estimator) -> None:
    x = torch.randn(4, 3)
    torch.testing.assert_close(divergence(Squares(), x, estimator=estimator), 2 * x.sum(1))


@pytest.mark.parametrize("estimator", [Analytic(), Bottleneck()])
def test_functions_without_the_structure_are_named(estimator) -> None:
    with pytest.raises(TypeError, match=r"tanh has none|got tanh"):
        divergence(torch.tanh, torch.randn(4, 3), estimator=estimator)


def test_a_field_cut_off_from_x_is_refused_though_its_parameters_are_not() -> None:
    w = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="autograd cannot trace the field's value to x"):
        divergence(lambda x: w * x.detach(), torch.randn(4, 3))


def test_equal_settings_are_equal() -> None:
    assert Hutchinson(2, "gaussian") == Hutchinson(2, Gaussian()) != Hutchinson(2, "sphere")
    assert len({Hutchinson(2, "orthonormal"), Hutchinson(2, "orthonormal")}) == 1


@pytest.mark.parametrize(
    ("field", "cost"),
    [
        (MLP((64,), (128, 128)), 0),
        (MLP((64,), (128, 32, 128)), 32),
        (MLP((4,), (128, 128, 128)), 4),
        (ConcatSquashMLP((2,), (64, 64, 64)), 2),
        (ConcatSquashMLP((2,), (64, 64)), 0),
        (Potential((64,), num_layers=1), 0),
        (Potential((64,), num_layers=2), 32),
        (Linear((5,)), 0),
    ],
)
def test_closed_forms_that_grow_say_so(field, cost: int) -> None:
    assert at_work(Analytic(), field).cost == cost
    assert at_work(Auto(max_products=cost), field) == Analytic()
    if cost:
        assert at_work(Auto(max_products=cost - 1), field) == Hutchinson(2)


def test_an_estimator_of_no_field_says_how_to_give_it_one() -> None:
    with pytest.raises(ValueError, match=r"Exact is not bound to a field; use Exact\(...\).bind\(flows.fields.bind"):
        Exact()(torch.zeros(()), torch.randn(4, 3))


def test_binding_leaves_the_options_alone() -> None:
    options, first, second = Hutchinson(2), Linear((3,)), Linear((5,))
    bound = at_work(options, first)
    assert bound == options
    assert bound.field.field is first
    assert bound.bind(bind(second)).field.dimension == 5
    assert bound.field.field is first
    with pytest.raises(ValueError, match="not bound"):
        options.field  # noqa: B018


class Hides(torch.nn.Module):
    def forward(self, y):
        return y.detach() * y


@pytest.mark.parametrize(
    ("f", "words"),
    [
        (lambda y: y.detach() * y, "autograd misses"),
        (Hides(), "autograd misses"),
        (functools.partial(lambda a, y: a * y.detach() * y, 2.0), "autograd misses"),
        (lambda y: y - y.mean(0), "mixes the samples"),
        (lambda y: y.cumsum(0), "mixes the samples"),
        (lambda y: y * torch.rand_like(y), "draws random numbers"),
        (lambda y: y.round(), "changes by steps"),
        (np.sin, "numpy"),
        (torch.nn.Dropout(0.5), "draws random numbers"),
        (torch.nn.BatchNorm1d(2).double(), "mixes the samples"),
    ],
)
@pytest.mark.parametrize("estimator", [Exact(), Hutchinson(2)])
def test_a_function_is_examined_at_its_first_use(f, words, estimator):
    for _ in range(2):  # not only at the first call
        with pytest.raises(flows.FlowsError, match=words):
            divergence(f, torch.randn(6, 2, dtype=torch.float64), estimator=estimator)


def test_a_function_that_writes_into_its_argument_is_given_a_copy():
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(6, 2)
    kept = x.clone()
    found = divergence(lambda y: y.mul_(2).square(), x)
    torch.testing.assert_close(found, 8 * kept.sum(1))
    assert torch.equal(x, kept)


def test_forward_mode_of_scripted_code_is_refused_for_functions_too():
    net = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh()))
    with pytest.raises(flows.FlowsError, match="forward-mode products are wrong"):
        divergence(net, torch.randn(6, 2), estimator=Exact(mode="forward"))


def test_a_lambda_in_a_loop_is_examined_once():
    calls = []

    def f(y):
        calls.append(y)
        return y.sin()

    x, counts = torch.randn(4, 2, dtype=torch.float64), []
    for _ in range(3):
        calls.clear()
        divergence(lambda y: f(y), x)
        counts.append(len(calls))
    assert counts[0] > 10
    assert counts[1:] == [1, 1]


@pytest.mark.parametrize("shape", [(3,), (1, 3), (2, 4, 3), (2, 1, 4, 3)])
def test_functions_of_any_shape_are_examined(shape):
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(divergence(lambda y: y**3, x), 3 * x.square().sum(-1))
    with pytest.raises(flows.FlowsError, match="autograd misses"):
        divergence(lambda y: y.detach() * y, x)


def test_the_standard_error_of_a_divergence_is_the_spread_of_its_estimates():
    matrix, x = torch.randn(6, 6), torch.randn(400, 6)
    exact, none = divergence(lambda x: x @ matrix.T, x, return_error=True)
    assert torch.equal(none, torch.zeros(400))
    torch.testing.assert_close(exact, matrix.trace().expand(400))
    estimator, generator = Hutchinson(num_probes=16), torch.Generator().manual_seed(0)
    value, error = divergence(lambda x: x @ matrix.T, x, estimator=estimator, generator=generator, return_error=True)
    symmetric = (matrix + matrix.T) / 2
    variance = 2 * (symmetric.square().sum() - symmetric.diagonal().square().sum()) / 16  # of Rademacher probes
    assert error.square().mean().item() == pytest.approx(variance.item(), rel=0.1)
    assert ((value - exact) / error).square().mean().item() == pytest.approx(1.15, abs=0.25)  # Student's t of 15
