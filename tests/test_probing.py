"""Probing: colourings keep their distance, and what follows for exactness, noise and cost."""

import math

import pytest
import torch
from problems import (
    Convolutions,
    assert_unbiased,
    assert_variance,
    at_work,
    dense_divergence,
    dense_jacobian,
    on_shape,
    sampled,
)

from flows import CNF, ODESolver
from flows.divergence import Auto, Exact, Hutchinson, Probing, divergence
from flows.divergence.probing import colour_event, colour_line, num_line_colours

T = torch.tensor(0.3, dtype=torch.float64)
GRIDS = [(1, 9), (2, 7), (1, 8, 9), (2, 7, 6), (3, 4, 5)]


@pytest.mark.parametrize("size", [1, 2, 5, 8, 13, 28])
@pytest.mark.parametrize("stride", [1, 2, 3, 5, 7, 40])
@pytest.mark.parametrize("periodic", [False, True])
def test_pixels_of_one_colour_are_a_stride_apart(size, stride, periodic):
    colours = colour_line(size, stride, periodic).tolist()
    assert set(colours) == set(range(num_line_colours(size, stride, periodic)))
    for i in range(size):
        for j in range(i):
            gap = min(i - j, size - i + j) if periodic else i - j
            assert colours[i] != colours[j] or gap >= stride


