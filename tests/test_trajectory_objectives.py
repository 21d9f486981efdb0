"""Trajectory matching and derivative matching: their losses, gradients, pieces, and what they refuse."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import flows
from flows.datasets import Series, SeriesBatch
from flows.errors import FlowsError
from flows.objectives import DerivativeMatching, TrajectoryMatching
from flows.objectives.trajectories import cut, filled, first_part, smoothed
from flows.path_costs import KineticEnergy
from flows.solvers import ODESolver, SolverError

torch.set_default_dtype(torch.float64)

TIGHT = ODESolver(rtol=1e-9, atol=1e-9)


class Decay(nn.Module):
    """dx/dt = −a x + b sin(c·x₂), nonlinear in x and in its three parameters."""

    event_shape = (2,)

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([0.7, 0.4, 1.3]))

    def forward(self, t, x):
        a, b, c = self.weights
        return -a * x + b * torch.sin(c * x.flip(-1)) + 0.1 * t.reshape(-1, 1)


def decay(solver=TIGHT, **settings):
    return flows.NeuralODE(Decay(), solver, **settings)


def series(count=5, length=9, seed=0, missing=0.0):
    """Irregular times, series of several lengths, and values that were not observed."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [length - i % 3 for i in range(count)]
    times = [(torch.rand(n, generator=generator) + 0.1).cumsum(0) + i for i, n in enumerate(lengths)]
    values = [torch.randn(n, 2, generator=generator) for n in lengths]
    for x in values:
        x[1:][torch.rand(x[1:].shape, generator=generator) < missing] = torch.nan
    return Series(times, values, missing="mask", validation_fraction=1 / count, test_fraction=1 / count)


def gradient(objective, model, batch):
    model.zero_grad()
    output = objective(model, batch)
    output.loss.backward()
    return output, torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]
    )


OBJECTIVES = [
    TrajectoryMatching(),
    TrajectoryMatching(loss="mae"),
    TrajectoryMatching(loss="gaussian"),
    TrajectoryMatching(horizon=0.6),
    TrajectoryMatching(segment_length=3, continuity=0.5, smoothing=5),
    TrajectoryMatching(regularizers=[KineticEnergy(0.1)]),
    DerivativeMatching(),
    DerivativeMatching(window=1, smoothing=5),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_gradients_are_those_of_finite_differences(objective):
    model = decay(ODESolver(rtol=1e-11, atol=1e-11), noise=0.4, transform=flows.transforms.Standardise(2))
    batch = series(missing=0.2).part("train")
    model.transform.fit(batch.x.flatten(0, 1))
    parameters = list(model.parameters())
    _, found = gradient(objective, model, batch)
    flat = torch.nn.utils.parameters_to_vector(parameters).detach()
    expected, step = [], 1e-5
    for i in range(len(flat)):
        losses = []
        for sign in (1, -1):
            moved = flat.clone()
            moved[i] += sign * step
            torch.nn.utils.vector_to_parameters(moved, parameters)
            with torch.no_grad():
                losses.append(objective(model, batch).loss.item())
        expected.append((losses[0] - losses[1]) / (2 * step))
    torch.nn.utils.vector_to_parameters(flat, parameters)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("loss", ["mse", "gaussian"])
def test_masked_values_give_the_gradient_of_leaving_them_out(loss):
    """A time at which nothing was observed, and padding, are as if they were not there."""
    generator = torch.Generator().manual_seed(3)
    times = (torch.rand(4, 8, generator=generator) + 0.1).cumsum(1)
    x = torch.randn(4, 8, 2, generator=generator)
    observed = torch.ones_like(x, dtype=torch.bool)
    kept = torch.tensor([0, 1, 3, 4, 6, 7])
    observed[:, [2, 5]] = False
    masked = SeriesBatch(x.where(observed, 7.0), times=times, mask=torch.ones(4, 8).bool(), observed=observed)
    left_out = SeriesBatch(x[:, kept], times=times[:, kept], mask=torch.ones(4, 6).bool(), observed=observed[:, kept])
    model, objective = decay(noise=0.4), TrajectoryMatching(loss=loss)
    (one, of_one), (other, of_other) = (gradient(objective, model, batch) for batch in (masked, left_out))
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-8, atol=0)
    torch.testing.assert_close(of_one, of_other, rtol=1e-7, atol=1e-9)


