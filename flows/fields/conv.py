"""FFJORD's concat-squash convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from flows.arguments import checked
from flows.errors import InvalidValueError
from flows.fields.activations import Activation
from flows.fields.base import Field
from flows.fields.modulation import Modulation
from flows.naming import by_name

_PADDINGS = ("zeros", "circular", "reflect", "replicate")


@checked
class ConvNet(Field):
    r"""Layers (W ∗ h + b) ∘ 2 sigmoid(g(t, context)) + s(t, context), activations between them, on images.

    The convolutional field of FFJORD (Grathwohl et al. 2019, arXiv:1810.01367) at stride 1, with gates g and shifts
    s of sinusoidal features of t. The last layer starts at zero, so that the flow starts near the identity.

    It has no closed form. A pixel sees others up to `receptive_radius` pixels away along either axis (no padding
    reaches further), so `Probing` is exact at a stride above it: with four 3×3 layers 25 products a channel,
    whatever the size of the image.

    Args:
        event_shape: (C, H, W).
        hidden: channels of the hidden layers, at least one.
        kernel_size: odd.
        padding_mode: `"zeros"`, `"circular"` (pixels wrap around: `periodic` is true), `"reflect"` or
            `"replicate"`.
        activation: an `Activation` or its lower-case name.
        num_frequencies: of the time features; see `SinusoidalTime`.
        context_shape: shape of the context (a class as a one-hot vector, say), `None` for an unconditional field.

    Example:
        ```python
        import flows

        flow = flows.CNF(flows.fields.ConvNet((1, 8, 8), hidden=(8,)), divergence=flows.divergence.Probing(stride=5))
        ```
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        hidden: Sequence[int] = (64, 64, 64),
        kernel_size: int = 3,
        padding_mode: str = "zeros",
        activation: Activation | str = "silu",
        num_frequencies: int = 8,
        context_shape: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__(event_shape, context_shape)
        if len(self.event_shape) != 3:
            raise InvalidValueError(
                f"event_shape must be (channels, height, width), such as (1, 28, 28), got {self.event_shape}"
            )
        if not hidden or min(hidden) < 1:
            raise InvalidValueError(
                f"hidden must hold the channels of at least one hidden layer, such as (64, 64), got {tuple(hidden)}"
            )
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise InvalidValueError(f"kernel_size must be odd and positive, got {kernel_size}")
        if padding_mode not in _PADDINGS:
            raise InvalidValueError(f"padding_mode must be one of {', '.join(_PADDINGS)}, got {padding_mode!r}")
        channels, *size = self.event_shape
        radius = kernel_size // 2
        if padding_mode != "zeros" and min(size) <= radius:
            raise InvalidValueError(
                f"padding_mode {padding_mode!r} with kernel_size {kernel_size} needs images larger than {radius} "
                f"pixels, got {tuple(size)}; choose padding_mode='zeros' or a smaller kernel"
            )
        widths = (channels, *hidden, channels)
        layers = [nn.Conv2d(a, b, kernel_size, padding=radius, padding_mode=padding_mode) for a, b in pairwise(widths)]
        self.layers = nn.ModuleList(layers)
        with torch.no_grad():
            for parameter in layers[-1].parameters():
                parameter.zero_()
        self.receptive_radius = len(self.layers) * radius
        self.periodic = padding_mode == "circular"
        self.activation = by_name(Activation, activation, "activation")
        self.modulation = Modulation([*widths[1:], *widths[1:]], context_shape, num_frequencies)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.check_context(context)
        modulation = [m[..., None, None] for m in self.modulation(t, context)]
        count = len(self.layers)
        h = x
        for index, (layer, gate, shift) in enumerate(
            zip(self.layers, modulation[:count], modulation[count:], strict=True)
        ):
            h = torch.addcmul(shift, layer(h if index == 0 else self.activation(h)), 2 * gate.sigmoid())
        return h.to(x.dtype)  # under autocast, the layers return another
