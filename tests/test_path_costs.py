"""Path costs: their rates against dense forms, their integrals against closed forms, and that only training pays."""

import math

import pytest
import torch
from problems import assert_unbiased, dense_jacobian, perceptron

from flows import CNF, ODESolver
from flows.datasets import Batch
from flows.divergence import Analytic, Exact, Hutchinson, XTrace
from flows.dynamics import AugmentedDynamics
from flows.fields import MLP, ConcatSquashMLP, ConvNet, Linear, Potential, bind
from flows.objectives import MaximumLikelihood
from flows.path_costs import (
    HamiltonJacobi,
    JacobianNorm,
    KineticEnergy,
    PathCost,
    TotalDerivative,
    draw_directions,
)
from flows.training.runs import build_trainer

T = torch.tensor(0.3, dtype=torch.float64)
COSTS = [KineticEnergy(), JacobianNorm(), TotalDerivative()]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def rate(cost, field, x, estimator=None, seed=0, context=None):
    """c at one time, as a solve computes it."""
    estimator = (Exact() if estimator is None else estimator).bind(bind(field, context, x.shape[1:]))
    probes = estimator.draw_probes(x, rng(seed))
    directions = draw_directions([cost], x, rng(seed + 1000))
    dynamics = AugmentedDynamics(estimator, probes, [cost], directions)
    return dynamics(T, dynamics.initial_state(x))[2]


# Rates


FIELDS = {
    "two layers": lambda: perceptron((2,), (8, 5)),
    "one layer": lambda: perceptron((3,), (7,)),
    "three layers": lambda: perceptron((4,), (6, 5, 4), sine_frequency=2.0),
    "concat-squash": lambda: ConcatSquashMLP((3,), (6, 5)),
    "linear": lambda: Linear((3,)),
    "potential": lambda: Potential((3,), width=8),
}


@pytest.mark.parametrize("build", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("estimator", [Exact(), Exact("forward"), Analytic(), Hutchinson(3, "orthonormal")])
def test_exact_jacobian_norms_are_those_of_the_dense_jacobian(build, estimator):
    field = build()
    if isinstance(estimator, Hutchinson) and field.event_shape != (3,):
        return  # three orthonormal probes tell everything in three dimensions only
    x = torch.randn(6, *field.event_shape)
    truth = dense_jacobian(field, T, x).square().sum((1, 2))
    torch.testing.assert_close(rate(JacobianNorm(), field, x, estimator), truth)


def test_the_norm_given_a_context_whose_gates_differ():
    context = torch.randn(5, 2)
    for field in (MLP((2,), (6, 5), context_shape=(2,)), ConcatSquashMLP((2,), (6, 5), context_shape=(2,))):
        x = torch.randn(5, 2)
        dense = [dense_jacobian(bind(field, context[i : i + 1]), T, x[i : i + 1]).square().sum() for i in range(5)]
        torch.testing.assert_close(rate(JacobianNorm(), field, x, Analytic(), context=context), torch.stack(dense))


def test_random_directions_are_unbiased_where_the_basis_is_too_long():
    field = perceptron((6,), (8, 5))
    x = torch.randn(1, 6)
    truth = dense_jacobian(field, T, x).square().sum()
    with torch.no_grad():
        for estimator in (Analytic(), XTrace(4)):
            for cost in (JacobianNorm(), JacobianNorm(num_probes=3)):
                assert_unbiased(rate(cost, field, x.expand(2000, 6), estimator), truth)


def test_estimators_with_products_of_their_own_take_no_more_of_them(monkeypatch):
    """Counted as reverse passes through the field."""
    passes = []
    autograd = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(1) or autograd(*a, **k))
    field, x = ConvNet((1, 4, 4), (2,)), torch.randn(2, 1, 4, 4)
    for estimator in (Hutchinson(3), Exact()):
        counts = []
        for costs in ([], [KineticEnergy(), JacobianNorm()]):
            bound = estimator.bind(bind(field))
            dynamics = AugmentedDynamics(bound, bound.draw_probes(x, rng()), costs, draw_directions(costs, x, rng()))
            passes.clear()
            dynamics(T, dynamics.initial_state(x))
            counts.append(len(passes))
        assert counts[0] == counts[1] > 0


def test_the_kinetic_energy_is_the_squared_speed():
    field, x = ConvNet((2, 3, 3), (4,)), torch.randn(5, 2, 3, 3)
    torch.testing.assert_close(rate(KineticEnergy(), field, x), field(T, x).square().sum((1, 2, 3)))


