"""Trace estimation with one signed probe for each colour of the pixel grid."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from flows.arguments import checked
from flows.divergence.autodiff import Mode, check_mode, linearise, products_per_call
from flows.divergence.base import DivergenceEstimator, FieldSample
from flows.divergence.probes import Rademacher
from flows.errors import InvalidValueError
from flows.vector_field import BoundField


@checked
@dataclass(frozen=True)
class Probing(DivergenceEstimator):
    r"""div v ≈ Σ_c z_cᵀ J z_c with z_c random signs on the pixels of colour c and zeros elsewhere.

    Colours are such that two pixels of one colour and channel are at least `stride` apart along some axis of
    the grid. So what a field does within its receptive radius r, J_ij ≠ 0 only for pixels i, j at most r apart
    along every axis, meets no pixel of its own colour: **exact if and only if stride > r can be relied on**,
    that is where the field states a `receptive_radius` below the stride, or where no two pixels share a colour.

    Unbiased at any stride, with the variance Σ (J_ij² + J_ij J_ji)/num_repeats over the ordered pairs i ≠ j of
    one colour. Cost: one product for each colour and channel, stride^n · C on a grid of n dimensions
    whatever its size, times `num_repeats`. The probes of a solve are one sign an entry; colours are derived.

    Events: (C, H, W) and (C, L) have one colour set a channel; (d,) is a line of d pixels, so the colours are the
    indices modulo the stride. For events without a grid, such as point sets (N, 3), set `grid_ndim=0`:
    the flattened event is such a line, split into `stride` blocks.

    On a torus (a field with `periodic = True` or `padding_mode == "circular"`) the colouring keeps the same
    distance across the seam, with up to some colours more where the stride does not divide a size.

    Sources: Tang & Saad 2012; Stathopoulos, Laeuchli & Orginos 2013.

    Args:
        stride: >= 1, the distance between pixels of one colour.
        num_repeats: K >= 1 independent sets of signs; the standard error needs two.
        grid_ndim: how many trailing dimensions of the event are its grid; `None`: all but the first.
        mode: `"reverse"` or `"forward"` Jacobian products.
        chunk_size: products in one vectorised call; `None`: 1 in reverse, 16 in forward mode.

    Raises:
        ValueError: the event has fewer dimensions than `grid_ndim`; or the field states a receptive radius that a
            layer with circular padding breaks, for opposite edges see each other, without `periodic = True`.

    Example:
        ```python
        import flows
        from flows.divergence import Probing

        field = flows.fields.ConvNet((1, 16, 16), hidden=(8,))  # two 3 × 3 convolutions: pixels five apart do not meet
        flow = flows.CNF(field, divergence=Probing(stride=5))  # 25 products instead of 256, and exact
        ```
    """

    stride: int = 5
    num_repeats: int = 1
    grid_ndim: int | None = None
    mode: Mode = "reverse"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise InvalidValueError(
                f"stride must be >= 1, got {self.stride}; a field of receptive radius r needs r + 1 to be exact"
            )
        if self.num_repeats < 1:
            raise InvalidValueError(f"num_repeats must be >= 1, got {self.num_repeats}")
        if self.grid_ndim is not None and self.grid_ndim < 0:
            raise InvalidValueError(
                f"grid_ndim must be >= 0, or None for all but the first dimension, got {self.grid_ndim}"
            )
        check_mode(self.mode, self.chunk_size)

    def draw_probes(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:  # (K, B, *event), signs
        _check_padding(self.field)
        return Rademacher().draw(self.num_repeats, x, generator)

    def __call__(self, t: Tensor, x: Tensor, probes: Tensor) -> FieldSample:
        return self._sample(t, x, probes, with_norm=False)

    def with_jacobian_norm(self, t: Tensor, x: Tensor, probes: Tensor, directions: Tensor) -> FieldSample:
        """‖J‖²_F as Σ_c ‖Jᵀz_c‖², for free."""
        return self._sample(t, x, probes, with_norm=True)

    def _sample(self, t: Tensor, x: Tensor, probes: Tensor, with_norm: bool) -> FieldSample:
        value, products = linearise(self.field, t, x, self.mode, self.chunk_size)
        colours = self._colours(x.device)
        palette = torch.arange(self._num_colours, device=x.device).view(-1, *[1] * (x.ndim - 1))
        masks = (colours == palette).unsqueeze(1)  # (colours, 1, *event)
        estimates, norm = [], x.new_zeros(len(x)) if with_norm else None
        for signs in probes:
            total = x.new_zeros(len(x))
            for chunk in masks.split(products_per_call(self.mode, self.chunk_size)):
                directions = chunk * signs
                rows = products(directions)
                total = total + (rows * directions).flatten(2).sum((0, 2))
                if norm is not None:
                    norm = norm + rows.square().flatten(2).sum((0, 2)) / len(probes)
            estimates.append(total)
        return FieldSample(value, torch.stack(estimates), norm)

    @property
    def num_estimates(self) -> int:
        return self.num_repeats

    @property
    def cost(self) -> int:
        return self.num_repeats * self._num_colours

    def with_budget(self, num_products: int, field: BoundField) -> Probing:
        best = replace(self, stride=1)
        for stride in range(2, max(split_event(field.event_shape, self.grid_ndim)[1]) + 1):
            if best.bind(field).is_exact:
                break
            wider = replace(self, stride=stride)
            if wider.bind(field).cost <= num_products:
                best = wider
        return best

    @property
    def is_exact(self) -> bool:
        """Whether no two entries of one colour can see each other."""
        if self._num_colours == self.field.dimension:
            return True
        # A radius is about the axes after the first: the channels of an image may all depend on each other.
        axes = max(1, len(self.field.event_shape) - 1)
        covered = self.grid_ndim is None or 1 <= self.grid_ndim <= axes
        radius = self.field.receptive_radius
        return covered and radius is not None and self.stride > radius

    def variance(
        self,
        jacobian: Tensor,  # (..., d, d)
    ) -> Tensor:  # (...)
        """The variance of the mean over the repeats."""
        colours = self._colours(jacobian.device).flatten()
        pairs = (colours.unsqueeze(0) == colours.unsqueeze(1)).fill_diagonal_(False)
        return (pairs * jacobian * (jacobian + jacobian.mT)).sum((-2, -1)) / self.num_repeats

    @property
    def _num_colours(self) -> int:
        channels, sizes = split_event(self.field.event_shape, self.grid_ndim)
        return channels * math.prod(num_line_colours(size, self.stride, self.field.periodic) for size in sizes)

    def _colours(self, device: torch.device) -> Tensor:  # (*event)
        return colour_event(self.field.event_shape, self.stride, self.grid_ndim, self.field.periodic, device)


def _check_padding(field: BoundField) -> None:
    """Raise `ValueError` where a layer wraps around a grid that the field calls open."""
    if field.receptive_radius is None or field.periodic or not isinstance(field.field, nn.Module):
        return
    for name, layer in field.field.named_modules():
        if getattr(layer, "padding_mode", None) == "circular":
            raise InvalidValueError(
                f"{field.name} states receptive_radius = {field.receptive_radius}, but its layer {name} has circular "
                "padding, through which pixels at opposite edges see each other; state periodic = True on the field, "
                "too, so that distances are counted around the edges"
            )


def split_event(event_shape: tuple[int, ...], grid_ndim: int | None) -> tuple[int, tuple[int, ...]]:
    """The channels of an event and the sizes of its grid.

    By default every dimension but the first is one of the grid, and an event (d,) is a line of d pixels.
    `grid_ndim = 0` takes the whole event for such a line.

    Raises:
        ValueError: the event has fewer than `grid_ndim` dimensions.
    """
    if grid_ndim is None:
        grid_ndim = max(1, len(event_shape) - 1)
    if grid_ndim > len(event_shape):
        raise InvalidValueError(
            f"a grid of grid_ndim = {grid_ndim} dimensions needs an event with as many, got event_shape "
            f"{tuple(event_shape)}; grid_ndim=None takes all but the first for the grid, 0 needs no grid"
        )
    if grid_ndim == 0:
        return 1, (math.prod(event_shape),)
    return math.prod(event_shape[:-grid_ndim]), tuple(event_shape[-grid_ndim:])


def num_line_colours(size: int, stride: int, periodic: bool) -> int:
    """The number of colours of a line."""
    if not periodic:
        return min(stride, size)
    return math.ceil(size / max(1, size // stride))


def colour_line(size: int, stride: int, periodic: bool, device: torch.device | None = None) -> Tensor:  # (size,)
    """Colour the pixels of a line, equal colours at least `stride` apart.

    An open line repeats 0, ..., stride − 1. A ring is cut into ⌊size/stride⌋ arcs whose lengths differ by at
    most one, so none is shorter than the stride, and a pixel's colour is its place in its arc: with the fewest
    colours there can be, and those are the stride's own number where it divides the size.
    """
    pixels = torch.arange(size, device=device)
    if not periodic:
        return pixels % stride
    arcs = max(1, size // stride)
    arc = ((pixels + 1) * arcs - 1) // size  # the last arc a that starts, at ⌊a size/arcs⌋, by this pixel
    return pixels - arc * size // arcs


def colour_event(
    event_shape: tuple[int, ...],
    stride: int,
    grid_ndim: int | None = None,
    periodic: bool = False,
    device: torch.device | None = None,
) -> Tensor:  # (*event), whole numbers
    """Colour the entries of an event.

    There is one colour for each channel and each combination of the colours along the axes of the grid."""
    channels, sizes = split_event(event_shape, grid_ndim)
    colours = torch.arange(channels, device=device)
    for size in sizes:
        line = colour_line(size, stride, periodic, device)
        colours = colours.unsqueeze(-1) * num_line_colours(size, stride, periodic) + line
    return colours.reshape(event_shape)
