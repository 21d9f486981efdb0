"""Dequantisation noise that knows which pixels go together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from flows.arguments import checked
from flows.checks import as_shape, check_number, fits_in_memory, whole_number
from flows.errors import InvalidValueError
from flows.transforms.dequantise import DequantisationNoise, checked_levels

TINY = 1e-300  # the least probability of a cell, far out in the tails
LOG_TWO_PI = math.log(2 * math.pi)


@checked
class CopulaNoise(DequantisationNoise):
    r"""Noise from a Gaussian copula: pixels follow the pixels before them.

    Give each entry its normal score z = Φ⁻¹(F(x + u)), F the distribution function of the training data with uniform
    noise, as `NormalMarginals` does. Let z ~ N(0, C), C the correlations of the scores. An image confines z to a box of
    cells. Within it z is drawn in groups of entries: those of a group are independent given all groups before it,

        z_i ~ N(m_i, s_i²) truncated to the cell of x_i,    m_i and s_i² the mean and variance of z_i given z_{<g},
        log q(u | x) = Σ_i log N(z_i; m_i, s_i²) − log P(cell_i; m_i, s_i²) + log p_i(x_i) − log φ(z_i),

    where p_i are the shares of the levels. Uniform noise is blind: beside dark pixels, a pixel of the lowest level is
    as likely to lie at the upper end of its cell as anywhere. With this noise the data are closer to a normal
    distribution, with softer edges, and the bound is tighter. Nothing has to be trained: `fit` counts levels and
    estimates C from draws of the noise itself, a few times over. Before `fit` it is uniform noise.
    [Geweke 1991, Hajivassiliou & Ruud 1994, the GHK simulator; as dequantisation by more than uniform noise: Ho et al.
    2019, arXiv:1902.00275]

    Args:
        event_shape: shape of a point. Memory grows with the square of its size.
        num_levels: L.
        stride: of images: pixels that are `stride` apart in rows and columns are one group, so there are stride² groups
            a channel, and a draw takes as many steps. Default (`None`): each entry is a group of its own.
        shrinkage: s in [0, 1): C is replaced by (1 − s) C + s I.
        pseudo_count: added to each count of a level, above 0.
        rounds: how often C is estimated, from noise that is drawn with the C before it.

    Raises:
        InvalidTypeError, InvalidValueError: a setting is no number, or out of range.

    Example:
        ```python
        import torch

        from flows.transforms import CopulaNoise, Dequantise

        images = torch.randint(4, (100, 1, 3, 3)).float()
        dequantise = Dequantise(4, CopulaNoise((1, 3, 3), 4)).fit(images)
        y, log_det = dequantise(images)
        ```
    """

    order: Tensor
    shares: Tensor
    below: Tensor
    weights: Tensor
    spread: Tensor

    def __init__(
        self,
        event_shape: int | Sequence[int],
        num_levels: int | None,
        stride: int | None = None,
        shrinkage: float = 0.05,
        pseudo_count: float = 0.5,
        rounds: int = 8,
    ) -> None:
        super().__init__()
        check_number("shrinkage", shrinkage, at_least=0, below=1)
        check_number("pseudo_count", pseudo_count, above=0)
        self.rounds = whole_number("rounds", rounds)
        self.event_shape = as_shape("event_shape", event_shape)
        self.shrinkage, self.pseudo_count = shrinkage, pseudo_count
        size, levels = math.prod(self.event_shape), checked_levels(num_levels)
        fits_in_memory(f"event_shape: a copula of {size:,} entries with {levels:,} levels", 8 * size * (size + levels))
        groups = _groups(self.event_shape, stride)
        self.ends = list(accumulate(len(group) for group in groups))
        self.register_buffer("order", torch.cat(groups), persistent=False)  # in which entries are drawn
        self.register_buffer("shares", torch.full((size, levels), 1 / levels))  # p, by entry
        self.register_buffer("below", torch.arange(levels).div(levels).repeat(size, 1))  # F at the whole numbers
        self.register_buffer("weights", torch.zeros(size, size))  # m = weights z, both in this order
        self.register_buffer("spread", torch.ones(size))  # s, in this order

    def fit(self, points: Tensor) -> CopulaNoise:
        """Count the levels of `points` (n, *event), and estimate C. Noise has a fixed seed."""
        if tuple(points.shape[1:]) != self.event_shape or len(points) < 2:
            raise InvalidValueError(
                f"expected at least two points of shape {self.event_shape}, got {tuple(points.shape)}"
            )
        levels = points.flatten(1).long().T
        counts = torch.zeros(self.shares.shape, dtype=torch.float64, device=points.device)
        counts.scatter_add_(1, levels, torch.ones_like(levels, dtype=torch.float64))
        shares = (counts + self.pseudo_count) / (levels.shape[1] + counts.shape[1] * self.pseudo_count)
        self.shares.copy_(shares)
        self.below.copy_(shares.cumsum(1) - shares)
        self._take(torch.eye(len(shares), dtype=torch.float64, device=points.device))
        generator = torch.Generator(points.device).manual_seed(0)
        with torch.no_grad():
            for _ in range(self.rounds):
                scores = self._back(self._draw(points, generator)[0])
                covariance = scores.T @ scores / len(scores)
                spread = covariance.diagonal().sqrt()
                correlation = covariance / spread / spread.unsqueeze(1)
                self._take(torch.lerp(correlation, torch.eye(len(spread)).to(correlation), self.shrinkage))
        return self

    def _take(self, correlation: Tensor) -> None:
        """Keep what the groups need of C: the regression of each on those before it."""
        factor = torch.linalg.cholesky(correlation[self.order][:, self.order])
        inverse = torch.linalg.solve_triangular(factor, torch.eye(len(factor)).to(factor), upper=False)
        self.weights.zero_()
        start = 0
        for end in self.ends:
            own = factor[start:end]
            self.weights[start:end, :start] = own[:, :start] @ inverse[:start, :start]
            self.spread[start:end] = own[:, start:end].norm(dim=1)
            start = end

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            scores, log_q = self._draw(x, generator)
            share, below = self._cells(x)
            u = ((torch.special.ndtr(scores) - below) / share).clamp(0, 1)
            log_q = log_q + (share.log() + 0.5 * scores.square() + 0.5 * LOG_TWO_PI).sum(1)
            return self._back(u).to(x.dtype).view_as(x), log_q.to(x.dtype)

    def log_prob(self, u: Tensor, x: Tensor) -> Tensor:
        share, below = self._cells(x)
        low, high = torch.special.ndtri(below), torch.special.ndtri((below + share).clamp(max=1))
        limit = torch.finfo(torch.float64).eps
        rank = below + u.flatten(1)[:, self.order].double() * share
        scores = torch.special.ndtri(rank.clamp(limit, 1 - limit))
        means, spread = scores @ self.weights.double().T, self.spread.double()
        mass = _mass((low - means) / spread, (high - means) / spread)[0]
        errors = (scores - means) / spread
        terms = 0.5 * (scores.square() - errors.square()) - spread.log() - mass.log() + share.log()
        return terms.sum(1).to(u.dtype)

    def _draw(self, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:  # (B, d) and (B,)
        """Return the scores z in the order of the groups, and log of their density; both in float64."""
        share, below = self._cells(x)
        low, high = torch.special.ndtri(below), torch.special.ndtri((below + share).clamp(max=1))
        device = x.device if generator is None else generator.device
        ranks = torch.rand(share.shape, generator=generator, dtype=torch.float64, device=device).to(x.device)
        weights, spread = self.weights.double(), self.spread.double()
        scores, squares, log_mass = torch.zeros_like(share), torch.zeros_like(share), torch.zeros_like(share)
        start = 0
        for end in self.ends:
            own = slice(start, end)
            means = scores[:, :start] @ weights[own, :start].T
            first, last = (low[:, own] - means) / spread[own], (high[:, own] - means) / spread[own]
            mass, lower, flipped = _mass(first, last)
            errors = torch.special.ndtri((lower + ranks[:, own] * mass).clamp(TINY, 1))
            errors = torch.where(flipped, -errors, errors).clamp(first, last)
            scores[:, own] = means + spread[own] * errors
            squares[:, own], log_mass[:, own] = errors.square(), mass.log()
            start = end
        return scores, -(0.5 * squares + log_mass + spread.log() + 0.5 * LOG_TWO_PI).sum(1)

    def _back(self, values: Tensor) -> Tensor:  # (B, d)
        """Return values in the order of the entries, from that of the groups."""
        return torch.empty_like(values).index_copy_(1, self.order, values)

    def _cells(self, x: Tensor) -> tuple[Tensor, Tensor]:  # (B, d) each, float64
        """Return p and F at the lower end of each entry's cell, in the order of the groups."""
        index = x.flatten(1).long().T
        found = (table.gather(1, index).T[:, self.order].double() for table in (self.shares, self.below))
        share, below = found
        return share, below


def _groups(event_shape: tuple[int, ...], stride: int | None) -> list[Tensor]:
    """Return the flat indices of each group, in the order in which groups are drawn."""
    index = torch.arange(math.prod(event_shape)).view(event_shape)
    if stride is None:
        return list(index.flatten().unsqueeze(1))
    whole_number("stride", stride)
    if len(event_shape) != 3:
        raise InvalidValueError(
            f"stride needs images of shape (channels, height, width), got {event_shape}; use stride=None"
        )
    offsets = [(row, column) for row in range(stride) for column in range(stride)]
    found = [index[c, row::stride, column::stride].flatten() for row, column in offsets for c in range(event_shape[0])]
    return [group for group in found if len(group)]


def _mass(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return P(start < e < end) for normal e, Φ at the lower end, and whether both are those of −e.

    The tail on the left keeps its digits, so intervals on the right are mirrored.
    """
    flipped = start + end > 0
    first, last = torch.where(flipped, -end, start), torch.where(flipped, -start, end)
    lower = torch.special.ndtr(first)
    return (torch.special.ndtr(last) - lower).clamp(min=TINY), lower, flipped
