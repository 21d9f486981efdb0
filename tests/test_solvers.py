"""The solver against closed-form solutions, its statistics, and how it fails."""

import math
import re

import pytest
import torch

from flows.errors import FlowsError, InvalidValueError
from flows.solvers import ODESolver, SolverError, errors
from flows.solvers.control import ErrorNorm
from flows.solvers.runge_kutta import error_estimate, take_step
from flows.solvers.solver import METHODS
from flows.solvers.statistics import Attempt
from flows.solvers.tableaux import RUNGE_KUTTA

FIXED = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4, "explicit_adams": 3, "implicit_adams": 4}
ADAPTIVE = ["flow5", "tsit5", "dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun"]


def rotation(t, state):
    """x' = Ax with A = [[-0.5, 2], [-2, -0.5]]: a spiral, e^{-t/2} times a rotation by 2t."""
    (x,) = state
    return (x @ torch.tensor([[-0.5, 2.0], [-2.0, -0.5]], dtype=x.dtype).T,)


def spiral(x, t):
    c, s = math.cos(2 * t), math.sin(2 * t)
    return math.exp(-0.5 * t) * x @ torch.tensor([[c, s], [-s, c]]).T


def build(method, **settings):
    if method in FIXED:
        settings.setdefault("step_size", 0.01)
    return ODESolver(method, **settings)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (1.0, 0.0)])
def test_every_method_solves_a_spiral_both_ways(method, start, end):
    x = torch.randn(4, 2)
    with torch.no_grad():
        (moved,) = build(method).solve(rotation, (x,), (start, end)).end
    tolerance = {"euler": 0.1, "fehlberg2": 0.02}.get(method, 2e-3)
    torch.testing.assert_close(moved, spiral(x, end - start), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("method", "order"), sorted(FIXED.items()))
def test_fixed_step_methods_converge_at_their_order(method, order):
    x = torch.randn(4, 2)
    options = {"max_order": 4} if "adams" in method else {}
    errors = []
    for step in (1 / 20, 1 / 40):
        solver = ODESolver(method, step_size=step, rtol=1e-7, atol=1e-7, options=options)
        (moved,) = solver.solve(rotation, (x,), (0.0, 1.0)).end
        errors.append((moved - spiral(x, 1.0)).abs().max())
    assert math.log2(errors[0] / errors[1]) > order - 0.35


def test_tolerances_bound_the_error_and_intermediate_times_are_kept():
    x = torch.randn(4, 2)
    times = torch.linspace(0, 1, 5)
    solution = ODESolver(rtol=1e-9, atol=1e-9).solve(rotation, (x,), times)
    assert solution.states[0].shape == (5, 4, 2)
    for t, state in zip(times.tolist(), solution.states[0], strict=True):
        torch.testing.assert_close(state, spiral(x, t), rtol=0, atol=1e-7)
    coarse = ODESolver("rk4", step_size=0.3).solve(rotation, (x,), times)
    torch.testing.assert_close(coarse.states[0][2], spiral(x, 0.5), rtol=0, atol=1e-2)
    assert coarse.statistics.accepted == 4


@pytest.mark.parametrize(("step_size", "steps"), [(0.05, 20), (0.1, 10), (0.3, 4), (1.0, 1), (7.0, 1)])
def test_steps_are_equal_and_no_longer_than_asked(step_size, steps):
    for dtype in (torch.float32, torch.float64):
        solution = ODESolver("euler", step_size=step_size).solve(
            rotation, (torch.randn(4, 2, dtype=dtype),), (0.0, 1.0)
        )
        assert solution.statistics.accepted == solution.statistics.nfe_forward == steps


def test_statistics_count_every_evaluation_forward_and_backward():
    calls = []
    rate = torch.tensor([1.0], requires_grad=True)

    def decay(t, state):
        calls.append(torch.is_grad_enabled())
        return (-rate * state[0],)

    x = torch.ones(3, 1)
    solution = ODESolver(gradient="adjoint", rtol=1e-9, atol=1e-9).solve(decay, (x,), (0.0, 1.0), [rate])
    statistics = solution.statistics
    assert statistics.nfe_forward == len(calls) > 6
    assert statistics.nfe_backward == 0
    assert statistics.nfe_forward == 2 + 6 * (statistics.accepted + statistics.rejected)
    solution.end[0].sum().backward()
    assert statistics.nfe_forward + statistics.nfe_backward == len(calls)
    assert statistics.nfe_backward > 0
    torch.testing.assert_close(rate.grad, torch.tensor([-3 * math.exp(-1)]), rtol=0, atol=1e-7)


