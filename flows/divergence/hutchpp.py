"""Hutch++: the exact trace on a sketched subspace, Hutchinson's estimator on the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flows.divergence.base import DivergenceEstimator, FieldSample, VectorField
from flows.divergence.exact import Exact
from flows.divergence.probes import Gaussian, Rademacher
from flows.divergence.products import Mode, check_mode, linearise
from flows.divergence.sketch import to_columns, to_vectors


@dataclass(frozen=True)
class HutchPlusPlus(DivergenceEstimator):
    r"""div v ≈ tr(QᵀJQ) + g_kᵀ P J P g_k with Q = orth(J S), P = I − QQᵀ, and m/3 columns in S and in G.

    Unbiased: whatever Q is, the mean of the second term over g is tr(PJ). That needs g to be independent of Q,
    which looks at S; so S (normal) and G (signs) are drawn apart, once a solve. Q follows from S at every
    evaluation, so the right-hand side stays smooth, and is a constant for autograd: for any constant Q the
    gradient is unbiased too, while the QR of a sketch without full rank, as of a field that starts at zero, has
    no derivative.

    The m/3 estimates share the first term, so that their spread gives the standard error given Q, whose square
    has the mean 2(‖sym(PJP)‖²_F − Σ (PJP)_ii²)/(m/3). Exact where rank J <= m/3. Pays where the singular values
    of J decay; on a flat spectrum ``Hutchinson(num_probes=m)`` has less noise.

    Cost: m products, and one QR of a (d, m/3) matrix for each sample. From m/3 >= d on the sketch would fill the
    space; then the estimates are the exact trace, at d products.

    Source: Meyer, Musco, Musco & Woodruff 2021, arXiv:2010.09649.

    Args:
        num_products: m, a multiple of 3; the standard error needs six.
        mode: ``"reverse"`` (which sketches Jᵀ, of the same trace) or ``"forward"`` Jacobian products.
        chunk_size: products in one vectorised call; ``None``: 1 in reverse, 16 in forward mode.
    """

    num_products: int = 6
    mode: Mode = "reverse"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.num_products < 3 or self.num_products % 3:
            raise ValueError(
                "num_products must be a multiple of 3 and >= 3 (a third each for the sketch, its trace and the rest), "
                f"got {self.num_products}; try {max(3, round(self.num_products / 3) * 3)}"
            )
        check_mode(self.mode, self.chunk_size)

    def draw_probes(
        self, x: Tensor, generator: torch.Generator | None = None, field: object | None = None
    ) -> Tensor:  # (2K, B, *event): S, then G
        sketch = Gaussian().draw(self.num_estimates, x, generator)
        return torch.cat([sketch, Rademacher().draw(self.num_estimates, x, generator)])

    def __call__(self, field: VectorField, t: Tensor, x: Tensor, probes: Tensor) -> FieldSample:
        if self.is_exact(x.shape[1:]):
            exact = Exact(self.mode, self.chunk_size)(field, t, x)
            return FieldSample(exact.value, exact.estimates.expand(self.num_estimates, -1))
        value, products = linearise(field, t, x, self.mode, self.chunk_size)
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

    def cost(self, event_shape: tuple[int, ...], field: object | None = None) -> int:
        return math.prod(event_shape) if self.is_exact(event_shape) else self.num_products

    def with_budget(
        self, num_products: int, event_shape: tuple[int, ...], field: object | None = None
    ) -> HutchPlusPlus:
        dimension = math.prod(event_shape)
        if num_products >= dimension:
            return replace(self, num_products=3 * dimension)  # exact at d products
        return replace(self, num_products=max(3, num_products - num_products % 3))

    def is_exact(self, event_shape: tuple[int, ...], field: object | None = None) -> bool:
        return self.num_estimates >= math.prod(event_shape)
