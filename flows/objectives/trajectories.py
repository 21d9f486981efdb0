"""What the objectives of neural ODEs share: their checks, states as the field sees them, smoothed states, segments."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from flows.datasets import Dataset, Series, SeriesBatch
from flows.errors import InvalidTypeError, InvalidValueError
from flows.models.neural_ode import NeuralODE
from flows.objectives.checks import DENSITY_RECIPE, check_contexts, check_kind

TINY = 1e-20  # squares of polynomials below this are those of fewer points than their degree needs


def check_series(model: nn.Module, dataset: Dataset) -> NeuralODE:
    """Return the model, or raise `InvalidTypeError` or `InvalidValueError` unless it is a neural ODE for these data."""
    if not isinstance(model, NeuralODE):
        instead = "model=neural_ode" if isinstance(dataset, Series) else DENSITY_RECIPE
        raise InvalidTypeError(
            f"this objective trains a flows.NeuralODE on time series, got {type(model).__name__}; use {instead}"
        )
    check_kind(model, dataset)
    if tuple(dataset.event_shape) != model.event_shape:
        raise InvalidValueError(
            f"the states of {dataset.name!r} have the shape {tuple(dataset.event_shape)}, and the model's have "
            f"{model.event_shape}"
        )
    check_contexts(model, dataset)
    return model


def series_of(batch: object) -> SeriesBatch:
    """Return the batch, or raise `InvalidTypeError` unless it holds series."""
    if not isinstance(batch, SeriesBatch):
        raise InvalidTypeError(
            f"this objective needs a flows.datasets.SeriesBatch, with times and masks, got {type(batch).__name__}"
        )
    return batch


def in_field_space(model: NeuralODE, x: Tensor) -> Tensor:  # (B, T, *event), both
    """Values as the field sees them."""
    return model.transform(x.flatten(0, 1))[0].reshape(x.shape).to(model.dtype)


def like(table: Tensor, x: Tensor) -> Tensor:
    """A table (B, T) that broadcasts to x (B, T, *event)."""
    return table.view(*table.shape, *[1] * (x.ndim - 2))


def first_part(batch: SeriesBatch, share: float) -> SeriesBatch:
    """The first part of each series in time, at least its first two points."""
    ends = batch.times.gather(1, (batch.mask.sum(1, keepdim=True) - 1).clamp(min=0))
    last = batch.times[:, :1] + share * (ends - batch.times[:, :1])
    if batch.times.shape[1] > 1:
        last = torch.maximum(last, batch.times[:, 1:2])
    inside = batch.mask & (batch.times <= last)
    return _columns(batch, inside, torch.arange(inside.shape[1], device=last.device).expand_as(inside))


@dataclass(frozen=True)
class Segments:
    """Series cut into pieces that are solved apart."""

    batch: SeriesBatch  # one row a piece, (S, K)
    rows: Tensor  # (S,), which series each piece is of
    columns: Tensor  # (S,), the column of the series where each piece starts
    joins: Tensor  # (S,), the column of the piece where the next one starts, 0 for the last piece of a series

    def of_series(self, rows: slice) -> slice:
        """Which pieces are those of a range of series."""
        first, last = ((self.rows < row).sum().item() for row in (rows.start, rows.stop))
        return slice(int(first), int(last))


def cut(batch: SeriesBatch, length: int) -> Segments:
    """Cut each series after about `length` intervals, where a state was observed whole.

    Neighbouring pieces share the observation between them. No observation is lost: where no state was observed whole
    after `length` intervals, the piece goes on to the next one that was.
    """
    whole = (batch.mask & batch.observed.flatten(2).all(2)).cpu().tolist()
    counts = batch.mask.sum(1).tolist()
    pieces = []  # (row, first column, last column, the column of the piece where another follows)
    for row, count in enumerate(counts):
        start = 0
        while start < count - 1 or start == 0:
            stop = next((j for j in range(start + length, count - 1) if whole[row][j]), count - 1)
            pieces.append((row, start, stop, stop - start if stop < count - 1 else 0))
            start = max(stop, 1)
    rows, starts, stops, joins = torch.tensor(pieces, device=batch.x.device).T
    longest = int((stops - starts).max()) + 1
    columns = starts[:, None] + torch.arange(longest, device=batch.x.device)
    inside = columns <= stops[:, None]
    return Segments(_columns(batch[rows], inside, columns.minimum(stops[:, None])), rows, starts, joins)


def _columns(
    batch: SeriesBatch,
    inside: Tensor,  # (B, K), which of the columns belong to the result
    columns: Tensor,  # (B, K), of the batch
) -> SeriesBatch:
    """Some columns of each row; those that are not inside repeat the time before them."""
    last = inside.sum(1, keepdim=True) - 1
    columns = columns.minimum(columns.gather(1, last.clamp(min=0)))
    rows = torch.arange(len(columns), device=columns.device)[:, None]
    observed = batch.observed[rows, columns] & like(inside, batch.x)
    x = batch.x[rows, columns].where(observed, 0)
    return replace(batch, x=x, times=batch.times[rows, columns], mask=inside, observed=observed)


def filled(
    y: Tensor,  # (B, T, *event)
    times: Tensor,  # (B, T)
    observed: Tensor,  # (B, T, *event)
) -> Tensor:  # (B, T, *event)
    """The values with gaps filled by lines between the observed neighbours; after the last one, that one again."""
    length = y.shape[1]
    index = torch.arange(length, device=y.device).view(1, -1, *[1] * (y.ndim - 2)).expand_as(y)
    before = index.where(observed, -1).cummax(1).values.clamp(min=0)
    after = index.where(observed, length).flip(1).cummin(1).values.flip(1)
    after = torch.where(after == length, before, after)
    t = like(times, y).expand(y.shape)
    t0, t1 = t.gather(1, before), t.gather(1, after)
    apart = t1 > t0
    share = torch.where(apart, (t - t0) / (t1 - t0).where(apart, 1), 0).to(y)
    return torch.lerp(y.gather(1, before), y.gather(1, after), share)


def smoothed(
    y: Tensor,  # (B, T, *event), without gaps
    times: Tensor,  # (B, T)
    mask: Tensor,  # (B, T)
    width: int,
) -> tuple[Tensor, Tensor]:  # (B, T, *event) each
    """States and slopes of the parabola that fits the `width` observations nearest in index best, at each time.

    With a width of three the parabola goes through the three points; where a series has two, it is the line. The first
    state stays as it is, since it is where the model starts. [Savitzky & Golay 1964]
    """
    counts = mask.sum(1, keepdim=True)
    places = torch.arange(y.shape[1], device=y.device)
    first = (places - width // 2).clamp(min=0).minimum((counts - width).clamp(min=0))  # (B, T)
    chosen = first[..., None] + torch.arange(width, device=y.device)  # (B, T, W)
    inside = (chosen < counts[..., None]).to(times)
    chosen = chosen.minimum((counts[..., None] - 1).clamp(min=0))
    rows = torch.arange(len(y), device=y.device)[:, None, None]
    offsets = (times[rows, chosen] - times[..., None]) * inside
    length = offsets.abs().amax(-1, keepdim=True)
    length = torch.where(length > 0, length, 1)
    u = offsets / length

    def mean(values: Tensor) -> Tensor:
        return (inside * values).sum(-1, keepdim=True) / inside.sum(-1, keepdim=True).clamp(min=1)

    # Polynomials of degree 0, 1, 2 that are orthogonal over the chosen points: 1, p, q.
    middle = mean(u)
    p = (u - middle) * inside
    spread = mean(p.square())
    skew = mean(p**3) / spread.clamp(min=TINY)
    q = (p.square() - skew * p - spread) * inside
    of_line, of_parabola = (poly / poly.square().sum(-1, keepdim=True).clamp(min=TINY) for poly in (p, q))
    of_constant = inside / inside.sum(-1, keepdim=True).clamp(min=1)
    at_zero = middle.square() + skew * middle - spread  # q there
    state_weights = of_constant - middle * of_line + at_zero * of_parabola
    slope_weights = (of_line - (2 * middle + skew) * of_parabola) / length
    values = y[rows, chosen].flatten(3)  # (B, T, W, d)
    state, slope = (
        torch.einsum("btw,btwd->btd", weights.to(y), values).view(y.shape) for weights in (state_weights, slope_weights)
    )
    return torch.cat([y[:, :1], state[:, 1:]], 1), slope
