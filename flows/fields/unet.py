"""A U-Net modulated by time, for images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from flows.arguments import checked
from flows.checks import whole_number
from flows.errors import InvalidValueError
from flows.fields.base import Field
from flows.fields.modulation import Modulation

MAX_BLOCKS = 1000  # of one level; more would take minutes to build


@checked
class UNet(Field):
    r"""Residual blocks at several resolutions, modulated by time and context.

    Level l = 0, 1, ... works at 1/2^l of the resolution with `channels · multipliers[l]` channels. Each level has
    `num_blocks` blocks on the way down and as many on the way up; two more blocks stand at the bottom. Before a block
    on the way up, the output of its partner on the way down is *added*, not concatenated, so that no block is wider
    than its level. A block is

        h + K₂ ∗ σ(g(t, context) ∘ norm(K₁ ∗ σ(norm(h))) + s(t, context)),    σ = SiLU,

    with 3×3 convolutions and, per pixel, norm(h) = h / √(mean over channels of h²). Unlike group normalisation, this
    norm does not couple pixels. K₂ and the last layer start at zero, so the flow starts at the identity.
    Sizes need not be divisible by two. [Ronneberger et al. 2015, arXiv:1505.04597; Ho et al. 2020, arXiv:2006.11239;
    pixel norm: Karras et al. 2018, arXiv:1710.10196]

    The divergence has no closed form. Without attention the field has a finite but large `receptive_radius`. `Probing`
    is exact at a stride above it, which pays for much larger images.

    Args:
        event_shape: (C, H, W).
        channels: at full resolution.
        multipliers: of the channels, one for each level.
        num_blocks: a level, on either way.
        attention_levels: those with self-attention after each block; its cost grows with the square of the pixels.
            `-1` is the lowest level.
        num_heads: of the attention; divides the channels of its levels.
        recompute: keep only the input of each block for the backward pass and compute the rest again: less memory, a
            third more time. Only in training mode, and with reverse-mode products.
        num_frequencies: of the time features; see `SinusoidalTime`.
        context_shape: shape of the context (a class as a one-hot vector, say), `None` for an unconditional field.

    Example:
        ```python
        import flows

        field = flows.fields.UNet((1, 8, 8), channels=8, multipliers=(1, 2))
        flow = flows.CNF(field, divergence=flows.divergence.Hutchinson())
        ```
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        channels: int = 32,
        multipliers: Sequence[int] = (1, 2, 2),
        num_blocks: int = 1,
        attention_levels: Sequence[int] = (-1,),
        num_heads: int = 4,
        recompute: bool = False,
        num_frequencies: int = 8,
        context_shape: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__(event_shape, context_shape)
        if len(self.event_shape) != 3:
            raise InvalidValueError(
                f"event_shape must be (channels, height, width), such as (3, 32, 32), got {self.event_shape}"
            )
        if channels < 1 or not multipliers or min(multipliers) < 1 or num_blocks < 1:
            raise InvalidValueError(
                f"channels and num_blocks must be >= 1 and multipliers hold a number >= 1 a level, got {channels}, "
                f"{num_blocks} and {list(multipliers)}"
            )
        whole_number("num_blocks", num_blocks, at_most=MAX_BLOCKS)
        whole_number("num_heads", num_heads)
        depth = len(multipliers)
        smallest = min(self.event_shape[1:])
        if smallest < 2 ** (depth - 1):
            raise InvalidValueError(
                f"{depth} levels halve the image {depth - 1} times, which {tuple(self.event_shape[1:])} pixels do not "
                f"allow; take at most {smallest.bit_length()} multipliers"
            )
        if any(not -depth <= level < depth for level in attention_levels):
            raise InvalidValueError(
                f"attention_levels must lie between {-depth} and {depth - 1}, the levels of {depth} multipliers, got "
                f"{list(attention_levels)}"
            )
        attended = {level % depth for level in attention_levels}
        widths = [channels * multiplier for multiplier in multipliers]
        if any(widths[level] % num_heads for level in attended):
            raise InvalidValueError(
                f"num_heads must divide the channels of the attention levels, "
                f"{sorted({widths[level] for level in attended})}, got {num_heads}"
            )
        self.recompute = recompute
        make = [lambda level=level: _Block(widths[level], num_heads * (level in attended)) for level in range(depth)]
        self.down = nn.ModuleList(nn.ModuleList(make[level]() for _ in range(num_blocks)) for level in range(depth))
        self.bottom = nn.ModuleList(make[-1]() for _ in range(2))
        self.up = nn.ModuleList(nn.ModuleList(make[level]() for _ in range(num_blocks)) for level in range(depth))
        steps = list(pairwise(widths))
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in steps)
        self.grow = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in steps)
        self.first = nn.Conv2d(self.event_shape[0], widths[0], 3, padding=1)
        self.last = _zeroed(nn.Conv2d(widths[0], self.event_shape[0], 3, padding=1))
        self.receptive_radius = None if attended else _radius(depth, num_blocks)
        per_level = [width for width in widths for _ in range(num_blocks)]
        sizes = [*per_level, widths[-1], widths[-1], *reversed(per_level)]  # of the blocks, in the order of forward
        self.modulation = Modulation([2 * size for size in sizes], context_shape, num_frequencies, width=4 * channels)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.check_context(context)
        moves = iter(self.modulation(t, context))
        h = self.first(x)
        skips = []
        for level, blocks in enumerate(cast(Iterable[nn.ModuleList], self.down)):
            h = self.shrink[level - 1](h) if level > 0 else h
            for block in blocks:
                h = self._run(block, h, next(moves))
                skips.append(h)
        for block in self.bottom:
            h = self._run(block, h, next(moves))
        for level in reversed(range(len(self.up))):
            if level < len(self.grow):
                h = functional.interpolate(self.grow[level](h), size=skips[-1].shape[-2:], mode="nearest")
            for block in cast(nn.ModuleList, self.up[level]):
                h = self._run(block, h + skips.pop(), next(moves))
        return self.last(functional.silu(_pixel_norm(h))).to(x.dtype)  # under autocast, it is another

    def _run(self, block: nn.Module, h: Tensor, move: Tensor) -> Tensor:
        if self.recompute and self.training and torch.is_grad_enabled():
            if forward_ad.unpack_dual(h).tangent is not None:
                raise InvalidValueError(
                    "recompute=True goes with reverse-mode Jacobian products, and these are forward-mode ones; choose "
                    "mode='reverse' for the divergence estimator, or recompute=False"
                )
            return checkpoint(block, h, move, use_reentrant=False)
        return block(h, move)


