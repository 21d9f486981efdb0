"""FFJORD's concat-squash perceptron."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from flows.errors import InvalidValueError
from flows.fields.activations import Activation
from flows.fields.base import BoundField, Field
from flows.fields.trace import PerceptronTrace, perceptron_products
from flows.naming import by_name


class ConcatSquashMLP(Field):
    r"""Layers (W h + b) ∘ sigmoid(A c + a) + B c with c = (t, context), activations between them.

    The field of FFJORD's toy and tabular experiments (Grathwohl et al. 2019, arXiv:1810.01367, and its
    published settings), here with its divergence in closed form: the sigmoid gates fold into the slopes.

    Args:
        event_shape: shape of a point; it is flattened for the layers.
        hidden: widths of the hidden layers, at least one.
        activation: an :class:`Activation` or its lower-case name.
        context_shape: shape of the context, ``None`` for an unconditional field.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        hidden: Sequence[int] = (64, 64, 64),
        activation: Activation | str = "tanh",
        context_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(event_shape, context_shape)
        if not hidden or min(hidden) < 1:
            raise InvalidValueError(
                f"hidden must hold the width of at least one hidden layer, such as (64, 64), got {tuple(hidden)}"
            )
        dimension = math.prod(self.event_shape)
        widths = (dimension, *hidden, dimension)
        condition = 1 + self.num_context_features
        self.layers = nn.ModuleList(_ConcatSquash(a, b, condition) for a, b in itertools.pairwise(widths))
        self.activation = by_name(Activation, activation)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        condition = self._condition(t, context)
        h = x.flatten(1)
        for layer in self.layers[:-1]:
            h = self.activation(layer(h, condition)[0])
        return self.layers[-1](h, condition)[0].view_as(x)

    def value_and_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None = None, gating: _Gating | None = None
    ) -> tuple[Tensor, Tensor]:
        """v (B, *event) and div v (B,); ``gating`` holds what :meth:`bind` has put together."""
        value, weights, slopes, gate = self._value_and_slopes(t, x, context, gating)
        return value, self._divergence(weights, slopes, gate)

    def value_divergence_and_products(
        self,
        t: Tensor,
        x: Tensor,
        directions: Tensor,  # (P, B, *event)
        context: Tensor | None = None,
        gating: _Gating | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Beside v and div v the products J u (P, B, *event), each at the price of one evaluation."""
        value, weights, slopes, gate = self._value_and_slopes(t, x, context, gating)
        products = perceptron_products(weights, slopes, directions)
        if gate is not None:
            products = gate.view(-1, *self.event_shape) * products
        return value, self._divergence(weights, slopes, gate), products

    def _value_and_slopes(
        self, t: Tensor, x: Tensor, context: Tensor | None, gating: _Gating | None
    ) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor | None]:
        """v, and J as diag(gate) W_out diag(slopes_L) W_L ··· diag(slopes_1) W_1.

        Gates that the batch shares go into the weights, which are smaller than a batch; then ``gate`` is None.
        """
        condition = self._condition(t, context)
        h = x.flatten(1)
        slopes = []
        if len(condition) == 1:
            gates, biases = (_Gating(self.layers) if gating is None else gating)(condition)
            folded = [gate.T * weight for gate, weight in zip(gates, self._weights(), strict=True)]
            *maps, (weight, bias) = zip(folded, (bias.squeeze(0) for bias in biases), strict=True)
            for w, b in maps:
                h, slope = self.activation.value_and_slope(functional.linear(h, w, b))
                slopes.append(slope)
            return functional.linear(h, weight, bias).view_as(x), [*(w for w, _ in maps), weight], slopes, None
        for layer in self.layers[:-1]:
            z, gate = layer(h, condition)
            h, slope = self.activation.value_and_slope(z)
            slopes.append(slope * gate)
        value, gate = self.layers[-1](h, condition)
        return value.view_as(x), self._weights(), slopes, gate

    def bind(self, context: Tensor | None = None) -> BoundField:
        return _BoundConcatSquash(self, context)

    def _divergence(self, weights: list[Tensor], slopes: list[Tensor], gate: Tensor | None) -> Tensor:  # (B,)
        if gate is None:
            return PerceptronTrace(weights)(slopes)
        return PerceptronTrace(weights, gate_per_sample=True)(slopes, gate)

    def _weights(self) -> list[Tensor]:
        return [layer.linear.weight for layer in self.layers]

    @property
    def divergence_cost(self) -> int:
        return PerceptronTrace.num_tangents(self._weights(), gate_per_sample=self.context_shape is not None)

    def _condition(self, t: Tensor, context: Tensor | None) -> Tensor:  # (1 or B, 1 + context)
        self.check_context(context)
        condition = t.reshape(-1, 1)
        if context is None:
            return condition
        return torch.cat([condition.expand(len(context), -1), context.reshape(len(context), -1)], dim=1)


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
    """Gates and biases of all layers from one product each.

    Args:
        layers: whose parameters are put together.
    """

    def __init__(self, layers: Iterable[_ConcatSquash]) -> None:
        parts = [(layer.gate.weight, layer.gate.bias, layer.shift.weight, layer.linear.bias) for layer in layers]
        self.gate, self.offset, self.shift, self.bias = (torch.cat(kind) for kind in zip(*parts, strict=True))
        self.widths = [len(gate) for gate, *_ in parts]

    def __call__(
        self,
        condition: Tensor,  # (1 or B, c)
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:  # (1 or B, width) for each layer
        """Of each layer the gate g, and g b + B c, so that it is g ∘ W h plus that."""
        gate = functional.linear(condition, self.gate, self.offset).sigmoid()
        bias = functional.linear(condition, self.shift) + self.bias * gate
        return gate.split(self.widths, 1), bias.split(self.widths, 1)


class _BoundConcatSquash(BoundField):
    """The field bound for a solve: the parameters of its gates are put together at their first use, once."""

    def __init__(self, field: ConcatSquashMLP, context: Tensor | None) -> None:
        super().__init__(field, context)
        self._cached: _Gating | None = None

    def value_and_divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.field.value_and_divergence(t, x, self.context, self._gating())

    def value_divergence_and_products(self, t: Tensor, x: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.field.value_divergence_and_products(t, x, directions, self.context, self._gating())

    def _gating(self) -> _Gating:
        if self._cached is None:
            self._cached = _Gating(self.field.layers)
        return self._cached
