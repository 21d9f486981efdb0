"""What drives the step size, within which limits, and what a solve tells about its steps."""

import itertools
import math

import pytest
import torch

from flows import CNF
from flows.divergence import Analytic, Hutchinson
from flows.dynamics import AugmentedDynamics
from flows.fields import MLP, bind
from flows.solvers import ErrorControl, ODESolver
from flows.solvers.control import ErrorNorm
from flows.solvers.step_size import Growth


class Named:
    """dx/dt = −x with a component beside it that oscillates at `frequency`: cos(frequency · t)."""

    def __init__(self, name, frequency=60.0):
        self.component_names = ("state", name)
        self.frequency = frequency

    def __call__(self, t, state):
        return -state[0], torch.cos(self.frequency * t).expand_as(state[1])


def solved(dynamics, batch=4, **settings):
    state = (torch.ones(batch, 2), torch.zeros(batch))
    return ODESolver(**{"rtol": 1e-6, "atol": 1e-6, **settings}).solve(dynamics, state, (0.0, 1.0))


def test_path_costs_do_not_drive_the_steps_unless_asked_and_the_log_density_does():
    plain = ODESolver(rtol=1e-6, atol=1e-6).solve(lambda t, s: (-s[0],), (torch.ones(4, 2),), (0.0, 1.0))
    cost = solved(Named("kinetic"))
    assert cost.statistics.nfe_forward == plain.statistics.nfe_forward
    assert cost.statistics.limited_by == {"state": 1.0, "kinetic": 0.0}
    for name, weights in (("kinetic", {"path_costs": 1.0}), ("log_density", {})):
        driven = solved(Named(name), error_control=ErrorControl(**weights))
        assert driven.statistics.nfe_forward > 3 * plain.statistics.nfe_forward
        assert driven.statistics.limited_by[name] > 0.9
        torch.testing.assert_close(driven.end[1], torch.full((4,), math.sin(60) / 60), rtol=0, atol=1e-5)
    ignored = solved(Named("log_density"), error_control=ErrorControl(log_density=0))
    assert ignored.statistics.nfe_forward == plain.statistics.nfe_forward


def test_components_without_names_all_count():
    unnamed = Named("anything")
    del unnamed.component_names
    assert solved(unnamed).statistics.limited_by["component 1"] > 0.9


def test_a_weight_is_a_tighter_tolerance_for_its_component():
    """The error of a step is of fifth order: 32 times the weight halves the steps."""
    steps = [
        len(solved(Named("log_density", 200.0), error_control=ErrorControl(log_density=w)).statistics.attempts)
        for w in (1.0, 32.0)
    ]
    assert steps[1] / steps[0] == pytest.approx(2, rel=0.2)


def test_a_bad_value_rejects_a_step_whatever_its_weight():
    class Bad(Named):
        def __call__(self, t, state):
            moving, cost = super().__call__(t, state)
            return moving, torch.where(t > 0.5, torch.nan, cost)

    for min_step in (0.0, 0.01):
        with pytest.raises(
            RuntimeError, match=r"solve failed at t = 0\.(49|50?)\d*, .*the shortest possible, ends in"
        ) as failed:
            solved(Bad("kinetic", 1.0), min_step=min_step)
        assert (failed.value.component, failed.value.sample) == ("kinetic", 0)


def stiff_among_many(t, state):
    """Sample 0 turns fast, the others stand nearly still."""
    speed = torch.where(torch.arange(len(state[0])) == 0, 40.0, 0.01).unsqueeze(1)
    x = state[0]
    return (speed * torch.stack([-x[:, 1], x[:, 0]], 1),)


