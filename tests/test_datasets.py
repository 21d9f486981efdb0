"""Densities: every yaml in conf/data that names one is tested here, so that a new one is tested by being there."""

import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf
from PIL import Image
from scipy.spatial import cKDTree
from scipy.special import digamma, logsumexp

from flows import datasets
from flows.datasets import ConditionalDensity, Density, FreeField, Funnel, Particles, Phi4
from flows.errors import FileError, FlowsError, InvalidTypeError, InvalidValueError

CONFIGS = {path.stem: OmegaConf.load(path) for path in sorted(Path(__file__).parents[1].glob("conf/data/*.yaml"))}
for config in CONFIGS.values():
    config.pop("defaults", None)  # the groups that suit the data
KINDS = {name: get_class(config._target_) for name, config in CONFIGS.items()}
OTHERS = (ConditionalDensity, FreeField, Funnel, Particles, Phi4)  # not in the plane, or not one density
DENSITIES = [n for n, kind in KINDS.items() if issubclass(kind, Density) and not issubclass(kind, OTHERS)]
SMOOTH = [name for name in DENSITIES if name not in ("checkerboard", "image_density")]


@pytest.fixture(autouse=True)
def _float64_in_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine several wait for one another
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


def build(name: str, **changes) -> Density:
    return instantiate(CONFIGS[name], **changes)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def on_grid(name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Centres of squares that cover a density, (n, 2), log p there, (n,), and the side of the squares."""
    density = build(name)
    x = density.reference()
    step = density.pixel if name == "image_density" else 1 / 16
    low, high = torch.floor(x.min(0).values - 1.5), torch.ceil(x.max(0).values + 1.5)
    axes = [torch.arange(a + step / 2, b, step) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
    points = torch.cartesian_prod(*axes)
    return points, density.log_prob(points), step


def nearest_neighbour_entropy(x: np.ndarray, k: int = 4) -> float:
    """Kozachenko-Leonenko: psi(n) - psi(k) + log(pi) + 2 mean log(distance to the k-th neighbour), in the plane."""
    distance = cKDTree(x).query(x, k + 1)[0][:, -1]
    return digamma(len(x)) - digamma(k) + math.log(math.pi) + 2 * np.log(distance).mean()


def test_there_is_a_yaml_for_every_density():
    assert {
        "8gaussians",
        "checkerboard",
        "rings",
        "circles",
        "moons",
        "pinwheel",
        "2spirals",
        "swissroll",
        "gaussian",
        "image_density",
    } <= set(DENSITIES)


@pytest.mark.parametrize("name", DENSITIES)
def test_log_prob_is_a_density_with_the_stated_entropy(name):
    density = build(name)
    assert density.name == name
    assert density.has_log_prob
    _, log_p, step = on_grid(name)
    assert not log_p.isnan().any()
    p = log_p.exp() * step**2
    torch.testing.assert_close(p.sum().item(), 1.0, rtol=0, atol=1e-6)
    entropy = -torch.where(p > 0, p * log_p, 0).sum().item()
    torch.testing.assert_close(entropy, density.entropy, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", DENSITIES)
def test_samples_come_from_log_prob(name):
    density = build(name)
    nll = -density.log_prob(density.sample(20_000, rng(1)))
    error = 4 * nll.std().item() / math.sqrt(len(nll)) + 1e-9
    assert abs(nll.mean().item() - density.entropy) < error


@pytest.mark.parametrize("name", [name for name in DENSITIES if name != "image_density"])
def test_counts_of_samples_follow_log_prob(name):
    """Chi-square over squares of side 1/4; catches what a mean cannot, such as noise shared by two coordinates."""
    density = build(name)
    n = 50_000
    points, log_p, step = on_grid(name)
    low = points.min(0).values - step / 2
    shape = ((points.max(0).values - low) * 4).ceil().long().tolist()

    def histogram(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        cell = torch.floor((x - low) * 4).long()
        return torch.zeros(shape).index_put(tuple(cell.T), weight, accumulate=True)

    expected = n * histogram(points, log_p.exp() * step**2)
    counts = histogram(density.sample(n, rng(9)), torch.ones(n))
    used = expected > 5
    chi_square = ((counts - expected).square() / expected)[used].sum().item()
    freedom = used.sum().item()
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("name", DENSITIES)
def test_points_of_a_batch_are_independent(name):
    """A mean of n independent points has 1/n of their variance; a lattice of angles has far less."""
    x = build(name).sample(500 * 32, rng(10))
    stream = build(name).train_stream(32, rng(11))
    means = torch.stack([stream.next().x.mean(0) for _ in range(500)])
    ratio = 32 * means.var(0) / x.var(0)
    assert ((ratio - 1).abs() < 4 * math.sqrt(2 / 500)).all()


@pytest.mark.parametrize("name", DENSITIES)
def test_entropy_agrees_with_an_estimate_from_neighbours(name):
    if name == "image_density":  # neighbours do not resolve 10,000 pixels
        pytest.skip("closed form, checked on its own grid")
    density = build(name)
    estimate = nearest_neighbour_entropy(density.sample(50_000, rng(2)).numpy())
    assert abs(estimate - density.entropy) < 0.03


@pytest.mark.parametrize("name", SMOOTH)
def test_log_prob_is_differentiable(name):
    density = build(name)
    x = density.sample(4, rng(3)) + torch.tensor([[0.0, 0.0], [0.3, -0.2], [1.5, 1.0], [-0.5, 0.4]])
    assert torch.autograd.gradcheck(density.log_prob, x.requires_grad_())


@pytest.mark.parametrize("name", DENSITIES)
def test_log_prob_keeps_shape_and_dtype(name):
    density = build(name)
    x = density.sample(12, rng(4)).reshape(3, 4, 2)
    expected = density.log_prob(x)
    single = density.log_prob(x.float())
    assert expected.shape == (3, 4)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-3, atol=1e-3)
    torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(density.log_prob(x), expected, rtol=1e-14, atol=1e-14)
    with pytest.raises(ValueError, match=r"must hold points of shape \(\*batch, 2\), got \(5, 3\)"):
        density.log_prob(torch.zeros(5, 3))


@pytest.mark.parametrize("name", DENSITIES)
def test_the_generator_is_the_only_randomness(name):
    density = build(name)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = (density.sample(64, rng(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert len(torch.unique(torch.cat([first, other]), dim=0)) == 128
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", DENSITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stream_resumes_bit_for_bit(name, dtype, tmp_path):
    stream = build(name).train_stream(7, rng(7), dtype=dtype)
    stream.next()
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    expected = [next(stream).x for _ in range(3)]
    resumed = build(name).train_stream(7, rng(99), dtype=dtype)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(torch.equal(resumed.next().x, x) for x in expected)
    assert expected[0].shape == (7, 2)
    assert expected[0].dtype == dtype


@pytest.mark.parametrize("name", DENSITIES)
def test_fixed_parts(name):
    density = build(name, num_validation=25, num_test=40, num_reference=30)
    parts = [
        torch.cat([batch.x for batch in density.validation_batches(10)]),
        torch.cat([batch.x for batch in density.test_batches(15)]),
        density.reference(),
    ]
    assert [len(part) for part in parts] == [25, 40, 30]
    assert len(torch.unique(torch.cat(parts), dim=0)) == 95
    kept = [part.clone() for part in parts]
    next(density.test_batches(40)).x.zero_()
    density.reference().zero_()
    assert torch.equal(torch.cat([batch.x for batch in density.test_batches(3)]), kept[1])
    assert torch.equal(torch.cat([batch.x for batch in build(name, num_test=40).test_batches(40)]), kept[1])
    assert torch.equal(density.reference(), kept[2])
    assert next(density.validation_batches(5, dtype=torch.float32)).x.dtype == torch.float32


def test_two_spirals_far_away():
    """Against a plain quadrature over all three uniforms, in the middle and in the tails."""
    x = torch.tensor([[0.1, 0.2], [2.0, 0.0], [3.7, 0.2], [3.5, -3.5], [-1.0, 2.6], [8.0, 1.0], [8.0, 0.05]])
    a = 3 * np.pi * np.sqrt((np.arange(40_000) + 0.5) / 40_000)
    node, weight = np.polynomial.legendre.leggauss(24)
    log_p = []
    for point in x.numpy():
        arms = []
        for sign in (1, -1):
            arm = np.stack([-a * np.cos(a), a * np.sin(a)]) / 3
            offset = sign * point[:, None] - arm  # (2, a)
            z = (offset[..., None] - (node + 1) / 12) / 0.1
            kernel = logsumexp(-(z**2) / 2, axis=-1, b=weight / 2) - math.log(0.1 * math.sqrt(2 * math.pi))
            arms.append(kernel.sum(0))
        log_p.append(logsumexp(np.concatenate(arms)) - math.log(2 * len(a)))
    expected = torch.tensor(np.array(log_p))
    assert expected.min() < -1000
    torch.testing.assert_close(datasets.TwoSpirals().log_prob(x), expected, rtol=1e-7, atol=1e-5)


def test_checkerboard_support():
    board = datasets.Checkerboard()
    inside, light, outside = [1.0, 1.0], [1.0, -1.0], [5.0, 5.0]
    log_p = board.log_prob(torch.tensor([inside, light, outside, [4.0, 4.0], [2.0, 1.0]]))
    assert log_p.tolist() == [-math.log(32), -math.inf, -math.inf, -math.log(32), -math.log(32)]


def test_gaussian_of_any_dimension():
    torch.manual_seed(0)
    root = torch.randn(5, 5)
    mean, covariance = torch.randn(5), root @ root.T + torch.eye(5)
    density = datasets.Gaussian(mean, covariance)
    exact = torch.distributions.MultivariateNormal(mean, covariance)
    x = density.sample(50_000, rng())
    torch.testing.assert_close(density.entropy, exact.entropy().item())
    torch.testing.assert_close(density.log_prob(x[:100]), exact.log_prob(x[:100]))
    torch.testing.assert_close(torch.cov(x.T), covariance, rtol=0.05, atol=0.2)
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.08)
    assert next(density.train_stream(3, rng())).x.shape == (3, 5)


@pytest.mark.parametrize(
    ("mean", "covariance", "message"),
    [
        ([0, 0], [[1, 0, 0]] * 3, r"covariance must be 2 x 2 for a mean of 2 numbers, got \(3, 3\)"),
        ([0, 0], [[1, 0.5], [0, 1]], "covariance must be symmetric"),
        ([0, 0], [[1, 2], [2, 1]], "positive definite, its smallest eigenvalue is -1"),
        ([0, math.nan], [[1, 0], [0, 1]], "must be finite"),
        ([0, 0], [[1, 0], [0]], "covariance d rows of d numbers, got"),
        (0.0, 1.0, "mean must be d numbers"),
    ],
)
def test_gaussian_refuses(mean, covariance, message):
    with pytest.raises(ValueError, match=message):
        datasets.Gaussian(mean, covariance)


def test_picture_with_known_answer(tmp_path):
    """Three quarters of the mass in the lower left pixel of 2 x 1, a quarter in the upper left, none at the right."""
    shades = np.array([[170, 255], [0, 255]], dtype=np.uint8)
    Image.fromarray(shades).save(tmp_path / "squares.png")
    density = datasets.ImageDensity(tmp_path / "squares.png", contrast=1.0)
    log_p = density.log_prob(torch.tensor([[-1.0, 1.0], [-1.0, -1.0], [1.0, 1.0], [3.0, 0.0]]))
    torch.testing.assert_close(log_p.exp(), torch.tensor([0.25, 0.75, 0, 0]) / 4)
    torch.testing.assert_close(density.entropy, math.log(4) - 0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    x = density.sample(4000, rng())
    assert (x[:, 0] < 0).all()
    assert abs((x[:, 1] > 0).double().mean().item() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)
    bright = datasets.ImageDensity(tmp_path / "squares.png", dense="bright", contrast=1.0)
    assert bright.log_prob(torch.tensor([-1.0, -1.0])) == -math.inf
    assert bright.log_prob(torch.tensor([1.0, 1.0])) == bright.log_prob(torch.tensor([1.0, -1.0]))


def test_picture_keeps_its_shape_and_transparency(tmp_path):
    picture = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 20, 20))
    picture.save(tmp_path / "half.png")
    x = datasets.ImageDensity(tmp_path / "half.png").sample(2000, rng())
    assert -2 <= x[:, 0].min() < -1.9
    assert -0.1 < x[:, 0].max() <= 0
    assert 0.9 < x[:, 1].max() <= 1


def test_single_precision_samples_stay_in_the_support(tmp_path):
    torch.set_default_dtype(torch.float32)
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (2, 1000))
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    for density in (datasets.Checkerboard(), datasets.ImageDensity(tmp_path / "stripes.png", resolution=2000)):
        assert density.log_prob(density.sample(300_000, rng(8))).isfinite().all()


def test_picture_errors(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    Image.new("L", (8, 8), 128).save(tmp_path / "grey.png")
    with pytest.raises(FileError, match=r"no picture at .*missing\.png; a relative path starts at"):
        datasets.ImageDensity(tmp_path / "missing.png")
    with pytest.raises(FileError, match=r"text\.png is not a picture that Pillow can read .* use a \.png or \.jpg"):
        datasets.ImageDensity(tmp_path / "text.png")
    with pytest.raises(ValueError, match=r"grey\.png has a single shade at 8 x 8 pixels"):
        datasets.ImageDensity(tmp_path / "grey.png")
    with pytest.raises(ValueError, match="dense must be 'dark' or 'bright', got 'grey'"):
        datasets.ImageDensity(dense="grey")
    with pytest.raises(ValueError, match="contrast must be a finite number > 0, got 0; 1 takes"):
        datasets.ImageDensity(contrast=0)
    with pytest.raises(ValueError, match="resolution must be a whole number >= 1, got 0"):
        datasets.ImageDensity(resolution=0)


class Uniform(Density):
    """What a user writes at the least."""

    name = "uniform"

    def sample(self, n, generator):
        return torch.rand(n, 2, generator=generator)


def test_a_density_needs_only_sample():
    density = Uniform()
    assert density.entropy is None
    assert not density.has_log_prob
    assert density.train_stream(4, rng()).next().x.shape == (4, 2)
    assert density.reference().shape == (10_000, 2)
    with pytest.raises(NotImplementedError, match="Uniform has no log_prob; check has_log_prob first"):
        density.log_prob(torch.zeros(1, 2))


def test_bad_samples_of_a_user(monkeypatch):
    density = Uniform()
    stream = density.train_stream(4, rng())
    monkeypatch.setattr(Uniform, "sample", lambda self, n, generator: torch.zeros(n, 3))
    with pytest.raises(ValueError, match=r"Uniform.sample\(4, generator\) must return .* \(4, 2\), got shape \(4, 3\)"):
        stream.next()
    monkeypatch.setattr(Uniform, "sample", lambda self, n, generator: np.zeros((n, 2)))
    with pytest.raises(InvalidTypeError, match="got ndarray"):
        density.reference()
    monkeypatch.setattr(Uniform, "sample", lambda self, n, generator: torch.tensor([[0.0, 1.0], [2.0, math.inf]] * 2))
    with pytest.raises(ValueError, match=r"'uniform': 2 of 8 values are NaN or infinite .* inf at index \(1, 1\)"):
        stream.next()


def test_the_contract_has_defaults_and_a_description_in_plain_values():
    density = Uniform()
    assert (density.columns, density.num_levels, density.num_classes, density.context_shape) == (None,) * 4
    assert density.has_samples
    described = {
        "uniform": Uniform(),
        "moons_by_class": datasets.MoonsByClass(),
        "table": datasets.Table(np.random.default_rng(0).normal(size=(20, 2)), columns=["a", "b"]),
        "digits": datasets.Digits(conditional=True),
    }
    plain = {name: json.loads(json.dumps(dataset.description())) for name, dataset in described.items()}
    assert plain == {name: dataset.description() for name, dataset in described.items()}
    assert plain["digits"] == {
        "name": "digits",
        "event_shape": [1, 8, 8],
        "context_shape": [10],
        "num_classes": 10,
        "num_levels": 17,
        "columns": None,
    }
    assert plain["table"]["columns"] == ["a", "b"]


IMPOSSIBLE = {
    "num_test=10**12": lambda: datasets.Moons(num_test=10**12),
    "num_validation=10**18": lambda: datasets.EightGaussians(num_validation=10**18),
    "a wide Gaussian": lambda: datasets.GaussianMean(dimension=10**9),
    "a large lattice": lambda: FreeField([100_000, 100_000]),
    "a large lattice with interaction": lambda: Phi4([100_000, 100_000, 100_000]),
    "many particles": lambda: Particles(num_particles=10**10),
    "a wide funnel": lambda: Funnel(10**10),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_no_memory_can_hold_is_refused_with_its_size(name):
    with pytest.raises(InvalidValueError, match=r"num_\w+: .* would take .* [GT]B, more than half of this machine's"):
        IMPOSSIBLE[name]()


WRONG_TYPES = {
    "num_test": lambda value: datasets.Moons(num_test=value),
    "tilt": lambda value: datasets.DoubleWell(tilt=value),
    "dimension": lambda value: Funnel(value),
    "sd": lambda value: datasets.GaussianMean(sd=value),
    "mass": lambda value: FreeField(mass=value),
    "size": lambda value: FreeField(size=value),
    "mass_squared": lambda value: Phi4(mass_squared=value),
    "coupling": lambda value: Phi4(coupling=value),
    "num_particles": lambda value: Particles(value),
    "spreads": lambda value: Particles(spreads=value),
    "contrast": lambda value: datasets.ImageDensity(contrast=value),
    "resolution": lambda value: datasets.ImageDensity(resolution=value),
    "path": lambda value: datasets.ImageDensity(path=[value]),
    "stride": lambda value: datasets.PhotoPatches(stride=value),
    "split_seed": lambda value: datasets.Digits(split_seed=value),
    "test_fraction": lambda value: datasets.BreastCancer(test_fraction=value),
}


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_wrong_types_are_errors_that_name_the_setting(name):
    for value in ("three", True, {"a": 1}):
        with pytest.raises(InvalidTypeError, match=f"{name} must "):
            WRONG_TYPES[name](value)


NUMBERS = [name for name in WRONG_TYPES if name not in ("size", "spreads", "path")]


@pytest.mark.parametrize("name", NUMBERS)
def test_values_out_of_range_are_errors_that_name_the_setting(name):
    for value in (-1e9, math.nan, math.inf, -math.inf):
        if name == "mass_squared" and math.isfinite(value):
            continue
        with pytest.raises((InvalidValueError, InvalidTypeError), match=f"{name} must .*got {value}"):
            WRONG_TYPES[name](value)


def test_bad_settings():
    density = datasets.Moons()
    with pytest.raises(ValueError, match="num_test must be a whole number >= 1, got 0"):
        datasets.Moons(num_test=0)
    with pytest.raises(ValueError, match="batch_size must be a whole number >= 1, got 0"):
        density.train_stream(0, rng())
    with pytest.raises(InvalidTypeError, match=r"batch_size must be a whole number, got 2\.5"):
        density.test_batches(2.5)
    with pytest.raises(InvalidTypeError, match=r"generator must be a torch.Generator, got 0; write torch.Generator"):
        density.train_stream(1, 0)
    state = datasets.Rings().train_stream(1, rng()).state_dict()
    with pytest.raises(ValueError, match="belongs to the data set 'rings', but this one is 'moons'"):
        density.train_stream(1, rng()).load_state_dict(state)


class Bowl(datasets.Energy):
    def __init__(self):
        """Forgets its parent's."""

    def log_density(self, x):
        return -x.square().sum(1)


def test_data_are_named_by_their_class_and_say_what_they_must_state():
    class DeepBowl(Bowl):
        pass

    class Named(DeepBowl):
        name = "bowl_of_soup"

    later = type("Later", (Named,), {})
    assert (DeepBowl().name, Named().name, later().name) == ("deep_bowl", "bowl_of_soup", "bowl_of_soup")
    assert datasets.Moons.name == "moons"
    forgetful = type("Forgetful", (datasets.Dataset,), dict.fromkeys(("held_out", "reference", "train_stream"), None))
    with pytest.raises(FlowsError, match=r"Forgetful does not state num_test; set it .* or call super\(\).__init__"):
        _ = forgetful().num_test
    assert not hasattr(forgetful(), "num_test")