def test_the_gaussian_loss_is_that_of_torch_distributions():
    model, batch = decay(noise=0.3), series(missing=0.3).part("train")
    assert model.log_noise is not None
    model.log_noise.data += torch.tensor([0.2, -0.5])
    output = TrajectoryMatching(loss="gaussian")(model, batch)
    states = model(batch.x[:, 0], batch.times, mask=batch.mask)
    counts = batch.observed.clone()
    counts[:, 0] = False
    density = torch.distributions.Normal(states, model.log_noise.exp().expand_as(states))
    torch.testing.assert_close(output.loss, -density.log_prob(batch.x)[counts].mean())
    torch.testing.assert_close(output.metrics["mse"], (states - batch.x)[counts].square().mean())


def test_horizon_and_segments_are_the_pieces_solved_by_hand():
    model, batch = decay(), series().part("train")
    squares, number = torch.zeros(()), 0
    jumps = []
    for x, times, mask in zip(batch.x, batch.times, batch.mask, strict=True):
        x, times = x[mask], times[mask]
        ends = []
        for start in range(0, len(times) - 1, 3):
            stop = min(start + 3, len(times) - 1)
            states = model(x[start], times[start : stop + 1])
            squares += (states[1:] - x[start + 1 : stop + 1]).square().sum()
            number += x[start + 1 : stop + 1].numel()
            if stop < len(times) - 1:
                ends.append((states[-1] - x[stop]).square().mean())
        jumps += ends
    output = TrajectoryMatching(segment_length=3, continuity=0.5)(model, batch)
    torch.testing.assert_close(output.metrics["mse"], (squares / number).detach(), rtol=1e-7, atol=0)
    torch.testing.assert_close(output.loss, squares / number + 0.5 * torch.stack(jumps).mean(), rtol=1e-7, atol=0)

    squares, number = torch.zeros(()), 0
    for x, times, mask in zip(batch.x, batch.times, batch.mask, strict=True):
        x, times = x[mask], times[mask]
        early = times <= times[0] + 0.5 * (times[-1] - times[0])
        states = model(x[0], times[early])
        squares += (states[1:] - x[early][1:]).square().sum()
        number += x[early][1:].numel()
    output = TrajectoryMatching(horizon=0.5)(model, batch)
    torch.testing.assert_close(output.loss, squares / number, rtol=1e-7, atol=0)


def test_a_short_horizon_keeps_two_points_of_each_series():
    batch = first_part(series().part("train"), 1e-9)
    assert batch.mask[:, :2].all()
    assert not batch.mask[:, 2:].any()
    assert TrajectoryMatching(horizon=1e-9)(decay(), series().part("train")).loss.requires_grad


def test_segments_start_where_states_were_observed_whole_and_lose_no_observation():
    batch = series(count=6, length=12, missing=0.4).part("train")
    segments = cut(batch, 3)
    assert segments.batch.observed[:, 0].all()
    seen = torch.zeros_like(batch.observed, dtype=torch.int64)
    for piece, row, start in zip(
        range(len(segments.rows)), segments.rows.tolist(), segments.columns.tolist(), strict=True
    ):
        length = int(segments.batch.mask[piece].sum())
        places = slice(start, start + length)
        assert torch.equal(segments.batch.times[piece, :length], batch.times[row, places])
        assert torch.equal(segments.batch.x[piece, :length], batch.x[row, places])
        seen[row, places][1:] += segments.batch.observed[piece, :length][1:]
    counted = batch.observed.clone()
    counted[:, 0] = False
    assert torch.equal(seen, counted.long())


def test_a_segment_as_long_as_the_series_is_the_series():
    batch = series(missing=0.2).part("train")
    model = decay()
    whole, cut_once = TrajectoryMatching()(model, batch), TrajectoryMatching(segment_length=100)(model, batch)
    torch.testing.assert_close(whole.loss, cut_once.loss, rtol=0, atol=1e-15)


class AlongAPath(nn.Module):
    """v(t, x) = y′(t) + κ (x − y(t))², which vanishes beside y′ on the path y(t) = 1 + 2 t − t²/2 alone."""

    event_shape = (1,)

    def __init__(self):
        super().__init__()
        self.strength = nn.Parameter(torch.tensor(3.0))

    def forward(self, t, x):
        t = t.reshape(-1, 1)
        return 2 - t + self.strength * (x - path(t)).square()


def path(t):
    return 1 + 2 * t - t.square() / 2


@pytest.mark.parametrize(("window", "smoothing"), [(1, 3), (3, 3), (100, 3), (2, 7)])
def test_the_weak_form_is_exact_for_polynomials(window, smoothing):
    """Parabolas through data on a parabola are that parabola, and the quadrature is exact for its velocity."""
    times = [torch.tensor([0.0, 0.3, 0.5, 1.1, 1.2, 2.0]), torch.tensor([1.0, 1.5, 1.7, 2.5])]
    batch = Series(times * 5, [path(t)[:, None] for t in times * 5]).part("train")
    model = flows.NeuralODE(AlongAPath())
    output, slope = gradient(DerivativeMatching(window=window, smoothing=smoothing), model, batch)
    assert output.loss.item() < 1e-25
    assert slope.abs().max().item() < 1e-12
    off = replace(batch, x=batch.x + 0.1)
    assert DerivativeMatching(window=window)(model, off).loss.item() > 1e-6


