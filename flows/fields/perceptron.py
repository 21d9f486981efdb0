"""Base class of perceptrons with a closed-form divergence."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from flows.errors import InvalidValueError
from flows.fields.activations import Activation, Rescaled
from flows.fields.base import Field
from flows.fields.trace import PerceptronTrace, perceptron_products


class Linearised(NamedTuple):
    """v at some points, with its Jacobian diag(gate) W_out diag(a_L) W_L ··· diag(a_1) W_1."""

    value: Tensor  # (B, *event)
    weights: list[Tensor]  # W_1, ..., W_L, W_out
    slopes: list[Tensor]  # a_1, ..., a_L, (B, width) or (1, width) each
    gate: Tensor | None  # (B, d); None for ones
    trace: PerceptronTrace  # of these weights


class Folded(NamedTuple):
    """The layers of a perceptron, with the scales of its activations in their parameters."""

    weights: list[Tensor]  # W_1, ..., W_L, W_out
    biases: list[Tensor]
    activations: list[Activation]  # L of them
    stretches: list[float]  # that the arguments of the activations have, and 1 for the output


def folded(weights: Sequence[Tensor], biases: Sequence[Tensor], activations: Sequence[Activation]) -> Folded:
    """The same function by activations that cost less, see `Activation.rescaled`.

    The pre-activations are the old ones times `stretches`; what is added to them must be stretched as well. Only on
    CPUs, and not in low precision: there, differences of values between 0 and 1 cost digits.
    """
    device, dtype = weights[0].device.type, weights[0].dtype
    exact = device == "cpu" and dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(device)
    rescaled = [
        activation.rescaled() if exact and isinstance(activation, Activation) else Rescaled(activation)
        for activation in activations
    ]
    found = Folded([], [], [each.function for each in rescaled], [*(each.stretch for each in rescaled), 1.0])
    inputs = [(1.0, 0.0), *((each.scale, each.offset) for each in rescaled)]
    for weight, bias, stretch, (scale, offset) in zip(weights, biases, found.stretches, inputs, strict=True):
        bias = bias + offset * weight.sum(1) if offset else bias
        found.weights.append(weight if stretch * scale == 1 else (stretch * scale) * weight)
        found.biases.append(bias if stretch == 1 else stretch * bias)
    return found


def refresh(layers: Iterable[nn.Module]) -> None:
    """Let hooks that compute the weights of a layer at each call, such as those of pruning, compute them now.

    Whoever reads weights would see those of the last call otherwise.
    """
    for layer in layers:
        if layer._forward_pre_hooks:
            layer(next(layer.parameters()).new_zeros(1, cast(nn.Linear, layer).in_features))


class Perceptron(Field):
    """A perceptron, with its divergence and products with its Jacobian in closed form.

    Args:
        event_shape: shape of a point; it is flattened for the layers.
        hidden: widths of the hidden layers, at least one.
        context_shape: shape of the context; `None` for an unconditional field.
    """

    def __init__(
        self, event_shape: int | Sequence[int], hidden: Sequence[int], context_shape: int | Sequence[int] | None
    ) -> None:
        super().__init__(event_shape, context_shape)
        if not hidden or min(hidden) < 1:
            raise InvalidValueError(
                f"hidden must hold the width of at least one hidden layer, such as (128, 128), got {tuple(hidden)}"
            )
        self.hidden = tuple(hidden)

    @abstractmethod
    def precompute(self) -> Any:
        """What depends on the parameters alone; `linearised` takes it."""

    @abstractmethod
    def linearised(self, t: Tensor, x: Tensor, context: Tensor | None, precomputed: Any) -> Linearised:
        """v, and the factors of its Jacobian."""

    @abstractmethod
    def velocity(
        self, t: Tensor, x: Tensor, context: Tensor | None = None, precomputed: Callable[[], Any] | None = None
    ) -> Tensor:
        """v (B, *event), as `forward`, for many evaluations with what `precompute` returns."""

    def value_and_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None = None, precomputed: Callable[[], Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """v (B, *event) and div v (B,)."""
        found = self.linearised(t, x, context, (precomputed or self.precompute)())
        return found.value, found.trace(found.slopes, found.gate)

    def value_divergence_and_products(
        self,
        t: Tensor,
        x: Tensor,
        directions: Tensor,  # (P, B, *event)
        context: Tensor | None = None,
        precomputed: Callable[[], Any] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """v, div v, and the products J u (P, B, *event), each at the cost of one evaluation."""
        found = self.linearised(t, x, context, (precomputed or self.precompute)())
        products = perceptron_products(found.weights, found.slopes, directions)
        if found.gate is not None:
            products = found.gate.view(-1, *self.event_shape) * products
        return found.value, found.trace(found.slopes, found.gate), products