def test_errors_of_settings():
    with pytest.raises(ValueError, match=r"method must be one of .*dopri5.*rk4.*, got 'dopri'"):
        ODESolver("dopri")
    with pytest.raises(ValueError, match="gradient must be 'backprop', 'checkpoint' or 'adjoint', got 'autograd'"):
        ODESolver(gradient="autograd")
    with pytest.raises(TypeError, match="step_size of method 'rk4' must be a finite number > 0, got None"):
        ODESolver("rk4")
    with pytest.raises(ValueError, match=r"'dopri5' chooses its own steps and takes no step_size, got 0.1"):
        ODESolver("dopri5", step_size=0.1)
    with pytest.raises(ValueError, match="rtol must be a finite number > 0 and < 1, got 0"):
        ODESolver(rtol=0)
    with pytest.raises(ValueError, match="scipy_solver cannot be differentiated through"):
        ODESolver("scipy_solver").solve(rotation, (torch.randn(1, 2),), (0.0, 1.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rtol": math.inf}, "rtol must be a finite number > 0 and < 1, got inf"),
        ({"rtol": math.nan}, "rtol must be a finite number > 0 and < 1, got nan"),
        ({"rtol": 1.0}, "rtol must be a finite number > 0 and < 1, got 1.0"),
        ({"rtol": "tight"}, "rtol must be a finite number > 0 and < 1, got 'tight'"),
        ({"rtol": None}, "rtol must be a finite number"),
        ({"atol": 1e30}, "atol must be a finite number > 0 and < 1e[+]09, got 1e[+]30"),
        ({"atol": 0}, "atol must be a finite number > 0"),
        ({"atol": [1e-5]}, r"atol must be a finite number .* got \[1e-05\]"),
        ({"adjoint_rtol": 0}, "adjoint_rtol must be a finite number > 0 and < 1, got 0"),
        ({"adjoint_rtol": True}, "adjoint_rtol must be a finite number"),
        ({"adjoint_atol": math.inf}, "adjoint_atol must be a finite number"),
        ({"max_steps": 1e20}, r"max_steps must be a whole number >= 1 and <= 1000000000, got 1e[+]20"),
        ({"max_steps": 10**20}, r"max_steps must be a whole number >= 1 and <= 1000000000, got 1000"),
        ({"max_steps": 0}, "max_steps must be a whole number >= 1"),
        ({"max_steps": True}, "max_steps must be a whole number"),
        ({"min_step": math.inf}, "min_step must be a finite number >= 0, got inf"),
        ({"min_step": None}, "min_step must be a finite number >= 0"),
        ({"max_step": math.inf}, "max_step must be a finite number > 0, got inf; use None for no limit"),
        ({"max_step": "none"}, "max_step must be a finite number > 0"),
        ({"method": "rk4", "step_size": math.inf}, "step_size of method 'rk4' must be a finite number > 0, got inf"),
        ({"method": "rk4", "step_size": 0}, "step_size of method 'rk4' must be a finite number > 0"),
        ({"method": "rk4", "step_size": "0.1"}, "step_size of method 'rk4' must be a finite number > 0, got '0.1'"),
        ({"method": ["rk4"]}, r"method must be one of .*, got \['rk4'\]"),
        ({"gradient": None}, "gradient must be 'backprop', 'checkpoint' or 'adjoint', got None"),
        ({"adjoint_seminorm": "no"}, "adjoint_seminorm must be true or false, got 'no'"),
        ({"error_control": {"state": 1.0}}, "error_control must be an ErrorControl, got {'state': 1.0}"),
        ({"options": [1]}, r"options must be a mapping, got \[1\]"),
        ({"method": "explicit_adams", "step_size": 0.1, "options": {"order": 3}}, "has no option order; .* max_order"),
        (
            {"method": "implicit_adams", "step_size": 0.1, "options": {"max_order": 20}},
            "max_order must be a whole number >= 4 and <= 12",
        ),
        (
            {"method": "implicit_adams", "step_size": 0.1, "options": {"max_iters": 0}},
            "max_iters must be a whole number >= 1, got 0",
        ),
        ({"method": "scipy_solver", "options": {"solver": "euler"}}, "solver must be one of RK45, .* got 'euler'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(FlowsError, match=message):
        ODESolver(**settings)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ((0.0, math.inf), "times must be a sequence of finite numbers"),
        ((0.0, math.nan), "times must be a sequence of finite numbers"),
        (("start", "end"), "times must be a sequence of numbers, got"),
        (1.0, "times must be a sequence of finite numbers, got 1.0"),
        ((1.0,), "times must be at least two"),
        ((((0.0, 1.0),),), "times must be a sequence of finite numbers"),
        (((0.0, 1.0), (0.0, 1.0)), "need a row for each of 1 samples, got 2"),
        (((0.0, 1.0, 0.5),), r"each row of times must be strictly increasing, .* got \[0.0, 1.0, 0.5\] in row 0"),
        (((0.0, math.nan),), r"times must be finite numbers, got \[0.0, nan\] in row 0"),
    ],
)
def test_times_that_are_none_are_refused(times, message):
    with pytest.raises(InvalidValueError, match=message):
        ODESolver().solve(rotation, (torch.ones(1, 2),), times)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (torch.ones(1, 2), r"the state must be a tuple of tensors, got Tensor; write \(x,\)"),
        ((), "the state must be a tuple of tensors"),
        ((torch.ones(1, 2, dtype=torch.int64),), "one floating dtype and device, got torch.int64"),
        ((torch.ones(1, 2), torch.ones(1, dtype=torch.float16)), "one floating dtype and device"),
    ],
)
def test_states_that_cannot_be_solved_for_are_refused(state, message):
    with pytest.raises(InvalidValueError, match=message):
        ODESolver().solve(rotation, state, (0.0, 1.0))


