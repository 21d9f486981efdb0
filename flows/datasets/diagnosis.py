"""What makes the likelihoods of a table meaningless: ties, copies, dependent columns, outliers, row counters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

MAX_ROWS = 100_000  # rows that ties and dependence are looked for in
MAX_REPEATED = 0.1  # of the values of a column; continuous numbers in float32 or float64 repeat less
ATOM_SHARE = 0.01  # of the rows with one and the same value
MAX_RESIDUAL = 1e-6  # of the standard deviation, for a column that follows from others
MAX_WIDTHS = 1e4  # distance of a value from the median in widths of the middle 98%; more is an outlier
MIN_ROWS_TO_COUNT = 10  # fewer evenly spaced rows may be chance
NEIGHBOURS = 8  # training rows that a test row is compared with, to tell copies from chance
CLOSE = 1e-4  # of the distance of the last of these neighbours
MIN_NEAR_COPIES = 3  # fewer are chance
NEAR_SHARE = 0.01  # of the test rows, likewise
MIN_ROWS_TO_LOOK_AT = 200
MAX_DISTANCES = 10**9  # numbers that are compared to find near copies
MAX_NAMES = 5  # in a message


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


def find_ties(table: Values) -> list[Ties]:
    """Return the columns whose values repeat. Copies of whole rows count once."""
    _, first = np.unique(row_keys(table), return_index=True)
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


def warnings_about(
    table: Values,
    split: Mapping[str, NDArray[np.int64]],  # rows of "train", "validation" and "test"
    columns: Sequence[str],
    continuous: Sequence[bool],  # False for a column that noise makes continuous
    source: str,
) -> Iterator[str]:
    """Yield one sentence for each kind of trouble."""
    keep = np.array(continuous, dtype=bool)
    yield from _about_ties(table, columns, keep, source)
    if keep.any():
        yield from _about_copies(row_keys(table[:, keep]), split, source)
        yield from _about_near_copies(table[:, keep], split, source)
        yield from _about_dependence(
            table[split["train"]][:, keep], [columns[i] for i in np.flatnonzero(keep).tolist()], source
        )
    yield from _about_outliers(table, split["train"], columns, source)
    yield from _about_counters(table, columns, source)


def _about_ties(table: Values, columns: Sequence[str], keep: NDArray[np.bool_], source: str) -> Iterator[str]:
    found = [ties for ties in find_ties(table) if keep[ties.column]]
    if not found:
        return
    named = listed(f"{columns[t.column]!r} ({t.distinct:,} distinct values in {t.rows:,} rows)" for t in found)
    who = f"column {named} repeats" if len(found) == 1 else f"columns {named} repeat"
    cure = "dequantise with dequantise_columns=auto, or drop with columns=[...]"
    if all(ties.unit is None for ties in found):
        cure = "drop with columns=[...], or model the rows with the repeated values apart"
    yield (
        f"{source}: {who} values, where a density can grow without limit, so likelihoods of this table "
        f"have no meaning; {cure}"
    )


def _about_copies(keys: NDArray[np.uint64], split: Mapping[str, NDArray[np.int64]], source: str) -> Iterator[str]:
    copies = len(keys) - len(np.unique(keys))
    if not copies:
        return
    known = {part: int(np.isin(keys[split[part]], keys[split["train"]]).sum()) for part in ("validation", "test")}
    found = f"{source}: {copies:,} of {len(keys):,} rows are duplicates of other rows"
    if not any(known.values()):
        yield (
            f"{found}, all in the same part of the split. Each copy counts in the likelihood of its part; drop the "
            "duplicates if they are no data of their own"
        )
        return
    yield (
        f"{found}, and {known['test']:,} of {len(split['test']):,} test rows and {known['validation']:,} of "
        f"{len(split['validation']):,} validation rows are also training rows, so the test likelihood rewards memory; "
        "drop the duplicates, keep copies together with split_by=content, or related rows with group_column=..."
    )


def _about_near_copies(table: Values, split: Mapping[str, NDArray[np.int64]], source: str) -> Iterator[str]:
    known, asked = near_copies(table[split["test"]], table[split["train"]])
    if known >= max(MIN_NEAR_COPIES, NEAR_SHARE * asked):
        yield (
            f"{source}: {known:,} of {asked:,} test rows equal a training row up to rounding, so the test likelihood "
            "rewards memory; drop the copies, or keep related rows together with group_column=..."
        )


def near_copies(test: Values, train: Values) -> tuple[int, int]:
    """Count test rows that nearly equal a training row, among the first so many.

    The nearest training row of such a row is 10,000 times closer than its eighth nearest. That is so for one row in a
    thousand if rows are independent and continuous, however dense they lie, and for fewer the more columns there are.

    Returns:
        The count, and how many test rows were looked at.
    """
    from scipy.spatial import KDTree  # slow to import

    train = train[:MAX_ROWS]
    asked = test[: max(MIN_ROWS_TO_LOOK_AT, MAX_DISTANCES // (train.size or 1))]
    if len(train) < 2 * NEIGHBOURS or not len(asked):
        return 0, len(asked)
    spread = np.subtract(*np.quantile(train, [0.9, 0.1], axis=0))
    scale = np.where(spread > 0, spread, 1)
    distances = KDTree(train / scale).query(asked / scale, NEIGHBOURS)[0]
    near = (distances[:, 0] > 0) & (distances[:, 0] < CLOSE * distances[:, -1])
    return int(near.sum()), len(asked)


def _about_dependence(train: Values, columns: Sequence[str], source: str) -> Iterator[str]:
    found = list(find_dependence(train[:MAX_ROWS]))
    if not found:
        return
    named = listed(
        f"{columns[column]!r} ({'of ' + ' and '.join(repr(columns[i]) for i in others[:3]) if others else 'constant'}"
        f"{' and others' if len(others) > 3 else ''})"
        for column, others in found
    )
    are = f"column {named} is a linear function" if len(found) == 1 else f"columns {named} are linear functions"
    yield (
        f"{source}: {are} of other columns, so the rows fill no volume and a density can grow without limit; drop with "
        "columns=[...]"
    )


def find_dependence(table: Values) -> Iterator[tuple[int, list[int]]]:
    """Yield each column that is a linear function of those before it, and the ones that it depends on."""
    centred = table - table.mean(0)
    sd = centred.std(0)
    scaled = centred / np.where(sd > 0, sd, 1)
    basis: list[Values] = []
    independent: list[int] = []
    for column in range(table.shape[1]):
        if len(independent) >= len(table) - 2:
            return  # so few rows lie in a plane whatever they are
        residual = scaled[:, column].copy()
        if basis:
            directions = np.stack(basis)
            for _ in range(2):  # the second pass removes the rounding of the first
                residual -= directions.T @ (directions @ residual)
        spread = float(np.sqrt(np.mean(residual**2)))
        if spread > _tolerance(table[:, column], float(sd[column])):
            basis.append(residual / np.linalg.norm(residual))
            independent.append(column)
            continue
        weights = np.linalg.lstsq(scaled[:, independent], scaled[:, column], rcond=None)[0]
        yield column, [i for i, weight in zip(independent, weights, strict=True) if abs(weight) > 1e-3]


def _tolerance(values: Values, sd: float) -> float:
    """Return the residual, in standard deviations, that rounding explains."""
    unit = rounding_unit(np.unique(values))
    rounded = 0.0 if unit is None or sd == 0 else unit / sd
    spacing = float(np.spacing(np.abs(values).max())) / sd if sd > 0 else 0.0
    return max(MAX_RESIDUAL, 4 * spacing, rounded if rounded < 0.01 else 0.0)


def _about_outliers(table: Values, train: NDArray[np.int64], columns: Sequence[str], source: str) -> Iterator[str]:
    named = []
    for column, values in enumerate(table.T):
        middle = np.median(values[train])
        # Never the largest or smallest value, which may be the outlier.
        low = np.quantile(values[train], 0.01, method="higher") if len(train) > 2 else middle
        high = np.quantile(values[train], 0.99, method="lower") if len(train) > 2 else middle
        far = np.abs(values - middle)
        if high > low and far.max() > MAX_WIDTHS * (high - low):
            row = int(far.argmax())
            named.append(f"{columns[column]!r} ({values[row]:g} in row {row + 1}, 98% lie from {low:g} to {high:g})")
    if named:
        yield (
            f"{source}: outliers in {'column' if len(named) == 1 else 'columns'} {listed(named)}, beside which all "
            "other rows look equal once they are standardised; remove these rows, or take logarithms"
        )


def _about_counters(table: Values, columns: Sequence[str], source: str) -> Iterator[str]:
    if len(table) < MIN_ROWS_TO_COUNT:
        return
    steps = np.diff(table, axis=0)
    even = (steps[0] != 0) & (np.abs(steps - steps[0]).max(0) <= 1e-9 * np.abs(steps[0]))
    named = [repr(name) for name, counts in zip(columns, even.tolist(), strict=True) if counts]
    if named:
        yield (
            f"{source}: {'column' if len(named) == 1 else 'columns'} {listed(named)} only "
            f"{'counts' if len(named) == 1 else 'count'} the rows, like the index of a data frame, and no density "
            "describes that; drop with columns=[...]"
        )


def listed(items: Iterable[str]) -> str:
    """The first few items, and how many more there are."""
    every = list(items)
    return ", ".join(every[:MAX_NAMES]) + (f" and {len(every) - MAX_NAMES} more" if len(every) > MAX_NAMES else "")
