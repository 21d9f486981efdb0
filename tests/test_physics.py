"""Known equations with parameters to fit."""

import functools
import inspect

import pytest
import torch

import flows
from flows import equations
from flows.fields import MLP, Coefficient, Forced, Physics
from flows.training.settings import instantiate
from flows.training.trusted import UntrustedConfigError, check_trusted
from flows.transforms import Compose, Logit, Standardise, Whiten

SYSTEMS = {"spiral": 2, "lotka_volterra": 2, "pendulum": 2, "lorenz": 3, "two_body": 4, "oscillator": 2}


@pytest.mark.parametrize("name", SYSTEMS)
def test_divergences_of_known_equations(name):
    function = getattr(equations, name)
    parameters = {p.name: 0.7 + 0.1 * i for i, p in enumerate(inspect.signature(function).parameters.values()) if i > 1}
    x = torch.randn(5, SYSTEMS[name], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = x.new_zeros(())
    jacobians = torch.func.vmap(torch.func.jacrev(lambda y: function(t, y, **parameters)))(x)
    expected = jacobians.diagonal(dim1=1, dim2=2).sum(1)
    found = torch.as_tensor(function.divergence(t, x, **parameters)).expand(len(x))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def exact_divergence(field, t, x):
    jacobians = torch.func.vmap(torch.func.jacrev(lambda y: field(t, y[None])[0]))(x)
    return jacobians.diagonal(dim1=1, dim2=2).sum(1)


def corrected(**settings):
    torch.manual_seed(0)
    network = functools.partial(MLP, hidden=(16,))
    return Physics(equations.lotka_volterra, (2,), correction=network, **settings).double()


POINTS = 0.5 + torch.rand(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TIGHT = flows.ODESolver(rtol=1e-8, atol=1e-8)


def test_known_equations_and_a_network_add_up():
    field, t = corrected(correction_scale=0.3), torch.tensor(0.2, dtype=torch.float64)
    expected = equations.lotka_volterra(t, POINTS) + 0.3 * field.correction(t, POINTS)
    torch.testing.assert_close(field(t, POINTS), expected)
    value, divergence = flows.fields.bind(field).value_and_divergence(t, POINTS)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(divergence, exact_divergence(field, t, POINTS))


def test_known_equations_in_a_flow():
    closed, exact = (flows.CNF(corrected(), divergence, TIGHT).log_prob(POINTS) for divergence in ("analytic", "exact"))
    torch.testing.assert_close(closed, exact)
    undeclared = Physics(lambda t, x, rate=0.5: -rate * x * x.cos(), (2,)).double()
    assert flows.fields.bind(undeclared).value_and_divergence is None
    flow = flows.CNF(undeclared, solver=TIGHT)
    y, log_p = flow.sample_and_log_prob((4,))
    torch.testing.assert_close(flow.log_prob(y), log_p, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("transform", [Standardise((2,)), Whiten((2,)), Compose(a=Standardise((2,)), b=Whiten((2,)))])
def test_known_equations_see_the_units_of_the_data(transform):
    data = torch.randn(50, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    transform = transform.double().fit(data @ torch.tensor([[3.0, 1.0], [0.0, 0.4]], dtype=torch.float64) + 5)
    times = torch.linspace(0, 2, 5)
    field = Physics(equations.lotka_volterra, (2,)).double()
    expected = flows.NeuralODE(field, TIGHT).trajectory(POINTS, times).states
    found = flows.NeuralODE(field, TIGHT, transform).trajectory(POINTS, times).states
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    flow = flows.CNF(field, "analytic", TIGHT, transform=transform)
    exact = flows.CNF(field, "exact", TIGHT, transform=transform)
    torch.testing.assert_close(flow.log_prob(POINTS), exact.log_prob(POINTS))
    driven = Forced(Physics(relax, (2,), context_shape=(1,)), times=[0.0, 3.0], values=[0.0, 1.0]).double()
    alone = flows.NeuralODE(driven, TIGHT).trajectory(POINTS, times).states
    behind = flows.NeuralODE(driven, TIGHT, transform).trajectory(POINTS, times).states
    torch.testing.assert_close(behind, alone, rtol=1e-6, atol=1e-6)


def relax(t, x, context, rate=0.7):
    return context - rate * x


def test_transforms_that_are_not_affine_are_refused():
    ode = flows.NeuralODE(Physics(equations.lotka_volterra, (2,)), transform=Logit(0.05))
    with pytest.raises(ValueError, match=r"Logit is no affine transform.*Standardise"):
        ode.trajectory(torch.full((1, 2), 0.5), [0.0, 1.0])


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_gradients_of_parameters(gradient):
    field = corrected(parameters={"alpha": 1.4, "beta": {"start": 0.9, "low": 0}, "gamma": Coefficient(2.5, 0, 5)})
    ode = flows.NeuralODE(field, flows.ODESolver("dopri8", rtol=1e-11, atol=1e-11, gradient=gradient))
    loss = ode.trajectory(POINTS, [0.0, 0.5, 1.0], solver_error=False).states.square().sum()
    names = ["raw_alpha", "raw_beta", "raw_gamma"]
    found = torch.autograd.grad(loss, [getattr(field, name) for name in names])
    for name, gradient_found in zip(names, found, strict=True):
        values = []
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                raw = getattr(field, name)
                raw += step
                values.append(ode.trajectory(POINTS, [0.0, 0.5, 1.0], solver_error=False).states.square().sum())
                raw -= step
        torch.testing.assert_close(gradient_found, (values[0] - values[1]) / 2e-4, rtol=1e-5, atol=1e-6)


def test_parameters_keep_their_bounds():
    bounds = {"a": (None, None), "b": (0.0, None), "c": (None, 2.0), "d": (-1.0, 3.0)}
    parameters = {name: Coefficient(1.5, *bound) for name, bound in bounds.items()} | {
        "e": Coefficient(4.0, fixed=True)
    }
    field = Physics(lambda t, x, a, b, c, d, e, f=7.0: a * x, (2,), parameters)
    for name, value in field.values().items():
        torch.testing.assert_close(value, torch.tensor(4.0 if name == "e" else 1.5))
    assert {name for name, _ in field.named_parameters()} == {"raw_a", "raw_b", "raw_c", "raw_d"}
    with torch.no_grad():
        for raw in field.parameters():
            raw.fill_(-3.0)
    for name, (low, high) in bounds.items():
        value = float(field.values()[name].detach())
        assert low is None or value > low
        assert high is None or value < high


def test_what_is_fitted_is_what_is_named():
    assert list(Physics(equations.lorenz, (3,)).values()) == ["sigma", "rho", "beta"]
    assert list(Physics(equations.lorenz, (3,), {"rho": 20.0}).values()) == ["rho"]
    partial = Physics(functools.partial(equations.pendulum, friction=0.2), (2,))
    torch.testing.assert_close(partial.values()["friction"], torch.tensor(0.2))
    vector = Physics(lambda t, x, k: -k * x, (3,), {"k": [1.0, 2.0, 3.0]})
    torch.testing.assert_close(vector(torch.tensor(0.0), torch.ones(2, 3))[0], torch.tensor([-1.0, -2.0, -3.0]))


def test_bad_settings_of_physics_are_refused_by_name():
    with pytest.raises(ValueError, match="lorenz has no parameter tau; its parameters are sigma, rho, beta"):
        Physics(equations.lorenz, (3,), {"tau": 1.0})
    with pytest.raises(ValueError, match="needs a start of k"):
        Physics(lambda t, x, k: -k * x, (3,))
    with pytest.raises(TypeError, match=r"known must be a function f\(t, x, name=start, \.\.\.\)"):
        Physics(lambda t, x, *rest: x, (3,))
    with pytest.raises(ValueError, match=r"parameters\['sigma'\]: start must be finite, > low and < high"):
        Physics(equations.lorenz, (3,), {"sigma": {"start": -1.0, "low": 0}})
    with pytest.raises(ValueError, match="neither lorenz nor the correction takes one"):
        Physics(equations.lorenz, (3,), context_shape=(2,))
    with pytest.raises(ValueError, match="one velocity a point"):
        flows.NeuralODE(Physics(lambda t, x, k=1.0: x[:, :1], (2,))).trajectory(torch.ones(1, 2), [0.0, 1.0])


def test_a_partial_of_settings_gives_its_parameters():
    config = {
        "_target_": "flows.fields.Physics",
        "known": {"_target_": "flows.equations.pendulum", "_partial_": True, "stiffness": 0.5},
        "parameters": {"stiffness": {"start": 0.8, "low": 0.0}},
        "correction": {"_target_": "flows.fields.MLP", "_partial_": True, "hidden": [8]},
    }
    check_trusted({"field": config})
    field = instantiate(config, "field", event_shape=(2,), context_shape=None)
    assert list(field.values()) == ["stiffness"]
    assert field.correction.hidden == (8,)
    with pytest.raises(UntrustedConfigError, match=r"os\.system"):
        check_trusted({"field": {**config, "known": {"_target_": "os.system", "_partial_": True}}})
    with pytest.raises(UntrustedConfigError, match=r"flows\.equations\.torch"):
        check_trusted({"field": {**config, "known": {"_target_": "flows.equations.torch.load", "_partial_": True}}})
