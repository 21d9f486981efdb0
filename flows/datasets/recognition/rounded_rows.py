"""Recognises rows of a table whose values were rounded, and rows of which one column was changed.

Each row gets a coarse hash: that of the cell of a grid in which it lies. A row to be found is looked up in its own cell
and in the neighbours across the nearest borders, so that a value on a border is found on either side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flows.datasets.recognition.hashing import STEP, column_spreads, hash_rows, mix, rounded, salts

Hashes = NDArray[np.uint64]
Values = NDArray[Any]  # (n, k)

MAX_KEPT = 2**16  # hashes of each kind, 8 bytes each
MAX_GROUPS = 16  # of columns, each of which is left out in turn
MAX_BORDERS = 4  # columns whose nearest border is crossed: 16 cells in all
MAX_COUNTED = 2**16  # rows that are looked up; the count of more is estimated
CHANCE = 0.01  # of the rows of other data that may hit an occupied cell
FINEST, COARSEST = 2.0**-15, 2.0**-5  # steps of the grid, of the spread of a column
SINGLE_PRECISION = 2.0**-21  # of the values: eight times the rounding of float32
SIX_DIGITS = 2e-5  # of the values: four times the rounding to six digits
MAX_CHANCE = 0.3  # more, and rows cannot be told from others
ENOUGH = 0.5  # of the rows were found, so that no column is left out


@dataclass(frozen=True)
class Found:
    """Rows that were found.

    Attributes:
        count: how many, estimated if `about`.
        about: whether the count is an estimate.
        left_out: columns whose values were not compared.
    """

    count: int
    about: bool
    left_out: Sequence[int] = ()


def rounded_entry(rows: Mapping[str, Values]) -> dict[str, Any]:
    """Return the coarse hashes of the rows of a table, for its fingerprint: at most 65,536 of each kind."""
    every = np.concatenate(list(rows.values()))
    chosen = every[_positions(len(every), MAX_KEPT)]
    steps, width = _grid_steps(chosen), every.shape[1]
    groups = _groups(width)
    few = _training_rows(len(every), len(rows["train"]), MAX_KEPT // max(1, len(groups)))
    return {
        "steps": [float(step) for step in steps],
        "hashes": _tensor(_hashes(chosen, steps)),
        "without": _tensor(np.stack([_hashes(every[few], steps, without=group) for group in groups]))
        if groups
        else None,
        "chance": _chance(chosen, steps, ()),
        "chance_without": [_chance(every[few], steps, group) for group in groups],
    }


class RoundedRows:
    """Rows of data, looked up among those of a run.

    Args:
        entry: what `rounded_entry` said of the run.
        old: number of rows of the run in each split.
        rows: rows of the data in each split.
        order: their columns in the order of the run.
    """

    def __init__(
        self,
        entry: Mapping[str, Any],
        old: Mapping[str, int],
        rows: Mapping[str, Values],
        order: Sequence[int] | None = None,
    ):
        self.steps = np.array(entry["steps"], np.float64)
        self.rows = {split: part if order is None else part[:, list(order)] for split, part in rows.items()}
        self.sizes = {split: len(part) for split, part in rows.items()}
        self.old, self.total = old, sum(old.values())
        self.hashes = entry["hashes"].numpy().view(np.uint64)
        self.chance = float(entry["chance"])
        self.groups = _groups(len(self.steps))
        self.without = None if entry["without"] is None else entry["without"].numpy().view(np.uint64)
        self.chance_without = [float(chance) for chance in entry["chance_without"]]
        self._check_entry()
        self._found: dict[tuple[str, int], Found | None] = {}

    def _check_entry(self) -> None:
        """Raise `ValueError` unless the parts of the entry fit each other."""
        groups, shape = len(self.groups), () if self.without is None else self.without.shape
        width = next(iter(self.rows.values())).shape[1]
        if self.steps.shape != (width,) or not (np.isfinite(self.steps) & (self.steps > 0)).all():
            raise ValueError(f"{width} columns have the steps {self.steps.tolist()}")
        if self.hashes.shape != (min(self.total, MAX_KEPT),):
            raise ValueError(f"{self.total} rows have {self.hashes.shape} hashes")
        if (shape[:1] != (groups,) or len(shape) != 2) if groups else shape:
            raise ValueError(f"{groups} groups of columns have hashes of shape {shape}")
        if len(self.chance_without) != groups:
            raise ValueError(f"{groups} groups of columns have {len(self.chance_without)} chances")

    @cached_property
    def only_rounding(self) -> bool:
        """Whether the rows are those of the run, in the same order and splits, but for rounding.

        Up to 65,536 rows are compared, evenly spread.
        """
        if self.sizes != dict(self.old):
            return False
        every = np.concatenate(list(self.rows.values()))[_positions(self.total, MAX_KEPT)]
        same = np.zeros(len(every), bool)
        for hashes in _neighbours(every, self.steps):
            same |= hashes == self.hashes
        return bool(same.all())

    @cached_property
    def share(self) -> float:
        """Share of the rows that are rows of the run up to rounding; NaN if that cannot be told."""
        if self.chance > MAX_CHANCE:
            return float("nan")
        every = np.concatenate(list(self.rows.values()))
        every = every[_positions(len(every), MAX_COUNTED // 4)]
        return min(1.0, _hits(every, self.steps, self.hashes) / max(1, len(every)) * self.total / len(self.hashes))

    @property
    def comparable(self) -> bool:
        """Whether equal rows can be told from others, if values are rounded."""
        return self.chance <= MAX_CHANCE

    @property
    def comparable_without(self) -> bool:
        """Whether equal rows can be told from others, if one column is changed, whichever it is."""
        return bool(self.chance_without) and max(self.chance_without) <= MAX_CHANCE

    def trained_on(self, split: str, exactly: int) -> Found | None:
        """Count the training rows of the run in a split.

        Args:
            split: the split.
            exactly: number of rows that are known to be training rows.

        Returns:
            The count, or None if it is not clearly more than `exactly`.
        """
        if (split, exactly) not in self._found:
            self._found[split, exactly] = self._search(split, exactly)
        return self._found[split, exactly]

    def _search(self, split: str, exactly: int) -> Found | None:
        trained = self.hashes[: _training_count(self.total, self.old["train"], MAX_KEPT)]
        found = self._count(split, trained, self.chance, (), exactly)
        if self.without is None or (found is not None and found.count >= ENOUGH * self.sizes[split]):
            return found
        groups = zip(self.groups, self.without, self.chance_without, strict=True)
        others = [self._count(split, hashes, chance, group, exactly) for group, hashes, chance in groups]
        most = max((one for one in others if one is not None), key=lambda one: one.count, default=None)
        return most if found is None or (most is not None and most.count > 2 * found.count) else found

    def _count(self, split: str, trained: Hashes, chance: float, without: Sequence[int], exactly: int) -> Found | None:
        total = self.sizes[split]
        if not total or not len(trained) or chance > MAX_CHANCE:
            return None
        rows = self.rows[split]
        rows = rows[_positions(total, MAX_COUNTED // max(1, len(self.groups)) if without else MAX_COUNTED)]
        kept = len(trained) / self.old["train"]
        hits = _hits(rows, self.steps, trained, without)
        expected = chance * len(rows) * (1 - exactly / total)
        if hits <= exactly / total * len(rows) * kept + expected + 4 * expected**0.5:
            return None
        if kept == 1 and len(rows) == total and expected < 0.5:
            return Found(hits, False, without) if hits > exactly else None
        share = (hits - chance * len(rows)) / (1 - chance) / len(rows) / kept
        count = min(total, round(share * total))
        return Found(count, True, without) if count > exactly else None


def _groups(width: int) -> list[list[int]]:
    """Return the columns that are left out together."""
    if width < 2:
        return []
    return [list(range(start, width, MAX_GROUPS)) for start in range(min(width, MAX_GROUPS))]


def _positions(count: int, limit: int) -> NDArray[np.int64]:
    """Return at most so many of the positions 0, ..., count − 1, rising, chosen by a fixed rule as if at random."""
    if count <= limit:
        return np.arange(count)
    keys = mix(np.arange(count, dtype=np.uint64) + STEP)
    return np.sort(np.argpartition(keys, limit)[:limit])


def _training_count(total: int, trained: int, limit: int) -> int:
    """Return how many of the positions that are kept are training rows, which come first."""
    return int(np.searchsorted(_positions(total, limit), trained))


def _training_rows(total: int, trained: int, limit: int) -> NDArray[np.int64]:
    return _positions(total, limit)[: _training_count(total, trained, limit)]


def _grid_steps(table: Values) -> NDArray[np.float64]:  # (k,)
    """Return the step of the grid in each column.

    It is fine enough that rows of other data rarely hit an occupied cell, even if one column is left out.
    """
    spread, largest = column_spreads(table)
    looked_at = table[:4096]
    distinct = [len(np.unique(column)) for column in looked_at.T]
    informative = float(np.sum(np.log(distinct))) / np.log(max(2, len(looked_at)))
    dimensions = max(1.0, informative - 1)
    cells = len(table) * 2 ** min(dimensions, MAX_BORDERS) / CHANCE
    step = float(np.clip(cells ** (-1 / dimensions), FINEST, COARSEST))
    steps = np.maximum(step * spread, SINGLE_PRECISION * largest)
    steps = np.maximum(steps, np.minimum(SIX_DIGITS * largest, spread / 16))
    return np.where(np.isfinite(steps) & (steps > 0), steps, 1.0)


def _chance(table: Values, steps: NDArray[np.float64], without: Sequence[int]) -> float:
    """Return about how likely a row of other data hits an occupied cell, from how often rows share one."""
    if not len(table):
        return 1.0
    exact = len(np.unique(hash_rows(np.delete(table, list(without), 1))))
    shared = exact - len(np.unique(_hashes(table, steps, without)))
    crossed = 2 ** min(table.shape[1] - len(without), MAX_BORDERS)
    repeated = len(np.unique(hash_rows(table))) - exact  # rows that are equal without the columns left out
    return (2 * crossed * shared + 2 * repeated + 3) / len(table)


def _hits(rows: Values, steps: NDArray[np.float64], known: Hashes, without: Sequence[int] = ()) -> int:
    """Return how many rows are known, in their cell or a neighbour.

    Many rows in one cell count once: they lie close, and need not be copies.
    """
    known = np.unique(known)
    found, hit = np.zeros(len(rows), bool), np.zeros(len(known), bool)
    for hashes in _neighbours(rows, steps, without):
        place = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        same = known[place] == hashes
        found |= same
        hit[place[same]] = True
    return int(min(found.sum(), hit.sum()))


def _hashes(rows: Values, steps: NDArray[np.float64], without: Sequence[int] = ()) -> Hashes:
    return next(_neighbours(rows, steps, without, borders=0))


def _neighbours(
    rows: Values, steps: NDArray[np.float64], without: Sequence[int] = (), borders: int = MAX_BORDERS
) -> Iterator[Hashes]:
    """Yield the hash of each row's cell, then those of the cells across its nearest borders."""
    columns = [column for column in range(rows.shape[1]) if column not in without]
    salt = salts(rows.shape[1])
    total = np.zeros(len(rows), np.uint64)
    nearest = np.full((borders, len(rows)), np.inf)
    changes = np.zeros((borders, len(rows)), np.uint64)
    for column in columns:
        place = rows[:, column].astype(np.float64) / steps[column]
        cell = np.rint(place)
        own = mix(rounded(cell, 1.0) + salt[column])
        total += own
        if not borders:
            continue
        side = np.where(place >= cell, 1.0, -1.0)
        distance = 0.5 - np.abs(place - cell)
        change = mix(rounded(cell + side, 1.0) + salt[column]) - own
        for kept in range(borders):  # insert it in order of distance
            closer = distance < nearest[kept]
            nearest[kept], distance = np.where(closer, (distance, nearest[kept]), (nearest[kept], distance))
            changes[kept], change = np.where(closer, (change, changes[kept]), (changes[kept], change))
    for crossed in product([False, True], repeat=min(borders, len(columns))):
        moved = total.copy()
        for change, across in zip(changes, crossed, strict=False):
            if across:
                moved += change
        yield mix(moved)


def _tensor(hashes: Hashes) -> torch.Tensor:
    return torch.from_numpy(hashes.view(np.int64).copy())
