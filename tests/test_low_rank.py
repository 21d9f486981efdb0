"""Hutch++ and XTrace: exact at low rank, unbiased at any, finite at none."""

import pytest
import torch
from problems import (
    EVENT_SHAPES,
    LowRank,
    assert_unbiased,
    assert_variance,
    at_work,
    dense_divergence,
    on_shape,
    perceptron,
    sampled,
)

from flows import CNF, ODESolver
from flows.divergence import Exact, Hutchinson, HutchPlusPlus, Probing, XTrace, divergence
from flows.fields import MLP

T = torch.tensor(0.3, dtype=torch.float64)
DRAWS = 20_000


def linear(matrix):
    return lambda t, x: x @ matrix.T


def draws_of(estimator, matrix, count=DRAWS):
    with torch.no_grad():
        return sampled(estimator, linear(matrix), torch.zeros(count, len(matrix)))


def spectrum(values):
    """A matrix with these singular values that is neither symmetric nor normal."""
    left, right = [torch.linalg.qr(torch.randn(len(values), len(values)))[0] for _ in range(2)]
    return left @ torch.diag(values) @ right.T + torch.diag(values)


EXACT_AT_RANK = [(HutchPlusPlus(9), 3), (HutchPlusPlus(6, "forward"), 2), (XTrace(8), 3), (XTrace(6, "forward"), 2)]


@pytest.mark.parametrize(("estimator", "rank"), EXACT_AT_RANK, ids=str)
@pytest.mark.parametrize("event_shape", EVENT_SHAPES.values(), ids=EVENT_SHAPES)
def test_exact_up_to_a_rank(estimator, rank, event_shape):
    x = torch.randn(50, *event_shape)
    for lower in range(1, rank + 1):
        field = LowRank(event_shape, lower)
        truth = dense_divergence(field, T, x)
        sample = sampled(estimator, field, x)
        torch.testing.assert_close(sample.estimates, truth.expand_as(sample.estimates), rtol=0, atol=1e-9)
    field = LowRank(event_shape, rank + 1)
    assert (sampled(estimator, field, x).divergence - dense_divergence(field, T, x)).abs().max() > 1e-4


@pytest.mark.parametrize("estimator", [HutchPlusPlus(12), XTrace(8)], ids=str)
def test_gradients_are_exact_up_to_a_rank(estimator):
    """With constants in place of QR's derivatives: the gradient at rank 2 is that of the trace plus noise off it."""
    field = LowRank((7,), 2)
    x = torch.randn(1, 7)
    truth = torch.autograd.grad(dense_divergence(field, T, x).sum(), list(field.parameters()))
    sample = sampled(estimator, field, x.expand(4000, 7))
    gradient = torch.autograd.grad(sample.divergence.mean(), list(field.parameters()))
    for ours, dense in zip(gradient, truth, strict=True):
        assert (ours - dense).norm() < 0.1 * dense.norm()


@pytest.mark.parametrize("estimator", [HutchPlusPlus(12), XTrace(8)], ids=str)
@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_and_rank_deficient_fields_are_finite(estimator, mode, dtype):
    estimator = type(estimator)(estimator.num_products, mode)
    field = MLP((6,), (8,)).to(dtype)
    torch.nn.init.zeros_(field.out.weight)
    x = torch.randn(5, 6, dtype=dtype)
    probes = at_work(estimator, field).draw_probes(x)
    sample = at_work(estimator, field)(T.to(dtype), x, probes)
    assert sample.estimates.eq(0).all()
    sample.divergence.sum().backward()
    assert field.out.weight.grad.isfinite().all()
    assert field.out.weight.grad.abs().max() > 0
    mask = torch.tensor([1, 0, 0, 1, 0, 0], dtype=dtype)
    for slopes in (mask, 1e-30 * mask, 1e12 * mask):
        sample = at_work(estimator, lambda t, x, slopes=slopes: slopes * x, (6,))(T, x, probes)
        expected = slopes.sum().expand_as(sample.estimates)
        torch.testing.assert_close(sample.estimates, expected, rtol=3e-3 if dtype == torch.float32 else 1e-9, atol=0)