class _Block(nn.Module):
    """A residual block, with self-attention after it where there are heads."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.into = nn.Conv2d(channels, channels, 3, padding=1)
        self.out = _zeroed(nn.Conv2d(channels, channels, 3, padding=1))
        self.attention = _Attention(channels, num_heads) if num_heads else None

    def forward(
        self,
        h: Tensor,  # (B, channels, H, W)
        move: Tensor,  # (1 or B, 2 channels), the scale and the shift
    ) -> Tensor:  # (B, channels, H, W)
        scale, shift = move[..., None, None].chunk(2, dim=1)
        inner = self.into(functional.silu(_pixel_norm(h)))
        inner = functional.silu(torch.addcmul(shift, _pixel_norm(inner), 1 + scale))
        h = h + self.out(inner)
        return h if self.attention is None else h + self.attention(h)


class _Attention(nn.Module):
    """Self-attention between all pixels, in plain products: fused kernels have no second derivatives."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.into = nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, h: Tensor) -> Tensor:  # (B, channels, H, W) to the same
        parts = self.into(_pixel_norm(h)).flatten(2).unflatten(1, (3, self.num_heads, -1))
        queries, keys, values = parts.unbind(1)  # (B, heads, channels / heads, pixels)
        weights = (queries.mT @ keys / math.sqrt(keys.shape[2])).softmax(-1)  # (B, heads, pixels, pixels)
        return self.out((values @ weights.mT).flatten(1, 2).view_as(h))


def _pixel_norm(h: Tensor) -> Tensor:
    return h * torch.rsqrt(h.square().mean(1, keepdim=True) + 1e-3)


def _zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    return layer


def _radius(depth: int, num_blocks: int) -> int:
    """How far the convolutions reach: the interval that each pixel sees, carried back through the network."""
    radius = 0
    for pixel in range(2 ** (depth - 1)):
        low, high = pixel - 1, pixel + 1  # the last layer
        for level in range(depth):
            low, high = low - 2 * num_blocks, high + 2 * num_blocks
            if level < depth - 1:
                low, high = low // 2, high // 2
        low, high = low - 4, high + 4  # the bottom
        for level in reversed(range(depth)):
            if level < depth - 1:
                low, high = 2 * low - 1, 2 * high + 1
            low, high = low - 2 * num_blocks, high + 2 * num_blocks
        radius = max(radius, pixel - low + 1, high + 1 - pixel)  # the first layer
    return radius