@pytest.mark.parametrize("method", ["rk4", "explicit_adams"])
def test_steps_too_short_to_end_are_refused(method):
    with pytest.raises(InvalidValueError, match=r"step_size = 1e-12 takes 1e\+12 steps from 0 to 1"):
        ODESolver(method, step_size=1e-12).solve(rotation, (torch.ones(1, 2),), (0.0, 1.0))


@pytest.mark.parametrize("method", ADAPTIVE)
def test_underflow_says_where_and_what_to_try(method):
    def explosive(t, state):
        return (state[0] ** 2,)  # x = 1/(0.5 − t) from x(0) = 2: infinite at t = 0.5

    solver = ODESolver(method, rtol=1e-4, atol=1e-4, max_steps=10**5)
    with pytest.raises(
        SolverError,
        match=r"forward solve underflowed at t = 0.[45].*, dt = .*: the state of sample 2 has grown from 2 to .* and "
        r"seems to explode in finite time\. Try \(1\) a solve that ends before; ",
    ) as e:
        solver.solve(explosive, (torch.tensor([[0.1], [0.5], [2.0], [0.2]]),), (0.0, 1.0))
    assert e.value.t == pytest.approx(0.5, abs=0.02)
    assert 0 < e.value.dt < 1e-14
    assert (e.value.component, e.value.sample) == ("state", 2)


def test_underflow_without_growth_advises_other_tolerances():
    last = Attempt(0.5, 1e-15, False, 3.0, "state", 1)
    states = (torch.ones(2, 1),), (torch.tensor([[5.0], [900.0]]),)
    assert errors.explosion(*states, last) == ""
    error = errors.underflow("forward", 1e-4, 1e-4, 0.5, 1e-15, last, errors.explosion(*states, last))
    assert re.search(
        r"forward solve underflowed at t = 0.5, dt = .*no step meets rtol.*, limited by the state of sample 1\. "
        r"Try \(1\) .*; \(2\) .*rk4.*; \(3\) ",
        str(error),
    )


def test_a_non_finite_field_is_named_as_such():
    def overflow(t, state):
        return state[0] / 0.0, state[1]

    overflow.component_names = ("state", "log_density")
    with pytest.raises(SolverError, match="the velocity has 3 NaN or infinite values there, the first for sample 0"):
        ODESolver().solve(overflow, (torch.ones(3, 1), torch.zeros(3)), (0.0, 1.0))

    def overflowing_divergence(t, state):
        return state[0], torch.where(torch.arange(3) == 1, torch.nan, state[1])

    overflowing_divergence.component_names = ("state", "log_density")
    with pytest.raises(SolverError, match=r"its divergence has 2 NaN .* for sample 1") as e:
        ODESolver().solve(overflowing_divergence, (torch.ones(3, 1), torch.zeros(2, 3)), (0.0, 1.0))
    assert (e.value.component, e.value.sample, e.value.t) == ("log_density", 1, 0.0)
    with pytest.raises(SolverError, match=r"the state holds NaN or infinite values from the start .*of sample 0"):
        ODESolver().solve(rotation, (torch.full((1, 2), torch.inf),), (0.0, 1.0))


