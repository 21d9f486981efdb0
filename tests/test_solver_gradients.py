"""Gradients through a solve: checkpoints against backprop, step for step; the adjoint's accuracy and its check."""

import copy
import math

import pytest
import torch
from torch import nn
from torchdiffeq import odeint

from flows import CNF
from flows.compare.memory import peak_memory
from flows.divergence import Analytic, Exact, Hutchinson
from flows.dynamics import AugmentedDynamics
from flows.fields import MLP, bind
from flows.path_costs import JacobianNorm, KineticEnergy, TotalDerivative
from flows.solvers import ErrorControl, ODESolver, check_gradients, recompute
from flows.solvers.runge_kutta import interpolate, take_step
from flows.solvers.tableaux import RUNGE_KUTTA


def steep(event_shape=(2,), hidden=(8, 8), slope=1.4, **settings):
    field = MLP(event_shape, hidden, num_frequencies=2, **{"activation": "silu", "sine_frequency": None, **settings})
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.mul_(slope)
    return field


def build(method="dopri5", **settings):
    if method != "scipy_solver" and not (method in RUNGE_KUTTA and RUNGE_KUTTA[method].is_adaptive):
        settings = {"step_size": 0.03, **settings}
    return ODESolver(method, **settings)


def gradients(solver, times=(1.0, 0.0), estimator=None, seed=1):
    """Gradients of a loss over all output times and components, with those of start, context and probes."""
    torch.manual_seed(seed)
    field = steep(context_shape=(3,))
    options = estimator or Hutchinson(2)
    x, context = torch.randn(6, 2, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    start = torch.randn(6, requires_grad=True)
    estimator = options.bind(bind(field, context))
    probes = estimator.draw_probes(x)
    if probes is not None:
        probes.requires_grad_()
    dynamics = AugmentedDynamics(estimator, probes)
    state = (x, dynamics.initial_state(x)[1] + start)
    tensors = [*field.parameters(), context, *([] if probes is None else [probes])]
    solution = solver.solve(dynamics, state, times, tensors)
    loss = 0.0
    for component in solution.states:
        weights = torch.linspace(1, 2, component.numel()).view_as(component)
        loss = loss + (component.sin() * weights).sum()
    return solution, torch.autograd.grad(loss, [x, start, *tensors], allow_unused=True)


def assert_same(found, expected, **tolerance):
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("method", sorted(RUNGE_KUTTA))
@pytest.mark.parametrize("times", [(1.0, 0.0), (0.0, 0.21, 0.5, 0.501, 1.0)])
def test_checkpoints_give_the_values_steps_and_gradients_of_backprop(method, times):
    expected, expected_gradients = gradients(build(method), times)
    found, found_gradients = gradients(build(method, gradient="checkpoint"), times)
    for a, b in zip(found.statistics.attempts, expected.statistics.attempts, strict=True):
        assert (a.accepted, a.component, a.sample) == (b.accepted, b.component, b.sample)
        assert (a.t, a.dt) == pytest.approx((b.t, b.dt), abs=1e-10)  # the error has rounding of its own
    assert found.statistics.nfe_forward == expected.statistics.nfe_forward
    assert found.statistics.nfe_backward > 0
    assert_same(found.states, expected.states, rtol=0, atol=1e-13)
    assert_same(found_gradients, expected_gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("estimator", [Analytic(), Exact("forward"), Exact()])
def test_checkpoints_work_with_every_kind_of_divergence(estimator):
    _, expected = gradients(build(), estimator=estimator)
    _, found = gradients(build(gradient="checkpoint"), estimator=estimator)
    assert_same(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 31, 33, 40, 150])
def test_segments_of_any_length_give_the_same_gradient(steps):
    _, expected = gradients(build("midpoint", step_size=1 / steps))
    found, found_gradients = gradients(build("midpoint", step_size=1 / steps, gradient="checkpoint"))
    assert found.statistics.nfe_backward == 2 * steps
    assert_same(found_gradients, expected, rtol=1e-10, atol=1e-12)


def test_the_backward_pass_evaluates_each_accepted_step_once_more():
    statistics = gradients(build(gradient="checkpoint", rtol=1e-9, atol=1e-9))[0].statistics
    assert statistics.rejected > 0
    assert statistics.nfe_backward == 1 + 6 * statistics.accepted
    assert statistics.backward_attempts == []


def test_dropout_draws_the_same_masks_again():
    field = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 4))
    x = torch.randn(5, 4)
    for method, settings in (("rk4", {}), ("dopri5", {}), ("euler", {"step_size": 1.0})):  # the last takes one step
        found, after = {}, {}
        for gradient in ("backprop", "checkpoint"):
            solver = build(method, gradient=gradient, rtol=1e-1, atol=1e-1, max_steps=40, **settings)
            torch.manual_seed(3)
            end = solver.solve(lambda t, s: (field(s[0]),), (x,), (0.0, 1.0), list(field.parameters())).end
            loss = end[0].square().sum()
            torch.rand(3)  # what is drawn between the passes does not matter
            before = torch.get_rng_state()
            found[gradient] = torch.autograd.grad(loss, list(field.parameters()))
            after[gradient] = torch.get_rng_state()
            assert torch.equal(after[gradient], before)
        assert_same(found["checkpoint"], found["backprop"], rtol=1e-9, atol=1e-11)


