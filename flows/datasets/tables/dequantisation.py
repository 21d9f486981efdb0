"""Noise of one rounding unit on columns of a table whose values repeat."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from flows.checks import check_number
from flows.datasets.batches import Batch, EpochStream, convert
from flows.datasets.tables.columns import choose_columns
from flows.datasets.tables.ties import find_ties, rounding_unit
from flows.errors import InvalidValueError

LOGGER = logging.getLogger("flows")
Noise = Literal["auto"] | Sequence[str | int] | Mapping[str, float] | None  # columns to dequantise

# Seeds of the noise of `dequantise_columns`, large, so that nobody uses them for training.
NOISE_SEEDS = {
    "train": 0x5EED_0004_4EF4_ECE5,
    "validation": 0x5EED_0005_7A11_DA7E,
    "test": 0x5EED_0006_07E5_7AB1,
}


class TableStream(EpochStream):
    """Batches of rows without replacement, with new noise in each batch where columns are dequantised."""

    def __init__(
        self,
        dataset: str,
        rows: Batch,  # (n, columns), with their contexts
        units: Tensor,  # (columns,), 0 for no noise
        batch_size: int,
        generator: torch.Generator,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(dataset, len(rows), batch_size, generator, device, dtype)
        self._units = units
        self._noisy = bool(units.any())
        self._context = None if rows.context is None else convert(rows.context, self.device, self.dtype, dataset)
        self._rows = rows.x if self._noisy else convert(rows.x, self.device, self.dtype, dataset)

    def next(self) -> Batch:
        chosen = self.draw()
        placed = chosen.to(self.device)
        context = None if self._context is None else self._context[placed]
        if self._noisy:
            x = dequantised(self._rows[chosen], self._units, self.generator)
            return Batch(convert(x, self.device, self.dtype, self.dataset), context)
        return Batch(self._rows[placed], context)


def dequantised(rows: Tensor, units: Tensor, generator: torch.Generator) -> Tensor:
    """Add uniform noise of one rounding unit, centred at 0."""
    if not units.any():
        return rows
    return rows + units * (torch.rand(rows.shape, generator=generator, dtype=rows.dtype) - 0.5)


def units_of(
    table: Tensor, columns: Sequence[str], chosen: Noise, source: str, others: np.ndarray | None
) -> Tensor:  # (columns,)
    """Return the rounding unit of the columns to dequantise, and 0 for all others."""
    units = torch.zeros(len(columns), dtype=torch.float64)
    if chosen is None:
        return units
    if isinstance(chosen, Mapping):
        for name, unit in chosen.items():
            check_number(f"dequantise_columns.{name}", unit, above=0)
            units[choose_columns([name], columns, source)[0]] = float(unit)
        return units
    if chosen == "auto":
        found = {ties.column: ties.unit for ties in find_ties(table.numpy(), others) if ties.unit is not None}
    else:
        found = {i: rounding_unit(np.unique(table[:, i].numpy())) for i in choose_columns(chosen, columns, source)}
    for column, unit in found.items():
        if unit is None:
            raise InvalidValueError(
                f"{source}: column {columns[column]!r} has no rounding unit: its values are no multiples of one step; "
                "leave it out of dequantise_columns"
            )
        units[column] = unit
    if found:
        named = ", ".join(f"{columns[column]!r} ({unit:g})" for column, unit in sorted(found.items()))
        LOGGER.warning("%s: uniform noise of one rounding unit is added to %s", source, named)
    return units
