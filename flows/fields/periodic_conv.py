"""A shallow convolutional field on a periodic lattice."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flows.arguments import checked
from flows.errors import InvalidValueError
from flows.fields.activations import Activation
from flows.fields.base import Field
from flows.fields.modulation import Modulation
from flows.naming import by_name

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@checked
class PeriodicConv(Field):
    r"""v(t, x) = K_out ∗ σ(g(t) ∘ (K_in ∗ x + b) + s(t)) + c(t) ∘ x + o(t), convolutions wrapping around.

    A field on a lattice whose sites are alike: it commutes with translations of the lattice. Gates g, shifts s
    (for each hidden channel), slopes c and offsets o (for each channel) depend on time and the context.

    Divergence: site p of channel c reaches itself through every hidden channel h at every site p + k, by the
    tap k of K_out after the tap −k of K_in, so the taps collect into one constant for each hidden channel,

        div v = Σ_h g_h κ_h Σ_sites σ′(z_h) + S Σ_c c_c,     κ_h = Σ_c Σ_k K_out[c, h, k] K_in[h, c, −k],

    with z the argument of σ and S the number of sites. It costs σ′ and a sum, less than a convolution. The taps
    must not meet around the lattice, hence no kernel may be wider than it. [de Haan et al. 2021, arXiv:2110.02673,
    and Gerdes et al. 2023, arXiv:2207.00283, with kernel_size=(1, the lattice) and activation="sine"]

    Args:
        event_shape: (C, L), (C, H, W) or (C, D, H, W).
        num_channels: of the hidden layer.
        kernel_size: odd, of both convolutions, or a pair for K_in and K_out; no larger than the lattice.
        activation: σ, an `Activation` or its lower-case name.
        num_frequencies: of the time features; see `SinusoidalTime`.
        context_shape: shape of the context, `None` for an unconditional field.

    Example:
        ```python
        import torch

        import flows

        field = flows.fields.PeriodicConv((8, 8), num_channels=16)
        x = torch.randn(10, 8, 8)
        shifted = field(torch.tensor(0.5), x.roll(1, 2)).roll(-1, 2)
        torch.testing.assert_close(shifted, field(torch.tensor(0.5), x))
        ```
    """

    periodic = True

    def __init__(
        self,
        event_shape: int | Sequence[int],
        num_channels: int = 64,
        kernel_size: int | Sequence[int] = 3,
        activation: Activation | str = "tanh",
        num_frequencies: int = 8,
        context_shape: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__(event_shape, context_shape)
        channels, *lattice = self.event_shape
        if len(lattice) not in _CONVOLUTIONS:
            raise InvalidValueError(
                f"event_shape must be (channels, *lattice) with a lattice of one to three dimensions, such as "
                f"(1, 8, 8), got {self.event_shape}"
            )
        if num_channels < 1:
            raise InvalidValueError(f"num_channels must be >= 1, got {num_channels}")
        kernels = (kernel_size, kernel_size) if not isinstance(kernel_size, Sequence) else tuple(kernel_size)
        if len(kernels) != 2 or min(kernels) < 1 or any(size % 2 == 0 for size in kernels):
            raise InvalidValueError(f"kernel_size must be odd and positive, or a pair of such, got {kernel_size}")
        if max(kernels) > min(lattice):
            raise InvalidValueError(
                f"a kernel of size {max(kernels)} wraps around the lattice {tuple(lattice)} onto itself; choose an odd "
                f"kernel_size <= {min(lattice)}"
            )
        convolution = _CONVOLUTIONS[len(lattice)]
        self.into, self.out = [
            convolution(a, b, size, padding=size // 2, padding_mode="circular")
            for (a, b), size in zip([(channels, num_channels), (num_channels, channels)], kernels, strict=True)
        ]
        self.receptive_radius = sum(size // 2 for size in kernels)  # in sites, along each axis
        self.activation = by_name(Activation, activation, "activation")
        self.modulation = Modulation([num_channels, num_channels, channels, channels], context_shape, num_frequencies)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        gate, shift, slope, offset = self._modulate(t, x, context)
        h = self.activation(torch.addcmul(shift, self.into(x), gate))
        return torch.addcmul(self.out(h) + offset, slope, x)

    def value_and_divergence(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """v (B, *event) and div v (B,)."""
        gate, shift, slope, offset = self._modulate(t, x, context)
        h, h_slope = self.activation.value_and_slope(torch.addcmul(shift, self.into(x), gate))
        value = torch.addcmul(self.out(h) + offset, slope, x)
        weighted = h_slope.flatten(2).sum(2) * gate.flatten(1)  # (B, num_channels)
        sites = math.prod(self.event_shape[1:])
        return value, weighted @ self._self_coupling() + sites * slope.flatten(1).sum(1)

    def _self_coupling(self) -> Tensor:  # (num_channels,), κ
        inner, outer = self.into.weight.flatten(2), self.out.weight.flatten(2)
        if inner.shape != outer.shape[1::-1] + outer.shape[2:]:  # the taps that the smaller kernel has
            radius = min(self.into.padding[0], self.out.padding[0])
            inner, outer = (_centre(conv.weight, radius).flatten(2) for conv in (self.into, self.out))
        return torch.einsum("chk,hck->h", outer, inner.flip(-1))

    def _modulate(self, t: Tensor, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        self.check_context(context)
        axes = [1] * (x.ndim - 2)
        gate, shift, slope, offset = (m.unflatten(1, (-1, *axes)) for m in self.modulation(t, context))
        return 1 + gate, shift, slope, offset


def _centre(weight: Tensor, radius: int) -> Tensor:
    """The taps within `radius` of the middle along every axis."""
    for axis in range(2, weight.ndim):
        weight = weight.narrow(axis, weight.shape[axis] // 2 - radius, 2 * radius + 1)
    return weight
