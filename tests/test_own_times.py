"""Solves in which each sample has output times of its own."""

import pytest
import torch

from flows.errors import InvalidValueError
from flows.solvers import ODESolver

torch.set_default_dtype(torch.float64)
RATES = torch.tensor([0.3, 1.0, 2.0, 0.7])


class Growth:
    """dx/dt = r x + a cos t, with one rate a sample, and the integral of the sum of x beside it."""

    component_names = ("state", "cost")

    def __init__(self, rates, forcing=0.0):
        self.rates, self.forcing = rates, forcing

    def __call__(self, t, state):
        x = state[0]
        push = self.forcing * torch.cos(t) * torch.ones(len(x))
        return self.rates[:, None] * x + push[:, None], x.sum(1)


def exact(rates, x0, times):
    """The states (B, T, d) and the costs (B, T) without forcing."""
    factor = (rates[:, None] * (times - times[:, :1])).exp()
    states = x0[:, None] * factor[..., None]
    return states, (x0.sum(1)[:, None] * (factor - 1)) / rates[:, None]


def own_times(columns=6, seed=0, start=0.5, span=2.0):
    generator = torch.Generator().manual_seed(seed)
    steps = torch.rand(4, columns - 1, generator=generator) + 0.1
    steps = span * steps / steps.sum(1, keepdim=True)
    return start + torch.cat([torch.zeros(4, 1), steps.cumsum(1)], 1)


def start_state():
    x0 = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    return x0, torch.zeros(4)