@pytest.mark.parametrize("estimator", [HutchPlusPlus(6), XTrace(6)], ids=str)
def test_values_that_are_not_finite_pass_through(estimator):
    """So that the solver can say where they came from."""
    assert sampled(estimator, lambda t, x: x * torch.nan, torch.randn(3, 5)).estimates.isnan().all()


@pytest.mark.parametrize("values", [torch.ones(6), 0.3 ** torch.arange(6)], ids=["flat", "decaying"])
@pytest.mark.parametrize("estimator", [HutchPlusPlus(6), HutchPlusPlus(9), XTrace(4), XTrace(6), XTrace(10)], ids=str)
def test_unbiased(estimator, values):
    matrix = spectrum(values.to(torch.get_default_dtype()))
    for row in draws_of(estimator, matrix).estimates:
        assert_unbiased(row, matrix.trace())


def test_residual_probes_that_the_sketch_has_seen_are_biased():
    """The mistake that independent probes avoid: far beyond the 4 standard errors of `test_unbiased`."""

    class Reusing(HutchPlusPlus):
        def draw_probes(self, x, generator=None):
            sketch, _ = super().draw_probes(x, generator).chunk(2)
            return torch.cat([sketch, sketch])

    matrix = spectrum(torch.ones(6))
    honest, reusing = [draws_of(kind(6), matrix).divergence for kind in (HutchPlusPlus, Reusing)]
    assert_unbiased(honest, matrix.trace())
    assert abs(reusing.mean() - matrix.trace()) > 20 * reusing.std() / DRAWS**0.5


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_hutch_plus_plus_has_the_stated_variance_given_its_sketch(mode):
    matrix = spectrum(torch.rand(6) + 0.5)
    estimator = at_work(HutchPlusPlus(6, mode), linear(matrix), (6,))
    x = torch.zeros(DRAWS, 6)
    sketch, residual = estimator.draw_probes(x).chunk(2)
    sketch = sketch[:, :1].expand_as(sketch)
    draws = estimator(T, x, torch.cat([sketch, residual]))
    target = matrix if mode == "forward" else matrix.T
    left = torch.linalg.svd(target @ sketch[:, 0].T, full_matrices=False)[0]
    off = torch.eye(6) - left @ left.T
    symmetric = (off @ (matrix + matrix.T) @ off) / 2
    stated = (2 * symmetric.square().sum() - 2 * symmetric.diagonal().square().sum()) / 2
    assert_variance(draws.divergence, stated)
    squared_error = estimator.standard_error(draws.estimates).square()
    assert_unbiased(squared_error, stated)


def test_xtrace_is_its_definition():
    """Against a QR for each test vector left out."""
    d, k = 7, 4
    matrix = spectrum(torch.rand(d))
    estimator = at_work(XTrace(2 * k, "forward"), linear(matrix), (d,))
    x = torch.zeros(5, d)
    probes = estimator.draw_probes(x)
    estimates = estimator(T, x, probes).estimates
    for b in range(5):
        omega = probes[:, b].T
        for i in range(k):
            others = torch.linalg.qr(matrix @ omega[:, [j for j in range(k) if j != i]])[0]
            rest = omega[:, i] - others @ (others.T @ omega[:, i])
            left = (d - k + 1) * (rest @ matrix @ rest) / (rest @ rest)
            torch.testing.assert_close(estimates[i, b], (others.T @ matrix @ others).trace() + left)


