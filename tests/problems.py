"""Small fields with dense answers, and what it takes for random draws to agree with a formula."""

import math

import torch
from torch import nn

from flows.fields import MLP, bind

EVENT_SHAPES = {"points": (7,), "point set": (4, 3), "image": (2, 6, 6)}


def perceptron(event_shape, hidden=(8, 5), scale=2.0, **options):
    """An MLP steep enough for a Jacobian of order one that changes with x."""
    field = MLP(event_shape, hidden, **{"activation": "silu", "sine_frequency": None, **options})
    with torch.no_grad():
        for layer in [*field.layers, field.out]:
            layer.weight.mul_(scale)
    return field


class LowRank(nn.Module):
    """v = U tanh(Vᵀx + t) with orthonormal U, V of `rank` columns: a Jacobian of that rank and norm at most √rank."""

    def __init__(self, event_shape, rank):
        super().__init__()
        self.event_shape = event_shape
        d = math.prod(event_shape)
        self.left, self.right = [nn.Parameter(torch.linalg.qr(torch.randn(d, rank))[0]) for _ in range(2)]

    def forward(self, t, x, context=None):
        return ((x.flatten(1) @ self.right + t).tanh() @ self.left.T).view_as(x)


class Convolutions(nn.Module):
    """Layers of 3-tap convolutions over a grid of one or two dimensions; tanh between them.

    `centre` is added to the taps of a pixel at itself.
    """

    def __init__(self, event_shape, num_layers, padding_mode="zeros", centre=0.0):
        super().__init__()
        self.event_shape = event_shape
        self.receptive_radius = num_layers
        self.padding_mode = padding_mode
        kind = {1: nn.Conv1d, 2: nn.Conv2d}[len(event_shape) - 1]
        channels = event_shape[0]
        self.layers = nn.ModuleList(
            kind(channels, channels, 3, padding=1, padding_mode=padding_mode) for _ in range(num_layers)
        )
        middle = (..., *[1] * (len(event_shape) - 1))
        with torch.no_grad():
            for layer in self.layers:
                layer.weight[middle] += centre

    def forward(self, t, x, context=None):
        h = self.layers[0](x) + t
        for layer in self.layers[1:]:
            h = layer(h.tanh())
        return h


def at_work(estimator, field, event_shape=None, context=None):
    """The estimator bound to a field; `event_shape` is for functions, which state none."""
    return estimator.bind(bind(field, context, event_shape))


def on_shape(estimator, event_shape):
    """The estimator bound to a function of which only the shape of its points is known."""
    return at_work(estimator, torch.tanh, event_shape)


def sampled(estimator, field, x, seed=0, t=0.3, context=None):
    """One evaluation as a solve makes it: the field bound, probes from a generator."""
    bound = at_work(estimator, field, x.shape[1:], context)
    probes = bound.draw_probes(x, torch.Generator().manual_seed(seed))
    return bound(torch.tensor(t, dtype=x.dtype), x, probes)


def dense_jacobian(field, t, x):
    """(B, d, d) by one reverse pass a row, for x (B, *event); differentiable."""

    def flat_field(point):
        return field(t, point.unsqueeze(0)).flatten()

    return torch.func.vmap(torch.func.jacrev(flat_field))(x).flatten(2)


def dense_divergence(field, t, x):
    """(B,), the trace of the dense Jacobian."""
    return dense_jacobian(field, t, x).diagonal(dim1=-2, dim2=-1).sum(-1)


def assert_unbiased(draws, truth, sigmas=4.0):
    """The mean of independent draws (n,) lies within so many of its standard errors on either side."""
    error = draws.std() / len(draws) ** 0.5 + 1e-12  # draws may be constant up to rounding
    assert abs(draws.mean() - truth) < sigmas * error, f"{draws.mean():.6g} against {truth:.6g} ± {error:.2g}"


def assert_variance(draws, variance, sigmas=4.0):
    """The sample variance of independent draws (n,) is `variance` within so many of its standard errors."""
    fourth = (draws - draws.mean()).pow(4).mean()
    error = ((fourth - draws.var() ** 2) / len(draws)).sqrt()
    assert abs(draws.var() - variance) < sigmas * error, f"{draws.var():.6g} against {variance:.6g} ± {error:.2g}"
