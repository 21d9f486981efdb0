"""Dynamical systems against conserved quantities, closed forms and another solver."""

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf
from scipy.integrate import solve_ivp

from flows.datasets import DynamicalSystem, Lorenz, LotkaVolterra, Oscillator, Pendulum, Spiral, TwoBody
from flows.datasets.recognition.recognition import refuse_other_data
from flows.errors import InvalidTypeError, InvalidValueError

CONFIGS = {path.stem: OmegaConf.load(path) for path in sorted(Path(__file__).parents[1].glob("conf/data/*.yaml"))}
for config in CONFIGS.values():
    config.pop("defaults", None)  # the groups that suit the data
SYSTEMS = [name for name, config in CONFIGS.items() if issubclass(get_class(config._target_), DynamicalSystem)]


@cache
def system(name: str, **settings) -> DynamicalSystem:
    return instantiate(CONFIGS[name], **{"num_series": 12, "num_times": 20, **settings})


def test_there_is_a_yaml_for_each_system():
    known = {Lorenz, LotkaVolterra, Oscillator, Pendulum, Spiral, TwoBody}
    assert {get_class(CONFIGS[name]._target_) for name in SYSTEMS} >= known


@pytest.mark.parametrize("name", SYSTEMS)
def test_states_are_those_of_another_solver(name):
    data = system(name)
    times, starts = data.part("test").times[0].numpy(), data.truth[:, 0]

    def velocity(t, y):
        return data.velocity(torch.tensor(t), torch.from_numpy(y).view_as(starts)).numpy().ravel()

    found = solve_ivp(velocity, (0, times[-1]), starts.numpy().ravel(), "LSODA", times, rtol=1e-12, atol=1e-12).y
    states = torch.from_numpy(found).view(*starts.shape, -1).movedim(-1, 1)
    size = 1e-4 if name == "lorenz" else 2e-7  # chaos: errors grow e-fold in 1.1 units of time
    torch.testing.assert_close(data.truth, states, atol=size, rtol=0)


@pytest.mark.parametrize("name", SYSTEMS)
def test_conserved_quantities_stay_constant(name):
    data = system(name)
    for quantity in data.conserved(data.truth).values():
        assert quantity.shape == data.truth.shape[:2]
        assert float((quantity - quantity[:, :1]).abs().max()) < 1e-7
        assert float(quantity[:, 0].std()) > 1e-2  # it tells solutions apart


def test_what_is_conserved():
    conserved = {name: list(system(name).conserved(system(name).truth)) for name in SYSTEMS}
    assert conserved["lotka_volterra"] == ["invariant"]
    assert conserved["oscillator"] == ["invariant"]
    assert conserved["pendulum"] == ["energy"]
    assert conserved["two_body"] == ["energy", "angular_momentum"]
    damped = Pendulum(num_series=5, friction=0.3)
    assert not damped.conserved(damped.truth)
    energy = system("pendulum").conserved(damped.truth)["energy"]
    assert bool((energy[:, -1] < 0.1 * energy[:, 0]).all())


def test_the_spiral_is_that_of_torchdiffeq():
    """x₀ = (2, 0) and dx/dt = x³ A; then d(x⁴ + y⁴)/dt = −0.4 (x⁶ + y⁶)."""
    data = system("spiral")
    matrix = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=torch.float64)
    x = data.truth
    torch.testing.assert_close(data.velocity(torch.tensor(0.0), x), x**3 @ matrix)
    slope = (4 * x**3 * data.velocity(torch.tensor(0.0), x)).sum(-1)
    torch.testing.assert_close(slope, -0.4 * (x**6).sum(-1))
    assert float(data.truth[:, 0].norm(dim=1).min()) >= 1
    assert float(data.truth[:, 0].norm(dim=1).max()) <= 2


def test_the_oscillator_is_that_of_diffrax():
    """The velocity is (s₂, −s₁) with s = x / (1 + x), from initial states in [−0.6, 1]²."""
    data = system("oscillator", num_series=400)
    s = data.truth / (1 + data.truth)
    torch.testing.assert_close(data.velocity(torch.tensor(0.0), data.truth), torch.stack([s[..., 1], -s[..., 0]], -1))
    starts = data.truth[:, 0]
    assert float(starts.min()) == pytest.approx(-0.6, abs=0.01)
    assert float(starts.max()) == pytest.approx(1.0, abs=0.01)


def test_orbits_start_at_their_nearest_point_and_stay_within_the_farthest():
    """r lies between a (1 − e) and a (1 + e), with a = −1 / 2E and e² = 1 + 2 E L²."""
    data = system("two_body")
    energy, momentum = (quantity[:, 0] for quantity in data.conserved(data.truth).values())
    axis, eccentricity = -1 / (2 * energy), (1 + 2 * energy * momentum**2).sqrt()
    distance = data.truth[..., :2].norm(dim=-1)
    torch.testing.assert_close(distance[:, 0], axis * (1 - eccentricity))
    assert bool((distance <= (axis * (1 + eccentricity))[:, None] + 1e-7).all())
    assert 0.8 <= float(axis.min()) <= float(axis.max()) <= 1.2
    assert float(eccentricity.max()) <= 0.5