def test_with_the_norm_per_sample_a_hard_sample_does_not_hide_in_the_batch():
    x = torch.tensor([1.0, 0.0]).expand(4000, 2)
    truth = torch.tensor([math.cos(40), math.sin(40)])
    errors = {}
    for per_sample in (False, True):
        control = ErrorControl(per_sample=per_sample)
        solver = ODESolver("dopri5", rtol=1e-5, atol=1e-5, error_control=control)
        solution = solver.solve(stiff_among_many, (x,), (0.0, 1.0))
        alone = solver.solve(stiff_among_many, (x[:1],), (0.0, 1.0))
        errors[per_sample] = float((solution.end[0][0] - truth).abs().max())
        assert all(attempt.sample == 0 for attempt in solution.statistics.attempts)
        if per_sample:
            assert solution.statistics.accepted == alone.statistics.accepted
            torch.testing.assert_close(solution.end[0][:1], alone.end[0])
    assert errors[True] < 1e-3
    assert errors[False] > 10 * errors[True]


def test_the_sample_that_limits_is_found_in_every_layout():
    """Positions have the batch first, (K, B) log-densities last."""

    class OneFast(Named):
        def __call__(self, t, state):
            moving, estimates = super().__call__(t, state)
            return moving, estimates * (torch.arange(estimates.shape[-1]) == 2)

    state = (torch.ones(5, 3, 2), torch.zeros(7, 5))
    solution = ODESolver().solve(OneFast("log_density"), state, (0.0, 1.0))
    samples = {attempt.sample for attempt in solution.statistics.attempts if attempt.component == "log_density"}
    assert samples == {2}


def test_min_step_is_accepted_whatever_its_error_and_counted():
    free = solved(Named("log_density", 400.0))
    held = solved(Named("log_density", 400.0), min_step=0.02)
    assert free.statistics.forced == 0
    assert held.statistics.forced > 20
    assert held.statistics.accepted <= 51
    assert min(abs(a.dt) for a in held.statistics.attempts[:-1]) >= 0.02 - 1e-9


def test_no_step_is_longer_than_max_step():
    for end in (1.0, -1.3):
        for most in (0.1, 0.2, 0.25, 0.3):
            solver = ODESolver(rtol=0.5, atol=0.5, max_step=most)
            steps = solver.solve(Named("log_density", 1.0), (torch.ones(4, 2), torch.zeros(4)), (0.0, end)).statistics
            assert max(abs(attempt.dt) for attempt in steps.attempts) <= most * (1 + 1e-6)
            assert steps.accepted == math.ceil(abs(end) / most - 1e-6)


def test_the_record_of_the_steps_covers_the_interval():
    for start, end in ((0.0, 1.0), (1.0, 0.0)):
        solver = ODESolver(rtol=1e-7, atol=1e-7)
        state = (torch.ones(4, 2), torch.zeros(4))
        statistics = solver.solve(Named("log_density", 300.0), state, (start, end)).statistics
        t = start
        for attempt in statistics.attempts:
            assert attempt.t == t
            assert (attempt.error <= 1) == attempt.accepted
            t = attempt.t + attempt.dt if attempt.accepted else t
        assert t == pytest.approx(end, abs=1e-12)
        assert statistics.rejected > 0
        assert statistics.nfe_forward == 2 + 6 * len(statistics.attempts)
        assert statistics.shortest in statistics.attempts
        assert sum(statistics.limited_by.values()) == pytest.approx(1)


def test_a_solve_never_leaves_its_interval():
    """A field that ends at t = 1 can be solved up to there."""
    seen = []

    def watched(t, state):
        seen.append(float(t))
        return (torch.sqrt(1 - t) * state[0],)

    for method in ("dopri5", "dopri8", "bosh3", "rk4"):
        step = {"step_size": 0.1} if method == "rk4" else {}
        end = ODESolver(method, **step).solve(watched, (torch.ones(1, 1),), (0.0, 1.0)).end[0]
        assert end.item() == pytest.approx(math.exp(2 / 3), rel=1e-2)
    assert min(seen) == 0
    assert max(seen) == 1


