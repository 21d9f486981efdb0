"""Parameters of known equations, their reports and standard errors."""

import math

import numpy as np
import pytest
import torch

import flows
from flows.datasets import SeriesBatch
from flows.evaluation import fitted_parameters, parameter_estimates
from flows.fields import MLP, Coefficient, Physics


def batch_of(times, values):
    return SeriesBatch(
        values,
        None,
        times=times,
        mask=torch.ones_like(times, dtype=torch.bool),
        observed=torch.ones_like(values, dtype=torch.bool),
    )


def regression(num_series, generator):
    """Series of dx/dt = a + b t with noise: x − x0 = a t + b t²/2 is linear in a and b."""
    times = torch.rand(num_series, 12, generator=generator, dtype=torch.float64).cumsum(1)
    start = torch.randn(num_series, 1, generator=generator, dtype=torch.float64)
    clean = start + 0.8 * (times - times[:, :1]) - 0.3 * (times.square() - times[:, :1].square()) / 2
    noise = 0.1 * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    noise[:, 0] = 0
    return times, (clean + noise)[..., None]


def test_standard_errors_are_those_of_linear_regression():
    times, values = regression(5, torch.Generator().manual_seed(0))
    t = (times[:, 1:] - times[:, :1]).flatten()
    half = (times[:, 1:].square() - times[:, :1].square()).flatten() / 2
    design = torch.stack([t, half], 1).numpy()
    y = (values[:, 1:, 0] - values[:, :1, 0]).flatten().numpy()
    best, squares, *_ = np.linalg.lstsq(design, y, rcond=None)
    expected = np.sqrt(np.diag(np.linalg.inv(design.T @ design)) * squares[0] / (len(y) - 2))
    for bounds in ({}, {"low": -1.0}, {"low": -2.0, "high": 2.0}):  # the parametrisation does not matter
        starts = {"a": Coefficient(float(best[0]), **bounds), "b": Coefficient(float(best[1]), **bounds)}
        field = Physics(lambda t, x, a, b: (a + b * t).reshape(-1, 1) + 0 * x, (1,), starts).double()
        ode = flows.NeuralODE(field)
        found = parameter_estimates(ode, batch_of(times, values))
        for name, value, error in zip("ab", best, expected, strict=True):
            assert found[name].value == pytest.approx(value, rel=1e-6)
            assert found[name].standard_error == pytest.approx(error, rel=1e-4)


def test_standard_errors_are_unknown_where_they_would_say_too_little():
    data = flows.datasets.Pendulum(num_series=6, num_times=10, noise=0.01)
    learned = Physics(flows.equations.pendulum, (2,), correction=MLP((2,), (4,)))
    assert {
        one.standard_error for one in parameter_estimates(flows.NeuralODE(learned), data.part("train")).values()
    } == {None}
    apart = Physics(lambda t, x, a=0.4, b=0.6: -(a + b) * x, (2,))
    assert {one.standard_error for one in parameter_estimates(flows.NeuralODE(apart), data.part("train")).values()} == {
        None
    }
    held = Physics(flows.equations.pendulum, (2,), {"stiffness": 1.0, "friction": Coefficient(0.1, fixed=True)})
    found = parameter_estimates(flows.NeuralODE(held), data.part("train"))
    assert found["friction"].standard_error is None
    assert found["stiffness"].standard_error > 0
    with pytest.raises(ValueError, match="the model has no Physics"):
        parameter_estimates(flows.NeuralODE(MLP((2,))), data.part("train"))


@pytest.mark.slow
def test_the_truth_lies_within_the_errors():
    """The estimates of 40 data sets spread as the standard errors say, with both entries of a state noisy."""
    estimates, errors = [], []
    for seed in range(40):
        data = flows.datasets.LotkaVolterra(num_series=6, num_times=20, noise=0.02, seed=seed)
        ode = flows.NeuralODE(Physics(flows.equations.lotka_volterra, (2,)).double())
        series = data.part("train")
        raws = list(ode.parameters())
        optimiser = torch.optim.LBFGS(raws, max_iter=30, line_search_fn="strong_wolfe")

        def closure(optimiser=optimiser, ode=ode, series=series):
            optimiser.zero_grad()
            loss = flows.objectives.TrajectoryMatching()(ode, series).loss
            loss.backward()
            return loss

        optimiser.step(closure)
        found = parameter_estimates(ode, series)
        estimates.append([one.value for one in found.values()])
        errors.append([one.standard_error for one in found.values()])
    z = (torch.tensor(estimates) - torch.tensor([1.5, 1.0, 3.0, 1.0])) / torch.tensor(errors)
    assert (z.square().mean(0) < 2).all()
    assert (z.square().mean(0) > 0.45).all()
    assert math.isclose(float(z.mean()), 0.0, abs_tol=0.3)


def test_names_of_parameters():
    vector = Physics(lambda t, x, k, c=1.0: -k * x, (2,), {"k": [1.0, 2.0], "c": 3.0})
    assert list(fitted_parameters(flows.NeuralODE(vector))) == ["k[0]", "k[1]", "c"]
    assert fitted_parameters(flows.NeuralODE(MLP((2,)))) == {}
