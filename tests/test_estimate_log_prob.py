"""A likelihood with its errors: the standard error from the probes, the solver error, and what it cost."""

import pytest
import torch
from problems import assert_unbiased, perceptron

import flows
from flows.divergence import Bottleneck, Exact, Hutchinson, HutchPlusPlus, Probing, XTrace

STEPS = flows.ODESolver("rk4", step_size=0.25)  # one grid for all, so that only the probes differ
DIMENSION = 6

# ratio: of the mean squared error to the mean squared standard error
ESTIMATORS = {
    "rademacher": (Hutchinson(4), (0.85, 1.15)),
    "gaussian": (Hutchinson(4, "gaussian"), (0.85, 1.15)),
    "sphere": (Hutchinson(4, "sphere"), (0.85, 1.15)),
    "orthonormal": (Hutchinson(4, "orthonormal"), (0.85, 1.15)),
    "coordinates": (Hutchinson(4, "coordinates"), (0.85, 1.15)),
    "probing": (Probing(3, num_repeats=4), (0.85, 1.15)),
    "bottleneck": (Bottleneck(4), (0.85, 1.15)),
    "hutch_plus_plus": (HutchPlusPlus(6), (0.8, 1.25)),
    "xtrace": (XTrace(8), (0.8, 1.25)),
}


@pytest.fixture(scope="module")
def many():
    """25 points with 120 independent draws of the probes each, and the truth on the same grid of times."""
    torch.manual_seed(1)
    field = perceptron((DIMENSION,), scale=1.7).double()
    x = torch.randn(25, DIMENSION, dtype=torch.float64)
    with torch.no_grad():
        truth = flows.CNF(field, Exact(), STEPS).log_prob(x)
    return field, x.expand(120, *x.shape), truth


@pytest.mark.parametrize(("estimator", "limits"), ESTIMATORS.values(), ids=ESTIMATORS)
def test_the_standard_error_is_that_of_the_true_deviations(many, estimator, limits):
    field, x, truth = many
    with torch.no_grad():
        estimate = flows.CNF(field, estimator, STEPS).estimate_log_prob(x, solver_error=False)
    deviations = estimate.value - truth
    ratio = float(deviations.square().mean() / estimate.standard_error.square().mean())
    assert limits[0] < ratio < limits[1]
    assert_unbiased(deviations.flatten(), 0.0)
    # not only on average: points with large deviations are those with large standard errors
    of_points = torch.stack([deviations.square().mean(0), estimate.standard_error.square().mean(0)]).log()
    assert float(torch.corrcoef(of_points)[0, 1]) > 0.8


def test_two_standard_errors_cover(many):
    field, x, truth = many
    with torch.no_grad():
        estimate = flows.CNF(field, Hutchinson(16), STEPS).estimate_log_prob(x, solver_error=False)
    inside = ((estimate.value - truth).abs() < 2 * estimate.standard_error).double().mean()
    assert 0.92 < inside < 0.97  # 0.936 for Student's t with 15 degrees of freedom, 0.954 for a normal


def test_the_variance_is_that_of_the_integrated_jacobian(many):
    """For a linear field M = A, whatever the path: Var = 2 (‖S‖² − Σ A_ii²)/K."""
    matrix = torch.randn(4, 4)
    flow = flows.CNF(flows.fields.Linear((4,), matrix, torch.zeros(4)), Hutchinson(3), STEPS)
    with torch.no_grad():
        estimate = flow.estimate_log_prob(torch.randn(4).expand(4000, 4), solver_error=False)
    expected = Hutchinson(3).variance(matrix)
    assert float(estimate.value.var()) == pytest.approx(float(expected), rel=0.1)
    assert float(estimate.standard_error.square().mean()) == pytest.approx(float(expected), rel=0.1)


def test_the_solver_error_is_free_of_the_noise_of_the_probes(many):
    field, x, _ = many
    flow = flows.CNF(field, Hutchinson(1, "gaussian"), flows.ODESolver(rtol=1e-4, atol=1e-4))
    with torch.no_grad():
        estimate = flow.estimate_log_prob(x[0])
        again = flow.estimate_log_prob(x[0])
    noise = (estimate.value - again.value).abs().mean()
    assert 0 < estimate.solver_error.max() < 0.02 * noise


@pytest.mark.parametrize(
    "solver",
    [
        flows.ODESolver(method="euler", step_size=0.05),
        flows.ODESolver(method="midpoint", step_size=0.1),
        flows.ODESolver(rtol=1e-3, atol=1e-3),
    ],
    ids=lambda solver: solver.method,
)
def test_the_solver_error_is_the_true_error(many, solver):
    field, x, _ = many
    flow = flows.CNF(field, Exact(), solver)
    with torch.no_grad():
        estimate = flow.estimate_log_prob(x[0][:50])
        flow.solver = flows.ODESolver(method="rk4", step_size=0.005)
        error = (estimate.value - flow.log_prob(x[0][:50])).abs()
    assert float(estimate.solver_error.mean()) == pytest.approx(float(error.mean()), rel=0.15)


def test_evaluations_are_counted_for_the_value_alone(many):
    field, x, _ = many
    calls = []
    handle = field.register_forward_hook(lambda *_: calls.append(1))
    flow = flows.CNF(field, Hutchinson(2), flows.ODESolver())
    try:
        with torch.no_grad():
            flow.log_prob(x[0])  # a field with a hook is examined at its first use
            calls.clear()
            alone = flow.estimate_log_prob(x[0], solver_error=False)
            assert alone.nfe == len(calls) > 10
            assert alone.solver_error is None
            calls.clear()
            both = flow.estimate_log_prob(x[0], generator=torch.Generator().manual_seed(0))
    finally:
        handle.remove()
    assert both.nfe < len(calls) / 2  # the tighter solve takes more than the value itself
    assert both.statistics.nfe_forward == both.nfe


def test_shapes_seeds_and_gradients(many):
    field, x, _ = many
    flow = flows.CNF(field, Hutchinson(3), STEPS, transform=flows.transforms.Standardise((DIMENSION,)).fit(x[0] * 3))
    points = x[:2, :5]
    first, second, other = (
        flow.estimate_log_prob(points, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    )
    for name in ("value", "standard_error", "solver_error"):
        assert getattr(first, name).shape == (2, 5)
        assert torch.equal(getattr(first, name), getattr(second, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))
        assert getattr(first, name).requires_grad == (name == "value")
    assert torch.equal(first.value, flow.log_prob(points, generator=torch.Generator().manual_seed(0)))


def test_large_batches_are_evaluated_in_pieces(monkeypatch):
    flow = flows.CNF(flows.fields.MLP((2,), (8, 8))).double()
    x, sizes = torch.randn(11, 2, dtype=torch.float64), []
    expected = flow.log_prob(x).detach()
    monkeypatch.setattr("flows.dynamics.piece_size", lambda: 5)
    monkeypatch.setattr(
        flows.divergence.Analytic,
        "__call__",
        lambda self, t, x, probes=None, call=flows.divergence.Analytic.__call__: (
            sizes.append(len(x)) or call(self, t, x, probes)
        ),
    )
    with torch.no_grad():
        torch.testing.assert_close(flow.log_prob(x), expected, rtol=1e-13, atol=1e-13)
    assert set(sizes) == {5, 6}
    sizes.clear()
    flow.log_prob(x)
    assert 11 in sizes