def test_the_adjoint_refuses_dynamics_that_draw_random_numbers():
    field = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    solver = ODESolver("rk4", step_size=0.1, gradient="adjoint")

    def solve():
        return solver.solve(lambda t, s: (field(s[0]),), (torch.ones(2, 3),), (0.0, 1.0), list(field.parameters()))

    with pytest.raises(ValueError, match=r"draw random numbers, as dropout does.* Use gradient='checkpoint'"):
        solve()
    with torch.no_grad():
        solve()
    field.eval()
    solve().end[0].sum().backward()


def test_a_second_forward_and_a_second_backward_change_nothing():
    field, x = steep(), torch.randn(5, 2)
    flow = CNF(field, solver=build(gradient="checkpoint"))
    expected = torch.autograd.grad(CNF(field, solver=build()).log_prob(x).mean(), list(field.parameters()))
    loss = flow.log_prob(x).mean()
    flow.log_prob(torch.randn(5, 2)).mean().backward()
    for retain in (True, False):
        assert_same(torch.autograd.grad(loss, list(field.parameters()), retain_graph=retain), expected)


def test_weights_that_change_before_the_backward_pass_are_noticed():
    for gradient in ("checkpoint", "adjoint"):
        field = steep()
        loss = CNF(field, solver=build(gradient=gradient)).log_prob(torch.randn(5, 2)).mean()
        with torch.no_grad():
            field.out.weight.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_second_derivative_is_refused_not_wrong():
    x = torch.randn(3, 2, requires_grad=True)
    for gradient in ("checkpoint", "adjoint"):
        flow = CNF(steep(), solver=build(gradient=gradient))
        with pytest.raises(RuntimeError, match=f"gradient='{gradient}' has first derivatives only.*use gradient='b"):
            torch.autograd.grad(flow.log_prob(x).sum(), x, create_graph=True)


def test_gradients_reach_what_lies_behind_a_context():
    encoder = nn.Linear(2, 3)
    field = steep(context_shape=(3,))
    x, seen = torch.randn(5, 2), torch.randn(5, 2)
    found = {}
    for gradient in ("backprop", "checkpoint", "adjoint"):
        flow = CNF(field, solver=build(gradient=gradient, rtol=1e-8, atol=1e-8))
        found[gradient] = torch.autograd.grad(flow.log_prob(x, encoder(seen)).mean(), encoder.weight)
    assert_same(found["checkpoint"], found["backprop"])
    assert_same(found["adjoint"], found["backprop"], rtol=0, atol=1e-6)


def test_mixed_precision_is_the_same_in_both_passes():
    class Watched(MLP):
        seen = ()

        def forward(self, t, x, context=None):
            self.seen += (torch.is_autocast_enabled("cpu"),)
            return super().forward(t, x, context)

    field, x, found = Watched((2,), (8, 8)).float(), torch.randn(16, 2, dtype=torch.float32), {}
    for gradient in ("backprop", "checkpoint", "adjoint"):
        flow = CNF(field, Exact(), solver=ODESolver("rk4", step_size=0.1, gradient=gradient))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = flow.log_prob(x).mean()
        found[gradient] = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(field.parameters()))])
    for name, tolerance in (("checkpoint", 0.02), ("adjoint", 0.2)):
        assert (found[name] - found["backprop"]).norm() < tolerance * found["backprop"].norm()
    assert len(field.seen) == 40 * 5
    assert all(field.seen)