def test_what_has_no_name_and_no_step_yet_is_a_failure_all_the_same():
    """As at the start of an adjoint solve, where only the gradient of a parameter is infinite."""
    finite = (torch.ones(3, 1),)
    error = errors.not_finite("adjoint", 1.0, -0.1, ("state",), finite, (*finite, torch.tensor(torch.inf)))
    assert (error.component, error.sample, error.t) == (None, None, 1.0)
    assert "steps from there end in NaN or infinite values. Try (1)" in str(error)


def test_a_fixed_step_solve_that_blows_up_says_when_and_which_sample():
    def explosive(t, state):
        return (state[0] ** 3,)

    points = torch.tensor([[0.1], [100.0], [0.2]])
    for gradient in ("backprop", "checkpoint", "adjoint"):
        solver = ODESolver("euler", step_size=0.1, gradient=gradient)
        with pytest.raises(
            SolverError,
            match=r"the forward solve is not finite at t = 0.4 with method 'euler'.* of sample 1\. Try \(1\) a sm",
        ) as e:
            solver.solve(explosive, (points.clone().requires_grad_(),), (0.0, 1.0))
        assert (e.value.component, e.value.sample, e.value.dt) == ("state", 1, pytest.approx(0.1))


@pytest.mark.parametrize("method", ["rk4", "explicit_adams", "dopri5", "bosh3"])
def test_a_sample_that_leaves_the_domain_is_named_with_the_time(method):
    """The velocity of one sample is √(0.5 − t), NaN from there on."""

    def bounded(t, state):
        return (torch.where(torch.arange(3).unsqueeze(1) == 2, (0.5 - t).sqrt(), state[0]),)

    settings = {"step_size": 0.01} if method in ("rk4", "explicit_adams") else {}
    with pytest.raises(SolverError, match=r"of sample 2\. Try") as e:
        ODESolver(method, **settings).solve(bounded, (torch.ones(3, 1),), (0.0, 1.0))
    assert (e.value.component, e.value.sample) == ("state", 2)
    assert e.value.t == pytest.approx(0.5, abs=0.011)


@pytest.mark.parametrize(("method", "rate"), [("rk4", 60), ("explicit_adams", 30)])
def test_an_adjoint_solve_of_fixed_steps_that_blows_up_says_so(method, rate):
    """Points that a steep field draws together fly apart when they are solved for backwards."""
    x = torch.tensor([[0.0], [0.5]], dtype=torch.float64, requires_grad=True)
    solver = ODESolver(method, step_size=0.02, gradient="adjoint")
    end = solver.solve(lambda t, state: (-rate * state[0].sinh(),), (x,), (0.0, 1.0)).end[0]
    assert end.isfinite().all()
    with pytest.raises(SolverError, match=r"the adjoint solve is not finite at t = .* of sample 1\. Try \(1\)"):
        end.sum().backward()


def test_the_worst_sample_has_its_index_in_any_precision():
    norm = ErrorNorm(("state",), (1.0,), 0.0, 1.0, 300)
    error = torch.ones(300, 2, dtype=torch.bfloat16)
    error[257] = 9.0
    assert norm((error,), (error,), (error,))[1] == [257]


def test_steps_that_end_outside_the_domain_are_shortened():
    """x' = -1/(2 √x) from 1 is √(1 − t), which ends at t = 1; too long a step would take the root of x < 0."""

    def root(t, state):
        return (-0.5 / state[0].sqrt(),)

    def rooted_until(end, **settings):
        return ODESolver("dopri5", **settings).solve(lambda t, s: (-0.5 / s[0],), (torch.ones(1, 1),), (0.0, end))

    moved = rooted_until(0.99, rtol=1e-8, atol=1e-8).end[0]
    torch.testing.assert_close(moved, torch.full((1, 1), 0.1), rtol=0, atol=1e-5)
    solver = ODESolver("dopri5", rtol=1e-1, atol=1e-1)
    solution = solver.solve(root, (torch.tensor([[1e-3]]),), (0.0, 3e-5))
    assert solution.end[0].isfinite().all()
    with pytest.raises(SolverError, match=r"the shortest possible, ends in NaN|no step meets"):
        solver.solve(root, (torch.tensor([[1e-3]]),), (0.0, 1.0))


