"""NeuralODE: trajectories, their gradients, their errors, and what is refused."""

import math

import pytest
import torch
from torch import nn

import flows
from benchmarks import error_bars
from flows.errors import FlowsError, InvalidTypeError, InvalidValueError
from flows.path_costs import JacobianNorm, KineticEnergy
from flows.solvers import ODESolver, SolverError

torch.set_default_dtype(torch.float64)

SOLVE = ODESolver.solve


class Spiral(nn.Module):
    """dx/dt = A x + b cos t, with a parameter A and a context that scales it."""

    event_shape = (2,)

    def __init__(self, push=0.0):
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[-0.1, -2.0], [2.0, -0.1]]))
        self.push = push

    def forward(self, t, x, context=None):
        scale = 1.0 if context is None else context
        return scale * (x @ self.matrix.T) + self.push * torch.cos(t).expand(len(x))[:, None]


def exact(matrix, x0, times):  # (B, 2), (B, T) -> (B, T, 2)
    shifted = (times - times[:, :1])[..., None, None] * matrix
    return (torch.linalg.matrix_exp(shifted) @ x0[:, None, :, None])[..., 0]


def spiral(push=0.0, gradient="backprop", tolerance=1e-9):
    return flows.NeuralODE(Spiral(push), ODESolver(rtol=tolerance, atol=tolerance, gradient=gradient))


def starts(*shape):
    return torch.randn(*shape, 2, generator=torch.Generator().manual_seed(0))


def increasing(batch, columns, offset=0.0):
    steps = torch.rand(batch, columns, generator=torch.Generator().manual_seed(1)) + 0.05
    return steps.cumsum(1) + offset * torch.arange(batch)[:, None]


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_states_are_those_of_the_matrix_exponential(shape):
    ode, x0, times = spiral(), starts(*shape), torch.linspace(1.0, 4.0, 7)
    path = ode.trajectory(x0, times)
    flat = exact(ode.field.matrix, x0.reshape(-1, 2), times.expand(x0.reshape(-1, 2).shape[0], -1))
    assert path.states.shape == (*shape, 7, 2)
    torch.testing.assert_close(path.states, flat.reshape(path.states.shape), rtol=1e-6, atol=1e-7)
    assert path.solver_error.shape == path.states.shape
    assert torch.equal(ode(x0, times), path.states)


@pytest.mark.parametrize("sign", [1, -1])
def test_rows_may_start_anywhere(sign):
    ode, x0, times = spiral(), starts(4), sign * increasing(4, 6, offset=3.0)
    path = ode.trajectory(x0, times)
    torch.testing.assert_close(path.states, exact(ode.field.matrix, x0, times), rtol=1e-5, atol=1e-6)


def test_each_row_is_its_own_solve_where_the_field_depends_on_time():
    ode, x0, times = spiral(push=1.0), starts(3), increasing(3, 5, offset=2.0)
    path = ode.trajectory(x0, times)
    for i in range(3):
        alone = ode.trajectory(x0[i], times[i])
        torch.testing.assert_close(path.states[i], alone.states, rtol=1e-6, atol=1e-7)


def test_a_mask_picks_times_and_repeats_the_state_before():
    ode, x0, times = spiral(push=1.0), starts(3), increasing(3, 6)
    mask = torch.tensor([[1, 1, 0, 1, 0, 1], [0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0]], dtype=torch.bool)
    given = times.masked_fill(~mask, math.nan)
    path = ode.trajectory(x0, given, mask=mask)
    for i in range(2):
        alone = ode.trajectory(x0[i], times[i, mask[i]])
        torch.testing.assert_close(path.states[i, mask[i]], alone.states, rtol=1e-6, atol=1e-7)
    assert torch.equal(path.states[0, 2], path.states[0, 1])
    assert torch.equal(path.states[1, 5], path.states[1, 4])
    assert torch.equal(path.states[2], x0[2].expand(6, 2))
    assert torch.isfinite(path.states).all()


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
@pytest.mark.parametrize("layout", ["shared", "rows", "masked"])
def test_gradients_to_everything_are_those_of_finite_differences(gradient, layout):
    ode = spiral(push=1.0, gradient=gradient, tolerance=1e-10)
    x0, context = starts(3), torch.tensor([[1.0], [0.8], [1.2]])
    times = torch.linspace(0.2, 1.5, 4) if layout == "shared" else increasing(3, 4, offset=1.0)
    mask = None
    if layout == "masked":
        mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
    weights = torch.rand(3, 4, 2, generator=torch.Generator().manual_seed(3))

    def loss(x0, times, context, matrix):
        ode.field.matrix.data = matrix.data
        value = (weights * ode(x0, times, context, mask).sin()).sum()
        if not times.requires_grad:
            return value, None
        (slope,) = torch.autograd.grad(value, ode.field.matrix, retain_graph=True)
        return value, slope

    inputs = [tensor.requires_grad_() for tensor in (x0, times, context)]
    value, slope = loss(*inputs, ode.field.matrix)
    found = [*torch.autograd.grad(value, inputs), slope]
    tensors = [tensor.detach().clone() for tensor in (*inputs, ode.field.matrix)]
    for place, gradient_found in enumerate(found):
        direction = torch.randn(tensors[place].shape, generator=torch.Generator().manual_seed(place))
        values = []
        for step in (1e-5, -1e-5):
            moved = list(tensors)
            moved[place] = tensors[place] + step * direction
            values.append(loss(*moved)[0].item())
        numeric = (values[0] - values[1]) / 2e-5
        assert (gradient_found * direction).sum().item() == pytest.approx(numeric, rel=1e-5, abs=1e-6)


