"""Bases of the range of a sketch, for every sample of a batch."""

from __future__ import annotations

import torch
from torch import Tensor


def to_columns(
    vectors: Tensor,  # (k, B, *event)
) -> Tensor:  # (B, d, k)
    """Stacked vectors as the columns of one matrix a sample."""
    return vectors.flatten(2).permute(1, 2, 0)


def to_vectors(
    columns: Tensor,  # (B, d, k)
    x: Tensor,  # (B, *event)
) -> Tensor:  # (k, B, *event)
    """The columns as vectors shaped like ``x``."""
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
