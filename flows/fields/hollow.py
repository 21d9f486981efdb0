"""A field whose Jacobian has a diagonal in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from flows.arguments import checked
from flows.errors import InvalidValueError
from flows.fields.activations import Activation
from flows.fields.base import Field
from flows.fields.modulation import Modulation
from flows.naming import by_name


@checked
class Hollow(Field):
    r"""v_i(t, x) = τ_i(x_i, h_i(t, x), t), where the conditioner h_i does not see x_i.

    With ∂h_i/∂x_i = 0 ("hollow"), ∂v_i/∂x_i is the slope of τ in its first argument at fixed h. So all d diagonal
    entries of the Jacobian come at once, where a general field needs d Jacobian products. Chen & Duvenaud (2019,
    arXiv:1912.03579) detach h and run one reverse pass. Here τ is two layers of m units, whose slope has a closed form:

        z_i = h_i + a_i(t) x_i,   y_i = g(t) ∘ M σ(z_i) + s(t),   v_i = w_iᵀ σ(y_i) + c_i(t) x_i + b_i(t)
        ∂v_i/∂x_i = (w_i ∘ σ′(y_i))ᵀ (g ∘ M (σ′(z_i) ∘ a_i)) + c_i,

    so it needs neither autograd nor a second-order graph. The divergence costs less than one evaluation for any d. An
    evaluation costs d · m · (width of the last hidden layer) multiplications.

    The conditioner is one masked network. Every hidden unit has a *blind set* of coordinates: for half of the
    units all from some index on, for the others all before some index. x_j reaches a unit that is not blind
    to j, a unit u reaches a unit w only if w's blind set lies within u's, and it reaches h_i only if i is in
    its blind set. By induction no unit depends on a coordinate it is blind to, hence no h_i on x_i. A linear
    hollow layer beside it makes every h_i depend on all other coordinates, however few the hidden units are.

    Args:
        event_shape: shape of a point; it is flattened.
        hidden: widths of the conditioner's hidden layers, at least one, each at least 2.
        num_features: m, the size of each h_i and of the layers of τ.
        activation: an `Activation` or its lower-case name.
        num_frequencies: of the time features; see `SinusoidalTime`.
        context_shape: shape of the context, `None` for an unconditional field.

    Example:
        ```python
        import torch

        import flows

        flow = flows.CNF(flows.fields.Hollow((6,), hidden=(32,)))  # the divergence costs one product
        flow.log_prob(torch.randn(10, 6))
        ```
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        hidden: Sequence[int] = (256,),
        num_features: int = 16,
        activation: Activation | str = "silu",
        num_frequencies: int = 8,
        context_shape: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__(event_shape, context_shape)
        if not hidden or min(hidden) < 2:
            raise InvalidValueError(
                f"hidden must hold the width (>= 2) of at least one hidden layer, such as (256,), got {tuple(hidden)}"
            )
        if num_features < 1:
            raise InvalidValueError(f"num_features must be >= 1, got {num_features}")
        d, m = math.prod(self.event_shape), num_features
        blind = [_blind_sets(width, d) for width in hidden]
        reach = [~blind[0], *(_nested(a, b) for a, b in pairwise(blind))]
        self.layers = nn.ModuleList(_MaskedLinear(mask) for mask in reach)
        self.head = _MaskedLinear(blind[-1].T.repeat_interleave(m, dim=0))
        self.direct = _MaskedLinear(~torch.eye(d, dtype=torch.bool))
        self.direct_gain = nn.Parameter(torch.randn(d, m))
        self.gain = nn.Parameter(torch.randn(d, m))  # a
        self.mix = nn.Linear(m, m)  # M
        self.out = nn.Parameter(torch.randn(d, m) / math.sqrt(m))  # w
        self.activation = by_name(Activation, activation, "activation")
        self.num_layers = len(hidden)
        self.modulation = Modulation([*hidden, *hidden, m, m, m, d, d], context_shape, num_frequencies)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        z, _, scale, shift, slope, offset = self._first_layer(t, x, context)
        y = torch.addcmul(shift, self.mix(self.activation(z)), scale)
        value = (self.activation(y) * self.out).sum(-1)
        return (torch.addcmul(value, slope, x.flatten(1)) + offset).view_as(x)

    def value_and_divergence(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """v (B, *event) and div v (B,)."""
        z, gain, scale, shift, slope, offset = self._first_layer(t, x, context)
        h, z_slope = self.activation.value_and_slope(z)
        h, y_slope = self.activation.value_and_slope(torch.addcmul(shift, self.mix(h), scale))
        tangent = functional.linear(z_slope * gain, self.mix.weight) * scale  # (B, d, m), ∂y_i/∂x_i
        diagonal = (y_slope * tangent * self.out).sum((1, 2)) + slope.sum(1)
        value = torch.addcmul((h * self.out).sum(-1), slope, x.flatten(1)) + offset
        return value.view_as(x), diagonal

    def conditioner(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """h (B, d, m): row i does not depend on coordinate i of the flattened x."""
        self.check_context(context)
        return self._conditioner(x.flatten(1), self.modulation(t, context))

    def _conditioner(self, x: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        h = x
        shifts = modulation[self.num_layers :]
        for layer, scale, shift in zip(self.layers, modulation, shifts):  # noqa: B905 (the rest is for τ)
            h = self.activation(torch.addcmul(shift, layer(h), 1 + scale))
        h = self.head(h).unflatten(1, self.gain.shape)
        return torch.addcmul(h, self.direct(x).unsqueeze(-1), self.direct_gain)

    def _first_layer(self, t: Tensor, x: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
        """z (B, d, m), and what of time the rest of τ needs: a (1 or B, d, m), g and s (1 or B, 1, m), c and b."""
        self.check_context(context)
        modulation = self.modulation(t, context)
        gain, scale, shift, slope, offset = modulation[2 * self.num_layers :]
        x = x.flatten(1)
        gain = self.gain * (1 + gain).unsqueeze(1)
        z = torch.addcmul(self._conditioner(x, modulation), x.unsqueeze(-1), gain)
        return z, gain, 1 + scale.unsqueeze(1), shift.unsqueeze(1), slope, offset


class _MaskedLinear(nn.Linear):
    """W x + b with the entries of W zero where `mask` (out, in) is false."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight * self.mask, self.bias)


def _blind_sets(width: int, dimension: int) -> Tensor:  # (width, dimension), true where a unit is blind
    coordinate = torch.arange(dimension)
    left, right = [
        1 + torch.arange(units).unsqueeze(1) * (dimension - 1) // units for units in (width - width // 2, width // 2)
    ]
    return torch.cat([coordinate >= left, coordinate < right])


def _nested(inner: Tensor, outer: Tensor) -> Tensor:  # (outer, inner), true where outer's blind set lies in inner's
    return outer.double() @ (~inner).double().T == 0