def test_times_of_rows_cost_the_evaluations_of_their_union():
    ode, x0 = spiral(push=1.0, tolerance=1e-6), starts(16)
    times = torch.cat([torch.zeros(16, 1), increasing(16, 9)], 1)
    union = ode.trajectory(x0, times.flatten().unique(), solver_error=False)
    assert ode.trajectory(x0, times, solver_error=False).nfe <= union.nfe  # rows that have ended are left out
    times[:, -1] = times.max()
    assert ode.trajectory(x0, times, solver_error=False).nfe == union.nfe


SOLVERS = {
    "dopri5": {"rtol": 1e-4, "atol": 1e-4},
    "at the rounding of float32": {"rtol": 1e-7, "atol": 1e-7},
    "bosh3": {"method": "bosh3", "rtol": 1e-5, "atol": 1e-5},
    "rk4": {"method": "rk4", "step_size": 0.05},
    "euler": {"method": "euler", "step_size": 0.1},
    "explicit_adams": {"method": "explicit_adams", "step_size": 0.1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("system", list(error_bars.SYSTEMS))
@pytest.mark.parametrize("name", list(SOLVERS))
def test_the_true_error_is_within_three_reported_errors(name, system, dtype):
    found = error_bars.measure(ODESolver(**SOLVERS[name]), system, dtype)
    assert found.inside > 0.95
    assert found.reported < 4 * found.true_error + 20 * torch.finfo(dtype).eps


def test_the_solver_error_is_nan_where_the_tighter_solve_fails():
    ode = flows.NeuralODE(Spiral(), ODESolver("rk4", step_size=0.5))
    calls = []

    def fail(self, *arguments, **named):
        calls.append(self)
        if len(calls) > 1:
            raise SolverError("no", 0.0, 0.0)
        return SOLVE(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ODESolver, "solve", fail)
        path = ode.trajectory(starts(3), torch.linspace(0.0, 1.0, 4))
    assert path.solver_error.isnan().all()
    assert torch.isfinite(path.states).all()
    assert len(calls) == 3


def test_path_costs_are_integrated_beside_the_states():
    ode, x0 = spiral(), starts(4)
    path = ode.trajectory(x0, (0.0, 2.0), path_costs=[KineticEnergy(), JacobianNorm()])
    matrix = ode.field.matrix.detach()
    rates = (exact(matrix, x0, torch.linspace(0, 2, 2001).expand(4, -1)) @ matrix.T).square().sum(-1)
    energy = torch.trapezoid(rates, dx=0.001, dim=1)
    torch.testing.assert_close(path.path_costs["kinetic_energy"], energy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(path.path_costs["jacobian_norm"], 2 * matrix.square().sum().expand(4), rtol=1e-6, atol=0)
    backwards = ode.trajectory(path.states[:, -1], (2.0, 0.0), path_costs=[KineticEnergy()])
    torch.testing.assert_close(backwards.path_costs["kinetic_energy"], energy, rtol=1e-5, atol=1e-5)


def test_noise_is_a_parameter_in_the_units_of_the_states():
    ode = flows.NeuralODE(Spiral(), noise=0.1)
    torch.testing.assert_close(ode.noise, torch.full((2,), 0.1))
    assert "log_noise" in dict(ode.named_parameters())
    assert flows.NeuralODE(Spiral()).noise is None


class Explosion(nn.Module):
    event_shape = (1,)

    def forward(self, t, x):
        return x**2


def test_an_explosion_in_finite_time_says_when():
    with pytest.raises(SolverError, match=r"at t = 0\.(49|5)"):
        flows.NeuralODE(Explosion()).trajectory(torch.tensor([[2.0]]), (0.0, 1.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"times": [0.0, 1.0, 0.5]}, "strictly increasing or strictly decreasing"),
        ({"times": torch.zeros(2, 3)}, r"must have the shape \(T,\) or \(3, 'T'\)"),
        ({"times": increasing(3, 4).flip(1) * torch.tensor([[1.0], [-1.0], [1.0]])}, "each row of times must be"),
        ({"times": ["a", "b"]}, r"times must be a torch.Tensor or a list of numbers, got .*; write torch.tensor"),
        ({"times": torch.tensor([0.0, math.nan])}, "finite"),
        ({"x0": starts(3)[:, :1]}, r"expected initial states of shape \(\*batch, 2\), got \(3, 1\)"),
        ({"x0": starts(3) * math.nan}, "3 initial states hold NaN or infinite values, the first at index 0"),
        ({"x0": [[1.0, 2.0]] * 3}, r"x0 must be a torch.Tensor, got .*; write torch.tensor"),
        ({"mask": torch.ones(3, 3, dtype=torch.bool)}, r"the mask must be a bool tensor of shape \(3, 4\)"),
        ({"mask": torch.zeros(3, 4, dtype=torch.bool)}, "the mask leaves no time in row 0"),
        ({"mask": torch.ones(3, 4)}, "the mask must be a bool tensor"),
        ({"context": torch.ones(2, 1)}, "a context for each of the initial states"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    given = {"x0": starts(3), "times": increasing(3, 4), **arguments}
    with pytest.raises(FlowsError, match=message):
        spiral()(**given)


@pytest.mark.parametrize("noise", [0.0, -1.0, math.inf])
def test_noise_must_be_positive(noise):
    with pytest.raises(InvalidValueError, match="noise must be"):
        flows.NeuralODE(Spiral(), noise=noise)


def test_a_transform_scales_what_the_field_sees():
    """With y = (x − m)/s and dy/dt = A y, x − m is a solution of the same equation with entries scaled by s."""
    transform = flows.transforms.Standardise((2,))
    transform.fit(torch.tensor([[1000.0, 0.0], [1002.0, 1e-3], [1004.0, 2e-3]]))
    ode = flows.NeuralODE(Spiral(), ODESolver(rtol=1e-9, atol=1e-9), transform)
    x0, times = torch.tensor([[1003.0, 1e-3]]), torch.linspace(0, 2, 5)
    path = ode.trajectory(x0, times)
    y = exact(ode.field.matrix, (x0 - transform.mean) / transform.sd, times[None])
    torch.testing.assert_close(path.states, transform.mean + transform.sd * y, rtol=1e-9, atol=1e-9)
    assert (path.solver_error[..., 1] < 1e-10).all()


def test_an_mlp_without_frequencies_does_not_depend_on_time():
    field = flows.fields.MLP((2,), (16,), num_frequencies=0)
    x = starts(5)
    assert torch.equal(field(torch.tensor(0.0), x), field(torch.tensor(17.3), x))
    torch.testing.assert_close(field(torch.rand(5), x), field(torch.tensor(17.3), x))
    exact_divergence = flows.divergence.divergence(lambda y: field(torch.tensor(0.0), y), x, event_ndim=1)
    torch.testing.assert_close(field.value_and_divergence(torch.tensor(0.3), x)[1], exact_divergence)


@pytest.mark.parametrize("layout", ["shared", "rows", "masked"])
def test_a_batch_may_be_empty(layout):
    times = torch.linspace(0, 1, 4) if layout == "shared" else torch.zeros(0, 4)
    mask = torch.ones(0, 4, dtype=torch.bool) if layout == "masked" else None
    path = spiral().trajectory(torch.zeros(0, 2), times, mask=mask)
    assert path.states.shape == path.solver_error.shape == (0, 4, 2)


def test_one_time_gives_the_initial_state():
    x0 = starts(3)
    path = spiral().trajectory(x0, [2.0], path_costs=[KineticEnergy()])
    assert torch.equal(path.states[:, 0], x0)
    assert path.nfe == 0
    assert (path.path_costs["kinetic_energy"] == 0).all()
    mask = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 1]], dtype=torch.bool)
    assert torch.equal(spiral()(x0, increasing(3, 3), mask=mask), x0[:, None].expand(3, 3, 2))
    with pytest.raises(InvalidValueError, match="times must hold at least one number"):
        spiral()(x0, [])


def test_a_frozen_part_in_half_precision_does_not_decide_the_dtype():
    field = Spiral()
    field.encoder = nn.Linear(2, 2).half().requires_grad_(False)
    ode = flows.NeuralODE(field.double())
    field.encoder.half()
    assert ode.dtype == torch.float64
    assert ode(starts(3), (0.0, 1.0)).dtype == torch.float64


def test_a_state_that_explodes_says_when_by_the_clock_of_its_row():
    ode, x0 = flows.NeuralODE(Explosion()), torch.tensor([[0.1], [2.0]], dtype=torch.float64)
    with pytest.raises(SolverError, match=r"at t = 0\.(50|49)\d*, .*sample 1 has grown from 2 to .* explode") as e:
        ode.trajectory(x0, [0.0, 1.0])
    assert "Rows start apart" not in str(e.value)
    with pytest.raises(SolverError, match=r"count from the start of each: in row 1 it is t = 7\.(5|49)"):
        ode.trajectory(x0, torch.tensor([[3.0, 4.0], [7.0, 8.0]], dtype=torch.float64))


def test_rows_of_different_lengths_need_a_mask():
    ode = flows.NeuralODE(Explosion())
    for times in ([[0.0, 1.0], [0.0, 0.5, 1.0]], [torch.zeros(2), torch.zeros(3)]):
        with pytest.raises(InvalidTypeError, match=r"rows have different lengths: pad them, .* mask"):
            ode.trajectory(torch.zeros(2, 1), times)
