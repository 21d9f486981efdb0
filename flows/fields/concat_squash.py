"""FFJORD's concat-squash perceptron."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from flows.arguments import checked
from flows.fields.activations import Activation
from flows.fields.perceptron import Folded, Linearised, Perceptron, folded, refresh
from flows.fields.trace import PerceptronTrace
from flows.naming import by_name

MIN_ROWS_PER_UNIT = 0.25  # in smaller batches, gates of the outputs cost less than gates of the weights


@checked
class ConcatSquashMLP(Perceptron):
    r"""Layers (W h + b) ∘ sigmoid(A c + a) + B c with c = (t, context), activations between them.

    The field of FFJORD's toy and tabular experiments (Grathwohl et al. 2019, arXiv:1810.01367, and its
    published settings), here with its divergence in closed form: the sigmoid gates fold into the slopes.

    Args:
        event_shape: shape of a point; it is flattened for the layers.
        hidden: widths of the hidden layers, at least one.
        activation: an `Activation` or its lower-case name.
        context_shape: shape of the context, `None` for an unconditional field.

    Example:
        ```python
        import flows

        flow = flows.CNF(flows.fields.ConcatSquashMLP((2,), hidden=(64, 64, 64)))  # the network of FFJORD
        ```
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        hidden: Sequence[int] = (64, 64, 64),
        activation: Activation | str = "tanh",
        context_shape: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__(event_shape, hidden, context_shape)
        dimension = math.prod(self.event_shape)
        widths = (dimension, *hidden, dimension)
        condition = 1 + self.num_context_features
        self.layers = nn.ModuleList(_ConcatSquash(a, b, condition) for a, b in itertools.pairwise(widths))
        self.activation = by_name(Activation, activation, "activation")

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        condition = self._condition(t, context)
        h = x.flatten(1)
        *hidden, last = self.layers  # a slice would be a new module
        for layer in hidden:
            h = self.activation(layer(h, condition)[0])
        return last(h, condition)[0].view_as(x)

    def precompute(self) -> _Gating:
        """The parameters of all layers, put together."""
        layers = list(cast(Iterable[_ConcatSquash], self.layers))
        refresh(part for layer in layers for part in layer.children())
        biases = [layer.linear.bias for layer in layers]
        return _Gating(layers, folded(self._weights(), biases, [self.activation] * len(self.hidden)))

    def linearised(self, t: Tensor, x: Tensor, context: Tensor | None, precomputed: _Gating) -> Linearised:
        """v, and the factors of its Jacobian.

        Gates that the batch shares go into the weights, which are smaller than a batch; then `gate` is None.
        """
        condition = self._condition(t, context)
        h = x.flatten(1)
        slopes = []
        if len(condition) == 1:
            weights, biases = precomputed(condition)
            *maps, last = zip(weights, biases, strict=True)
            for (weight, bias), activation in zip(maps, precomputed.folded.activations, strict=True):
                h, slope = activation.value_and_slope(functional.linear(h, weight, bias))
                slopes.append(slope)
            value = functional.linear(h, *last).view_as(x)
            return Linearised(value, weights, slopes, None, PerceptronTrace(weights))
        *hidden, last = self.layers
        for layer in hidden:
            z, gate = layer(h, condition)
            h, slope = self.activation.value_and_slope(z)
            slopes.append(slope * gate)
        value, gate = last(h, condition)
        weights = self._weights()
        return Linearised(value.view_as(x), weights, slopes, gate, PerceptronTrace(weights, gate_per_sample=True))

    def velocity(
        self, t: Tensor, x: Tensor, context: Tensor | None = None, precomputed: Callable[[], _Gating] | None = None
    ) -> Tensor:
        condition = self._condition(t, context)
        if len(condition) > 1 or len(x) < MIN_ROWS_PER_UNIT * max(self.hidden):
            return self(t, x, context)
        gating = (precomputed or self.precompute)()
        *maps, last = zip(*gating(condition), strict=True)
        h = x.flatten(1)
        for (weight, bias), activation in zip(maps, gating.folded.activations, strict=True):
            h = activation(functional.linear(h, weight, bias))
        return functional.linear(h, *last).view_as(x)

    def _weights(self) -> list[Tensor]:
        return [layer.linear.weight for layer in cast(Iterable[_ConcatSquash], self.layers)]

    @property
    def divergence_cost(self) -> int:
        return PerceptronTrace.num_tangents(self._weights(), gate_per_sample=self.context_shape is not None)

    def _condition(self, t: Tensor, context: Tensor | None) -> Tensor:  # (1 or B, 1 + context)
        self.check_context(context)
        condition = t.reshape(-1, 1)
        if context is None:
            return condition
        return torch.cat([condition.expand(context.shape[0], -1), context.reshape(context.shape[0], -1)], dim=1)


class _ConcatSquash(nn.Module):
    def __init__(self, width_in: int, width_out: int, num_conditions: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width_in, width_out)
        self.gate = nn.Linear(num_conditions, width_out)
        self.shift = nn.Linear(num_conditions, width_out, bias=False)

    def forward(self, h: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        gate = self.gate(condition).sigmoid()
        return torch.addcmul(self.shift(condition), self.linear(h), gate), gate


class _Gating:
    """Weights and biases of all layers for one condition.

    Args:
        layers: whose gates are put together.
        folded: their weights and biases.
    """

    def __init__(self, layers: Sequence[_ConcatSquash], folded: Folded) -> None:
        self.folded = folded
        self.widths = [len(weight) for weight in folded.weights]
        self.gate = torch.cat([layer.gate.weight for layer in layers])
        self.offset = torch.cat([layer.gate.bias for layer in layers])
        shifts = [layer.shift.weight for layer in layers]
        self.shift = torch.cat([stretch * shift for stretch, shift in zip(folded.stretches, shifts, strict=True)])
        self.bias = torch.cat(folded.biases)

    def __call__(
        self,
        condition: Tensor,  # (1, c)
    ) -> tuple[list[Tensor], Sequence[Tensor]]:  # (width, width of the input) and (width,) for each layer
        """Of each layer g ∘ W, and g b + B c."""
        gate = functional.linear(condition, self.gate, self.offset).sigmoid()
        bias = torch.addcmul(functional.linear(condition, self.shift), self.bias, gate).squeeze(0)
        gates = gate.T.split(self.widths)
        weights = [gate * weight for gate, weight in zip(gates, self.folded.weights, strict=True)]
        return weights, bias.split(self.widths)