@pytest.mark.parametrize("irregular", [False, True])
@pytest.mark.parametrize("name", SYSTEMS)
def test_times_are_inside_the_span_and_test_series_go_beyond(name, irregular):
    data = system(name, irregular=irregular)
    for split in ("train", "validation", "test"):
        batch = data.part(split)
        assert batch.mask.all()
        assert not batch.times[:, 0].any()
        end = data.span + data.beyond * (split == "test")
        assert 0.85 * end < float(batch.times.max()) <= end * (1 + 1e-12)
        assert batch.times.shape[1] == 20 if split != "test" else batch.times.shape[1] > 20
        assert torch.equal(data.true_states(split), batch.x)  # without noise


def test_irregular_times_are_uniform():
    data = Pendulum(num_series=50, num_times=100, irregular=True)
    inner = data.part("train").times[:, 1:] / data.span
    assert float(inner.diff(dim=1).min()) > 0
    assert float(inner.mean()) == pytest.approx(0.5, abs=4 / math.sqrt(12 * inner.numel()) + 1e-3)
    assert float(inner.square().mean()) == pytest.approx(1 / 3, abs=0.02)
    assert float(inner.std(0).min()) > 0  # each series has its own


def test_noise_has_the_size_that_was_asked_for():
    data = LotkaVolterra(num_series=60, noise=0.05)
    batch = data.part("test")
    error = (batch.x - data.true_states("test"))[:, 1:]
    torch.testing.assert_close(data.noise_scale, 0.05 * data.truth.flatten(0, 1).std(0))
    torch.testing.assert_close(error.flatten(0, 1).std(0), data.noise_scale, rtol=0.1, atol=0)
    assert torch.equal(batch.x[:, 0], data.true_states("test")[:, 0])


def test_a_seed_gives_the_same_data():
    one, other = (Spiral(num_series=8, noise=0.1, irregular=True, seed=3) for _ in range(2))
    refuse_other_data({**one.description(), "fingerprint": one.fingerprint()}, other)
    assert torch.equal(one.part("train").x, other.part("train").x)
    assert not torch.equal(one.truth[:, 0], Spiral(num_series=8, seed=4).truth[:, 0])
    noisier = Spiral(num_series=8, noise=0.2, irregular=True, seed=3)
    with pytest.raises(InvalidValueError, match="started on other data"):
        refuse_other_data({**one.description(), "fingerprint": one.fingerprint()}, noisier)


@pytest.mark.parametrize(
    ("kind", "settings", "error", "words"),
    [
        (Spiral, {"num_series": 3}, InvalidValueError, "num_series must be a whole number >= 4"),
        (Spiral, {"num_times": 1}, InvalidValueError, "num_times must be a whole number >= 2"),
        (Spiral, {"span": 0}, InvalidValueError, "span must be a finite number > 0"),
        (Spiral, {"beyond": -1}, InvalidValueError, "beyond must be a finite number >= 0"),
        (Spiral, {"noise": "much"}, InvalidTypeError, "noise"),
        (Spiral, {"radius": 0}, InvalidValueError, "radius must be"),
        (Spiral, {"num_times": 10**9}, InvalidValueError, "num_times: .* memory"),
        (LotkaVolterra, {"gamma": 0}, InvalidValueError, "gamma must be"),
        (Lorenz, {"rho": math.nan}, InvalidValueError, "rho must be"),
        (TwoBody, {"eccentricity": 1}, InvalidValueError, "eccentricity must be .* < 1"),
        (Pendulum, {"friction": -1}, InvalidValueError, "friction must be"),
        (Pendulum, {"test_fraction": 1.5}, InvalidValueError, "test_fraction must be"),
    ],
)
def test_settings_out_of_range_are_refused(kind, settings, error, words):
    with pytest.raises(error, match=words):
        kind(**settings)


class Decay(DynamicalSystem):
    """dx/dt = −x, of two numbers in a row."""

    name = "decay"

    def velocity(self, t, x):
        return -x

    def initial_states(self, n, generator):
        return torch.rand(n, 1, 2, generator=generator) + 1


def test_a_system_of_ones_own_has_states_of_any_shape():
    data = Decay(num_series=10, irregular=True)
    assert data.event_shape == (1, 2)
    batch = data.part("test")
    expected = batch.x[:, :1] * (-batch.times[..., None, None]).exp()
    torch.testing.assert_close(batch.x, expected, atol=1e-8, rtol=0)


def test_functions_of_wrong_shapes_are_named():
    class Flat(Decay):
        def velocity(self, t, x):
            return -x[:, 0]

    class Few(Decay):
        def initial_states(self, n, generator):
            return torch.ones(2, 2)

    with pytest.raises(InvalidValueError, match=r"Flat.velocity\(t, x\) must return the shape of x, \(10, 1, 2\)"):
        Flat(num_series=10)
    with pytest.raises(InvalidValueError, match=r"Few.initial_states\(10, generator\) must return .* \(10, \*event\)"):
        Few(num_series=10)
