"""Warnings of what makes the likelihoods of a table meaningless.

These are ties, copies, dependent columns, outliers and row counters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from flows.datasets.tables.dependence import find_dependence, find_surfaces
from flows.datasets.tables.ties import MAX_ROWS, Ties, find_ties, row_keys

Values = NDArray[np.float64]

MAX_WIDTHS = 1e4  # distance of a value from the median in widths of the middle 98%; more is an outlier
MIN_ROWS_TO_COUNT = 10  # fewer evenly spaced rows may be chance
NEIGHBOURS = 8  # training rows that a test row is compared with, to tell copies from chance
CLOSE = 1e-4  # of the distance of the last of these neighbours
MIN_NEAR_COPIES = 3  # fewer are chance
NEAR_SHARE = 0.01  # of the test rows, likewise
MIN_ROWS_TO_LOOK_AT = 200
MAX_DIMENSION_OF_TREES = 6  # in more, they prune nothing
ROWS_AT_ONCE = 32  # rows whose distances to all others are in memory
MAX_DISTANCES = 10**9  # numbers that are compared to find near copies
MAX_NAMES = 5  # in a message


def warnings_about(
    table: Values,
    split: Mapping[str, NDArray[np.int64]],  # rows of "train", "validation" and "test"
    columns: Sequence[str],
    continuous: Sequence[bool],  # False for a column that noise makes continuous
    source: str,
    contexts: Mapping[str, Values] | None = None,  # columns that the table is conditional on
) -> Iterator[str]:
    """Yield one sentence for each kind of trouble."""
    keep = np.array(continuous, dtype=bool)
    given = contexts or {}
    ties = find_ties(table, np.column_stack(list(given.values())) if given else None)
    yield from _about_ties([found for found in ties if keep[found.column]], columns, source)
    if keep.any():
        whole = np.column_stack([*given.values(), table[:, keep]])
        yield from _about_copies(row_keys(whole), split, source)
        yield from _about_near_copies(whole, split, source)
        kept = [columns[i] for i in np.flatnonzero(keep).tolist()]
        yield from _about_dependence(whole[split["train"]], [*given, *kept], source, first=len(given))
        smooth = [i for i in np.flatnonzero(keep).tolist() if i not in {found.column for found in ties}]
        yield from _about_surfaces(table[split["train"]][:, smooth], [columns[i] for i in smooth], source)
    yield from _about_outliers(table, split["train"], columns, source)
    yield from _about_counters(table, columns, source)


def _about_ties(found: Sequence[Ties], columns: Sequence[str], source: str) -> Iterator[str]:
    for mild in (False, True):
        group = [ties for ties in found if ties.is_mild == mild]
        if not group:
            continue
        named = listed(f"{columns[t.column]!r} ({t.distinct:,} distinct values in {t.rows:,} rows)" for t in group)
        who = f"column {named} repeats" if len(group) == 1 else f"columns {named} repeat"
        if mild:
            yield (
                f"{source}: {who} values, as rounding leaves them. Likelihoods are nearly right while the density is "
                "wide beside the rounding, and can grow without limit where it is not; dequantise_columns=auto "
                "rules that out"
            )
            continue
        cure = "dequantise with dequantise_columns=auto, or drop with columns=[...]"
        if all(ties.unit is None for ties in group):
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
    train = train[:MAX_ROWS]
    asked = test[: max(MIN_ROWS_TO_LOOK_AT, MAX_DISTANCES // (train.size or 1))]
    if len(train) < 2 * NEIGHBOURS or not len(asked):
        return 0, len(asked)
    spread = np.subtract(*np.quantile(train, [0.9, 0.1], axis=0))
    scale = np.where(spread > 0, spread, 1)
    distances = _nearest_distances(asked / scale, train / scale)
    near = (distances[:, 0] > 0) & (distances[:, 0] < CLOSE * distances[:, -1])
    return int(near.sum()), len(asked)


def _nearest_distances(asked: Values, rows: Values) -> Values:  # (n, NEIGHBOURS), rising
    """The distances to the nearest rows: by a tree in few dimensions, where it prunes, and by products in many."""
    if rows.shape[1] <= MAX_DIMENSION_OF_TREES:
        from scipy.spatial import KDTree  # slow to import

        return KDTree(rows).query(asked, NEIGHBOURS)[0]
    centre = rows.mean(0)
    asked, rows = asked - centre, rows - centre
    squares, found = np.square(rows).sum(1), []
    for block in np.array_split(asked, max(1, len(asked) // ROWS_AT_ONCE)):
        nearest = np.argpartition(squares - 2 * block @ rows.T, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]
        found.append(np.sort(np.linalg.norm(rows[nearest] - block[:, None], axis=2), axis=1))  # without cancellation
    return np.concatenate(found)


def _about_dependence(train: Values, columns: Sequence[str], source: str, first: int = 0) -> Iterator[str]:
    found = [(column, others) for column, others in find_dependence(train[:MAX_ROWS]) if column >= first]
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


def _about_surfaces(train: Values, columns: Sequence[str], source: str) -> Iterator[str]:
    dependent = {column for column, _ in find_dependence(train[:MAX_ROWS])}  # which has been said
    kept = [i for i in range(len(columns)) if i not in dependent]
    found = [[columns[kept[i]] for i in group] for group in find_surfaces(train[:, kept])]
    if found:
        named = "; ".join(" and ".join(map(repr, group)) for group in found[:MAX_NAMES])
        more = f"; and {len(found) - MAX_NAMES} more groups" if len(found) > MAX_NAMES else ""
        yield (
            f"{source}: rows lie on a curve or surface in the columns {named}{more}, as where one is a function of the "
            "others, so they fill no volume and a density can grow without limit; drop one with columns=[...]"
        )


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