def test_the_standard_error_of_the_divergence_is_kept_over_time():
    """At t = 0 and K probes it is the spread of the K estimates, and 0 everywhere on a field that they see exactly."""
    field, x = MLP((3,), (16,)), torch.randn(50, 3)
    estimator = Hutchinson(4).bind(bind(field))
    probes = estimator.draw_probes(x, torch.Generator().manual_seed(1))
    dynamics = AugmentedDynamics(estimator, probes)
    with torch.no_grad():
        statistics = ODESolver().solve(dynamics, dynamics.initial_state(x), (0.0, 1.0)).statistics
        times, errors = statistics.curve("divergence_standard_error")
        estimates = estimator(torch.tensor(0.0), x, probes).estimates
    assert len(times) == statistics.accepted
    assert times[0] == 0
    assert errors[0] == pytest.approx(float((estimates.var(0) / 4).mean().sqrt()))
    exact = CNF(field, Analytic()).estimate_log_prob(x).statistics
    assert exact.observed == {}


def test_errors_of_settings():
    with pytest.raises(
        ValueError, match="the weight log_density of error_control must be a finite number >= 0, got -1"
    ):
        ErrorControl(log_density=-1)
    with pytest.raises(ValueError, match="error_control needs at least one positive weight"):
        ErrorControl(0, 0, 0)
    with pytest.raises(ValueError, match=r"weight 0 to every component of this solve \(state\)"):
        CNF(MLP((2,), (4,)), solver=ODESolver(error_control=ErrorControl(state=0))).sample((3,))
    with pytest.raises(ValueError, match=r"controller must be 'i', 'pi' or 'pid', got 'p'"):
        ODESolver(controller="p")
    with pytest.raises(ValueError, match=r"controller has no effect on method 'rk4', got pi; set step_size"):
        ODESolver("rk4", step_size=0.1, controller="pi")
    with pytest.raises(ValueError, match=r"min_step must be a finite number >= 0, got -0\.1"):
        ODESolver(min_step=-0.1)
    with pytest.raises(ValueError, match=r"max_step must be > min_step = 0\.1, got 0\.1; .*None"):
        ODESolver(min_step=0.1, max_step=0.1)
    with pytest.raises(ValueError, match=r"max_step has no effect on method 'rk4', got 0\.1; set step_size"):
        ODESolver("rk4", step_size=0.1, max_step=0.1)
    with pytest.raises(ValueError, match=r"min_step has no effect on method 'scipy_solver', got 0\.1; .* flow5"):
        ODESolver("scipy_solver", gradient="adjoint", min_step=0.1)
    with pytest.raises(ValueError, match=r"error_control has no effect on method 'scipy_solver', got ErrorControl\("):
        ODESolver("scipy_solver", gradient="adjoint", error_control=ErrorControl(per_sample=True))
    wrong = Named("x")
    wrong.component_names = ("state",)
    with pytest.raises(ValueError, match=r"component_names must name each of the 2 components .*, got \('state',\)"):
        solved(wrong)
    with pytest.raises(ValueError, match=r"times must be at least two, strictly increasing or strictly decreasing"):
        ODESolver().solve(Named("x"), (torch.ones(1, 1), torch.zeros(1)), (0.0, 0.5, 0.5))
    with pytest.raises(ValueError, match=r"must return derivatives of shapes .*\(4,\)\], got .*\(2,\)\]"):
        solved(lambda t, s: (s[0], s[1][:2]))


def attempts(field, end=1.0, method="dopri5", tolerance=1e-6, **settings):
    """All attempts but the last five, whose size follows from the end of the solve."""
    solver = ODESolver(method, rtol=tolerance, atol=tolerance, max_steps=10**4, **settings)
    x = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    return solver.solve(field, (x,), (0.0, end)).statistics.attempts[:-5]


def turning(rate):
    """x turns by the angle ∫ rate dt."""
    return lambda t, state: (rate(t) * torch.stack([-state[0][:, 1], state[0][:, 0]], 1),)


def test_steps_grow_at_most_tenfold_and_do_so():
    """The field is steep until t = 0.01 and then 0."""
    field = turning(lambda t: 1e4 * (t < 0.01))
    growth = [b.dt / a.dt for a, b in itertools.pairwise(attempts(field, end=1e6)) if a.accepted]
    assert max(growth) == pytest.approx(10)


