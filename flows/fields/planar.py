"""The mixture of planar flows in continuous time."""

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


@checked
class Planar(Field):
    r"""v(t, x) = Σ_n g_n(t) u_n(t) σ(w_n(t)ᵀx + b_n(t)),  div v = Σ_n g_n(t) w_n(t)ᵀu_n(t) σ′(w_n(t)ᵀx + b_n(t)).

    Each unit moves points along u_n, so its Jacobian g σ′ u wᵀ has rank one and the trace g σ′ wᵀu: the divergence
    of N units costs as little as one layer, where a discrete planar flow takes one unit at a time. Gates
    g = sigmoid(·) of time switch units on and off; with `hypernetwork` u, w and b move with time as well.
    [Chen et al. 2018, arXiv:1806.07366, section 4]

    Args:
        event_shape: shape of a point; it is flattened.
        num_units: N.
        hypernetwork: whether u, w and b depend on time (and the context), by an addend of a small network; if
            not, the gates alone do. With a batch of times every sample then has weights of its own, 2 N d numbers.
        activation: σ, an `Activation` or its lower-case name.
        num_frequencies: of the time features; see `SinusoidalTime`.
        context_shape: shape of the context, `None` for an unconditional field.

    Example:
        ```python
        import flows

        flow = flows.CNF(flows.fields.Planar((2,), num_units=32))  # the field of the first paper on neural ODEs
        ```
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        num_units: int = 64,
        hypernetwork: bool = True,
        activation: Activation | str = "tanh",
        num_frequencies: int = 8,
        context_shape: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__(event_shape, context_shape)
        if num_units < 1:
            raise InvalidValueError(f"num_units must be >= 1, got {num_units}")
        n, d = num_units, math.prod(self.event_shape)
        self.directions = nn.Parameter(torch.randn(n, d) / math.sqrt(n))  # u
        self.weights = nn.Parameter(torch.randn(n, d) * (2 / math.sqrt(d)))  # w
        self.biases = nn.Parameter(2 * torch.rand(n) - 1)  # b
        self.hypernetwork = hypernetwork
        self.activation = by_name(Activation, activation, "activation")
        sizes = [n, n, n * d, n * d] if hypernetwork else [n]
        self.modulation = Modulation(sizes, context_shape, num_frequencies)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        gate, bias, weights, directions = self._units(t, context)
        z = _product(weights, x.flatten(1)) + bias
        return _product(directions.mT, self.activation(z) * gate).view_as(x)

    def value_and_divergence(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """v (B, *event) and div v (B,)."""
        gate, bias, weights, directions = self._units(t, context)
        h, slope = self.activation.value_and_slope(_product(weights, x.flatten(1)) + bias)
        divergence = (slope * (gate * (weights * directions).sum(-1))).sum(-1)
        return _product(directions.mT, h * gate).view_as(x), divergence

    def _units(self, t: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """g and b (1 or B, N), w and u (1 or B, N, d)."""
        self.check_context(context)
        gate, *moves = self.modulation(t, context)
        if not self.hypernetwork:
            return gate.sigmoid(), self.biases, self.weights.unsqueeze(0), self.directions.unsqueeze(0)
        bias, weights, directions = moves
        return (
            gate.sigmoid(),
            self.biases + bias,
            self.weights + weights.unflatten(1, self.weights.shape),
            self.directions + directions.unflatten(1, self.directions.shape),
        )


def _product(
    matrices: Tensor,  # (1 or B, n, k)
    vectors: Tensor,  # (B, k)
) -> Tensor:  # (B, n)
    if len(matrices) == 1:
        return vectors @ matrices[0].T
    return (matrices @ vectors.unsqueeze(-1)).squeeze(-1)