@pytest.mark.parametrize("name", ["one layer", "convolutions", "potential"])
def test_the_total_derivative_is_that_along_a_path(name):
    """By central differences along the path, which a step in the direction of v follows to second order."""
    field = ConvNet((1, 2, 2), (3,)) if name == "convolutions" else FIELDS[name]()
    x = torch.randn(4, *field.event_shape)
    h, v = 1e-5, field(T, x)
    acceleration = (field(T + h, x + h * v) - field(T - h, x - h * v)) / (2 * h)
    truth = acceleration.square().flatten(1).sum(1)
    torch.testing.assert_close(rate(TotalDerivative(), field, x), truth, rtol=1e-6, atol=1e-8)


class Transport(torch.nn.Module):
    """The optimal map from N(0, 1) to N(0, s²) in each dimension: paths x (1 + t (s − 1)), Φ = −r x²/2, r = v/x."""

    event_shape = (2,)

    def __init__(self, scale):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))

    def ratio(self, t):
        return (self.scale - 1) / (1 + t * (self.scale - 1))

    def forward(self, t, x):
        return self.ratio(t) * x

    def potential(self, t, x):
        return -self.ratio(t) * x.square().sum(1) / 2


def test_optimal_transport_has_no_acceleration_and_satisfies_hamilton_jacobi():
    x = torch.randn(5, 2)
    for cost in (TotalDerivative(), HamiltonJacobi()):
        torch.testing.assert_close(rate(cost, Transport(0.4), x), torch.zeros(5))
    assert (rate(HamiltonJacobi(), Potential((2,), width=8), x) > 0).all()


def test_hamilton_jacobi_needs_a_potential():
    with pytest.raises(TypeError, match=r"HamiltonJacobi needs a field with a potential.*, and MLP has none"):
        rate(HamiltonJacobi(), MLP((2,), (4,)), torch.randn(3, 2))


def test_hamilton_jacobi_follows_the_context():
    field = Potential((2,), width=8, context_shape=(1,))
    x, context = torch.randn(3, 2), torch.tensor([[0.0], [1.0], [2.0]])
    h = 1e-5
    slope = (field.potential(T + h, x, context) - field.potential(T - h, x, context)) / (2 * h)
    truth = (slope - field(T, x, context).square().sum(1) / 2).abs()
    torch.testing.assert_close(rate(HamiltonJacobi(), field, x, context=context), truth, rtol=1e-6, atol=1e-8)


# Integrals


def test_integrals_of_a_linear_flow():
    """v = −x: x_t = x₁ e^(1−t), so that ∫‖v‖² = ‖x₁‖² (e² − 1)/2, ∫‖J‖² = d, and the acceleration is x."""
    field = Linear((3,), matrix=-torch.eye(3))
    flow = CNF(field, solver=ODESolver(rtol=1e-9, atol=1e-9))
    x = torch.randn(4, 3)
    energy = x.square().sum(1) * (math.e**2 - 1) / 2
    truth = {"kinetic_energy": energy, "jacobian_norm": torch.full((4,), 3.0), "total_derivative": energy}
    estimate = flow.estimate_log_prob(x, solver_error=False, path_costs=COSTS)
    drawn = flow.draw((4,), path_costs=COSTS)
    back = flow.estimate_log_prob(drawn.x, solver_error=False, path_costs=COSTS)
    for name, value in truth.items():
        torch.testing.assert_close(estimate.path_costs[name], value, rtol=0, atol=1e-6)
        torch.testing.assert_close(drawn.path_costs[name], back.path_costs[name], rtol=0, atol=1e-6)
    torch.testing.assert_close(estimate.value, flow.log_prob(x))


def test_the_kinetic_energy_of_optimal_transport_is_the_squared_distance():
    flow = CNF(Transport(0.4), Exact(), ODESolver(rtol=1e-9, atol=1e-9))
    x = torch.randn(4, 2)
    estimate = flow.estimate_log_prob(x, path_costs=[KineticEnergy()], solver_error=False)
    torch.testing.assert_close(estimate.path_costs["kinetic_energy"], (x - x / 0.4).square().sum(1), rtol=0, atol=1e-7)


@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
@pytest.mark.parametrize("cost", COSTS, ids=lambda cost: cost.name)
def test_gradients_of_the_integrals(gradient, cost):
    """Against central differences in one weight."""
    flow = CNF(perceptron((2,), (6,)), Analytic(), ODESolver("rk4", step_size=0.02, gradient=gradient))
    x = torch.randn(3, 2)

    def integral():
        return flow.estimate_log_prob(x, path_costs=[cost], solver_error=False).path_costs[cost.name].sum()

    weight = flow.field.layers[0].weight
    (found,) = torch.autograd.grad(integral(), weight)
    with torch.no_grad():
        weight[1, 0] += 1e-4
        above = integral()
        weight[1, 0] -= 2e-4
        below = integral()
    torch.testing.assert_close(found[1, 0], (above - below) / 2e-4, rtol=1e-3, atol=1e-5)


# The objective