def test_xtrace_gives_the_error_estimate_of_the_paper():
    matrix = spectrum(0.5 ** torch.arange(12.0).to(torch.get_default_dtype()))
    estimates = draws_of(XTrace(12), matrix).estimates
    mean = estimates.mean(0)
    paper = ((estimates - mean).square().sum(0) / (6 * 5)).sqrt()
    ours = on_shape(XTrace(12), (12,)).standard_error(estimates)
    torch.testing.assert_close(ours, paper)
    assert 0.6 < ours.square().mean() / mean.var() < 1


def test_sketches_pay_where_singular_values_decay_and_only_there():
    decaying = spectrum(0.3 ** torch.arange(12.0).to(torch.get_default_dtype()))
    flat = spectrum(torch.ones(12))
    for matrix, pays in ((decaying, True), (flat, False)):
        hutchinson = Hutchinson(6, "gaussian").variance(matrix)
        assert (draws_of(HutchPlusPlus(6), matrix).divergence.var() < hutchinson / 3) == pays
    assert draws_of(XTrace(6), decaying).divergence.var() < draws_of(HutchPlusPlus(6), decaying).divergence.var()


@pytest.mark.parametrize("estimator", [HutchPlusPlus(6), XTrace(6)], ids=str)
def test_the_right_hand_side_stays_smooth(estimator):
    """A sketch drawn anew at each evaluation would stall an adaptive solver; a fixed one costs no more steps."""
    field = perceptron((6,), scale=1.5)
    x = torch.randn(4, 6)
    nfe = {
        kind: CNF(field, kind, ODESolver(rtol=1e-6, atol=1e-6)).estimate_log_prob(x, solver_error=False).nfe
        for kind in (estimator, Exact())
    }
    assert nfe[estimator] <= 2 * nfe[Exact()]


def test_a_sketch_that_fills_the_space_is_the_exact_trace():
    x = torch.randn(3, 4)
    matrix = torch.randn(4, 4)
    for estimator in (HutchPlusPlus(12), HutchPlusPlus(30), XTrace(8), XTrace(20)):
        assert on_shape(estimator, (4,)).is_exact
        assert on_shape(estimator, (4,)).cost == 4
        sample = sampled(estimator, linear(matrix), x)
        assert sample.estimates.shape == (estimator.num_estimates, 3)
        torch.testing.assert_close(sample.estimates, matrix.trace().expand_as(sample.estimates))
    for estimator in (HutchPlusPlus(9), XTrace(6)):
        assert not on_shape(estimator, (4,)).is_exact
        assert on_shape(estimator, (4,)).cost == estimator.num_products


def test_standard_error_needs_two_estimates():
    estimates = sampled(HutchPlusPlus(3), linear(torch.randn(4, 4)), torch.randn(3, 4)).estimates
    assert on_shape(HutchPlusPlus(3), (4,)).standard_error(estimates).isnan().all()


@pytest.mark.parametrize(("bad", "try_"), [(0, 3), (2, 3), (7, 6), (8, 9)])
def test_hutch_plus_plus_budget(bad, try_):
    with pytest.raises(ValueError, match=rf"num_products must be a multiple of 3 and >= 3 .*got {bad}; try {try_}"):
        HutchPlusPlus(bad)


@pytest.mark.parametrize(("bad", "try_"), [(0, 4), (2, 4), (7, 8)])
def test_xtrace_budget(bad, try_):
    with pytest.raises(ValueError, match=rf"num_products must be even and >= 4 .*got {bad}; try {try_}"):
        XTrace(bad)


def test_modes_are_checked():
    for kind in (HutchPlusPlus, XTrace, Probing):
        with pytest.raises(ValueError, match="mode must be 'reverse' or 'forward', got 'up'"):
            kind(6, mode="up")
        with pytest.raises(ValueError, match="chunk_size must be >= 1"):
            kind(6, chunk_size=0)


def test_any_function_by_name_of_the_sketch():
    x = torch.randn(2, 3, 5)
    value = divergence(torch.sin, x, 1, XTrace(10))
    torch.testing.assert_close(value, x.cos().sum(-1))
