"""Encoders: contexts in data units, once a solve, kept with the flow, trained with the field."""

import pytest
import torch
from torch import nn

import flows
from flows.encoders import Embedding, Encoder, Standardised
from flows.objectives import FlowMatching, MaximumLikelihood
from flows.training.building import build_flow


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def contexts(n=500, size=3):
    return 1e6 + torch.tensor([1.0, 10.0, 0.1]) * torch.randn(n, size, dtype=torch.float64)


def test_standardised_contexts_have_mean_0_and_sd_1():
    given = contexts()
    features = Standardised(3).fit(given).double()(given)
    torch.testing.assert_close(features.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-7, rtol=0)
    torch.testing.assert_close(features.std(0), torch.ones(3, dtype=torch.float64))
    assert Standardised(3).fit(given).float()(given).dtype == torch.float32


def test_logarithms_keep_signs_and_constant_entries_become_0():
    given = torch.stack([torch.randn(100).exp() * 1e3, torch.full((100,), 7.0)], 1)
    encoder = Standardised(2, scale="log").fit(given)
    features = encoder(given)
    assert (features[:, 1] == 0).all()
    log = given[:, 0].double().log1p()
    torch.testing.assert_close(features[:, 0].double(), (log - log.mean()) / log.std(), atol=1e-5, rtol=1e-5)
    assert encoder(-given)[0, 0] < encoder(given)[0, 0]


def flow_with(encoder):
    field = flows.fields.MLP(2, hidden=(16,), context_shape=encoder.features_shape)
    return flows.CNF(field, encoder=encoder)


def test_a_flow_takes_contexts_in_data_units():
    encoder = Standardised(3).fit(contexts())
    flow, x, given = flow_with(encoder), torch.randn(5, 2), contexts(5)
    plain = flows.CNF(flow.field)
    torch.testing.assert_close(flow.log_prob(x, given), plain.log_prob(x, encoder(given)))
    assert flow.sample((4,), given).shape == (4, 5, 2)
    assert flow.log_prob(x, given[0]).shape == (5,)
    assert flow(given).batch_shape == (5,)
    assert flow.context_shape == (3,)


def test_an_encoder_runs_once_a_solve_and_is_trained_with_the_field():
    encoder = Embedding(context_shape=(3, 4), features=5, hidden=(8,))
    flow = flow_with(encoder)
    calls = []
    encoder.register_forward_hook(lambda *given: calls.append(len(given[2])))
    batch = flows.datasets.Batch(torch.randn(6, 2), torch.randn(6, 3, 4))
    for gradient in ("backprop", "checkpoint", "adjoint"):
        flow.solver = flows.ODESolver("rk4", step_size=0.25, gradient=gradient)
        for objective in (MaximumLikelihood(), FlowMatching(target="sampled")):
            flow.zero_grad()
            calls.clear()
            objective(flow, batch, torch.Generator().manual_seed(0)).loss.backward()
            assert calls == [6]
            assert all(parameter.grad.abs().sum() > 0 for parameter in encoder.network.parameters())


def test_gradients_of_the_encoder_are_those_of_backprop():
    encoder = Embedding(context_shape=3, features=5, hidden=(8,)).double()
    flow = flow_with(encoder).double()
    x, given, found = torch.randn(6, 2).double(), torch.randn(6, 3).double(), {}
    for gradient in ("backprop", "checkpoint"):
        flow.solver = flows.ODESolver("rk4", step_size=0.25, gradient=gradient)
        flow.zero_grad()
        flow.log_prob(x, given).sum().backward()
        found[gradient] = [parameter.grad.clone() for parameter in flow.parameters()]
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other)


def test_dropped_contexts_are_zeros_of_the_features():
    """Guidance leaves out the features, not the context in data units."""
    encoder = Standardised(2).fit(5 + torch.randn(100, 2))
    flow = flow_with(encoder)
    guided, x, given = flow.guided(0.0), torch.randn(4, 2), torch.full((4, 2), 7.0)
    torch.testing.assert_close(guided.log_prob(x, given), flows.CNF(flow.field).log_prob(x, torch.zeros(4, 2)))


def test_a_built_flow_is_fitted_to_the_training_part_and_saved_with_it():
    config = {
        "field": {"_target_": "flows.fields.MLP", "hidden": [8]},
        "encoder": {"_target_": "flows.encoders.Standardised"},
        "divergence": {"_target_": "flows.divergence.Auto"},
        "solver": {"_target_": "flows.ODESolver"},
        "transform": {"_target_": "flows.transforms.Identity"},
    }
    data = flows.datasets.GaussianMean(2, num_validation=10, num_test=10, num_reference=200)
    flow = build_flow(config, data.event_shape, data)
    torch.testing.assert_close(flow.encoder.mean, data.reference_contexts().double().mean(0))
    again = build_flow(config, (2,), context_shape=(2,))
    again.load_state_dict(flow.state_dict())
    x, given = torch.randn(3, 2), torch.randn(3, 2)
    torch.testing.assert_close(again.log_prob(x, given), flow.log_prob(x, given))
    with pytest.raises(ValueError, match=r"encoder is for contexts, and the data 'moons' have none; .*encoder=null"):
        build_flow(config, (2,), flows.datasets.Moons(num_validation=5, num_test=5))


class Wrong(nn.Module):
    def forward(self, context):
        return context[:, :1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Standardised(2, scale="square"), "scale"),
        (lambda: Standardised(2).fit(torch.randn(1, 2)), "at least two contexts .* got 1"),
        (lambda: Standardised(2).fit(torch.randn(9, 2).log()), "hold NaN or infinite"),
        (lambda: Standardised(2)(torch.randn(9, 3)), r"must have the shape \(2,\), got \(3,\)"),
        (lambda: Embedding(2, features=0), "features must be .* >= 1, got 0"),
        (lambda: Embedding(2, features=3, network=Wrong())(torch.randn(9, 2)), r"features of shape \(9, 3\)"),
        (
            lambda: flows.CNF(flows.fields.MLP(2, context_shape=2), encoder=Embedding(4, features=3)),
            r"features of shape \(3,\), and the field MLP takes contexts of shape \(2,\); build it with context_shape",
        ),
        (lambda: flows.CNF(flows.fields.MLP(2), encoder=Standardised(4)), "takes contexts none"),
        (lambda: flow_with(Standardised(3)).sample(2, torch.zeros(2, 4)), r"must have the shape \(3,\), got \(4,\)"),
    ],
)
def test_bad_arguments_are_told(call, message):
    with pytest.raises(flows.FlowsError, match=message):
        call()


def test_an_encoder_is_one_class():
    class Sum(Encoder):
        def __init__(self, context_shape):
            super().__init__(context_shape, 1)

        def forward(self, context):
            return context.flatten(1).sum(1, keepdim=True)

    flow, x = flow_with(Sum((2, 2))), torch.randn(3, 2)
    one, other = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[4.0, 3.0], [2.0, 1.0]])
    torch.testing.assert_close(flow.log_prob(x, one), flow.log_prob(x, other))