def test_rejected_steps_shrink_at_most_to_a_fifth_and_do_so():
    """The field jumps at t = 0.5. It has no values beyond t = 0.7 in the second case."""
    for field in (turning(lambda t: 1 + 1e9 * (t > 0.5)), turning(lambda t: torch.where(t > 0.7, torch.nan, 1.0))):
        with pytest.raises(RuntimeError) as failed:
            attempts(field)
        assert failed.value.t > 0.49
    solver = ODESolver(min_step=1e-3)
    dynamics = turning(lambda t: 1 + 1e4 * (t > 0.5))
    tried = solver.solve(dynamics, (torch.ones(1, 2),), (0.0, 0.51)).statistics.attempts
    shrunk = [b.dt / a.dt for a, b in itertools.pairwise(tried) if not a.accepted and b.dt > 1.001e-3]
    assert min(shrunk) == pytest.approx(0.2)
    assert max(shrunk) < 1


def test_a_step_is_never_shorter_than_an_accepted_one_before():
    """The field turns faster and faster, so that errors rise until a step is rejected."""
    taken = attempts(turning(lambda t: torch.exp(5 * t)))
    pairs = [(a, b) for a, b in itertools.pairwise(taken) if a.accepted]
    assert sum(a.error > 0.7 for a, b in pairs) > 5
    assert all(b.dt >= a.dt * (1 - 1e-9) for a, b in pairs)
    assert all(b.dt < a.dt for a, b in itertools.pairwise(taken) if not a.accepted)


@pytest.mark.parametrize(
    ("method", "order"), [("flow5", 5), ("tsit5", 5), ("dopri5", 5), ("dopri8", 8), ("adaptive_heun", 2)]
)
def test_steps_settle_where_the_error_leaves_the_margin(method, order):
    """For constant difficulty steps stay as long as they are, or grow to 0.9 of what the tolerance allows."""
    taken = attempts(turning(lambda t: 1.0), 30.0, method, 1e-4)
    assert 0.95 * 0.9**order < taken[-1].error <= 1
    assert taken[-1].dt == pytest.approx(taken[-2].dt)


@pytest.mark.parametrize("controller", ["i", "pi", "pid"])
def test_every_controller_keeps_each_step_within_the_tolerance(controller):
    """On an orbit whose speed varies by a factor of a hundred; the error of the solution stays within a few of it."""
    speed = turning(lambda t: torch.exp(4.6 * torch.sin(t)))
    solver = ODESolver(rtol=1e-7, atol=1e-7, controller=controller)
    x = torch.tensor([[1.0, 0.0]])
    solution = solver.solve(speed, (x,), (0.0, 3.0))
    assert all((attempt.error <= 1) == attempt.accepted for attempt in solution.statistics.attempts)
    angle = ODESolver("dopri8", rtol=1e-12, atol=1e-12).solve(
        lambda t, s: (torch.exp(4.6 * torch.sin(t)).expand_as(s[0]),), (torch.zeros(1),), (0.0, 3.0)
    )
    truth = torch.stack([angle.end[0].cos(), angle.end[0].sin()], 1)
    assert float((solution.end[0] - truth).abs().max()) < 1e-3
    assert solution.statistics.rejected < 0.2 * solution.statistics.accepted


def test_growth_of_the_next_step_is_that_of_its_formula():
    """Errors 0.01, 0.02, 0.04 at order 5."""
    expected = {
        "i": 0.9 * 0.04**-0.2,
        "pi": 0.9 * 0.04 ** (-1.1 / 5) * 0.02 ** (0.4 / 5),
        "pid": 0.9 * 0.04 ** (-1.2 / 5) * 0.02 ** (0.6 / 5) * 0.01 ** (-0.1 / 5),
    }
    for controller, size in expected.items():
        growth = Growth(controller, 5)
        assert [growth(0.01), growth(0.02), growth(0.04)][2] == pytest.approx(size)
        assert growth(2.0) == pytest.approx(0.9 * 2**-0.2)
        assert growth(0.0) == 10
        assert growth(math.nan) == 0.2