def test_the_weak_form_is_that_of_single_windows():
    """Each window by itself, with the field along the data by a fine quadrature."""
    data = flows.datasets.Pendulum(num_series=10, num_times=15, span=1.0)
    batch, model = data.part("validation"), flows.NeuralODE(Decay())
    fine = torch.linspace(0, 1, 101)[:, None]
    x, times = batch.x[0], batch.times[0]
    inside = [path_between(data, *piece, fine, model) for piece in zip(x, times, times[1:], strict=False)]
    windows = [(x[i + 3] - x[i] - sum(inside[i : i + 3])) / (times[i + 3] - times[i]) for i in range(len(times) - 3)]
    found = DerivativeMatching(window=3)(model, batch).loss
    torch.testing.assert_close(found, torch.stack(windows).square().mean(), rtol=1e-3, atol=0)


def test_a_series_shorter_than_a_window_is_one_window():
    times = [torch.linspace(0, 1, 9), torch.tensor([0.0, 0.4, 1.0])]
    values = [torch.randn(len(t), 2, generator=torch.Generator().manual_seed(len(t))) for t in times]
    data = Series(times * 4, values * 4)
    batch, model = data._all.batch(torch.tensor([0, 1])), decay()  # a long series and a short one
    alone = [DerivativeMatching(window=4)(model, data._all.batch(torch.tensor([i]))).loss for i in (0, 1)]
    found = DerivativeMatching(window=4)(model, batch).loss
    torch.testing.assert_close(found, (5 * alone[0] + alone[1]) / 6)  # the long one has five windows


class Uniform(nn.Module):
    event_shape = (2,)

    def __init__(self):
        super().__init__()
        self.speed = nn.Parameter(torch.ones(2))

    def forward(self, t, x):
        return self.speed.expand_as(x)


@pytest.mark.parametrize("gone", [slice(5, None), slice(3, 6)], ids=["the end", "the middle"])
def test_values_that_were_not_observed_are_no_targets(gone):
    """On straight lines the loss at the truth is zero, and away from it that of the observed values."""
    times = torch.arange(10.0)
    x = times[:, None].expand(10, 2).clone()
    x[gone, 1] = torch.nan
    batch = Series([times] * 8, [x] * 8, missing="mask").part("train")
    model = flows.NeuralODE(Uniform())
    output, slope = gradient(DerivativeMatching(window=2), model, batch)
    assert output.loss.item() < 1e-25
    assert slope.abs().max().item() < 1e-12
    with torch.no_grad():
        model.field.speed += torch.tensor([0.1, 0.2])
    jolted = replace(batch, x=batch.x + 100 * (~batch.observed))
    assert torch.equal(DerivativeMatching()(model, batch).loss, DerivativeMatching()(model, jolted).loss)


def test_derivative_matching_refuses_data_without_a_window():
    x = torch.ones(5, 2)
    x[1:, 1] = torch.nan
    data = Series([torch.arange(5.0)] * 6, [x] * 6, missing="mask")
    with pytest.raises(FlowsError, match="nothing to compare; use objective=trajectory_matching"):
        DerivativeMatching().check(decay(), data)


def path_between(data, start, first, last, shares, model):
    """∫ v dt over one interval, along the true path."""
    times = torch.cat([first[None], first + (last - first) * shares[1:, 0]])
    truth = flows.NeuralODE(Wrapped(data), TIGHT)(start, times)
    return torch.trapezoid(model.field(times, truth), times, dim=0)


class Wrapped(nn.Module):
    def __init__(self, system):
        super().__init__()
        self.event_shape, self.system = system.event_shape, system

    def forward(self, t, x):
        return self.system.velocity(t, x)