def test_regularisers_are_added_with_their_weights_and_reported_bare():
    flow = CNF(MLP((2,), (8,)), Analytic(), ODESolver("rk4", step_size=0.25))
    batch = Batch(torch.randn(16, 2))
    bare = MaximumLikelihood()(flow, batch)
    costs = {"speed": KineticEnergy(0.5), "norm": JacobianNorm(0.25), "off": TotalDerivative(0.0)}
    out = MaximumLikelihood(regularizers=costs)(flow, batch)
    assert set(out.metrics) == {"nll", "divergence_standard_error", "kinetic_energy", "jacobian_norm"}
    torch.testing.assert_close(out.metrics["nll"], bare.loss)
    added = 0.5 * out.metrics["kinetic_energy"] + 0.25 * out.metrics["jacobian_norm"]
    torch.testing.assert_close(out.loss, bare.loss + added)
    assert MaximumLikelihood(regularizers=list(costs.values())).regularizers == tuple(costs.values())[:2]


def test_a_log_density_does_not_pay(monkeypatch):
    calls = []
    monkeypatch.setattr(Exact, "with_jacobian_norm", lambda *arguments: calls.append(1))
    flow = CNF(MLP((2,), (8,)), Exact())
    flow.log_prob(torch.randn(3, 2))
    MaximumLikelihood()(flow, Batch(torch.randn(3, 2)))
    assert not calls


def test_regularisation_straightens_a_flow():
    """Twenty steps of descent on the acceleration alone."""
    torch.manual_seed(1)
    flow = CNF(perceptron((2,), (16,)), Analytic(), ODESolver("rk4", step_size=0.2))
    batch, optimizer = Batch(torch.randn(32, 2)), torch.optim.Adam(flow.parameters(), lr=1e-2)
    objective = MaximumLikelihood([TotalDerivative(1e6)])
    seen = []
    for _ in range(20):
        optimizer.zero_grad()
        out = objective(flow, batch)
        out.loss.backward()
        optimizer.step()
        seen.append(out.metrics["total_derivative"])
    assert seen[-1] < 0.5 * seen[0]


def test_steer_ends_at_random_times():
    """Of v = −x from t = 1 to τ: log p = log N(x e^(1−τ)) + d (1 − τ)."""
    flow = CNF(Linear((2,), matrix=-torch.eye(2)), solver=ODESolver("rk4", step_size=0.02))
    x = torch.randn(5, 2)
    at = flow.estimate_log_prob(x, base_time=0.3, solver_error=False).value
    torch.testing.assert_close(at, flow.base.log_prob(x * math.exp(0.7)) + 2 * 0.7, rtol=0, atol=1e-6)
    objective, generator = MaximumLikelihood(steer=0.4), rng()
    with torch.no_grad():
        losses = torch.stack([objective(flow, Batch(x), generator).loss for _ in range(100)])

    def loss(tau):
        return -(flow.base.log_prob(x * math.exp(1 - tau)) + 2 * (1 - tau)).mean()

    assert loss(0.4) <= losses.min() < loss(0.35)
    assert loss(-0.4) >= losses.max() > loss(-0.35)
    again = objective(flow, Batch(x), rng()).loss
    torch.testing.assert_close(losses[0], again)
    for bad in (-0.1, 1.0):
        with pytest.raises(ValueError, match="steer must be a finite number"):
            MaximumLikelihood(steer=bad)


def test_a_stage_without_a_target_is_explained():
    stages = {"a": {"_target_": "flows.training.Stage"}, "b": {"steps": 3}}
    data = {"_target_": "flows.datasets.Moons"}
    with pytest.raises(ValueError, match=r"objective.b has settings \(steps\) but is no stage .* which has a\."):
        build_trainer({"seed": 0, "data": data, "objective": stages})


def test_a_new_cost_is_one_class():
    class Height(PathCost):
        name = "height"

        def rate(self, field, t, x, sample):
            return x[:, 1].square()

    flow = CNF(Linear((2,), matrix=torch.zeros(2, 2)))
    x = torch.randn(4, 2)
    found = flow.estimate_log_prob(x, path_costs=[Height()], solver_error=False).path_costs["height"]
    torch.testing.assert_close(found, x[:, 1].square())


def test_bad_settings_are_refused():
    for build, message in [
        (lambda: KineticEnergy(-1.0), "the weight of KineticEnergy must be >= 0, got -1.0"),
        (lambda: JacobianNorm(num_probes=0), "num_probes >= 1 and exact_up_to >= 0, got 0 and 4"),
        (
            lambda: CNF(MLP((2,), (4,))).estimate_log_prob(torch.randn(3, 2), path_costs=[KineticEnergy()] * 2),
            "each path cost can be given once, got kinetic_energy, kinetic_energy",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            build()
