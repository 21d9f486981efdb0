"""The trace of the Jacobian, one diagonal entry at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flows.divergence.base import DivergenceEstimator, FieldSample, VectorField
from flows.divergence.products import Mode, Products, check_mode, linearise, products_per_call


@dataclass(frozen=True)
class Exact(DivergenceEstimator):
    r"""div v = Σᵢ eᵢᵀ J eᵢ with d = dim(event) Jacobian products, for any field.

    Cost: d products; the d × d Jacobian is never held, only ``chunk_size`` rows (or columns) at a time.
    Prefer :class:`Analytic` where the field knows its divergence.

    Args:
        mode: ``"reverse"`` (vector-Jacobian) or ``"forward"`` (Jacobian-vector) products.
        chunk_size: products in one vectorised call; memory grows with it. ``None``: 1 in reverse, 16 in forward mode.
    """

    mode: Mode = "reverse"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        check_mode(self.mode, self.chunk_size)

    def draw_probes(self, x: Tensor, generator: torch.Generator | None = None, field: object | None = None) -> None:
        return None

    def __call__(self, field: VectorField, t: Tensor, x: Tensor, probes: Tensor | None = None) -> FieldSample:
        value, products = linearise(field, t, x, self.mode, self.chunk_size)
        trace = basis_trace(products, x, products_per_call(self.mode, self.chunk_size))
        return FieldSample(value, trace.unsqueeze(0))

    def cost(self, event_shape: tuple[int, ...], field: object | None = None) -> int:
        return math.prod(event_shape)

    def is_exact(self, event_shape: tuple[int, ...], field: object | None = None) -> bool:
        return True


def basis_trace(
    products: Products,
    x: Tensor,  # (B, *event); gives shape, dtype and device
    chunk_size: int,
) -> Tensor:  # (B,)
    """The trace of the matrix behind ``products`` from one product with each basis vector."""
    event_shape = x.shape[1:]
    dimension = math.prod(event_shape)
    trace = x.new_zeros(len(x))
    for start in range(0, dimension, chunk_size):
        coordinates = torch.arange(start, min(start + chunk_size, dimension), device=x.device)
        directions = torch.zeros(len(coordinates), dimension, dtype=x.dtype, device=x.device)
        directions[torch.arange(len(coordinates), device=x.device), coordinates] = 1
        directions = directions.view(-1, 1, *event_shape).expand(-1, *x.shape)
        rows = products(directions).flatten(2)  # (n, B, d)
        entries = rows.gather(2, coordinates.view(-1, 1, 1).expand(-1, len(x), 1))
        trace = trace + entries.sum((0, 2))
    return trace