def test_local_parabolas():
    t = torch.tensor([[0.0, 0.2, 0.7, 1.0, 1.6, 1.7, 2.0], [3.0, 3.5, 3.5, 3.5, 3.5, 3.5, 3.5]])
    mask = torch.tensor([[True] * 7, [True] * 2 + [False] * 5])
    y = torch.stack([1 - t + 2 * t.square(), 3 * t], 2)
    state, slope = smoothed(y, t, mask, 5)
    torch.testing.assert_close(state[0], y[0])
    torch.testing.assert_close(slope[0], torch.stack([4 * t[0] - 1, 3 + 0 * t[0]], 1))
    torch.testing.assert_close(state[1, :2], y[1, :2])
    chord = (y[1, 1] - y[1, 0]) / 0.5
    torch.testing.assert_close(slope[1, :2], chord.expand(2, 2))
    noise = torch.randn(1, 41, 1, generator=torch.Generator().manual_seed(0))
    times = torch.linspace(0, 1, 41)[None]
    averaged = smoothed(noise, times, torch.ones(1, 41).bool(), 11)[0]
    design = (times[0, 15:26] - times[0, 20])[:, None] ** torch.arange(3)
    expected = torch.linalg.lstsq(design, noise[0, 15:26]).solution[0]
    torch.testing.assert_close(averaged[0, 20], expected)


def test_gaps_are_filled_by_lines():
    times = torch.tensor([[0.0, 1.0, 3.0, 4.0, 5.0]])
    y = torch.tensor([[[1.0, 0.0], [9.0, 2.0], [4.0, 9.0], [9.0, 8.0], [9.0, 9.0]]])
    observed = torch.tensor([[[True, True], [False, True], [True, False], [False, True], [False, False]]])
    expected = torch.tensor([[[1.0, 0.0], [2.0, 2.0], [4.0, 6.0], [4.0, 8.0], [4.0, 8.0]]])
    torch.testing.assert_close(filled(y, times, observed), expected)


REFUSED = {
    "loss must be 'mse', 'mae' or 'gaussian', got 'huber'": {"loss": "huber"},
    "horizon must be a finite number > 0 and <= 1, got 0": {"horizon": 0.0},
    "segment_length must be a whole number >= 1, got 0": {"segment_length": 0},
    "smoothing must be 1 .none. or >= 3": {"segment_length": 4, "smoothing": 2},
    "continuity has no effect on whole series; set segment_length": {"continuity": 1.0},
    "smoothing has no effect on whole series; set segment_length": {"smoothing": 5},
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_are_refused(message):
    with pytest.raises(FlowsError, match=message):
        TrajectoryMatching(**REFUSED[message])


def test_derivative_matching_refuses_settings():
    with pytest.raises(FlowsError, match="window must be a whole number >= 1, got 0"):
        DerivativeMatching(window=0)
    with pytest.raises(FlowsError, match="smoothing must be a whole number >= 3, got 2"):
        DerivativeMatching(smoothing=2)


def flow():
    return flows.CNF(flows.fields.MLP(2))


@pytest.mark.parametrize("objective", [TrajectoryMatching(), DerivativeMatching()], ids=repr)
def test_models_and_data_of_another_kind_are_refused(objective):
    moons = flows.datasets.Moons(num_validation=10, num_test=10)
    with pytest.raises(FlowsError, match=r"trains a flows.NeuralODE on time series, got CNF; use model=neural_ode"):
        objective.check(flow(), series())
    with pytest.raises(FlowsError, match="got CNF; use model=cnf and an objective such as flow_matching"):
        objective.check(flow(), moons)
    with pytest.raises(FlowsError, match=r"'moons' are single points; .* model=cnf .*experiment=moons"):
        objective.check(decay(), moons)
    with pytest.raises(FlowsError, match=r"states of 'series' have the shape \(2,\), and the model's have \(3,\)"):
        objective.check(flows.NeuralODE(flows.fields.MLP(3)), series())
    with pytest.raises(FlowsError, match="SeriesBatch, with times and masks, got Batch"):
        objective(decay(), flows.datasets.Batch(torch.randn(3, 2)))


def test_objectives_of_densities_refuse_series():
    with pytest.raises(FlowsError, match=r"'series' are time series, .* got CNF; use model=neural_ode and"):
        flows.objectives.FlowMatching().check(flow(), series())
    with pytest.raises(FlowsError, match=r"trains a flows.CNF, got NeuralODE; use model=neural_ode and objective="):
        flows.objectives.MaximumLikelihood().check(decay(), series())


def test_a_likelihood_needs_noise():
    with pytest.raises(FlowsError, match=r"loss='gaussian' needs a model that knows noise: .*model.noise=0.1"):
        TrajectoryMatching(loss="gaussian").check(decay(), series())


class Explosion(nn.Module):
    """dx/dt = x², which is infinite at t = 1/x₀."""

    event_shape = (1,)

    def forward(self, t, x):
        return x.square()


def test_a_state_that_explodes_says_when():
    times = torch.linspace(0, 2, 5).expand(10, 5)
    batch = Series(times, torch.ones(10, 5, 1)).part("train")
    with pytest.raises(SolverError, match=r"underflowed at t = (1|0\.99999\d*), "):
        TrajectoryMatching()(flows.NeuralODE(Explosion()), batch)
