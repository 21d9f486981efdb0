"""A multilayer perceptron modulated by time, with its divergence in closed form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from flows.arguments import checked
from flows.checks import check_number
from flows.fields.activations import Activation, Sine
from flows.fields.modulation import Modulation
from flows.fields.perceptron import Linearised, Perceptron, folded, refresh
from flows.fields.trace import PerceptronTrace
from flows.naming import by_name
from flows.promises.regime import HOOKS
from flows.vector_field import at_first_use


@checked
class MLP(Perceptron):
    r"""v(t, x) = W_out h_L + b_out(t),  h_l = σ(g_l(t) ∘ (W_l h_{l−1} + b_l) + s_l(t)),  h_0 = x.

    Scales g_l, shifts s_l and the output's offset are affine functions of sinusoidal features of t, passed
    through one hidden layer together with the context where there is one. They fold into the slopes of the
    activations, a_l = σ′ ∘ g_l, so that the divergence

        div v = tr(W_out diag(a_L) W_L ··· diag(a_1) W_1)

    is exact and cheap (`flows.fields.trace.PerceptronTrace`): with two hidden layers
    a_2ᵀ [W_2 ∘ (W_1 W_out)ᵀ] a_1, whose bracket is computed once a solve.

    Args:
        event_shape: shape of a point; it is flattened for the layers.
        hidden: widths of the hidden layers, at least one.
        activation: an `Activation` or its lower-case name.
        sine_frequency: the first layer is sin(·) with weights drawn from N(0, sine_frequency²/d), so that its phases
            spread by about sine_frequency (default 6) over data of unit scale. It resolves sharp structure in low
            dimensions. `None`: the first layer has the same activation as the others.
        num_frequencies: of the time features, which suit times from 0 to 1; see `SinusoidalTime`. With 0 the field does
            not depend on time.
        context_shape: shape of the context, `None` for an unconditional field.
        at_rest: start with the velocity 0, so that training starts at the base: for a base that is near the data.

    Example:
        ```python
        import flows

        field = flows.fields.MLP((2,), hidden=(64, 64), activation="silu")
        flow = flows.CNF(field)  # its divergence has a closed form, which is taken by default
        ```
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        hidden: Sequence[int] = (128, 128),
        activation: Activation | str = "tanh",
        sine_frequency: float | None = 6.0,
        num_frequencies: int = 8,
        context_shape: int | Sequence[int] | None = None,
        at_rest: bool = False,
    ) -> None:
        super().__init__(event_shape, hidden, context_shape)
        dimension = math.prod(self.event_shape)
        widths = (dimension, *self.hidden)
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
        self.layers = nn.ModuleList(layers)
        self.out = nn.Linear(widths[-1], dimension)
        shared = by_name(Activation, activation, "activation")
        self.activations = nn.ModuleList([shared] * len(self.hidden))
        if sine_frequency is not None:
            check_number("sine_frequency", sine_frequency, above=0, otherwise="None: no sine layer")
            self.activations[0] = Sine()
            nn.init.normal_(layers[0].weight, std=sine_frequency / math.sqrt(dimension))
            nn.init.uniform_(layers[0].bias, -math.pi, math.pi)
        self.modulation = Modulation([*self.hidden, *self.hidden, dimension], context_shape, num_frequencies)
        if at_rest:
            with torch.no_grad():
                for weights in (self.out.weight, self.out.bias, self.modulation.heads.weight[-dimension:]):
                    weights.zero_()

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        scales, shifts, offset = self._modulate(t, context)
        h = self._hidden(x.flatten(1), scales, shifts, slice(None))
        return (self.out(h) + offset).view_as(x)

    @property
    def bottleneck_width(self) -> int:
        """H, the width of the narrowest hidden layer, where the field is cut into `decode` ∘ `encode`."""
        return min(self.hidden)

    def encode(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:  # (B, H)
        """The activations of the narrowest hidden layer."""
        scales, shifts, _ = self._modulate(t, context)
        return self._hidden(x.flatten(1), scales, shifts, slice(self._cut))

    def decode(self, t: Tensor, h: Tensor, context: Tensor | None = None) -> Tensor:  # (B, *event)
        """The velocity from the activations `h` (B, H) of the narrowest hidden layer."""
        scales, shifts, offset = self._modulate(t, context)
        h = self._hidden(h, scales, shifts, slice(self._cut, None))
        return (self.out(h) + offset).view(-1, *self.event_shape)

    @property
    def _cut(self) -> int:
        return self.hidden.index(min(self.hidden)) + 1

    def _hidden(self, h: Tensor, scales: list[Tensor], shifts: list[Tensor], part: slice) -> Tensor:
        layers = zip(self.layers[part], self.activations[part], scales[part], shifts[part], strict=True)
        for layer, activation, scale, shift in layers:
            h = activation(torch.addcmul(shift, layer(h), scale))
        return h

    def precompute(self) -> _Layers:
        """The layers, by activations that cost less if all are plain."""
        layers, activations = [*self.layers, self.out], list(cast(Iterable[Activation], self.activations))
        if not all(map(_is_plain, layers)):  # they are called
            refresh(layers)
            return _Layers(layers, activations, [1.0] * len(activations), self._weights())
        found = folded(self._weights(), [cast(Tensor, layer.bias) for layer in layers], activations)
        pairs = zip(found.weights, found.biases, strict=True)
        maps = [partial(functional.linear, weight=weight, bias=bias) for weight, bias in pairs]
        return _Layers(maps, found.activations, found.stretches[:-1], found.weights)

    def velocity(
        self, t: Tensor, x: Tensor, context: Tensor | None = None, precomputed: Callable[[], _Layers] | None = None
    ) -> Tensor:
        scales, shifts, offset = self._modulate(t, context)
        layers = (precomputed or self.precompute)()
        h = x.flatten(1)
        for affine, activation, scale, shift in layers.modulated(scales, shifts):
            h = activation(torch.addcmul(shift, affine(h), scale))
        return (layers.maps[-1](h) + offset).view_as(x)

    def linearised(self, t: Tensor, x: Tensor, context: Tensor | None, precomputed: _Layers) -> Linearised:
        scales, shifts, offset = self._modulate(t, context)
        h = x.flatten(1)
        slopes = []
        for affine, activation, scale, shift in precomputed.modulated(scales, shifts):
            h, slope = activation.value_and_slope(torch.addcmul(shift, affine(h), scale))
            slopes.append(slope * scale)
        value = (precomputed.maps[-1](h) + offset).view_as(x)
        return Linearised(value, precomputed.weights, slopes, None, precomputed.trace)

    @property
    def divergence_cost(self) -> int:
        return PerceptronTrace.num_tangents(self._weights())

    def _weights(self) -> list[Tensor]:
        return [*(layer.weight for layer in cast(Iterable[nn.Linear], self.layers)), self.out.weight]

    def _modulate(self, t: Tensor, context: Tensor | None) -> tuple[list[Tensor], list[Tensor], Tensor]:
        self.check_context(context)
        *parts, offset = self.modulation(t, context)
        half = len(parts) // 2
        return [1 + scale for scale in parts[:half]], parts[half:], offset


class _Layers:
    """The layers of one solve.

    Args:
        maps: h to W h + b, the output's last.
        activations: whose arguments are `stretches` times those of the field's own.
        weights: of the maps.
    """

    def __init__(
        self,
        maps: Sequence[Callable[[Tensor], Tensor]],
        activations: list[Activation],
        stretches: list[float],
        weights: list[Tensor],
    ) -> None:
        self.maps, self.activations, self.stretches, self.weights = maps, activations, stretches, weights

    @at_first_use
    def trace(self) -> PerceptronTrace:
        """Of the Jacobian with these weights."""
        return PerceptronTrace(self.weights)

    def modulated(
        self, scales: list[Tensor], shifts: list[Tensor]
    ) -> Iterator[tuple[Callable[[Tensor], Tensor], Activation, Tensor, Tensor]]:
        """Each hidden layer with its activation, its scale, and its shift in the units of the activation."""
        shifts = [s if stretch == 1 else stretch * s for s, stretch in zip(shifts, self.stretches, strict=True)]
        return zip(self.maps, self.activations, scales, shifts, strict=False)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is W h + b and nothing else."""
    hooks = any(getattr(layer, name) for name in HOOKS)
    return type(layer) is nn.Linear and layer.bias is not None and not hooks and "forward" not in layer.__dict__
