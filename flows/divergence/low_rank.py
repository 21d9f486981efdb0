"""Estimators that sketch the range of the Jacobian: Hutch++ and XTrace."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flows.arguments import checked
from flows.divergence.autodiff import Mode, check_mode, linearise
from flows.divergence.base import DivergenceEstimator, FieldSample
from flows.divergence.exact import Exact
from flows.divergence.probes import Gaussian, Rademacher, Sphere
from flows.errors import InvalidValueError
from flows.vector_field import BoundField


@checked
@dataclass(frozen=True)
class HutchPlusPlus(DivergenceEstimator):
    r"""div v ≈ tr(QᵀJQ) + g_kᵀ P J P g_k with Q = orth(J S), P = I − QQᵀ, and m/3 columns in S and in G.

    Unbiased: whatever Q is, the mean of the second term over g is tr(PJ). That needs g to be independent of Q,
    which looks at S; so S (normal) and G (signs) are drawn apart, once a solve. Q follows from S at every
    evaluation, so the right-hand side stays smooth, and is a constant for autograd: for any constant Q the
    gradient is unbiased too, while the QR of a sketch without full rank, as of a field that starts at zero, has
    no derivative.

    The m/3 estimates share the first term, so that their spread gives the standard error given Q, whose square
    has the mean 2(‖sym(PJP)‖²_F − Σ (PJP)_ii²)/(m/3). Exact where rank J <= m/3. Use it where the singular values
    of J decay; on a flat spectrum `Hutchinson(num_probes=m)` has less noise.

    Cost: m products, and one QR of a (d, m/3) matrix for each sample. From m/3 >= d on the sketch would fill the
    space; then the estimates are the exact trace, at d products.

    Source: Meyer, Musco, Musco & Woodruff 2021, arXiv:2010.09649.

    Args:
        num_products: m, a multiple of 3; the standard error needs six.
        mode: `"reverse"` (which sketches Jᵀ, of the same trace) or `"forward"` Jacobian products.
        chunk_size: products in one vectorised call; `None`: 1 in reverse, 16 in forward mode.

    Example:
        ```python
        import torch

        from flows.divergence import HutchPlusPlus, divergence

        direction = torch.randn(50)
        f = lambda x: torch.sin(x @ direction)[:, None] * direction  # a Jacobian of rank one
        divergence(f, torch.randn(10, 50), estimator=HutchPlusPlus(num_products=6))  # exact up to rounding
        ```
    """

    num_products: int = 6
    mode: Mode = "reverse"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.num_products < 3 or self.num_products % 3:
            raise InvalidValueError(
                "num_products must be a multiple of 3 and >= 3 (a third each for the sketch, its trace and the rest), "
                f"got {self.num_products}; try {max(3, round(self.num_products / 3) * 3)}"
            )
        check_mode(self.mode, self.chunk_size)

    def draw_probes(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:  # (2K, B, *event): S, then G
        sketch = Gaussian().draw(self.num_estimates, x, generator)
        return torch.cat([sketch, Rademacher().draw(self.num_estimates, x, generator)])

    def __call__(self, t: Tensor, x: Tensor, probes: Tensor) -> FieldSample:
        if self.is_exact:
            exact = Exact(self.mode, self.chunk_size).bind(self.field)(t, x)
            return FieldSample(exact.value, exact.estimates.expand(self.num_estimates, -1))
        value, products = linearise(self.field, t, x, self.mode, self.chunk_size)
        sketch, rest = probes.chunk(2)
        with torch.no_grad():
            basis = torch.linalg.qr(to_columns(products(sketch)))[0]  # (B, d, K)
            rest = to_columns(rest)
            rest = to_vectors(rest - basis @ (basis.mT @ rest), x)
            directions = torch.cat([to_vectors(basis, x), rest])
        traces, residuals = (products(directions) * directions).flatten(2).sum(2).chunk(2)  # (K, B) each
        return FieldSample(value, traces.sum(0) + residuals)

    @property
    def num_estimates(self) -> int:
        return self.num_products // 3

    @property
    def cost(self) -> int:
        return self.field.dimension if self.is_exact else self.num_products

    def with_budget(self, num_products: int, field: BoundField) -> HutchPlusPlus:
        dimension = field.dimension
        if num_products >= dimension:
            return replace(self, num_products=3 * dimension)  # exact at d products
        return replace(self, num_products=max(3, num_products - num_products % 3))

    @property
    def is_exact(self) -> bool:
        return self.num_estimates >= self.field.dimension


@checked
@dataclass(frozen=True)
class XTrace(DivergenceEstimator):
    r"""div v ≈ mean_i [tr(Q_iᵀ J Q_i) + (d − k + 1) ρ_iᵀ J ρ_i / ‖ρ_i‖²], k = m/2 leave-one-out estimates.

    Q_i = orth(J ω_j, j ≠ i) and ρ_i = (I − Q_i Q_iᵀ) ω_i with ω uniform on a sphere. As ω_i is independent of
    Q_i, the direction of ρ_i is uniform in the d − k + 1 dimensions that Q_i leaves: each estimate is unbiased,
    and so is its gradient with Q_i taken for a constant. All of it follows from the 2k products J ω and J Q with
    one QR and one triangular solve for each sample.

    The k estimates are exchangeable, and their spread/√k, which `standard_error` returns, is the paper's
    error estimate. As they are correlated it is somewhat optimistic: its mean square was 0.6 to 1 times the
    variance for spectra decaying by 0.2 to 0.8 a step, and less on flat ones. Exact where rank J <= k − 1.
    Beats `HutchPlusPlus` where the singular values of J decay; on a flat spectrum nothing is gained.

    Cost: m products. From k >= d on the sketch fills the space; then the estimates are the exact trace, at d
    products. The probes are drawn once a solve, and Q follows from them at every evaluation.

    Source: Epperly, Tropp & Webber 2024, arXiv:2301.07825.

    Args:
        num_products: m, even, >= 4.
        mode: `"reverse"` (which sketches Jᵀ, of the same trace) or `"forward"` Jacobian products.
        chunk_size: products in one vectorised call; `None`: 1 in reverse, 16 in forward mode.

    Example:
        ```python
        import torch

        from flows.divergence import XTrace, divergence

        divergence(torch.tanh, torch.randn(10, 50), estimator=XTrace(num_products=12))
        ```
    """

    num_products: int = 6
    mode: Mode = "reverse"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.num_products < 4 or self.num_products % 2:
            raise InvalidValueError(
                "num_products must be even and >= 4 (half for the sketch, half for its trace, and one test vector "
                f"to leave out), got {self.num_products}; try {max(4, self.num_products + self.num_products % 2)}"
            )
        check_mode(self.mode, self.chunk_size)

    def draw_probes(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:  # (k, B, *event)
        return Sphere().draw(self.num_estimates, x, generator)

    def __call__(self, t: Tensor, x: Tensor, probes: Tensor) -> FieldSample:
        if self.is_exact:
            exact = Exact(self.mode, self.chunk_size).bind(self.field)(t, x)
            return FieldSample(exact.value, exact.estimates.expand(self.num_estimates, -1))
        value, products = linearise(self.field, t, x, self.mode, self.chunk_size)
        omega = to_columns(probes)  # (B, d, k)
        sketch = to_columns(products(probes))
        with torch.no_grad():
            basis, triangle = torch.linalg.qr(sketch)  # (B, d, k), (B, k, k)
            left_out = left_out_directions(triangle)  # column i is s_i: Q_i Q_iᵀ = Q (I − s_i s_iᵀ) Qᵀ
            inner = basis.mT @ omega
            inner = inner - left_out * (left_out * inner).sum(-2, keepdim=True)
            rest = omega - basis @ inner  # ρ_i
            left = self.field.dimension - self.num_estimates + 1
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

    @property
    def cost(self) -> int:
        return self.field.dimension if self.is_exact else self.num_products

    def with_budget(self, num_products: int, field: BoundField) -> XTrace:
        dimension = field.dimension
        if num_products >= dimension:
            return replace(self, num_products=max(4, 2 * dimension))  # exact at d products
        return replace(self, num_products=max(4, num_products - num_products % 2))

    @property
    def is_exact(self) -> bool:
        return self.num_estimates >= self.field.dimension


def to_columns(
    vectors: Tensor,  # (k, B, *event)
) -> Tensor:  # (B, d, k)
    """Stacked vectors as the columns of one matrix a sample."""
    return vectors.flatten(2).permute(1, 2, 0)


def to_vectors(
    columns: Tensor,  # (B, d, k)
    x: Tensor,  # (B, *event)
) -> Tensor:  # (k, B, *event)
    """The columns as vectors shaped like `x`."""
    return columns.permute(2, 0, 1).reshape(-1, *x.shape)


def left_out_directions(
    triangle: Tensor,  # (B, k, k), R of Y = QR
) -> Tensor:  # (B, k, k)
    r"""Column i: the unit vector s_i with s_i ⟂ R e_j for all j ≠ i, so that Q(I − s_i s_iᵀ)Qᵀ projects on the
    range of Y without its column i.

    s_i is R^{−T} e_i, normalised. Diagonal entries of R below rounding are lifted to it, which moves s_iᵀ R e_j
    from 0 by rounding only: a sketch of any rank, even zero, gives finite unit vectors. [Epperly, Tropp & Webber
    2024, arXiv:2301.07825, section 2.2]
    """
    scale = triangle.abs().amax((-2, -1), keepdim=True)
    triangle = triangle / torch.where(scale > 0, scale, 1)
    floor = torch.finfo(triangle.dtype).eps * triangle.shape[-1]
    diagonal = triangle.diagonal(dim1=-2, dim2=-1)
    lifted = torch.where(diagonal.abs() < floor, floor, diagonal)
    triangle = triangle + torch.diag_embed(lifted - diagonal)
    identity = torch.eye(triangle.shape[-1], dtype=triangle.dtype, device=triangle.device)
    inverse = torch.linalg.solve_triangular(triangle.mT, identity.expand_as(triangle), upper=False)
    return inverse / torch.linalg.vector_norm(inverse, dim=-2, keepdim=True)
