"""The error bars of a likelihood against variance formulas."""

import math

import pytest
import torch
from small_run import small_flow, small_gaussian

import flows
from flows.datasets import Batch
from flows.divergence import Exact, Hutchinson
from flows.evaluation import likelihood, part_batches
from flows.transforms import Compose, Dequantise, UnitInterval

MATRIX = 0.5 * torch.tensor([[0.3, 1.0, -0.4], [0.2, -0.5, 0.6], [0.7, 0.1, 0.2]], dtype=torch.float64)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def linear_flow(divergence, transform=None):
    """v = A x: with frozen probes, log p is off by εᵀAε − tr A at every point."""
    field = flows.fields.Linear((3,), MATRIX)
    return flows.CNF(field, divergence, flows.ODESolver("rk4", step_size=0.25), transform=transform)


def probe_variance():
    symmetric = (MATRIX + MATRIX.T) / 2
    return float(2 * (symmetric.square().sum() - symmetric.diagonal().square().sum()))


@pytest.mark.parametrize("num_probes", [1, 4])
def test_probe_error_is_known_with_one_probe_too(num_probes):
    """One probe shows no spread: the checked points are solved again with others."""
    x = torch.randn(3000, 3, generator=rng(1))
    batches = [Batch(part) for part in x.split(1000)]
    flow = linear_flow(Hutchinson(num_probes=num_probes))
    result = likelihood(flow, batches, rng(), solver_error_points=1500)
    expected = math.sqrt(probe_variance() / num_probes / len(x))
    assert result.probe_standard_error == pytest.approx(expected, rel=0.1)
    assert result.solver_error_points == 1500
    assert result.probe_bias == 0
    unchecked = likelihood(flow, batches, rng())
    assert (unchecked.probe_standard_error is None) == (num_probes == 1)
    assert ("probe error", "unknown with one probe; take two or more") in unchecked.table() or num_probes > 1
    assert likelihood(linear_flow(Exact()), batches, rng()).probe_standard_error == 0


def test_noise_of_the_probes_flatters_a_bound_of_several_draws():
    """log of a mean of noisy exponentials is too high, by what probe_bias says."""
    transform = Compose(dequantise=Dequantise(2), unit=UnitInterval(2))
    x = torch.randint(2, (4000, 3), generator=rng(1)).double()
    found = {}
    for name, estimator in (("exact", Exact()), ("noisy", Hutchinson(num_probes=2))):
        found[name] = likelihood(linear_flow(estimator, transform), [Batch(x)], rng(), num_draws=8)
    noisy = found["noisy"]
    error = math.hypot(noisy.probe_standard_error, noisy.draw_standard_error, found["exact"].draw_standard_error)
    assert found["exact"].probe_bias == 0
    assert noisy.probe_bias > 10 * error
    assert found["exact"].nll - noisy.nll == pytest.approx(noisy.probe_bias, abs=4 * error + 0.1 * noisy.probe_bias)
    assert any(name == "probe bias" for name, _ in noisy.table())
    blind = likelihood(linear_flow(Hutchinson(), transform), [Batch(x[:100])], rng(), num_draws=2)
    assert blind.probe_bias is None


@pytest.mark.parametrize("most", [1, 20, 21, 39, 40, 1000])
def test_the_first_points_of_a_part(most):
    dataset = small_gaussian()
    flow = small_flow(dataset)
    batches, number = part_batches(flow, dataset, "validation", 20, most)
    every = torch.cat([batch.x for batch in dataset.validation_batches(40)])
    assert torch.equal(torch.cat([batch.x for batch in batches]), every[:most])
    assert number == min(most, 40)
