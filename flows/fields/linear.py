"""The linear field, whose flow is a matrix exponential."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flows.arguments import checked
from flows.errors import InvalidValueError
from flows.fields.base import Field


@checked
class Linear(Field):
    r"""v(x) = A x + b, div v = tr A.

    Its flow map over a time τ is affine with the linear part e^{Aτ}, so a flow with this field has a Gaussian
    density in closed form: the ground truth for solvers and estimators.

    Args:
        event_shape: shape of a point; it is flattened.
        matrix: A, (d, d); drawn at random with entries N(0, 1/d) if not given.
        offset: b, (d,); zero if not given.

    Example:
        ```python
        import flows

        flow = flows.CNF(flows.fields.Linear((2,), matrix=[[0.0, -1.0], [1.0, 0.0]]))  # a rotation keeps N(0, I)
        ```
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        matrix: Tensor | Sequence[Sequence[float]] | None = None,
        offset: Tensor | Sequence[float] | None = None,
    ) -> None:
        super().__init__(event_shape, None)
        d = math.prod(self.event_shape)
        matrix = torch.randn(d, d) / math.sqrt(d) if matrix is None else _real(matrix)
        offset = matrix.new_zeros(d) if offset is None else torch.as_tensor(offset, dtype=matrix.dtype)
        if matrix.shape != (d, d) or offset.shape != (d,):
            raise InvalidValueError(
                f"event_shape {self.event_shape} needs a matrix of shape {(d, d)} and an offset of shape {(d,)}, "
                f"got {tuple(matrix.shape)} and {tuple(offset.shape)}"
            )
        self.matrix = nn.Parameter(matrix.clone())
        self.offset = nn.Parameter(offset.clone())

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.check_context(context)
        return torch.addmm(self.offset, x.flatten(1), self.matrix.T).view_as(x)

    def value_and_divergence(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """v (B, *event) and div v (B,)."""
        return self(t, x, context), self.matrix.trace().expand(x.shape[0])

    def value_divergence_and_products(
        self,
        t: Tensor,
        x: Tensor,
        directions: Tensor,  # (P, B, *event)
        context: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """v, div v, and the products A u (P, B, *event)."""
        products = (directions.flatten(2) @ self.matrix.T).view(directions.shape)
        return *self.value_and_divergence(t, x, context), products


def _real(matrix: Tensor | Sequence[Sequence[float]]) -> Tensor:
    matrix = torch.as_tensor(matrix)
    return matrix if matrix.is_floating_point() else matrix.to(torch.get_default_dtype())
