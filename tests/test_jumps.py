"""Solves of right-hand sides that jump in time: the steps end at the jumps."""

import math

import pytest
import torch

from flows.solvers import ODESolver

JUMPS = (0.31, 0.5, 0.77)
LEVELS = (3.0, -6.0, 9.0, -12.0)
METHODS = {
    "dopri5": {},
    "dopri8": {},
    "bosh3": {},
    "rk4": {"step_size": 0.1},
    "explicit_adams": {"step_size": 0.01},
    "implicit_adams": {"step_size": 0.01},
    "scipy_solver": {"gradient": "adjoint"},
}
OWN_TIMES = torch.tensor([[0.0, 0.2, 0.6], [0.0, 0.5, 1.0]], dtype=torch.float64)


class Switched:
    """dx/dt = a x + u(t), with u constant between the jumps."""

    def __init__(self, rate, jumps=JUMPS, levels=LEVELS):
        self.rate, self.jumps, self.levels = rate, jumps, levels

    def __call__(self, t, state):
        (x,) = state
        at = torch.searchsorted(torch.tensor(JUMPS, dtype=x.dtype), t.detach().reshape(-1), right=True)
        return (self.rate * x + torch.as_tensor(self.levels, dtype=x.dtype)[at].view(-1, *[1] * (x.ndim - 1)),)


def closed_form(rate, x, end, levels=LEVELS):
    points = [0.0, *(jump for jump in JUMPS if jump < end), end]
    for a, b, level in zip(points, points[1:], levels, strict=False):
        growth = math.exp(rate * (b - a))
        x = growth * x + level * (growth - 1) / rate
    return x


@pytest.mark.parametrize("method", METHODS)
def test_steps_end_at_jumps(method):
    start = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    times = [0.0, 0.4, 0.77, 1.0]
    solver = ODESolver(method, rtol=1e-7, atol=1e-7, **METHODS[method])
    with torch.no_grad():
        found = solver.solve(Switched(0.65), (start,), times)
        blind = solver.solve(Switched(0.65, jumps=()), (start,), times)
    expected = torch.tensor([[closed_form(0.65, x, t) for x in (1.0, 2.0)] for t in times], dtype=torch.float64)
    error, blind_error = ((one.states[0][..., 0] - expected).abs().max().item() for one in (found, blind))
    tolerance = 1e-6 if method in ("bosh3", "rk4", "scipy_solver") else 5e-7
    assert error < tolerance
    assert blind_error > 10 * error or method == "scipy_solver"  # which finds them at a price
    if solver.controls_error:
        assert found.statistics.nfe_forward < 0.4 * blind.statistics.nfe_forward
        ends = {round(attempt.t, 12) for attempt in found.statistics.attempts}
        assert set(JUMPS) <= ends


@pytest.mark.parametrize("direction", ["forwards", "backwards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_solve_sees_one_side_of_a_jump_only(direction, dtype):
    seen = []

    class Watched(Switched):
        def __call__(self, t, state):
            seen.append(float(t))
            return super().__call__(t, state)

    times = [0.31, 1.0] if direction == "forwards" else [1.0, 0.31]
    for method, settings in (("dopri5", {}), ("rk4", {"step_size": 0.1})):
        seen.clear()
        ODESolver(method, **settings).solve(Watched(0.65), (torch.ones(1, 1, dtype=dtype),), times)
        assert not set(seen) & {float(torch.tensor(jump, dtype=dtype)) for jump in JUMPS}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_gradients_through_jumps(method, gradient, own):
    solver = ODESolver(method, rtol=1e-9, atol=1e-9, gradient=gradient, step_size={"rk4": 0.01}.get(method))
    times = OWN_TIMES if own else [0.0, 0.4, 0.77, 1.0]

    def loss(rate, start, levels):
        solution = solver.solve(Switched(rate, levels=levels), (start,), times, [rate, levels])
        return (solution.states[0] * torch.tensor([1.0, -0.3], dtype=torch.float64).view(2, 1)).square().sum()

    rate = torch.tensor(0.65, dtype=torch.float64, requires_grad=True)
    start = torch.tensor([[1.0], [2.0]], dtype=torch.float64, requires_grad=True)
    levels = torch.tensor(LEVELS, dtype=torch.float64, requires_grad=True)
    given = (rate, start, levels)
    found = torch.autograd.grad(loss(*given), given)
    for i, gradient_found in enumerate(found):
        for entry in range(given[i].numel()):
            values = []
            for step in (1e-4, -1e-4):
                moved = [tensor.detach().clone() for tensor in given]
                moved[i].view(-1)[entry] += step
                values.append(float(loss(*moved)))
            expected = (values[0] - values[1]) / 2e-4
            assert abs(float(gradient_found.flatten()[entry]) - expected) < 1e-5 * (1 + abs(expected))


def test_jumps_that_the_dtype_cannot_tell_apart_are_one():
    jumps = (0.5, 0.5 + 1e-9, 0.5 + 1e-8)
    solution = ODESolver().solve(lambda t, s: (-s[0],), (torch.ones(1, 1, dtype=torch.float32),), [0.0, 1.0])
    again = ODESolver().solve(Stated(jumps), (torch.ones(1, 1, dtype=torch.float32),), [0.0, 1.0])
    torch.testing.assert_close(again.end[0], solution.end[0], atol=2e-5, rtol=0)
    assert sum(abs(attempt.t - 0.5) < 1e-3 for attempt in again.statistics.attempts) == 1


class Stated:
    def __init__(self, jumps):
        self.jumps = jumps

    def __call__(self, t, state):
        return (-state[0],)


def test_jumps_are_finite():
    with pytest.raises(ValueError, match=r"jumps must be finite times, got \[0\.5, nan\]"):
        ODESolver().solve(Stated((0.5, math.nan)), (torch.ones(1, 1),), [0.0, 1.0])
