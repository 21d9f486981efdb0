"""The gradient field of a potential."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from flows.arguments import checked
from flows.checks import whole_number
from flows.errors import InvalidValueError
from flows.fields.base import Field
from flows.fields.time import SinusoidalTime

MAX_LAYERS = 1000


@checked
class Potential(Field):
    r"""v(t, x) = −∇ₓΦ(s) with s = (x, τ(t), context) and Φ(s) = wᵀN(s) + ½ ‖A s‖² + bᵀs.

    A gradient field is what optimal transport between densities looks like. τ are sinusoidal features of time and
    N is a residual network of L layers with σ(z) = log(eᶻ + e⁻ᶻ), whose slope is σ′ = tanh; with ε = 1/(L − 1),

        u₀ = σ(K₀ s + b₀),   u_l = u_{l−1} + ε σ(K_l u_{l−1} + b_l),   N = u_{L−1}.

    Gradient: p_l = ∂(wᵀN)/∂u_l runs backwards from p_{L−1} = w by p_{l−1} = p_l + ε K_lᵀ(a_l ∘ p_l) with the slopes
    a_l = tanh(K_l u_{l−1} + b_l), and ∇ₛ wᵀN = K₀ᵀ(a₀ ∘ p₀).

    Hessian: differentiating wᵀN twice, each layer adds one term, its curvature σ″ = 1 − a² weighted by p_l and
    the squared slopes of what enters it, so that with the Jacobian J_l = ∂u_l/∂x and K₀ₓ the columns of K₀ for x

        tr ∇ₓ² wᵀN = Σ_h ((1 − a₀²) ∘ p₀)_h ‖(K₀ₓ)_h‖² + ε Σ_{l≥1} Σ_h ((1 − a_l²) ∘ p_l)_h ‖(K_l J_{l−1})_h‖²,

    and −div v is this plus ‖Aₓ‖²_F. Everything is in closed form: no autograd in an evaluation. Source: OT-Flow,
    Onken et al. 2021, arXiv:2006.00104; there τ(t) = t.

    Cost of the divergence, a sample: free with one layer; (L − 1) min(d, 2m) m² multiplications with more, for m
    the width, beside the 2 (L − 1) m² + 2 d m of an evaluation.

    Args:
        event_shape: shape of a point; it is flattened.
        width: m.
        num_layers: L >= 1; the first is not residual. OT-Flow has two.
        rank: rows of A, at most the size of s; 0 leaves the quadratic term out.
        num_frequencies: of the time features; see `SinusoidalTime`.
        context_shape: shape of the context, `None` for an unconditional field.

    Example:
        ```python
        import flows
        from flows.path_costs import HamiltonJacobi, KineticEnergy

        flow = flows.CNF(flows.fields.Potential((2,), width=32))  # the field of OT-Flow
        objective = flows.objectives.MaximumLikelihood([KineticEnergy(0.1), HamiltonJacobi(0.1)])
        ```
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        width: int = 128,
        num_layers: int = 2,
        rank: int = 10,
        num_frequencies: int = 8,
        context_shape: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__(event_shape, context_shape)
        whole_number("num_layers", num_layers, at_most=MAX_LAYERS)
        if width < 1 or num_layers < 1 or rank < 0:
            raise InvalidValueError(
                f"width and num_layers must be >= 1 and rank >= 0, got width {width}, num_layers {num_layers} and "
                f"rank {rank}"
            )
        self.dimension = math.prod(self.event_shape)
        self.time = SinusoidalTime(num_frequencies)
        size = self.dimension + self.time.num_features + self.num_context_features
        self.first = nn.Linear(size, width)
        layers = [nn.Linear(width, width) for _ in range(num_layers - 1)]
        self.layers = nn.ModuleList(layers)
        with torch.no_grad():  # σ bends at the scale of the data: tanh of much less would be linear
            x_columns, other_columns = self.first.weight.split([self.dimension, size - self.dimension], dim=1)
            x_columns.normal_(std=2 / math.sqrt(self.dimension))
            other_columns.normal_(std=1 / math.sqrt(size - self.dimension))
            self.first.bias.uniform_(-1, 1)
            for layer in layers:
                layer.weight.mul_(2)
        self.step = 1 / max(1, num_layers - 1)
        self.weight = nn.Parameter(torch.randn(width) * (0.2 / math.sqrt(width)))
        self.quadratic = nn.Parameter(torch.randn(min(rank, size), size) * (0.1 / math.sqrt(size)))
        self.linear = nn.Parameter(torch.zeros(size))

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        s = self._join(t, x, context)
        return self._velocity(s, *self._passes(s)).view_as(x)

    def value_and_divergence(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """v (B, *event) and div v (B,)."""
        s = self._join(t, x, context)
        slopes, adjoints = self._passes(s)
        trace = self._hessian_trace(slopes, adjoints) + self.quadratic[:, : self.dimension].square().sum()
        return self._velocity(s, slopes, adjoints).view_as(x), -trace

    @property
    def divergence_cost(self) -> int:
        """The columns of the Jacobians that go through the layers, half of a backward pass each."""
        if not self.layers:
            return 0
        return math.ceil(min(self.dimension, len(self.first.weight)) * 0.5)

    def potential(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:  # (B,)
        """Φ, up to a constant."""
        s = self._join(t, x, context)
        u = _antiderivative(self.first(s))
        for layer in self.layers:
            u = u + self.step * _antiderivative(layer(u))
        return u @ self.weight + (s @ self.quadratic.T).square().sum(1) / 2 + s @ self.linear

    def _join(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:  # (B, size of s)
        self.check_context(context)
        parts = [x.flatten(1), self.time(t).expand(x.shape[0], -1)]
        return torch.cat(parts if context is None else [*parts, context.reshape(context.shape[0], -1)], dim=1)

    def _passes(self, s: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """a_l and p_l of every layer, (B, m) each."""
        z = self.first(s)
        slopes = [z.tanh()]
        u, step = 0, 1
        for layer in self.layers:
            u = u + step * _antiderivative(z)
            z, step = layer(u), self.step
            slopes.append(z.tanh())
        adjoints = [self.weight.expand_as(z)]
        for layer, slope in zip(reversed(self.layers), reversed(slopes[1:]), strict=True):
            adjoints.append(torch.add(adjoints[-1], (slope * adjoints[-1]) @ layer.weight, alpha=self.step))
        return slopes, adjoints[::-1]

    def _velocity(self, s: Tensor, slopes: list[Tensor], adjoints: list[Tensor]) -> Tensor:  # (B, d)
        d = self.dimension
        gradient = torch.addmm(self.linear[:d], slopes[0] * adjoints[0], self.first.weight[:, :d])
        return -torch.addmm(gradient, s @ self.quadratic.T, self.quadratic[:, :d])

    def _hessian_trace(self, slopes: list[Tensor], adjoints: list[Tensor]) -> Tensor:  # (B,)
        curvatures = [(1 - slope.square()) * adjoint for slope, adjoint in zip(slopes, adjoints, strict=True)]
        first = self.first.weight[:, : self.dimension]
        trace = curvatures[0] @ first.square().sum(1)
        if not self.layers:
            return trace
        # The Jacobians need d columns, or, where x is wide, m: their row norms follow from the Gram matrix of K₀ₓ.
        gram = first @ first.T if self.dimension > 2 * len(first) else None
        start = first.T if gram is None else torch.eye(len(first), dtype=first.dtype, device=first.device)
        jacobian = slopes[0].unsqueeze(1) * start  # (B, d or m, m), transposed
        layers = cast(Iterable[nn.Linear], self.layers)
        for layer, slope, curvature in zip(layers, slopes[1:], curvatures[1:], strict=True):
            inner = functional.linear(jacobian, layer.weight)
            squares = inner.square() if gram is None else inner * (gram @ inner)
            trace = trace + self.step * (curvature * squares.sum(1)).sum(1)
            jacobian = torch.addcmul(jacobian, slope.unsqueeze(1), inner, value=self.step)
        return trace


def _antiderivative(z: Tensor) -> Tensor:
    """log(eᶻ + e⁻ᶻ), without overflow."""
    return z.abs() + torch.log1p(torch.exp(-2 * z.abs()))
