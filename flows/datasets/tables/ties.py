"""Repeated values of a column, and the grid on which rounded values lie."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

MAX_ROWS = 100_000  # rows that ties and dependence are looked for in
MAX_REPEATED = 0.1  # of the values of a column; continuous numbers in float32 or float64 repeat less
MILD = 0.5  # of the rows have values of their own
ATOM_SHARE = 0.01  # of the rows with one and the same value


@dataclass(frozen=True)
class Ties:
    """Repeated values of a column.

    Attributes:
        column: position.
        distinct: number of distinct values.
        rows: number of rows, copies left out.
        unit: step of the grid on which all values lie. None if there is none, or if single values repeat among
            continuous ones.
    """

    column: int
    distinct: int
    rows: int
    unit: float | None

    @property
    def is_mild(self) -> bool:
        """Whether rounding explains it, and leaves most values apart."""
        return self.unit is not None and self.distinct >= MILD * self.rows


def find_ties(table: Values, given: Values | None = None) -> list[Ties]:
    """Return the columns whose values repeat.

    Copies of whole rows count once, with the conditions in `given`. In a single column without conditions, a copy is a
    repeated value.
    """
    whole = table if given is None else np.hstack([given, table])
    rows = table[:MAX_ROWS]
    if whole.shape[1] > 1:
        _, first = np.unique(row_keys(whole), return_index=True)
        rows = table[np.sort(first)[:MAX_ROWS]]
    found = []
    for column, values in enumerate(rows.T):
        distinct, counts = np.unique(values, return_counts=True)
        atoms = counts >= max(3, ATOM_SHARE * len(values))
        if 1 - len(distinct) / len(values) <= MAX_REPEATED and not atoms.any():
            continue
        rest = int(counts[~atoms].sum())
        mixed = rest >= 0.1 * len(values) and int((~atoms).sum()) > (1 - MAX_REPEATED) * rest
        found.append(Ties(column, len(distinct), len(values), None if mixed else rounding_unit(distinct)))
    return found


def rounding_unit(
    distinct: Values,  # (n,), rising
) -> float | None:
    """Return the largest step of which all differences are multiples, or None if there is none."""
    if len(distinct) < 2:
        return None
    shifted = distinct - distinct[0]
    finest = 1e4 * np.finfo(np.float64).eps * np.abs(distinct).max()
    power = int(np.floor(np.log10(shifted[-1])))
    while 10.0**power > finest:
        multiples = shifted / 10.0**power
        whole = np.rint(multiples)
        if np.abs(multiples - whole).max() < 1e-3:
            return float(np.gcd.reduce(whole.astype(np.int64)) * 10.0**power)
        power -= 1
    gap = np.diff(distinct).min()
    multiples = shifted / gap
    return float(gap) if np.abs(multiples - np.rint(multiples)).max() < 1e-3 else None


def row_keys(table: Values) -> NDArray[np.uint64]:
    """Return a 64-bit hash of each row; equal rows have equal hashes."""
    bits = np.ascontiguousarray(table + 0.0).view(np.uint64)  # −0 becomes 0
    factors = np.random.default_rng(0).integers(2**63, size=bits.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(
        1
    )
    mixed = bits ^ (bits >> np.uint64(32))  # numbers with few digits differ in their upper bits only
    return (mixed * factors).sum(1, dtype=np.uint64)
