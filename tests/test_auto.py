"""The estimator that suits the field: which one, that it is that one, and what a run gets by default."""

import pytest
import torch
from problems import Convolutions, assert_unbiased, at_work, dense_divergence, perceptron, sampled

from flows import CNF
from flows.divergence import Analytic, Auto, Exact, Hutchinson, Probing
from flows.fields import MLP, ConvNet


@pytest.mark.parametrize(
    ("field", "event_shape", "estimator", "choice"),
    [
        (MLP((500,)), (500,), Auto(), Analytic()),
        (torch.nn.Tanh(), (32,), Auto(), Exact()),
        (torch.nn.Tanh(), (33,), Auto(), Hutchinson(2)),
        (torch.nn.Tanh(), (33,), Auto(max_products=33, num_probes=5), Exact()),
        (ConvNet((1, 28, 28), (4, 4, 4)), (1, 28, 28), Auto(), Probing(5)),
        (ConvNet((1, 2, 2), (4, 4, 4)), (1, 2, 2), Auto(), Exact()),
        (ConvNet((3, 28, 28), (4, 4, 4)), (3, 28, 28), Auto(num_probes=3), Hutchinson(3)),
        (ConvNet((3, 28, 28), (4, 4, 4)), (3, 28, 28), Auto(max_products=75), Probing(5)),
        (torch.sin, (7,), Auto(), Exact()),
    ],
)
def test_choices(field, event_shape, estimator, choice):
    bound = at_work(estimator, field, event_shape)
    assert bound == choice
    assert bound.cost == at_work(choice, field, event_shape).cost <= estimator.max_products
    assert bound.description == type(choice).__name__


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_exact_by_probing(padding_mode):
    field = Convolutions((1, 9, 9), 1, padding_mode)
    bound, x, t = at_work(Auto(), field), torch.randn(4, 1, 9, 9), torch.tensor(0.3)
    estimates = bound(t, x, bound.draw_probes(x)).estimates
    torch.testing.assert_close(estimates, dense_divergence(field, t, x).unsqueeze(0), rtol=0, atol=1e-10)
    assert bound.standard_error(estimates.detach()).eq(0).all()


def test_unbiased_with_a_standard_error_where_exactness_is_too_dear():
    field = MLP((7,), (8,))
    without_closed_form = lambda t, x: field(t, x)  # noqa: E731
    estimator, x, t = Auto(max_products=6, num_probes=4), torch.randn(1, 7), torch.tensor(0.3)
    estimates = sampled(estimator, without_closed_form, x.expand(4000, 7)).estimates.detach()
    assert_unbiased(estimates.mean(0), dense_divergence(field, t, x).item())
    errors = at_work(estimator, without_closed_form, (7,)).standard_error(estimates)
    assert errors.square().mean() == pytest.approx(estimates.mean(0).var().item(), rel=0.15)


def test_a_flow_takes_it_by_default():
    flow = CNF(perceptron((3,)))
    assert flow.divergence == Auto()
    x = torch.randn(5, 3)
    torch.testing.assert_close(flow.log_prob(x), CNF(flow.field, Analytic()).log_prob(x))
    assert flow.estimate_log_prob(x, solver_error=False).standard_error.eq(0).all()


def test_errors():
    with pytest.raises(ValueError, match="max_products must be >= 0, got -1"):
        Auto(max_products=-1)
    with pytest.raises(ValueError, match="num_probes must be >= 1, got 0"):
        Auto(num_probes=0)