def peak(gradient, steps, field, x):
    flow = CNF(field, Analytic(), ODESolver("euler", step_size=1 / steps, gradient=gradient))
    parameters = list(field.parameters())
    return peak_memory(lambda: torch.autograd.grad(flow.log_prob(x).mean(), parameters), x.device)


def test_memory_grows_as_the_root_of_the_steps_where_the_graph_counts():
    field, x = steep(hidden=(32, 32)), torch.randn(64, 2)
    assert peak("backprop", 96, field, x) > 7 * peak("backprop", 12, field, x)
    assert peak("checkpoint", 96, field, x) < 2 * peak("checkpoint", 12, field, x)
    assert peak("checkpoint", 96, field, x) < peak("backprop", 96, field, x) / 7


def test_memory_grows_as_the_root_of_the_steps_where_the_states_count(monkeypatch):
    """With fewer checkpoints, so that the law shows at fewer steps."""
    monkeypatch.setattr(recompute, "MAX_CHECKPOINTS_PER_STEP", 4)
    monkeypatch.setattr(recompute, "MIN_SEGMENT_EVALUATIONS", 1)

    class Decay(nn.Module):
        event_shape = (500,)

        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.ones(()))

        def forward(self, t, x):
            return -self.rate * x

        def value_and_divergence(self, t, x):
            return -self.rate * x, -500 * self.rate * torch.ones(len(x))

    field, x = Decay(), torch.randn(4, 500)
    assert peak("checkpoint", 256, field, x) < 2.5 * peak("checkpoint", 64, field, x)
    assert peak("backprop", 256, field, x) > 3.5 * peak("backprop", 64, field, x)


@pytest.mark.parametrize("method", [*RUNGE_KUTTA, "explicit_adams", "implicit_adams", "scipy_solver"])
def test_the_adjoint_is_the_gradient_with_every_method(method):
    """dL/da of x(1) = x₀ eᵃ is x(1), and at two times the gradients add up."""
    rate = torch.tensor(0.7, requires_grad=True)
    fixed = {"step_size": 1e-3 if method == "euler" else 0.01} if build(method).is_fixed_step else {}
    solver = build(method, gradient="adjoint", rtol=1e-5, atol=1e-5, **fixed)
    x = torch.ones(3, 1, requires_grad=True)
    solution = solver.solve(lambda t, s: (rate * s[0],), (x,), (0.0, 0.5, 1.0), [rate])
    solution.states[0].sum().backward()
    truth = 3 * (0.5 * math.exp(0.35) + math.exp(0.7))
    assert rate.grad.item() == pytest.approx(truth, rel=5e-3)
    assert x.grad[0].item() == pytest.approx(1 + math.exp(0.35) + math.exp(0.7), rel=5e-3)


def test_the_adjoint_starts_from_zero_where_the_loss_does_not_see_the_end():
    rate = torch.tensor(0.7, requires_grad=True)
    solver = ODESolver(gradient="adjoint", rtol=1e-8, atol=1e-8)
    solution = solver.solve(lambda t, s: (rate * s[0],), (torch.ones(3, 1),), (0.0, 0.5, 1.0), [rate])
    solution.states[0][1].sum().backward()
    assert rate.grad.item() == pytest.approx(3 * 0.5 * math.exp(0.35), rel=1e-6)


def test_the_seminorm_leaves_the_gradients_of_parameters_out_of_the_error_control():
    """x' = −x + θ cos 30t at θ = 0: x and its adjoint are smooth, and only dL/dθ = ∫ e^(t−1) cos 30t dt oscillates."""
    truth = (math.cos(30) + 30 * math.sin(30) - math.exp(-1)) / 901
    counts = {}
    for seminorm in (True, False):
        theta = torch.zeros((), requires_grad=True)
        solver = ODESolver(gradient="adjoint", rtol=1e-7, atol=1e-7, adjoint_seminorm=seminorm)
        solution = solver.solve(
            lambda t, s, theta=theta: (theta * torch.cos(30 * t) - s[0],), (torch.ones(1, 1),), (0.0, 1.0), [theta]
        )
        solution.end[0].sum().backward()
        names = {attempt.component for attempt in solution.statistics.backward_attempts}
        assert any("parameter" in name for name in names) != seminorm
        counts[seminorm] = solution.statistics.nfe_backward
        if not seminorm:
            assert theta.grad.item() == pytest.approx(truth, abs=1e-7)
    assert counts[True] < counts[False] / 2


