"""The trace of the Jacobian, one diagonal entry at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flows.arguments import checked
from flows.divergence.autodiff import Mode, Products, check_mode, linearise, products_per_call
from flows.divergence.base import DivergenceEstimator, FieldSample


@checked
@dataclass(frozen=True)
class Exact(DivergenceEstimator):
    r"""div v = Σᵢ eᵢᵀ J eᵢ with d = dim(event) Jacobian products, for any field.

    Cost: d products. The d × d Jacobian is never held, only `chunk_size` rows (or columns) at a time. Prefer `Analytic`
    where the field knows its divergence.

    Args:
        mode: `"reverse"` (vector-Jacobian) or `"forward"` (Jacobian-vector) products.
        chunk_size: products in one vectorised call; memory grows with it. `None`: 1 in reverse, 16 in forward mode.

    Example:
        ```python
        import torch

        from flows.divergence import Exact, divergence

        x = torch.randn(10, 3)
        torch.testing.assert_close(divergence(torch.sin, x, estimator=Exact()), x.cos().sum(1))
        ```
    """

    mode: Mode = "reverse"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        check_mode(self.mode, self.chunk_size)

    def __call__(self, t: Tensor, x: Tensor, probes: Tensor | None = None) -> FieldSample:
        value, products = linearise(self.field, t, x, self.mode, self.chunk_size)
        trace = basis_trace(products, x, products_per_call(self.mode, self.chunk_size))
        return FieldSample(value, trace.unsqueeze(0))

    def with_jacobian_norm(self, t: Tensor, x: Tensor, probes: Tensor | None, directions: Tensor) -> FieldSample:
        """‖J‖²_F, exactly and for free, from the rows of J that the trace takes."""
        value, products = linearise(self.field, t, x, self.mode, self.chunk_size)
        trace, norm = x.new_zeros(len(x)), x.new_zeros(len(x))
        for entries, rows in _basis_products(products, x, products_per_call(self.mode, self.chunk_size)):
            trace, norm = trace + entries.sum(0), norm + rows.square().sum((0, 2))
        return FieldSample(value, trace.unsqueeze(0), norm)

    @property
    def cost(self) -> int:
        return self.field.dimension

    @property
    def is_exact(self) -> bool:
        return True


def basis_trace(
    products: Products,
    x: Tensor,  # (B, *event); gives shape, dtype and device
    chunk_size: int,
) -> Tensor:  # (B,)
    """The trace of the matrix behind `products`, by one product with each basis vector."""
    trace = x.new_zeros(len(x))
    for entries, _ in _basis_products(products, x, chunk_size):
        trace = trace + entries.sum(0)
    return trace


def _basis_products(products: Products, x: Tensor, chunk_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Diagonal entries (n, B) and products (n, B, d) of the basis vectors, n vectors at a time."""
    event_shape = x.shape[1:]
    dimension = math.prod(event_shape)
    for start in range(0, dimension, chunk_size):
        coordinates = torch.arange(start, min(start + chunk_size, dimension), device=x.device)
        directions = torch.zeros(len(coordinates), dimension, dtype=x.dtype, device=x.device)
        directions[torch.arange(len(coordinates), device=x.device), coordinates] = 1
        directions = directions.view(-1, 1, *event_shape).expand(-1, *x.shape)
        rows = products(directions).flatten(2)  # (n, B, d)
        yield rows.gather(2, coordinates.view(-1, 1, 1).expand(-1, len(x), 1)).squeeze(2), rows
