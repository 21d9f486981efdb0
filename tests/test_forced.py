"""Fields that are driven by sampled inputs."""

import functools
import itertools

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicHermiteSpline

import flows
from flows.fields import MLP, Forced, Linear, Physics

S = 7
TIMES = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.1, 1.6, 2.0], dtype=torch.float64)


def relax(t, x, context, rate=1.3):
    """dx/dt = u − k x."""
    return context - rate * x


def samples(batch, seed=0):
    values = torch.randn(batch, S, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cat([TIMES[:, None].expand(batch, S, 1), values], 2)


def relaxing(interpolation, **settings):
    settings = {"context_shape": (S, 2), "event_shape": (1,)} | settings
    known = functools.partial(Physics, relax)
    return Forced(known, interpolation, **settings).double()


def input_at(field, t, table):
    from flows.fields.forced import Samples

    return Samples(table, field, False)(torch.as_tensor(t, dtype=torch.float64))


@pytest.mark.parametrize("interpolation", ["linear", "cubic", "hold"])
def test_interpolation_is_that_of_numpy_and_scipy(interpolation):
    table = samples(3)
    for t in torch.linspace(0, 2, 41, dtype=torch.float64):
        for row in range(3):
            u = table[row, :, 1].numpy()
            if interpolation == "linear":
                expected = np.interp(t, TIMES, u)
            elif interpolation == "hold":
                expected = u[np.searchsorted(TIMES.numpy(), float(t), side="right") - 1]
            else:
                slopes = np.gradient(u, TIMES.numpy(), edge_order=2)
                expected = CubicHermiteSpline(TIMES.numpy(), u, slopes)(t)
            assert abs(float(input_at(interpolation, t, table)[row, 0]) - expected) < 1e-12
            alone = input_at(interpolation, t, table[row : row + 1])
            assert abs(float(alone) - expected) < 1e-12
    assert torch.allclose(
        input_at(interpolation, [0.3, 0.7, 1.9], table),
        torch.stack([input_at(interpolation, t, table)[i] for i, t in enumerate((0.3, 0.7, 1.9))]),
    )


@pytest.mark.parametrize("interpolation", ["linear", "cubic", "hold"])
def test_rows_that_repeat_their_last_sample_are_shorter_rows(interpolation):
    short = samples(2)[:, :4]
    padded = torch.cat([short, short[:, -1:].expand(2, 3, 2)], 1)
    for t in np.linspace(0, 0.9, 19):
        torch.testing.assert_close(input_at(interpolation, t, padded), input_at(interpolation, t, short))


def reference(table, interpolation, start, times):
    """By scipy, from knot to knot."""
    from scipy.integrate import solve_ivp

    states = []
    for row, y in zip(table, start, strict=True):
        found = {0.0: float(y)}
        y = [float(y)]
        for a, b in itertools.pairwise(TIMES):
            inside = [t for t in times if a < t <= b]

            def velocity(t, y, row=row, a=a, b=b):
                nudged = min(max(t, float(a) + 1e-12), float(b) - 1e-12)
                return [float(input_at(interpolation, nudged, row[None])) - 1.3 * y[0]]

            solved = solve_ivp(
                velocity, (float(a), float(b)), y, rtol=1e-11, atol=1e-11, t_eval=sorted({*inside, float(b)})
            )
            found |= dict(zip(inside, solved.y[0], strict=False))
            y = solved.y[:, -1]
        states.append([found[t] for t in times])
    return torch.tensor(states, dtype=torch.float64)


@pytest.mark.parametrize("interpolation", ["linear", "cubic", "hold"])
def test_a_driven_solve_meets_its_tolerance(interpolation):
    table, start = samples(2), torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    times = [0.0, 0.35, 1.1, 1.95]
    expected = reference(table, interpolation, start, times)
    solver = flows.ODESolver("dopri5", rtol=1e-7, atol=1e-7)  # the bound below is of its steps
    blind = flows.NeuralODE(relaxing(interpolation, stops=False), solver).trajectory(start, times, table)
    path = flows.NeuralODE(relaxing(interpolation), solver).trajectory(start, times, table)
    error = (path.states[..., 0] - expected).abs().max()
    assert error < 5e-7
    if interpolation == "hold":
        assert (blind.states[..., 0] - expected).abs().max() > 10 * error
        assert path.nfe < 0.5 * blind.nfe


@pytest.mark.parametrize(
    ("interpolation", "own"), [("linear", False), ("cubic", True), ("hold", False), ("hold", True)]
)
@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_gradients_reach_inputs_and_parameters(interpolation, gradient, own):
    table = samples(2).requires_grad_()
    start = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    ode = flows.NeuralODE(relaxing(interpolation), flows.ODESolver("dopri8", 1e-9, 1e-9, gradient=gradient))
    times = torch.tensor([[0.1, 0.9, 1.5], [0.0, 0.4, 1.95]], dtype=torch.float64) if own else [0.0, 0.9, 1.95]

    def loss(table):
        return ode.trajectory(start, times, table, solver_error=False).states.square().sum()

    (raw,) = ode.field.parameters()
    of_table, of_rate = torch.autograd.grad(loss(table), [table, raw])
    assert not of_table[..., 0].any()  # the times of the samples are given
    for row, place in ((0, 3), (1, 5)):
        bump = torch.zeros_like(table)
        bump[row, place, 1] = 1e-4
        with torch.no_grad():
            expected = (loss(table + bump) - loss(table - bump)) / 2e-4
        torch.testing.assert_close(of_table[row, place, 1], expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        raw += 1e-4
        above = loss(table)
        raw -= 2e-4
        below = loss(table)
        raw += 1e-4
    torch.testing.assert_close(of_rate, (above - below) / 2e-4, rtol=1e-5, atol=1e-6)


def test_one_signal_for_all_equals_the_same_signal_in_each_row():
    table = samples(1).expand(3, S, 2)
    start = torch.randn(3, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    by_row = flows.NeuralODE(relaxing("hold")).trajectory(start, [0.0, 1.0, 1.9], table)
    shared = relaxing("hold", context_shape=None, times=TIMES, values=table[0, :, 1])
    torch.testing.assert_close(flows.NeuralODE(shared).trajectory(start, [0.0, 1.0, 1.9]).states, by_row.states)
    assert by_row.nfe == flows.NeuralODE(shared).trajectory(start, [0.0, 1.0, 1.9]).nfe


def test_a_driven_flow_has_the_divergence_of_its_inner_field():
    torch.manual_seed(0)
    inner = functools.partial(MLP, hidden=(16,))
    field = Forced(inner, "cubic", event_shape=(2,), context_shape=(S, 3)).double()
    table = torch.cat([TIMES.expand(4, S)[..., None], torch.randn(4, S, 2, dtype=torch.float64)], 2)
    x = torch.randn(4, 2, dtype=torch.float64)
    solver = flows.ODESolver(rtol=1e-8, atol=1e-8)
    closed, exact = (flows.CNF(field, divergence, solver).log_prob(x, table) for divergence in ("analytic", "exact"))
    torch.testing.assert_close(closed, exact, rtol=1e-6, atol=1e-6)
    y, log_p = flows.CNF(field, solver=solver).sample_and_log_prob((4,), context=table)
    torch.testing.assert_close(flows.CNF(field, solver=solver).log_prob(y, table), log_p, rtol=1e-5, atol=1e-5)


def test_inputs_that_end_too_early_are_refused_by_name():
    ode, start = flows.NeuralODE(relaxing("linear")), torch.zeros(2, 1, dtype=torch.float64)
    table = samples(2)
    with pytest.raises(
        ValueError, match=r"inputs of row 0 end at t = 2, and states are wanted until t = 2\.5.*extrapolate"
    ):
        ode.trajectory(start, [0.0, 2.5], table)
    with pytest.raises(ValueError, match=r"inputs of row 1 begin at t = 0, and states are wanted from t = -1"):
        ode.trajectory(start, torch.tensor([[0.0, 1.0], [-1.0, 1.0]]), table)
    holding = flows.NeuralODE(relaxing("linear", extrapolate=True)).trajectory(start, [0.0, 2.0, 12.0], table)
    torch.testing.assert_close(holding.states[:, -1, 0], table[:, -1, 1] / 1.3, rtol=1e-4, atol=1e-4)


def test_bad_inputs_are_refused_by_name():
    ode, start = flows.NeuralODE(relaxing("linear")), torch.zeros(2, 1, dtype=torch.float64)
    swapped = samples(2)
    swapped[1, 3, 0] = 0.1
    with pytest.raises(ValueError, match="inputs of row 1 have times that do not increase"):
        ode.trajectory(start, [0.0, 1.0], swapped)
    missing = samples(2)
    missing[0, 3, 1] = torch.nan
    with pytest.raises(ValueError, match="inputs of row 0 hold NaN or infinite values"):
        ode.trajectory(start, [0.0, 1.0], missing)
    with pytest.raises(ValueError, match=r"inputs of row 0 are a single sample; linear .*'hold' one"):
        ode.trajectory(start, [0.0, 1.0], samples(2)[:, :1])
    with pytest.raises(ValueError, match="Forced needs its inputs"):
        ode.trajectory(start, [0.0, 1.0])
    with pytest.raises(ValueError, match=r"context of shape \(B, S, 2\).*got \(2, 7, 3\)"):
        ode.trajectory(start, [0.0, 1.0], torch.zeros(2, S, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="interpolation must be 'linear', 'cubic' or 'hold', got 'spline'"):
        Forced(MLP((2,), context_shape=(1,)), "spline", context_shape=(S, 2))
    with pytest.raises(ValueError, match=r"inner field must take the 1 inputs.*got Linear with None"):
        Forced(Linear((2,)), context_shape=(S, 2))
    with pytest.raises(ValueError, match="the inputs have times that do not increase"):
        Forced(MLP((2,), context_shape=(1,)), times=[0.0, 1.0, 1.0 - 1e-3], values=[1.0, 2.0, 3.0])


def test_stated_jumps_of_a_dose():
    def decay(t, x, dose=5.0):
        return -x + dose * ((t >= 0.4) & (t < 0.45)).to(x).reshape(-1, 1)

    solver = flows.ODESolver(rtol=1e-7, atol=1e-7)
    field = Physics(decay, (1,), jumps=(0.4, 0.45)).double()
    path = flows.NeuralODE(field, solver).trajectory(torch.zeros(1, 1, dtype=torch.float64), [0.0, 1.0])
    expected = 5 * (np.exp(0.05) - 1) * np.exp(-0.6)
    assert abs(float(path.states.detach()[0, -1, 0]) - expected) < 1e-7
    starts = torch.tensor([[0.0, 1.0], [0.1, 1.0]], dtype=torch.float64)  # solved together, each in its own time
    path = flows.NeuralODE(field, solver).trajectory(torch.zeros(2, 1, dtype=torch.float64), starts)
    assert (path.states.detach()[:, -1, 0] - expected).abs().max() < 1e-7