def test_the_tolerances_of_the_adjoint_do_not_depend_on_the_scale_of_the_loss():
    field, x = steep(), torch.randn(30, 2)
    evaluations, found = [], []
    for scale in (1.0, 1e6, 1e-6):
        estimate = CNF(field, solver=ODESolver(gradient="adjoint")).estimate_log_prob(x, solver_error=False)
        found.append(torch.autograd.grad(scale * estimate.value.sum(), field.out.weight)[0] / scale)
        evaluations.append(estimate.statistics.nfe_backward)
    assert len(set(evaluations)) == 1
    assert_same(found[1:], [found[0]] * 2)


@pytest.mark.parametrize("method", sorted(RUNGE_KUTTA))
def test_solutions_are_those_of_torchdiffeq(method):
    """The same within the tolerance, and up to rounding at fixed steps."""
    solver = build(method)
    x, times = torch.randn(6, 2), torch.linspace(0, 0.9, 4)
    field = steep()
    with torch.no_grad():
        (found,) = solver.solve(lambda t, s: (field(t, s[0]),), (x,), times).states
        if solver.is_fixed_step:
            reference = odeint(field, x, times, method=method, options={"step_size": 0.03})
        else:
            known = "dopri5" if method in ("flow5", "tsit5") else method  # it has no others of order five
            reference = odeint(field, x, times, method=known, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, reference, rtol=0, atol=1e-12 if solver.is_fixed_step else 5e-3)


@pytest.mark.parametrize(
    ("method", "order"), [("flow5", 5), ("tsit5", 5), ("dopri5", 5), ("dopri8", 5), ("bosh3", 4), ("adaptive_heun", 3)]
)
def test_interpolation_converges_at_its_order(method, order):
    """x' = 2tx, so x = e^(t²); one step from 0.5, looked at where the quartic is neither end nor middle."""
    errors = []
    for size in (0.2, 0.1):
        kind, x0 = RUNGE_KUTTA[method], torch.full((1, 1), math.exp(0.25))
        step = take_step(kind, lambda t, s: (2 * t * s[0],), 0.5, 0.5 + size, (x0,))
        inside = [0.5 + share * size for share in (0.2, 0.35, 0.9)]
        errors.append(max(abs(interpolate(kind, step, t)[0].item() - math.exp(t * t)) for t in inside))
        for t, state in ((step.t0, step.start), (step.t1, step.end)):
            torch.testing.assert_close(interpolate(kind, step, t), state)
    assert math.log2(errors[0] / errors[1]) > order - 0.3


def test_checks_say_which_tolerance_to_change():
    smooth, bent = steep(hidden=(16, 16)), steep(hidden=(16, 16), slope=3.0)
    x = torch.randn(16, 2)

    def check(field=smooth, **settings):
        flow = CNF(field, Hutchinson(2), ODESolver(**{"method": "dopri5", **settings}))
        before = copy.copy(flow.solver)
        result = check_gradients(flow, x, tolerance=3e-4)
        assert flow.solver == before
        assert all(parameter.grad is None for parameter in field.parameters())
        assert f"{result.difference:.1e}" in str(result)
        return result

    fine = check(rtol=1e-8, atol=1e-8)
    assert fine.passed
    assert fine.advice == "Nothing needs to change"
    loose = check(rtol=1e-8, atol=1e-8, adjoint_rtol=0.3, adjoint_atol=0.3)
    assert not loose.passed
    assert loose.backprop_error < 1e-4 < loose.adjoint_error
    assert loose.advice.startswith("Lower adjoint_rtol and adjoint_atol from 0.3 and 0.3 to about")
    coarse = check(bent, rtol=0.5, atol=0.5, adjoint_rtol=1e-7, adjoint_atol=1e-7)
    assert coarse.backprop_error > 1e-3
    assert coarse.advice.startswith("Lower rtol and atol from 0.5 and 0.5 to about")
    stepped = check(method="euler", step_size=0.5)
    assert stepped.advice.startswith("Lower step_size (now 0.5)")


def test_checks_of_methods_by_torchdiffeq_advise_what_these_can():
    flow = CNF(steep(), Analytic(), ODESolver("explicit_adams", step_size=0.5))
    assert check_gradients(flow, torch.randn(8, 2), tolerance=1e-6).advice.endswith("or use gradient='backprop'")
    flow.solver = build("scipy_solver", gradient="adjoint")
    with pytest.raises(ValueError, match="there is no backprop to compare them with; check a flow with solver=ODES"):
        check_gradients(flow, torch.randn(8, 2))