def test_max_steps_stops_a_stiff_solve_forward_and_backward():
    stiff = torch.tensor([-1e5], requires_grad=True)

    def dynamics(t, state):
        return (stiff * (state[0] - t.cos()),)

    with pytest.raises(SolverError, match=r"forward solve reached t = .* after max_steps = 50 steps.*larger max_steps"):
        ODESolver(max_steps=50).solve(dynamics, (torch.ones(1, 1),), (0.0, 1.0))

    growth = torch.tensor([1.0], requires_grad=True)
    solver = ODESolver(gradient="adjoint", max_steps=30, adjoint_rtol=1e-13, adjoint_atol=1e-13)
    solution = solver.solve(lambda t, s: ((growth * t).sin() * s[0],), (torch.ones(1, 1),), (0.0, 3.0), [growth])
    with pytest.raises(SolverError, match="adjoint solve reached"):
        solution.end[0].sum().backward()


def test_where_max_step_keeps_steps_short_the_failure_says_so():
    solver = ODESolver(max_steps=50, max_step=0.01)
    with pytest.raises(
        SolverError, match=r"t = 0\.5 .* of size 0\.01, which is max_step\. Try \(1\) a larger max_step"
    ):
        solver.solve(lambda t, state: (-state[0],), (torch.ones(1, 1),), (0.0, 1.0))


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_a_max_step_that_the_clock_cannot_show_is_refused(gradient):
    solver = ODESolver(max_step=1e-7, gradient=gradient)
    with pytest.raises(ValueError, match=r"max_step must be at least 1.9e-06, what torch.float32 resolves, got 1e-07"):
        solver.solve(lambda t, state: (-state[0],), (torch.ones(1, 1, dtype=torch.float32),), (0.0, 1.0))


@pytest.mark.parametrize("method", ["dopri5", "rk4", "scipy_solver"])
@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
def test_nothing_to_solve(method, gradient):
    step_size = 0.1 if method == "rk4" else None
    solver = ODESolver(method=method, step_size=step_size, gradient=gradient)
    solution = solver.solve(lambda t, y: y, (torch.zeros(0, 2), torch.zeros(1, 0)), [0.0, 0.5, 1.0])
    assert [tuple(component.shape) for component in solution.states] == [(3, 0, 2), (3, 1, 0)]


@pytest.mark.parametrize(("name", "message"), [("RK45", r"stopped at t = (0\.9|1)"), ("LSODA", "after max_steps = 30")])
@pytest.mark.filterwarnings("ignore:The following arguments have no effect", "ignore:lsoda")
def test_scipy_is_stopped_too(name, message):
    """x′ = x² from 1 has no solution beyond t = 1; from 0.5, none beyond 2."""
    solver = ODESolver(method="scipy_solver", options={"solver": name}, max_steps=30 if name == "LSODA" else 1000)
    with torch.no_grad(), pytest.raises(SolverError, match=message + ".*, limited by the state of sample 1") as failed:
        solver.solve(lambda t, y: (y[0] ** 2,), (torch.tensor([[0.5], [1.0]]),), [0.0, 2.0])
    assert 0.9 < failed.value.t < 1.1
    assert (failed.value.component, failed.value.sample) == ("state", 1)


def test_equal_solvers_are_equal():
    assert ODESolver() == ODESolver() != ODESolver(rtol=1e-3)
    assert len({ODESolver(), ODESolver()}) == 1


@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_error_constant_is_that_of_exponential_growth(name):
    method, h = RUNGE_KUTTA[name], 0.02 if name != "dopri8" else 0.2
    step = take_step(method, lambda t, state: state, 0.0, h, (torch.ones(1),))
    (error,) = error_estimate(method, step)
    assert error.abs().item() / h**method.order == pytest.approx(method.error_constant, rel=1.5 * h)


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
def test_first_steps_have_at_least_a_third_of_the_length_that_the_tolerance_allows(name, tolerance):
    order, time = RUNGE_KUTTA[name].order, 1 / math.hypot(0.5, 2.0)  # of the spiral's changes
    for end in (3.0, -3.0):
        solution = ODESolver(name, tolerance, tolerance).solve(rotation, (torch.randn(4, 2),), (0.0, end))
        first = solution.statistics.attempts[0]
        assert first.accepted
        assert first.error ** (1 / order) > 1 / 3 or abs(first.dt) > time / 3