def test_the_last_steps_share_the_rest_equally():
    """Up to four of them, and no more."""
    for end in torch.linspace(5, 8, 13).tolist():
        solver = ODESolver(rtol=1e-6, atol=1e-6)
        steps = solver.solve(turning(lambda t: 1.0), (torch.tensor([[1.0, 0.0]]),), (0.0, end)).statistics.attempts
        sizes = [step.dt for step in steps]
        assert sizes[-4:] == pytest.approx([sizes[-1]] * 4)
        assert sizes[-6] > 1.001 * sizes[-1] or sizes[-6] == pytest.approx(sizes[-5])
        assert all(b >= a * (1 - 1e-9) for a, b in itertools.pairwise(sizes[:-4]))


def test_bad_values_at_the_start_fail_at_once():
    calls = []

    def bad(t, state):
        calls.append(t)
        return state[0], state[1] / 0.0

    with pytest.raises(RuntimeError, match="the derivative of component 1 has 3 NaN or infinite values"):
        ODESolver().solve(bad, (torch.ones(3, 2), torch.zeros(3)), (0.0, 1.0))
    assert len(calls) == 1


def test_a_slope_whose_norm_overflows_is_solved_with_a_short_first_step():
    """The squares of 1e25 over the tolerance are infinite in float32; the slope is not."""
    x = torch.zeros(2, 2, dtype=torch.float32)
    solution = ODESolver().solve(lambda t, state: (torch.full_like(state[0], 1e25),), (x,), (0.0, 1.0))
    torch.testing.assert_close(solution.end[0], torch.full_like(x, 1e25))
    assert solution.statistics.attempts[0].dt < 1e-5


def test_the_first_evaluations_stay_within_the_solve():
    """The second one, which measures how the slope changes, is no farther than the end."""
    seen = []

    def slow(t, state):
        seen.append(float(t))
        return (1e-6 * state[0],)

    ODESolver().solve(slow, (torch.ones(1, 2),), (0.0, 1e-3))
    assert max(seen) == 1e-3


def test_steps_that_end_in_nan_are_tried_again_at_a_fifth_of_the_size():
    """The state approaches 1 from below; a step that is too long passes it, where the field has no values."""
    solver = ODESolver(rtol=0.1, atol=0.1)
    tried = solver.solve(
        lambda t, state: (torch.where(state[0] > 1, torch.nan, 1 - state[0]),), (torch.zeros(2, 1),), (0.0, 60.0)
    ).statistics.attempts
    shrunk = [b.dt / a.dt for a, b in itertools.pairwise(tried) if math.isnan(a.error)]
    assert shrunk
    assert shrunk == pytest.approx([0.2] * len(shrunk))


def test_what_dynamics_observe_is_kept_at_accepted_steps_only():
    class Observed:
        def __call__(self, t, state):
            return turning(lambda t: torch.exp(5 * t))(t, state)

        def observe(self, derivatives):
            return {"speed": derivatives[0].norm()}

    statistics = ODESolver().solve(Observed(), (torch.tensor([[1.0, 0.0]]),), (0.0, 1.0)).statistics
    times, speeds = statistics.curve("speed")
    assert statistics.rejected > 0
    assert times == [attempt.t for attempt in statistics.attempts if attempt.accepted]
    assert speeds == pytest.approx([math.exp(5 * t) for t in times], rel=1e-2)


def test_the_tolerance_is_relative_to_the_larger_end_of_the_step():
    norm = ErrorNorm(("state",), (1.0,), rtol=1.0, atol=1.0, batch_size=1)
    small, large, error = (torch.tensor([[value]]) for value in (0.0, 9.0, 2.0))
    assert norm.worst((error,), (small,), (large,))[0] == pytest.approx(0.2)
    assert norm.worst((error,), (large,), (small,))[0] == pytest.approx(0.2)


def test_the_worst_sample_of_an_adjoint_is_found_like_that_of_the_state():
    norm = ErrorNorm(("state", "adjoint of state"), (1.0, 1.0), rtol=1.0, atol=1.0, batch_size=3)
    zero, error = torch.zeros(3, 2), torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 2.0]])
    assert norm.worst((zero, error), (zero, zero), (zero, zero))[1:] == ("adjoint of state", 2)