SOLVERS = {
    "dopri5": ODESolver(rtol=1e-9, atol=1e-9),
    "dopri8": ODESolver(method="dopri8", rtol=1e-9, atol=1e-9, max_step=0.05),
    "bosh3": ODESolver(method="bosh3", rtol=1e-9, atol=1e-9),
    "rk4": ODESolver(method="rk4", step_size=0.005),
    "implicit_adams": ODESolver(method="implicit_adams", step_size=0.01),
}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("sign", [1, -1])
def test_each_sample_is_solved_at_its_own_times(name, sign):
    x0, zero = start_state()
    times = sign * own_times()
    solution = SOLVERS[name].solve(Growth(RATES), (x0, zero), times)
    states, costs = exact(RATES, x0, times)
    assert solution.states[0].shape == (6, 4, 3)
    assert solution.states[1].shape == (6, 4)
    tolerance = 1e-4 if name == "implicit_adams" else 1e-6
    torch.testing.assert_close(solution.states[0].transpose(0, 1), states, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(solution.states[1].T, costs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(solution.times, times)


def test_rows_with_equal_times_are_the_shared_solve_bit_for_bit_in_cost():
    x0, zero = start_state()
    shared = torch.linspace(0.5, 2.5, 7)
    one = SOLVERS["dopri5"].solve(Growth(RATES, 1.0), (x0, zero), shared)
    own = SOLVERS["dopri5"].solve(Growth(RATES, 1.0), (x0, zero), shared.expand(4, 7))
    assert own.statistics.nfe_forward == one.statistics.nfe_forward
    for a, b in zip(one.states, own.states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_evaluations_are_those_of_the_union_of_all_times():
    x0, zero = start_state()
    times = own_times(20)
    union = times.flatten().unique()
    own = SOLVERS["dopri5"].solve(Growth(RATES, 1.0), (x0, zero), times)
    shared = SOLVERS["dopri5"].solve(Growth(RATES, 1.0), (x0, zero), union)
    assert own.statistics.nfe_forward == shared.statistics.nfe_forward
    picked = shared.states[0][torch.searchsorted(union, times).T, torch.arange(4)]
    torch.testing.assert_close(own.states[0], picked, rtol=1e-12, atol=1e-12)


def gradients(solver, times, weights, counts=None):
    """Gradients of a weighted sum of states and costs, to the start and the rates."""
    x0, zero = (tensor.clone().requires_grad_() for tensor in start_state())
    rates = RATES.clone().requires_grad_()
    solution = solver.solve(Growth(rates, 1.0), (x0, zero), times, [rates], counts)
    loss = (weights[..., None] * solution.states[0]).square().sum() + (weights * solution.states[1]).sum()
    return torch.autograd.grad(loss, (x0, zero, rates))


@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint"])
@pytest.mark.parametrize("lengths", [None, [6, 4, 2, 1]])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_gradients_agree(gradient, lengths, method):
    settings = {"rtol": 1e-10, "atol": 1e-10} if method == "dopri5" else {"step_size": 0.005}
    times = own_times()
    counts = None if lengths is None else torch.tensor(lengths)
    weights = torch.rand(6, 4, generator=torch.Generator().manual_seed(2))
    expected = gradients(ODESolver(method=method, **settings), times, weights, counts)
    found = gradients(ODESolver(method=method, gradient=gradient, **settings), times, weights, counts)
    tolerance = 1e-12 if gradient == "checkpoint" else 1e-6
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_gradients_are_those_of_finite_differences():
    times = own_times(4)
    counts = torch.tensor([4, 2, 3, 1])
    solver = SOLVERS["dopri5"]

    def loss(x0, rates):
        states, costs = solver.solve(Growth(rates, 1.0), (x0, torch.zeros(4)), times, [rates], counts).states
        return states.square().sum() + costs.sum()

    inputs = (start_state()[0].requires_grad_(), RATES.clone().requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs, eps=1e-5, atol=1e-5)


def test_rows_repeat_their_last_output_after_their_count():
    x0, zero = start_state()
    times = own_times()
    times[2, 3:] = 99.0  # ignored
    solution = SOLVERS["dopri5"].solve(Growth(RATES), (x0, zero), times, counts=torch.tensor([6, 6, 3, 1]))
    states, _ = exact(RATES, x0, times)
    torch.testing.assert_close(solution.states[0][:3, 2], states[2, :3], rtol=1e-7, atol=1e-7)
    assert (solution.states[0][3:, 2] == solution.states[0][2, 2]).all()
    assert (solution.states[0][:, 3] == x0[3]).all()
    assert solution.times.max() < 3


class Explosion:
    """dx/dt = x², which leaves every bound at t = 1/x₀."""

    def __call__(self, t, state):
        return (state[0] ** 2,)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_a_sample_is_not_followed_beyond_its_last_time(gradient):
    x0 = torch.tensor([[2.0], [0.1]], requires_grad=True)  # the first explodes at 0.5
    times = torch.tensor([[0.0, 0.2, 0.4], [0.0, 2.0, 4.0]])
    solver = ODESolver(rtol=1e-8, atol=1e-8, gradient=gradient)
    states = solver.solve(Explosion(), (x0,), times).states[0][..., 0].T
    torch.testing.assert_close(states, 1 / (1 / x0 - times), rtol=1e-5, atol=1e-7)
    (slope,) = torch.autograd.grad(states[:, -1].sum(), x0)
    torch.testing.assert_close(slope, (1 / (1 - x0 * times[:, -1:])) ** 2, rtol=1e-4, atol=1e-6)


def test_samples_that_have_ended_do_not_loosen_the_tolerance():
    """The steps that the last of many samples takes alone are those that it takes in a solve of its own."""
    dynamics = Growth(torch.full((32,), 0.5), 3.0)
    x0 = torch.ones(32, 1)
    times = torch.cat([torch.zeros(32, 1), torch.full((32, 1), 0.1)], 1)
    times[0, 1] = 20.0
    many = ODESolver(rtol=1e-6, atol=1e-6).solve(dynamics, (x0, torch.zeros(32)), times)
    alone = ODESolver(rtol=1e-6, atol=1e-6).solve(Growth(dynamics.rates[:1], 3.0), (x0[:1], torch.zeros(1)), times[0])
    assert many.statistics.accepted == pytest.approx(alone.statistics.accepted, abs=3)
    torch.testing.assert_close(many.states[0][-1, 0], alone.states[0][-1, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("times", "counts", "message"),
    [
        (own_times()[:3], None, "need a row for each of 4 samples, got 3"),
        (own_times() + torch.arange(4.0)[:, None], None, "the rows of times must start together"),
        (own_times().flip(1), None, "the rows of times must start together"),
        (own_times(), torch.tensor([6, 7, 1, 1]), "counts must be 4 numbers from 1 to 6"),
        (own_times(), torch.tensor([1, 1, 1, 1]), "one of them at least 2"),
        (torch.tensor([[0.0, 1.0]] * 3 + [[0.0, -1.0]]), None, "each row of times must be strictly increasing"),
        (own_times()[0], torch.tensor([2]), "counts need times of shape"),
    ],
)
def test_times_that_do_not_fit_are_refused(times, counts, message):
    with pytest.raises(InvalidValueError, match=message):
        ODESolver().solve(Growth(RATES), start_state(), times, counts=counts)