def test_checks_with_path_costs_are_of_the_whole_loss():
    """The steps take no notice of path costs by default, and a check without them would pass."""
    field, x = steep(hidden=(16, 16), slope=1.6), torch.randn(32, 2)
    flow = CNF(field, Analytic(), ODESolver("dopri5", rtol=1e-5, atol=1e-5))
    costs = [TotalDerivative(0.3)]
    assert check_gradients(flow, x).passed
    result = check_gradients(flow, x, path_costs=costs)
    assert not result.passed
    assert result.advice.endswith(
        "or let path costs drive the step size too: error_control=ErrorControl(path_costs=1.0)"
    )
    flow.solver = ODESolver("dopri5", rtol=1e-5, atol=1e-5, error_control=ErrorControl(path_costs=1.0))
    assert check_gradients(flow, x, path_costs=costs).passed
    assert "path costs" not in check_gradients(flow, x, path_costs=costs, tolerance=1e-9).advice
    plain, ignored, more = (
        check_gradients(flow, x, path_costs={"any": TotalDerivative(w)} if w is not None else ()).difference
        for w in (None, 0.0, 3.0)
    )
    assert ignored == plain
    assert more != check_gradients(flow, x, path_costs=costs).difference


def test_what_a_check_states_is_true():
    """Its figures are the distances between gradients that were computed here in the plain way."""
    field, x = steep(), torch.randn(8, 2)
    settings = {"rtol": 1e-3, "atol": 1e-3}

    def flat(**more):
        flow = CNF(field, Analytic(), ODESolver(**{**settings, **more}))
        points = x.clone().requires_grad_()
        value = flow.log_prob(points).mean()
        found = torch.autograd.grad(value, [points, *field.parameters()], allow_unused=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in found])

    result = check_gradients(CNF(field, Analytic(), ODESolver(**settings)), x)
    reference = flat(rtol=1e-5, atol=1e-5, max_step=0.2)
    assert result.backprop_error == pytest.approx(float((flat() - reference).norm() / reference.norm()))
    assert result.adjoint_error == pytest.approx(
        float((flat(gradient="adjoint") - reference).norm() / reference.norm())
    )


def test_methods_without_checkpoints_say_what_to_choose():
    for method in ("explicit_adams", "implicit_adams", "scipy_solver"):
        with pytest.raises(ValueError, match=f"'{method}' cannot start again from a checkpoint, .*'flow5' or 'rk4'"):
            build(method, gradient="checkpoint")
    times = torch.tensor([0.0, 1.0], requires_grad=True)
    with pytest.raises(ValueError, match=r"times that require gradients would get none; .*NeuralODE"):
        ODESolver().solve(lambda t, s: s, (torch.ones(1, 1),), times)
    with pytest.raises(ValueError, match=r"method 'flow5' takes no further options, got {'first_step': 1}"):
        ODESolver(options={"first_step": 1})


def test_per_sample_control_holds_for_the_adjoint_too():
    field, x = steep(), torch.randn(30, 2)
    found = {}
    for gradient in ("backprop", "adjoint"):
        solver = ODESolver(rtol=1e-7, atol=1e-7, gradient=gradient, error_control=ErrorControl(per_sample=True))
        found[gradient] = torch.autograd.grad(CNF(field, solver=solver).log_prob(x).mean(), list(field.parameters()))
    assert_same(found["adjoint"], found["backprop"], rtol=0, atol=1e-5)


def test_path_costs_have_gradients_by_every_way_and_leave_the_steps_alone():
    field, x = steep(), torch.randn(20, 2)
    costs = (KineticEnergy(0.5), JacobianNorm(0.1))
    plain = CNF(field, solver=ODESolver(rtol=1e-8, atol=1e-8)).estimate_log_prob(x, solver_error=False).statistics
    found = {}
    for gradient in ("backprop", "checkpoint", "adjoint"):
        flow = CNF(field, solver=ODESolver(rtol=1e-8, atol=1e-8, gradient=gradient))
        estimate = flow.estimate_log_prob(x, solver_error=False, path_costs=costs)
        assert estimate.statistics.nfe_forward == plain.nfe_forward
        loss = sum(integral.mean() for integral in estimate.path_costs.values()) - estimate.value.mean()
        found[gradient] = torch.autograd.grad(loss, list(field.parameters()))
    assert_same(found["checkpoint"], found["backprop"], rtol=1e-9, atol=1e-11)
    assert_same(found["adjoint"], found["backprop"], rtol=0, atol=1e-6)
