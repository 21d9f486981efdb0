"""Particles and lattice fields against dense Gaussians, their symmetries, and their entropies."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from flows.datasets import FreeField, Particles


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def spring_covariance(particles, dimensions, spread):
    """The inverse of the matrix of the energy, built bond by bond, beside the trap of the centre."""
    size = particles * dimensions
    precision = torch.zeros(size, size)
    for i in range(particles):
        for j in range(i):
            for k in range(dimensions):
                bond = torch.zeros(size)
                bond[i * dimensions + k], bond[j * dimensions + k] = 1, -1
                precision += torch.outer(bond, bond) / (particles * spread**2)
    for k in range(dimensions):
        centre = torch.zeros(size)
        centre[k::dimensions] = 1 / math.sqrt(particles)
        precision += torch.outer(centre, centre)
    return torch.linalg.inv(precision)


def neighbour_covariance(size, mass):
    """The inverse of the matrix of the action, built site by site."""
    sites = torch.cartesian_prod(*[torch.arange(n) for n in size]).reshape(-1, len(size)).tolist()
    number = {tuple(site): i for i, site in enumerate(sites)}
    precision = mass**2 * torch.eye(len(sites))
    for site in sites:
        for axis in range(len(size)):
            neighbour = list(site)
            neighbour[axis] = (neighbour[axis] + 1) % size[axis]
            difference = torch.zeros(len(sites))
            difference[number[tuple(site)]] += 1
            difference[number[tuple(neighbour)]] -= 1
            precision += torch.outer(difference, difference)
    return torch.linalg.inv(precision)


@pytest.mark.parametrize(("particles", "dimensions", "spreads"), [(4, 2, [0.7]), (3, 3, [0.5, 1.5]), (2, 1, [1, 2, 3])])
def test_particles_are_a_mixture_of_gaussians(particles, dimensions, spreads):
    density = Particles(particles, dimensions, spreads)
    covariances = torch.stack([spring_covariance(particles, dimensions, spread) for spread in spreads])
    phases = MultivariateNormal(torch.zeros(particles * dimensions), covariances)
    x = density.sample(60_000, rng())
    points = x[:50].flatten(1).unsqueeze(1)
    expected = phases.log_prob(points).logsumexp(1) - math.log(len(spreads))
    torch.testing.assert_close(density.log_prob(x[:50]), expected)
    torch.testing.assert_close(torch.cov(x.flatten(1).T), covariances.mean(0), rtol=0, atol=0.06 * max(spreads) ** 2)
    if len(spreads) == 1:
        assert density.entropy == pytest.approx(phases.entropy().item(), abs=1e-8)


@pytest.mark.parametrize(("size", "mass"), [((6,), 0.3), ((4, 5), 0.5), ((2, 3, 3), 1.0)])
def test_free_field_is_a_gaussian(size, mass):
    density = FreeField(size, mass)
    sites = math.prod(size)
    exact = MultivariateNormal(torch.zeros(sites), neighbour_covariance(size, mass))
    x = density.sample(60_000, rng())
    torch.testing.assert_close(density.log_prob(x[:50]), exact.log_prob(x[:50].flatten(1)))
    torch.testing.assert_close(torch.cov(x.flatten(1).T), exact.covariance_matrix, rtol=0, atol=0.05)
    assert density.entropy == pytest.approx(exact.entropy().item(), abs=1e-10)


@pytest.mark.parametrize("density", [Particles(), Particles(5, 3), Particles(2, 1, [1e-4, 1, 1e4]), FreeField()])
def test_entropy_is_the_mean_of_minus_log_prob(density):
    nll = -density.log_prob(density.sample(100_000, rng(1)))
    assert abs(nll.mean().item() - density.entropy) < 4 * nll.std().item() / math.sqrt(len(nll))


def test_symmetries():
    density, x = Particles(4, 3), Particles(4, 3).sample(20, rng())
    rotation, _ = torch.linalg.qr(torch.randn(3, 3))
    torch.testing.assert_close(density.log_prob(x[:, [2, 0, 3, 1]]), density.log_prob(x))
    torch.testing.assert_close(density.log_prob(x @ rotation.T), density.log_prob(x))
    field, x = FreeField((4, 6)), FreeField((4, 6)).sample(20, rng())
    torch.testing.assert_close(field.log_prob(x.roll((1, 2), (2, 3))), field.log_prob(x))
    torch.testing.assert_close(field.log_prob(x.flip(3)), field.log_prob(x))


@pytest.mark.parametrize("density", [Particles(), FreeField()])
def test_log_prob_keeps_shape_dtype_and_gradient(density):
    x = density.sample(6, rng()).reshape(2, 3, *density.event_shape)
    assert density.log_prob(x).shape == (2, 3)
    assert density.log_prob(x.float()).dtype == torch.float32
    assert torch.autograd.gradcheck(density.log_prob, x[0].clone().requires_grad_())
    assert torch.equal(density.sample(3, rng(5)), density.sample(3, rng(5)))


def test_errors():
    with pytest.raises(ValueError, match="num_particles must be a whole number >= 2, got 1"):
        Particles(1)
    with pytest.raises(ValueError, match="each of spreads must be a finite number > 0, got -2"):
        Particles(spreads=[1, -2])
    with pytest.raises(ValueError, match=r"must hold points of shape \(\*batch, 4, 2\), got \(5, 8\)"):
        Particles().log_prob(torch.zeros(5, 8))
    with pytest.raises(ValueError, match="each entry of size must be a whole number >= 2, got 1"):
        FreeField((8, 1))
    with pytest.raises(ValueError, match="mass must be a finite number > 0, got 0"):
        FreeField(mass=0)
    with pytest.raises(ValueError, match=r"must hold points of shape \(\*batch, 1, 8, 8\), got \(5, 64\)"):
        FreeField().log_prob(torch.zeros(5, 64))