def test_the_last_two_steps_share_what_remains_and_no_solve_rests_on_one():
    for field in (lambda t, state: (torch.zeros_like(state[0]),), lambda t, state: (0.01 * state[0],)):
        statistics = ODESolver().solve(field, (torch.randn(4, 2),), (1.0, 0.0)).statistics
        assert [attempt.dt for attempt in statistics.attempts] == [-0.5, -0.5]
    for end in torch.linspace(0.5, 4, 15).tolist():
        taken = [a.dt for a in ODESolver().solve(rotation, (torch.randn(4, 2),), (0.0, end)).statistics.attempts]
        assert taken[-1] > 0.4 * taken[-2]


def test_steps_of_min_step_always_end():
    """y' = -30 (y - cos t), with steps that are too long for the tolerance."""

    def stiff(t, state):
        return (-30 * (state[0] - math.cos(t)),)

    for min_step in torch.linspace(0.05, 0.15, 41).tolist():
        statistics = ODESolver(min_step=min_step).solve(stiff, (torch.zeros(3, 1),), (0.0, 1.0)).statistics
        assert statistics.accepted <= math.ceil(1 / min_step)


def test_the_shortest_spans_are_solved():
    for dtype, end in ((torch.float32, 1.0 + 3e-6), (torch.float64, 1.0 + 1e-14), (torch.bfloat16, 0.8)):
        x = torch.ones(2, 2, dtype=dtype)
        (moved,) = ODESolver(rtol=0.1, atol=0.1).solve(rotation, (x,), (1.0, end)).end
        torch.testing.assert_close(moved.double(), spiral(x.double(), end - 1.0), rtol=0, atol=0.02)


def test_the_adjoint_takes_one_step_between_close_times():
    rate = torch.tensor(0.5, requires_grad=True)
    solver = ODESolver(gradient="adjoint")
    times = torch.linspace(0, 1, 51)
    solution = solver.solve(lambda t, state: (rate * state[0],), (torch.ones(2, 2),), times, [rate])
    solution.end[0].sum().backward()
    assert solution.statistics.nfe_backward <= 8 * 50


class Growth:
    """x′ = rotation, and ℓ′ = sin ‖x‖² + t, which nothing depends on."""

    component_names = ("state", "log_density")

    def __init__(self):
        self.calls = 0

    def __call__(self, t, state):
        self.calls += 1
        return rotation(t, state[:1])[0], (state[0].square().sum(1) + t).sin()


class Leading(Growth):
    def leading(self, t, state):
        return rotation(t, state[:1])[0]


@pytest.mark.parametrize(("method", "silent"), [("dopri5", 1), ("dopri8", 4), ("bosh3", 0), ("heun3", 1)])
@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
def test_stages_without_weight_evaluate_the_leading_component_alone(method, silent, gradient):
    solver = build(method, gradient=gradient, **({"step_size": 0.1} if method in FIXED else {}))
    times = torch.tensor([[0.0, 0.3, 1.0], [0.0, 0.2, 0.8], [0.0, 0.5, 0.9]], dtype=torch.float64)
    found = []
    for dynamics in (Growth(), Leading()):
        x = torch.arange(6, dtype=torch.float64).view(3, 2).requires_grad_()
        solution = solver.solve(dynamics, (x, x.new_zeros(3)), times, parameters=(x,))
        solution.states[1].sum().backward()
        found.append((*solution.states, x.grad, solution.statistics))
    for one, other in zip(found[0][:-1], found[1][:-1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert found[0][-1].nfe_forward == found[1][-1].nfe_forward
    with torch.no_grad():
        counts = []
        for dynamics in (Growth(), Leading()):
            statistics = solver.solve(dynamics, (x, x.new_zeros(3)), (0.0, 1.0)).statistics
            counts.append(dynamics.calls)
    assert counts[0] - counts[1] == silent * len(statistics.attempts)
