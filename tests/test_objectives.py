"""Objectives: their minimisers and gradients, and that all randomness is explicit."""

import math

import pytest
import torch

from flows import CNF, ODESolver
from flows.datasets import Batch
from flows.divergence import Hutchinson
from flows.fields import MLP, Linear
from flows.objectives import FlowMatching, MaximumLikelihood
from flows.objectives.posterior import posterior_moments
from flows.transforms import Dequantise, Standardise


class GaussianVelocity(torch.nn.Module):
    """The marginal velocity E[x₁ − x₀ | x_t] of the linear path from N(0, I) to N(0, s² I)."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, t, x):
        variance = (1 - t) ** 2 + t**2 * self.scale**2
        return x * ((t * self.scale**2 - (1 - t)) / variance).reshape(-1, 1)


def test_flow_matching_is_minimised_by_the_marginal_velocity():
    x = torch.randn(20_000, 2) * 0.5

    def loss(scale):
        flow = CNF(GaussianVelocity(scale), event_shape=(2,))
        return FlowMatching("sampled")(flow, Batch(x), torch.Generator().manual_seed(5)).loss

    assert loss(0.5) < min(loss(0.45), loss(0.55))
    # Var(x₁ − x₀ | x_t) per dimension is s²/((1 − t)² + t² s²), whose integral over t is s π/2
    assert abs(loss(0.5) - 0.5 * torch.pi / 2) < 0.02


def test_that_velocity_carries_the_base_to_the_data():
    flow = CNF(GaussianVelocity(0.5), event_shape=(2,), solver=ODESolver(rtol=1e-9, atol=1e-9))
    x = torch.randn(10, 2)
    truth = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2), 0.5), 1)
    torch.testing.assert_close(flow.log_prob(x), truth.log_prob(x), rtol=0, atol=1e-7)


def test_maximum_likelihood_is_the_mean_negative_log_density_in_data_space():
    points = torch.randn(64, 3) * 2 + 1
    flow = CNF(Linear((3,)), transform=Standardise((3,)).fit(points))
    out = MaximumLikelihood()(flow, Batch(points))
    torch.testing.assert_close(out.loss, -flow.log_prob(points).mean())
    assert out.metrics["nll"] == out.loss
    assert out.metrics["divergence_standard_error"] == 0
    assert out.statistics.nfe_forward > 0


def test_more_importance_samples_bring_the_bound_nearer_to_the_probability_of_a_level():
    """A standard normal flow of one pixel, whose cells have known probabilities, with uniform noise."""
    flow = CNF(Linear((1,), torch.zeros(1, 1)), solver=ODESolver("euler", step_size=1.0), transform=Dequantise(3))
    levels = torch.arange(3.0)
    exact = -(torch.special.ndtr(levels + 1) - torch.special.ndtr(levels)).log().mean()
    batch = Batch(levels.repeat(4000).unsqueeze(1))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        bounds = [MaximumLikelihood(importance_samples=k)(flow, batch, generator).loss for k in (1, 2, 8, 64)]
    assert bounds == sorted(bounds, reverse=True)
    assert exact < bounds[-1] < exact + 0.01 < bounds[0] - 0.1
    u = (torch.arange(1000) + 0.5) / 1000  # with one draw: −E log p(x + u)
    whole = 0.5 * (levels.unsqueeze(1) + u).square().mean() + 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(bounds[0], whole, rtol=0, atol=0.03)


def test_importance_samples_need_noise_and_keep_contexts_beside_their_points():
    flow = CNF(MLP((1,), (8,), context_shape=(1,)), transform=Dequantise(3))
    points, context = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [-1.0]])
    generator = torch.Generator().manual_seed(0)
    loss = MaximumLikelihood(importance_samples=2)(flow, Batch(points, context), generator).loss
    generator.manual_seed(0)
    values = flow.estimate_log_prob(points.repeat_interleave(2, 0), context.repeat_interleave(2, 0), generator).value
    torch.testing.assert_close(loss, -values.view(2, 2).exp().mean(1).log().mean())
    continuous = CNF(MLP((2,), (8,)))
    with pytest.raises(ValueError, match=r"importance_samples=4 draws the dequantisation noise.*leave importance_"):
        MaximumLikelihood(importance_samples=4)(continuous, Batch(torch.randn(8, 2)))
    noisy = CNF(MLP((3,), (8,)), Hutchinson(), transform=Dequantise(3))
    with pytest.raises(ValueError, match=r"Hutchinson is not exact for MLP .* importance_samples=2 would reward its"):
        MaximumLikelihood(importance_samples=2)(noisy, Batch(torch.zeros(4, 3)))
    with pytest.raises(ValueError, match="importance_samples must be a whole number >= 1, got 0"):
        MaximumLikelihood(importance_samples=0)


def test_the_generator_decides_every_random_number():
    flow = CNF(MLP((2,), (8,)), Hutchinson(2))
    batch = Batch(torch.randn(16, 2))
    for objective in (FlowMatching(), MaximumLikelihood()):
        losses = []
        for seed in (1, 1, 2):
            torch.manual_seed(len(losses))  # the global generator must not matter
            losses.append(objective(flow, batch, torch.Generator().manual_seed(seed)).loss)
        assert losses[0] == losses[1] != losses[2]


def test_context_reaches_the_field():
    flow = CNF(MLP((2,), (8,), context_shape=(1,)))
    x = torch.randn(16, 2)
    for objective in (FlowMatching(), MaximumLikelihood()):
        losses = [
            objective(flow, Batch(x, torch.full((16, 1), c)), torch.Generator().manual_seed(1)).loss for c in (0.0, 3.0)
        ]
        assert losses[0] != losses[1]


def test_the_marginal_target_keeps_its_digits_under_autocast():
    pool, noise, fraction = torch.randn(256, 2), torch.randn(64, 2), torch.full((64, 1), 0.99)
    position = torch.lerp(noise, pool[:64], fraction)
    plain = posterior_moments(position.float(), fraction.float(), 1 - fraction.float(), pool.float())[0]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            posterior_moments(position.float(), fraction.float(), 1 - fraction.float(), pool.float())[0], plain
        )


@pytest.mark.parametrize("dims", [1, 8, 9, 20], ids=str)  # summed one by one up to 8, expanded beyond
def test_the_marginal_target_weighs_by_the_density_of_the_noise(dims):
    pool, noise, fraction = torch.randn(300, dims), torch.randn(200, dims), torch.linspace(0, 0.999, 200).unsqueeze(1)
    position = torch.lerp(noise, pool[:200], fraction)
    noises = torch.distributions.Normal(fraction.unsqueeze(2) * pool, (1 - fraction).unsqueeze(2))
    log_density = noises.log_prob(position.unsqueeze(1)).sum(2)
    expected = log_density.softmax(1) @ pool
    torch.testing.assert_close(posterior_moments(position, fraction, 1 - fraction, pool)[0], expected)
    narrow = (tensor.float() for tensor in (position, fraction, 1 - fraction, pool))
    torch.testing.assert_close(posterior_moments(*narrow)[0], expected.float(), rtol=1e-3, atol=1e-3)
