"""Colours for the pixels of an event, such that pixels of one colour are far apart."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def split_event(event_shape: tuple[int, ...], grid_ndim: int | None) -> tuple[int, tuple[int, ...]]:
    """The number of channels of an event and the sizes of its grid.

    By default every dimension but the first is one of the grid, and an event (d,) is a line of d pixels.
    ``grid_ndim = 0`` takes the whole event for such a line.

    Raises:
        ValueError: the event has fewer than ``grid_ndim`` dimensions.
    """
    if grid_ndim is None:
        grid_ndim = max(1, len(event_shape) - 1)
    if grid_ndim > len(event_shape):
        raise ValueError(
            f"a grid of grid_ndim = {grid_ndim} dimensions needs an event with as many, got event_shape "
            f"{tuple(event_shape)}; grid_ndim=None takes all but the first for the grid, 0 needs no grid"
        )
    if grid_ndim == 0:
        return 1, (math.prod(event_shape),)
    return math.prod(event_shape[:-grid_ndim]), tuple(event_shape[-grid_ndim:])


def num_line_colours(size: int, stride: int, periodic: bool) -> int:
    """How many colours a line of ``size`` pixels takes."""
    if not periodic:
        return min(stride, size)
    return math.ceil(size / max(1, size // stride))


def colour_line(size: int, stride: int, periodic: bool, device: torch.device | None = None) -> Tensor:  # (size,)
    """Colours 0, 1, ... of the pixels of a line, those of one colour at least ``stride`` apart.

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
    """The colour of each entry: one for each channel and each combination of the colours along the grid's lines."""
    channels, sizes = split_event(event_shape, grid_ndim)
    colours = torch.arange(channels, device=device)
    for size in sizes:
        line = colour_line(size, stride, periodic, device)
        colours = colours.unsqueeze(-1) * num_line_colours(size, stride, periodic) + line
    return colours.reshape(event_shape)
