"""A transform to normal marginals, from the counts of levels in the data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flows.arguments import checked
from flows.checks import as_shape, check_number, fits_in_memory
from flows.errors import InvalidValueError
from flows.transforms.base import Transform
from flows.transforms.dequantise import checked_levels


@checked
class NormalMarginals(Transform):
    """Normal marginals: y = Φ⁻¹(α + (1 − 2α) F(x)) for each entry.

    x is a dequantised level in [0, L). F is the distribution function of the entry in the training data with uniform
    noise: F′ = p_l on the cell of level l. An identity flow then has the right marginals, including the jumps between
    cells; only the dependence between entries is left to learn. With

        p_l = (n_l + pseudo_count)/(n + L · pseudo_count)

    levels that are missing from the training data keep a positive probability.
    log|dy/dx| = log(1 − 2α) + log p_l − log φ(y), summed over the entries. [Chen & Gopinath 2000, Gaussianization]

    Args:
        event_shape: shape of a point.
        num_levels: L.
        pseudo_count: added to each count, above 0.
        alpha: α, between 0 and ½. It keeps y finite at the cost of the mass α at each end.

    Raises:
        InvalidTypeError, InvalidValueError: a setting is no number, or out of range.

    Example:
        ```python
        import torch

        import flows

        levels = torch.randint(17, (100, 4)).float()
        transform = flows.transforms.NormalMarginals((4,), num_levels=17).fit(levels)
        ```
    """

    term = "marginals"
    shares: Tensor
    below: Tensor

    def __init__(
        self, event_shape: int | Sequence[int], num_levels: int | None, pseudo_count: float = 0.5, alpha: float = 1e-5
    ) -> None:
        super().__init__()
        check_number("pseudo_count", pseudo_count, above=0)
        check_number("alpha", alpha, above=0, below=0.5)
        self.event_shape = as_shape("event_shape", event_shape)
        self.pseudo_count = pseudo_count
        self.alpha = alpha
        size, levels = math.prod(self.event_shape), checked_levels(num_levels)
        fits_in_memory(f"num_levels: {levels:,} levels of {size:,} entries", 4 * size * levels)
        self.register_buffer("shares", torch.full((size, levels), 1 / levels))  # p_l, by entry
        self.register_buffer("below", torch.arange(levels).div(levels).repeat(size, 1))  # F at the whole numbers

    def check(self, x: Tensor) -> None:
        outside = (x < 0) | (x >= self.shares.shape[1])
        if outside.any():
            raise InvalidValueError(
                f"expected dequantised levels from 0 to {self.shares.shape[1]}, got {x[outside][0].item():g} "
                f"({int(outside.sum())} values outside); put Dequantise directly before it, without scaling"
            )

    def fit(self, points: Tensor) -> NormalMarginals:
        """Count the levels of `points` (n, *event)."""
        if tuple(points.shape[1:]) != self.event_shape or not len(points):
            raise InvalidValueError(
                f"expected points of shape {self.event_shape} to count levels in, got {tuple(points.shape)}"
            )
        self.check(points)
        levels = points.flatten(1).long().T  # (d, n)
        counts = torch.zeros_like(self.shares, dtype=torch.float64)
        counts.scatter_add_(1, levels, torch.ones_like(levels, dtype=torch.float64))
        shares = (counts + self.pseudo_count) / (levels.shape[1] + counts.shape[1] * self.pseudo_count)
        self.shares.copy_(shares)
        self.below.copy_(shares.cumsum(1) - shares)
        return self

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        flat = x.flatten(1)
        cell = flat.detach().floor().clamp(0, self.shares.shape[1] - 1)
        share, below = self._of(cell)
        y = torch.special.ndtri(self.alpha + (1 - 2 * self.alpha) * (below + (flat - cell) * share))
        return y.view_as(x), self._log_det(y, share)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return x in [0, L] and −log_det. y beyond the image of the data goes to either end."""
        flat = y.flatten(1)
        rank = ((torch.special.ndtr(flat) - self.alpha) / (1 - 2 * self.alpha)).clamp(0, 1)
        cell = torch.searchsorted(self.below, rank.detach().T.contiguous(), right=True).T - 1
        share, below = self._of(cell)
        inside = ((rank - below) / share).clamp(max=1)  # above 1 only by rounding
        return (cell + inside).view_as(y), -self._log_det(flat, share)

    def _of(self, cell: Tensor) -> tuple[Tensor, Tensor]:  # (B, d) each
        """Return p_l and F at the lower end of each entry's cell."""
        index = cell.long().T
        return self.shares.gather(1, index).T, self.below.gather(1, index).T

    def _log_det(self, y: Tensor, share: Tensor) -> Tensor:
        constant = math.log(1 - 2 * self.alpha) + 0.5 * math.log(2 * math.pi)
        return (share.log() + 0.5 * y.square() + constant).sum(1)
