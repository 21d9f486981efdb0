"""Bottleneck: the trace from the narrowest layer."""

import pytest
import torch
from problems import assert_unbiased, assert_variance, at_work, dense_divergence, dense_jacobian, perceptron, sampled
from torch import nn

from flows import CNF, ODESolver
from flows.divergence import Analytic, Bottleneck, Hutchinson, divergence
from flows.fields import MLP, Linear

T = torch.tensor(0.3, dtype=torch.float64)


class Coder(nn.Module):
    """Any module with the three names is a field with a bottleneck."""

    event_shape = (4,)
    bottleneck_width = 2

    def __init__(self):
        super().__init__()
        self.inwards, self.outwards = nn.Linear(4, 2), nn.Linear(2, 4)

    def encode(self, t, x, context=None):
        return self.inwards(x).tanh()

    def decode(self, t, h, context=None):
        return self.outwards(h) * (1 + t)

    def forward(self, t, x, context=None):
        return self.decode(t, self.encode(t, x))


@pytest.mark.parametrize("hidden", [(9, 3, 6), (4, 9), (9, 4), (5,), (3, 3)])
@pytest.mark.parametrize("event_shape", [(6,), (2, 3), (2, 2, 2)])
def test_perceptron_is_cut_at_its_narrowest_layer(hidden, event_shape):
    field = perceptron(event_shape, hidden, context_shape=(2,))
    x, context = torch.randn(5, *event_shape), torch.randn(5, 2)
    code = field.encode(T, x, context)
    assert code.shape == (5, field.bottleneck_width) == (5, min(hidden))
    torch.testing.assert_close(field.decode(T, code, context), field(T, x, context))


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("hidden", [(9, 3, 6), (8, 7)])  # narrower and wider than the event
def test_exact_with_as_many_products_as_the_bottleneck_is_wide(mode, chunk_size, hidden):
    field = perceptron((5,), hidden, context_shape=(2,))
    x, context = torch.randn(6, 5), torch.randn(6, 2)
    estimator = Bottleneck(exact=True, mode=mode, chunk_size=chunk_size)
    sample = sampled(estimator, field, x, context=context)
    value, truth = field.value_and_divergence(T, x, context)
    torch.testing.assert_close(sample.value, value)
    torch.testing.assert_close(sample.divergence, truth, rtol=0, atol=1e-12)
    bound = at_work(estimator, field)
    assert (bound.cost, bound.is_exact, bound.num_estimates) == (min(hidden), True, 1)


@pytest.mark.parametrize("family", ["rademacher", "gaussian", "orthonormal"])
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_variance_is_that_of_the_small_matrix(family, mode):
    field = perceptron((6,), (9, 4))
    x = torch.randn(1, 6)
    encoder = torch.func.jacrev(lambda y: field.encode(T, y[None])[0])(x[0])
    decoder = torch.func.jacrev(lambda h: field.decode(T, h[None])[0])(field.encode(T, x)[0])
    torch.testing.assert_close(decoder @ encoder, dense_jacobian(field, T, x)[0])
    estimator = Bottleneck(3, family, mode=mode)
    with torch.no_grad():
        sample = sampled(estimator, field, x.expand(6000, 6))
    small = encoder @ decoder
    assert_unbiased(sample.divergence, small.trace())
    variance = estimator.probes.variance(small, 3)
    assert_variance(sample.divergence, variance)
    assert_unbiased(at_work(estimator, field).standard_error(sample.estimates).square(), variance)


def test_all_orthonormal_probes_of_the_bottleneck_are_exact():
    field = perceptron((6,), (9, 3))
    x = torch.randn(4, 6)
    estimator = Bottleneck(3, "orthonormal")
    assert at_work(estimator, field).is_exact
    assert not at_work(Bottleneck(2, "orthonormal"), field).is_exact
    torch.testing.assert_close(sampled(estimator, field, x).divergence, dense_divergence(field, T, x))
    with pytest.raises(ValueError, match=r"Orthonormal has at most d = 3 probes .* got num_probes = 4"):
        at_work(Bottleneck(4, "orthonormal"), field).draw_probes(x)


def test_foreign_fields_and_gradients():
    field = Coder()
    x = torch.randn(3, 4)
    parameters = list(field.parameters())[:-1]
    truth = dense_divergence(field, T, x)
    sample = sampled(Bottleneck(exact=True), field, x)
    torch.testing.assert_close(sample.divergence, truth)
    ours, dense = [
        torch.autograd.grad(d.square().sum(), parameters, materialize_grads=True, allow_unused=True)
        for d in (sample.divergence, truth)
    ]
    torch.testing.assert_close(ours, dense)


@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
def test_the_likelihood_of_a_conditional_flow(gradient):
    field = MLP((4,), (8, 3), context_shape=(2,))
    x, context = torch.randn(3, 4), torch.randn(3, 2)
    solver = ODESolver(gradient=gradient)
    torch.testing.assert_close(
        CNF(field, Bottleneck(exact=True), solver).log_prob(x, context),
        CNF(field, Analytic(), solver).log_prob(x, context),
        rtol=0,
        atol=1e-9,
    )


def test_errors():
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"num_probes must be >= 1, got 0; for no sampling noise set exact=True"):
        Bottleneck(0)
    with pytest.raises(ValueError, match="mode must be"):
        Bottleneck(mode="up")
    needs = r"Bottleneck\(\) needs a field with encode\(t, x\), decode\(t, h\) and bottleneck_width, .* and got "
    instead = r"; choose Hutchinson\(num_probes=\.\.\.\) or Exact\(\)"
    with pytest.raises(TypeError, match=needs + "Linear" + instead):
        CNF(Linear((4,)), Bottleneck()).log_prob(x)
    with pytest.raises(TypeError, match=needs + "sin" + instead):
        divergence(torch.sin, x, estimator=Bottleneck(exact=True))
    field = Coder()
    field.bottleneck_width = 3
    with pytest.raises(
        ValueError, match=r"encode\(t, x\) must return .* shape \(3, 3\) by the field's bottleneck_width, got \(3, 2\)"
    ):
        sampled(Bottleneck(), field, x)
    field = Coder()
    field.outwards = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"one velocity a point, of shape \(3, 4\), got \(3, 1\)"):
        sampled(Bottleneck(), field, x)


def test_costs_less_noise_than_hutchinson_where_the_event_is_wide():
    """A rank of H among d ≫ H directions: probes outside the small space are wasted."""
    field = perceptron((60,), (40, 4))
    x = torch.randn(1, 60).expand(3000, 60)
    with torch.no_grad():
        inside, outside = [sampled(kind, field, x).divergence.var() for kind in (Bottleneck(2), Hutchinson(2))]
    assert inside < outside