@pytest.mark.parametrize(("size", "stride", "expected"), [(30, 5, 5), (28, 5, 6), (11, 6, 11), (32, 9, 11), (3, 5, 3)])
def test_rings_take_the_fewest_colours(size, stride, expected):
    """No colour fits more than ⌊size/stride⌋ times on a ring."""
    assert num_line_colours(size, stride, True) == expected == math.ceil(size / max(1, size // stride))


def test_colours_tell_channels_and_axes_apart():
    colours = colour_event((3, 6, 7), 2)
    assert len(colours.unique()) == 12
    assert colours[1, 4, 2] == colours[1, 0, 6]
    assert (
        len({colours[1, 0, 0].item(), colours[2, 0, 0].item(), colours[1, 1, 0].item(), colours[1, 0, 1].item()}) == 4
    )


@pytest.mark.parametrize("event_shape", GRIDS)
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize(("mode", "chunk_size"), [("reverse", None), ("reverse", 4), ("forward", 4)])
def test_exact_above_the_receptive_radius(event_shape, num_layers, padding_mode, mode, chunk_size):
    field = Convolutions(event_shape, num_layers, padding_mode)
    x = torch.randn(3, *event_shape)
    truth = dense_divergence(field, T, x)
    exact = Probing(num_layers + 1, mode=mode, chunk_size=chunk_size)
    assert at_work(exact, field).is_exact
    torch.testing.assert_close(sampled(exact, field, x).divergence, truth, rtol=0, atol=1e-10)


def test_not_exact_at_the_receptive_radius():
    for event_shape in GRIDS:
        field = Convolutions(event_shape, 2)
        x = torch.randn(3, *event_shape)
        coarse = Probing(2)
        assert not at_work(coarse, field).is_exact
        error = (sampled(coarse, field, x).divergence - dense_divergence(field, T, x)).abs()
        assert error.max() > 1e-3


def test_exact_only_by_what_the_field_states():
    event_shape = (2, 9, 9)
    field = Convolutions(event_shape, 2)
    assert at_work(Probing(3), field).is_exact
    assert not on_shape(Probing(3), event_shape).is_exact
    assert on_shape(Probing(9), event_shape).is_exact  # every entry has its own colour
    field.receptive_radius = 3
    assert not at_work(Probing(3), field).is_exact
    flow = CNF(Convolutions(event_shape, 2), Probing(3), ODESolver("euler", step_size=0.5))
    assert flow.estimate_log_prob(torch.randn(2, *event_shape), solver_error=False).standard_error.eq(0).all()


class Hidden:
    """A field that keeps its layers, and with them their padding, to itself."""

    receptive_radius = 2
    periodic = False

    def __init__(self, field):
        self.evaluate = field

    def __call__(self, t, x):
        return self.evaluate(t, x)


def test_the_seam_of_a_torus_matters():
    """Colours of an open grid meet around a ring whose size the stride does not divide."""
    event_shape = (1, 8)
    field = Convolutions(event_shape, 2, "circular")
    x = torch.randn(3, *event_shape)
    truth = dense_divergence(field, T, x)
    torch.testing.assert_close(divergence(lambda x: field(T, x), x, 2, Exact()), truth)
    hidden = Hidden(field)
    assert (sampled(Probing(3), hidden, x).divergence - truth).abs().max() > 1e-3
    hidden.periodic = True
    torch.testing.assert_close(sampled(Probing(3), hidden, x).divergence, truth, rtol=0, atol=1e-10)
    assert on_shape(Probing(3), event_shape).cost == 3
    assert at_work(Probing(3), hidden, event_shape).cost == 4


def test_functions_state_their_radius_too():
    field = Convolutions((2, 9), 1)
    x = torch.randn(3, 2, 9)

    class Function:
        receptive_radius = 1

        def __call__(self, x):
            return field(T, x)

    value = divergence(Function(), x, 2, Probing(2))
    torch.testing.assert_close(value, dense_divergence(field, T, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("event_shape", [(2, 7), (1, 6, 5)])
@pytest.mark.parametrize("stride", [1, 3])
def test_variance_of_a_field_that_reaches_further(event_shape, padding_mode, stride):
    field = Convolutions(event_shape, 3, padding_mode)
    x = torch.randn(1, *event_shape)
    jacobian = dense_jacobian(field, T, x)[0]
    estimator = Probing(stride, num_repeats=2)
    variance = at_work(estimator, field).variance(jacobian)
    with torch.no_grad():
        draws = sampled(estimator, field, x.expand(4000, *event_shape)).divergence
    if variance == 0:  # a ring of few pixels
        torch.testing.assert_close(draws, jacobian.trace().expand(4000))
    else:
        assert_unbiased(draws, jacobian.trace())
        assert_variance(draws, variance)


def test_costs():
    assert on_shape(Probing(5), (1, 28, 28)).cost == 25
    assert on_shape(Probing(5), (3, 32, 32)).cost == 75
    assert on_shape(Probing(5, num_repeats=4), (3, 32, 32)).cost == 300
    assert at_work(Probing(5), Convolutions((3, 32, 32), 4, "circular")).cost == 3 * 6 * 6
    assert on_shape(Probing(5), (3, 2, 40)).cost == 3 * 2 * 5
    assert on_shape(Probing(5), (40,)).cost == 5
    assert on_shape(Probing(5), (4, 100)).cost == 20
    assert on_shape(Probing(5), (13, 3)).cost == 13 * 3
    assert on_shape(Probing(5, grid_ndim=0), (13, 3)).cost == 5
    assert on_shape(Probing(5, grid_ndim=1), (10, 10)).cost == 50
    assert on_shape(Probing(5, grid_ndim=2), (10, 10)).cost == 25


@pytest.mark.parametrize("event_shape", [(1, 28, 28), (3, 32, 32)])
def test_twenty_five_products_a_channel_for_a_picture_of_any_size(event_shape):
    """Four 3×3 convolutions, by count and against all 784 or 3072 products."""
    field = Convolutions(event_shape, 4)
    x = torch.randn(1, *event_shape)
    products = []
    x.requires_grad_().register_hook(lambda gradient: products.append(1))
    value = sampled(Probing(5), field, x)
    assert len(products) == at_work(Probing(5), field).cost == 25 * event_shape[0]
    with torch.no_grad():
        exact = at_work(Exact(chunk_size=96), field)(T, x)
    torch.testing.assert_close(value.divergence.detach(), exact.divergence, rtol=0, atol=1e-10)


def test_less_noise_than_hutchinson_at_the_same_cost():
    """Where pixels see near ones better than far ones."""
    field = Convolutions((1, 8, 8), 4, centre=1.0)
    jacobian = dense_jacobian(field, T, torch.randn(1, 1, 8, 8))[0]
    for stride, factor in ((2, 1.2), (3, 3), (4, 5)):
        probing, hutchinson = at_work(Probing(stride), field), at_work(Hutchinson(stride**2), field)
        assert probing.cost == hutchinson.cost
        ratio = hutchinson.variance(jacobian) / probing.variance(jacobian)
        assert ratio.sqrt() > factor


def test_without_a_grid_blocks_cover_the_event():
    """Signs in s blocks are signs without replacement: exact on diagonal Jacobians and at s = d."""
    x = torch.randn(4, 5, 3)
    matrix = torch.randn(15, 15)
    f = lambda x: (x.flatten(1) @ matrix.T).view_as(x)  # noqa: E731
    torch.testing.assert_close(divergence(f, x, 2, Probing(15, grid_ndim=0)), matrix.trace().expand(4))
    torch.testing.assert_close(divergence(torch.sin, x, 2, Probing(2, grid_ndim=0)), x.cos().sum((1, 2)))
    field = Convolutions((5, 3), 1)
    assert not at_work(Probing(2, grid_ndim=0), field).is_exact  # a radius is along the grid that there is not


def test_a_radius_that_circular_padding_breaks_is_refused():
    class Ring(torch.nn.Module):
        event_shape = (1, 8, 8)
        receptive_radius = 1

        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(
                torch.nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), torch.nn.Tanh()
            )

        def forward(self, t, x):
            return self.net(x)

    field, x = Ring(), torch.randn(2, 1, 8, 8)
    message = r"Ring states receptive_radius = 1, and sites at opposite edges see each other.*state periodic = True"
    for estimator in (Probing(2), Auto()):
        with pytest.raises(ValueError, match=message):
            CNF(field, estimator).log_prob(x)
    field.periodic = True
    truth = dense_divergence(field, T, x)
    torch.testing.assert_close(sampled(Probing(2), field, x).divergence, truth, rtol=0, atol=1e-10)


def test_errors():
    with pytest.raises(ValueError, match="stride must be >= 1, got 0; a field of receptive radius r needs r \\+ 1"):
        Probing(0)
    with pytest.raises(ValueError, match="num_repeats must be >= 1, got 0"):
        Probing(2, num_repeats=0)
    with pytest.raises(ValueError, match="grid_ndim must be >= 0, or None for all but the first dimension, got -1"):
        Probing(2, grid_ndim=-1)
    with pytest.raises(ValueError, match="mode must be 'reverse' or 'forward', got 'both'"):
        Probing(2, mode="both")
    message = r"grid_ndim = 3 dimensions needs an event with as many, got event_shape \(4,\); grid_ndim=None"
    with pytest.raises(ValueError, match=message):
        divergence(torch.sin, torch.randn(2, 4), estimator=Probing(2, grid_ndim=3))
