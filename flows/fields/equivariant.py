"""A field for systems of identical particles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flows.arguments import checked
from flows.checks import check_number, whole_number
from flows.errors import InvalidValueError
from flows.fields.base import Field
from flows.fields.modulation import Modulation


@checked
class EquivariantKernel(Field):
    r"""v_i(t, x) = (1/N) Σ_{j≠i} r_ij φ(ρ_ij, t) on N particles in D dimensions, with r_ij = x_i − x_j.

    ρ = √(‖r‖² + δ²) is the distance, softened by δ so that the field is smooth where particles meet, and φ is
    expanded in a constant and K Gaussians of ρ with weights that depend on time (and the context),

        φ(ρ, t) = c_0(t) + Σ_k c_k(t) exp(−(ρ − μ_k)² / 2γ_k²).

    Distances are all it knows, so v commutes with permutations of the particles, rotations and reflections, and
    does not change under translations. As r_ij = −r_ji, velocities sum to zero: the centre of mass stays where
    the base put it, N(0, I/N), and data should be given such a centre.

    Divergence: each pair adds twice the divergence of r ↦ r φ(ρ), with ∂ρ/∂r = r/ρ,

        div v = (2/N) Σ_{i<j} (D φ(ρ_ij) + φ′(ρ_ij) ‖r_ij‖² / ρ_ij).

    Its cost beside the velocity is that of φ′, which shares the exponentials. Source: Köhler et al. 2020,
    "Equivariant flows", arXiv:2006.02425; the softening is ours.

    Args:
        event_shape: (N, D) with N >= 2.
        num_kernels: K; their centres μ start evenly spaced from 0 to `max_distance`, their widths γ at the spacing.
            Both are learned.
        max_distance: the largest distance to resolve; beyond it only the constant acts.
        softening: δ > 0, small against the distances between particles.
        num_frequencies: of the time features; see `SinusoidalTime`.
        context_shape: shape of the context, `None` for an unconditional field; equivariance needs a context that
            does not depend on the frame, such as a temperature.

    Example:
        ```python
        import torch

        import flows

        field = flows.fields.EquivariantKernel((4, 2))  # four particles in the plane
        x = torch.randn(10, 4, 2)
        swapped = field(torch.tensor(0.5), x.flip(1)).flip(1)
        torch.testing.assert_close(swapped, field(torch.tensor(0.5), x))
        ```
    """

    pairs: Tensor  # (2, P), the indices i < j of every pair

    def __init__(
        self,
        event_shape: int | Sequence[int],
        num_kernels: int = 32,
        max_distance: float = 6.0,
        softening: float = 0.01,
        num_frequencies: int = 8,
        context_shape: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__(event_shape, context_shape)
        if len(self.event_shape) != 2 or self.event_shape[0] < 2:
            raise InvalidValueError(
                f"event_shape must be (particles, dimensions) with at least two particles, such as (13, 3), "
                f"got {self.event_shape}"
            )
        check_number("max_distance", max_distance, above=0)
        check_number("softening", softening, above=0)
        whole_number("num_kernels", num_kernels, 2)
        self.softening = softening
        self.centres = nn.Parameter(torch.linspace(0, max_distance, num_kernels))
        self.log_widths = nn.Parameter((self.centres[1] - self.centres[0]).log().detach().repeat(num_kernels))
        self.modulation = Modulation([1, num_kernels], context_shape, num_frequencies)
        pairs = torch.triu_indices(self.event_shape[0], self.event_shape[0], offset=1)
        self.register_buffer("pairs", pairs, persistent=False)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        constant, weights = self._weights(t, context)
        r, distance, _ = self._distances(x)
        gaussians, _ = self._gaussians(distance)
        return self._velocity(x, r, constant + _combine(gaussians, weights))

    def value_and_divergence(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """v (B, N, D) and div v (B,)."""
        constant, weights = self._weights(t, context)
        r, distance, squared = self._distances(x)
        gaussians, scaled = self._gaussians(distance)
        kernel = constant + _combine(gaussians, weights)  # (B, P), φ
        slope = -_combine(gaussians * scaled, weights * self.log_widths.neg().exp())  # (B, P), φ′
        particles, dimensions = self.event_shape
        divergence = (dimensions * kernel + slope * squared / distance).sum(1) * (2 / particles)
        return self._velocity(x, r, kernel), divergence

    def _weights(self, t: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:  # c_0 (1 or B, 1), c (1 or B, K)
        self.check_context(context)
        return self.modulation(t, context)

    def _distances(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """r (B, P, D), ρ (B, P) and ‖r‖² (B, P) for every pair i < j."""
        r = x[:, self.pairs[0]] - x[:, self.pairs[1]]
        squared = r.square().sum(-1)
        return r, (squared + self.softening**2).sqrt(), squared

    def _gaussians(self, distance: Tensor) -> tuple[Tensor, Tensor]:
        """The Gaussians (B, P, K), and (ρ − μ)/γ."""
        scaled = (distance.unsqueeze(-1) - self.centres) * self.log_widths.neg().exp()
        return (-0.5 * scaled.square()).exp(), scaled

    def _velocity(self, x: Tensor, r: Tensor, kernel: Tensor) -> Tensor:  # (B, N, D)
        force = r * (kernel / self.event_shape[0]).unsqueeze(-1)
        return torch.zeros_like(x).index_add(1, self.pairs[0], force).index_add(1, self.pairs[1], -force)


def _combine(
    features: Tensor,  # (B, P, K)
    weights: Tensor,  # (1 or B, K)
) -> Tensor:  # (B, P)
    return features @ weights[0] if len(weights) == 1 else (features @ weights.unsqueeze(-1)).squeeze(-1)
