"""XTrace: every test vector sketches for the others and measures what the others' sketch leaves."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flows.divergence.base import DivergenceEstimator, FieldSample, VectorField
from flows.divergence.exact import Exact
from flows.divergence.probes import Sphere
from flows.divergence.products import Mode, check_mode, linearise
from flows.divergence.sketch import left_out_directions, to_columns, to_vectors


@dataclass(frozen=True)
class XTrace(DivergenceEstimator):
    r"""div v ≈ mean_i [tr(Q_iᵀ J Q_i) + (d − k + 1) ρ_iᵀ J ρ_i / ‖ρ_i‖²], k = m/2 leave-one-out estimates.

    Q_i = orth(J ω_j, j ≠ i) and ρ_i = (I − Q_i Q_iᵀ) ω_i with ω uniform on a sphere. As ω_i is independent of
    Q_i, the direction of ρ_i is uniform in the d − k + 1 dimensions that Q_i leaves: each estimate is unbiased,
    and so is its gradient with Q_i taken for a constant. All of it follows from the 2k products J ω and J Q with
    one QR and one triangular solve for each sample.

    The k estimates are exchangeable, and their spread/√k, which :meth:`standard_error` returns, is the paper's
    error estimate. As they are correlated it is somewhat optimistic: its mean square was 0.6 to 1 times the
    variance for spectra decaying by 0.2 to 0.8 a step, and less on flat ones. Exact where rank J <= k − 1.
    Beats :class:`HutchPlusPlus` where the singular values of J decay; on a flat spectrum nothing is gained.

    Cost: m products. From k >= d on the sketch fills the space; then the estimates are the exact trace, at d
    products. The probes are drawn once a solve, and Q follows from them at every evaluation.

    Source: Epperly, Tropp & Webber 2024, arXiv:2301.07825.

    Args:
        num_products: m, even, >= 4.
        mode: ``"reverse"`` (which sketches Jᵀ, of the same trace) or ``"forward"`` Jacobian products.
        chunk_size: products in one vectorised call; ``None``: 1 in reverse, 16 in forward mode.
    """

    num_products: int = 6
    mode: Mode = "reverse"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.num_products < 4 or self.num_products % 2:
            raise ValueError(
                "num_products must be even and >= 4 (half for the sketch, half for its trace, and one test vector "
                f"to leave out), got {self.num_products}; try {max(4, self.num_products + self.num_products % 2)}"
            )
        check_mode(self.mode, self.chunk_size)

    def draw_probes(
        self, x: Tensor, generator: torch.Generator | None = None, field: object | None = None
    ) -> Tensor:  # (k, B, *event)
        return Sphere().draw(self.num_estimates, x, generator)

    def __call__(self, field: VectorField, t: Tensor, x: Tensor, probes: Tensor) -> FieldSample:
        if self.is_exact(x.shape[1:]):
            exact = Exact(self.mode, self.chunk_size)(field, t, x)
            return FieldSample(exact.value, exact.estimates.expand(self.num_estimates, -1))
        value, products = linearise(field, t, x, self.mode, self.chunk_size)
        omega = to_columns(probes)  # (B, d, k)
        sketch = to_columns(products(probes))
        with torch.no_grad():
            basis, triangle = torch.linalg.qr(sketch)  # (B, d, k), (B, k, k)
            left_out = left_out_directions(triangle)  # column i is s_i: Q_i Q_iᵀ = Q (I − s_i s_iᵀ) Qᵀ
            inner = basis.mT @ omega
            inner = inner - left_out * (left_out * inner).sum(-2, keepdim=True)
            rest = omega - basis @ inner  # ρ_i
            left = math.prod(x.shape[1:]) - self.num_estimates + 1
            weight = left / rest.square().sum(-2)  # (B, k)
        images = to_columns(products(to_vectors(basis, x)))  # J Q
        small = basis.mT @ images  # QᵀJQ
        traces = small.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
        traces = traces - (left_out * (small @ left_out)).sum(-2)  # tr(Q_iᵀ J Q_i)
        residuals = weight * (rest * (sketch - images @ inner)).sum(-2)  # J ρ_i = J ω_i − J Q (Qᵀω_i)
        return FieldSample(value, (traces + residuals).T)

    @property
    def num_estimates(self) -> int:
        return self.num_products // 2

    def cost(self, event_shape: tuple[int, ...], field: object | None = None) -> int:
        return math.prod(event_shape) if self.is_exact(event_shape) else self.num_products

    def with_budget(self, num_products: int, event_shape: tuple[int, ...], field: object | None = None) -> XTrace:
        dimension = math.prod(event_shape)
        if num_products >= dimension:
            return replace(self, num_products=max(4, 2 * dimension))  # exact at d products
        return replace(self, num_products=max(4, num_products - num_products % 2))

    def is_exact(self, event_shape: tuple[int, ...], field: object | None = None) -> bool:
        return self.num_estimates >= math.prod(event_shape)
