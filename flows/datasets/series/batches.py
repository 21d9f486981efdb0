"""Batches of time series of any lengths, and endless streams of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flows.arguments import checked
from flows.datasets.batches import Batch, EpochStream, convert
from flows.errors import InvalidValueError


@checked
@dataclass(frozen=True)
class SeriesBatch(Batch):
    """Observed time series of any lengths.

    `x` is (B, T, *event): the values, 0 where none was observed. Rows that are shorter than T repeat their last time.
    Inputs u(t) are in the context, (B, S, 1 + k): the times of S samples in column 0, then k inputs. Rows with fewer
    samples repeat the last one.

    Example:
        ```python
        import torch

        import flows

        data = flows.datasets.Spiral(num_series=10, num_times=20)
        batch: flows.datasets.SeriesBatch = data.train_stream(batch_size=4, generator=torch.Generator()).next()
        batch.x[batch.mask]  # the observed states of all series
        ```
    """

    times: Tensor = field(kw_only=True)  # (B, T), float64, strictly increasing where `mask` is true
    mask: Tensor = field(kw_only=True)  # (B, T), which times belong to the series
    observed: Tensor = field(kw_only=True)  # (B, T, *event), which values were observed

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_shapes(self.x, {"times": self.times, "mask": self.mask}, "x (B, T, *event)")
        if self.observed.shape != self.x.shape:
            raise InvalidValueError(
                f"observed must have the shape of x, {tuple(self.x.shape)}, got {tuple(self.observed.shape)}"
            )

    def __getitem__(self, indices: Tensor | slice) -> SeriesBatch:
        """Select series together with their contexts."""
        return SeriesBatch(
            self.x[indices],
            None if self.context is None else self.context[indices],
            times=self.times[indices],
            mask=self.mask[indices],
            observed=self.observed[indices],
        )

    def to(self, device: torch.device | str | None, dtype: torch.dtype | None, dataset: str = "series") -> SeriesBatch:
        """Copy to a device and a dtype; times stay in float64 where the device has it."""
        return SeriesBatch(
            convert(self.x, device, dtype, dataset),
            None if self.context is None else convert(self.context, device, dtype, dataset),
            times=convert(self.times, device, _exact(device, dtype), dataset),
            mask=self.mask.to(device),
            observed=self.observed.to(device),
        )

    def until(self, time: float) -> SeriesBatch:
        """The same series without what was observed later than `time` after the start of each."""
        early = self.mask & (self.times - self.times[:, :1] <= time)
        counts = early.sum(1)
        length = max(int(counts.max()), 1) if len(self) else 0
        places = torch.arange(length, device=counts.device).minimum((counts - 1).clamp(min=0)[:, None])
        early = early[:, :length]
        observed = self.observed[:, :length] & _like(early, self.x)
        return replace(
            self,
            x=self.x[:, :length].where(observed, 0),
            times=self.times.gather(1, places),
            mask=early,
            observed=observed,
        )


class EndToEnd:
    """Tables of any lengths in shared tensors: row i of table j is entry `starts[j] + i`.

    Args:
        counts: the length of each table.
        tensors: rows (P, ...) of all tables.
        starts: where each table begins. Default: one after the other.
    """

    def __init__(self, counts: Tensor, *tensors: Tensor, starts: Tensor | None = None):
        self.counts, self.tensors = counts, tensors
        self.starts = counts.cumsum(0) - counts if starts is None else starts

    def padded(self, chosen: Tensor, length: int | None = None) -> tuple[Tensor, list[Tensor]]:
        """The mask (B, T) of some tables, and their rows (B, T, ...); shorter tables repeat their last row."""
        counts = self.counts[chosen]
        places = torch.arange(int(counts.max()) if length is None else length)
        inside = places < counts[:, None]
        device = self.tensors[0].device
        rows = (self.starts[chosen][:, None] + places.minimum((counts - 1)[:, None])).to(device)
        return inside.to(device), [tensor[rows] for tensor in self.tensors]


@dataclass(frozen=True)
class AllSeries:
    """The examples of a dataset of series, on one device. An example is a series, or a piece of one."""

    points: EndToEnd  # times (P,), values (P, *event), which were observed (P, *event); a table for each example
    of: Tensor  # (examples,), the series that each example is of
    context: Tensor | None  # (N, *context), one a series
    inputs: EndToEnd | None  # times and inputs (Q, 1 + k); a table for each series

    def to(self, device: torch.device, dtype: torch.dtype, dataset: str) -> AllSeries:
        """Copy to a device and a dtype; times of observations stay in float64 where the device has it."""
        times, x, observed = self.points.tensors
        times, x = convert(times, device, _exact(device, dtype), dataset), convert(x, device, dtype, dataset)
        points = EndToEnd(self.points.counts, times, x, observed.to(device), starts=self.points.starts)
        inputs = self.inputs
        if inputs is not None:
            inputs = EndToEnd(inputs.counts, convert(inputs.tensors[0], device, dtype, dataset))
        context = None if self.context is None else convert(self.context, device, dtype, dataset)
        return AllSeries(points, self.of, context, inputs)

    def batch(self, chosen: Tensor) -> SeriesBatch:
        """The examples at these places, padded to the longest of them."""
        mask, (times, x, observed) = self.points.padded(chosen)
        observed = observed & _like(mask, x)
        series, context = self.of[chosen], None
        if self.context is not None:
            context = self.context[series.to(self.context.device)]
        if self.inputs is not None:
            samples = self.inputs.padded(series, int(self.inputs.counts.max()))[1][0]
            known = () if context is None else (context[:, None].expand(-1, samples.shape[1], -1),)
            context = torch.cat([samples, *known], 2)
        return SeriesBatch(x.where(observed, 0), context, times=times, mask=mask, observed=observed)


class SeriesStream(EpochStream):
    """Batches of whole series without replacement."""

    unit = "series"

    def __init__(
        self,
        dataset: str,
        series: AllSeries,
        training: Tensor,  # (n,), the places of the training series
        batch_size: int,
        generator: torch.Generator,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(dataset, len(training), batch_size, generator, device, dtype)
        self._series, self._training = series.to(self.device, self.dtype, dataset), training

    def next(self) -> SeriesBatch:
        return self._series.batch(self._training[self.draw()])


def _exact(device: torch.device | str | None, dtype: torch.dtype | None) -> torch.dtype | None:
    """float64, or `dtype` on a device that lacks float64."""
    return dtype if torch.device(device or "cpu").type == "mps" else torch.float64


def _like(mask: Tensor, x: Tensor) -> Tensor:
    """A mask (B, T) that broadcasts to x (B, T, *event)."""
    return mask.view(*mask.shape, *[1] * (x.ndim - 2))


def _check_shapes(x: Tensor, tables: dict[str, Any], what: str) -> None:
    for name, table in tables.items():
        if x.ndim < 2 or table.shape != x.shape[:2]:
            raise InvalidValueError(
                f"expected {what} and {name} with its first two sizes, got {tuple(x.shape)} and {tuple(table.shape)}"
            )
