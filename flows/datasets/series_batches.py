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
class Inputs:
    """Inputs u(t) of each series of a batch, sampled at times of their own.

    Rows that are shorter than S repeat their last time and value.
    """

    times: Tensor  # (B, S), float64, strictly increasing where `mask` is true
    values: Tensor  # (B, S, k)
    mask: Tensor  # (B, S), which samples belong to the series

    def __post_init__(self) -> None:
        _check_shapes(self.values, {"times": self.times, "mask": self.mask}, "inputs (B, S, k)")

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, indices: Tensor | slice) -> Inputs:
        """Select series."""
        return Inputs(self.times[indices], self.values[indices], self.mask[indices])


@checked
@dataclass(frozen=True)
class SeriesBatch(Batch):
    """Observed time series of any lengths.

    `x` is (B, T, *event): the values, 0 where none was observed. Rows that are shorter than T repeat their last time.
    """

    times: Tensor = field(kw_only=True)  # (B, T), float64, strictly increasing where `mask` is true
    mask: Tensor = field(kw_only=True)  # (B, T), which times belong to the series
    observed: Tensor = field(kw_only=True)  # (B, T, *event), which values were observed
    inputs: Inputs | None = field(kw_only=True, default=None)  # covariates that change in time

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_shapes(self.x, {"times": self.times, "mask": self.mask}, "x (B, T, *event)")
        if self.observed.shape != self.x.shape:
            raise InvalidValueError(
                f"observed must have the shape of x, {tuple(self.x.shape)}, got {tuple(self.observed.shape)}"
            )
        if self.inputs is not None and len(self.inputs) != len(self.x):
            raise InvalidValueError(f"{len(self.x)} series need as many inputs, got {len(self.inputs)}")

    def __getitem__(self, indices: Tensor | slice) -> SeriesBatch:
        """Select series together with their contexts and inputs."""
        return SeriesBatch(
            self.x[indices],
            None if self.context is None else self.context[indices],
            times=self.times[indices],
            mask=self.mask[indices],
            observed=self.observed[indices],
            inputs=None if self.inputs is None else self.inputs[indices],
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
        tensors: rows (P, ...) of all tables, one table after the other.
    """

    def __init__(self, counts: Tensor, *tensors: Tensor):
        self.counts, self.tensors = counts, tensors
        self.starts = counts.cumsum(0) - counts

    def holding(self, *tensors: Tensor) -> EndToEnd:
        """The same tables with other tensors of rows; their starts stay, also where counts have been shortened."""
        other = EndToEnd(self.counts, *tensors)
        other.starts = self.starts
        return other

    def padded(self, chosen: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The mask (B, T) of some tables, and their rows (B, T, ...); shorter tables repeat their last row."""
        counts = self.counts[chosen]
        places = torch.arange(int(counts.max()) if len(counts) else 0)
        inside = places < counts[:, None]
        rows = self.starts[chosen][:, None] + places.minimum((counts - 1)[:, None])
        device = self.tensors[0].device
        rows = rows.to(device)
        return inside.to(device), [tensor[rows] for tensor in self.tensors]


@dataclass(frozen=True)
class AllSeries:
    """All series of a dataset, on one device."""

    points: EndToEnd  # times (P,), values (P, *event), which were observed (P, *event)
    context: Tensor | None  # (N, *context)
    inputs: EndToEnd | None  # times (Q,), values (Q, k)

    def to(self, device: torch.device, dtype: torch.dtype, dataset: str) -> AllSeries:
        """Copy to a device and a dtype; times stay in float64 where the device has it."""
        exact = dtype if device.type == "mps" else torch.float64
        times, x, observed = self.points.tensors
        rows = (convert(times, device, exact, dataset), convert(x, device, dtype, dataset), observed.to(device))
        inputs = self.inputs
        if inputs is not None:
            times, values = inputs.tensors
            inputs = inputs.holding(convert(times, device, exact, dataset), convert(values, device, dtype, dataset))
        context = None if self.context is None else convert(self.context, device, dtype, dataset)
        return AllSeries(self.points.holding(*rows), context, inputs)

    def batch(self, chosen: Tensor) -> SeriesBatch:
        """The series at these places, padded to the longest of them."""
        mask, (times, x, observed) = self.points.padded(chosen)
        observed = observed & _like(mask, x)
        inputs = None
        if self.inputs is not None:
            inside, (own_times, values) = self.inputs.padded(chosen)
            inputs = Inputs(own_times, values, inside)
        context = None if self.context is None else self.context[chosen.to(self.context.device)]
        return SeriesBatch(x.where(observed, 0), context, times=times, mask=mask, observed=observed, inputs=inputs)


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


def _like(mask: Tensor, x: Tensor) -> Tensor:
    """A mask (B, T) that broadcasts to x (B, T, *event)."""
    return mask.view(*mask.shape, *[1] * (x.ndim - 2))


def _check_shapes(x: Tensor, tables: dict[str, Any], what: str) -> None:
    for name, table in tables.items():
        if x.ndim < 2 or table.shape != x.shape[:2]:
            raise InvalidValueError(
                f"expected {what} and {name} with its first two sizes, got {tuple(x.shape)} and {tuple(table.shape)}"
            )
