"""Columns of a table that follow from others."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from flows.datasets.tables.ties import rounding_unit

Values = NDArray[np.float64]

MAX_RESIDUAL = 1e-6  # of the standard deviation, for a column that follows from others
MAX_LOOKED_AT = 2000  # rows among which neighbours are looked for
NUM_CENTRES = 100  # rows whose neighbours are looked at
MIN_LOOKED_AT = 200  # fewer rows lie too far apart
NEAREST = (8, 32)  # neighbours at two scales, beside one for each column
NUM_KNOTS = 33  # quantiles by which columns get the same distribution
FLAT = 0.1  # thickness of a neighbourhood over its width; that of a cloud is about 1/2
CURVED = 2.5  # times flatter at the smaller scale, as a smooth surface is; noise about it stays
EXACT = 1e-7  # the thickness of what has no curvature
MAX_COLUMNS = {2: 20, 3: 9, 4: 6}  # of a table whose pairs, triples and so on are looked at


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


def find_surfaces(table: Values) -> Iterator[tuple[int, ...]]:
    """Yield the smallest groups of columns whose rows lie on a curve or surface, where one follows from the others.

    Rows near each other then lie in a plane, and the better, the nearer they are. Rows with noise about a surface do
    not, and neither do those of a density.
    """
    from scipy.spatial import KDTree  # slow to import

    rng = np.random.default_rng(0)
    rows = table[rng.permutation(len(table))[:MAX_LOOKED_AT]]
    rows = np.unique(rows, axis=0)
    if len(rows) < MIN_LOOKED_AT:
        return
    even = np.stack([_evenly(column) for column in rows.T], axis=1)
    centres = even[rng.permutation(len(even))[:NUM_CENTRES]]
    found: list[tuple[int, ...]] = []
    for size, most in MAX_COLUMNS.items():
        if table.shape[1] > most:
            continue
        for group in combinations(range(table.shape[1]), size):
            if any(set(known) <= set(group) for known in found):
                continue
            points = even[:, group]
            near = np.asarray(KDTree(points).query(centres[:, group], NEAREST[1] + size)[1], np.int64)
            fine = _thickness(points, near[:, : NEAREST[0] + size])
            if fine[1] > FLAT:
                continue
            coarse = _thickness(points, near)
            if fine[0] < EXACT or coarse[0] > CURVED * fine[0]:
                found.append(group)
                yield group


def _evenly(column: Values) -> Values:
    """The column stretched so that its values lie about evenly between 0 and 1."""
    knots = np.unique(np.quantile(column, np.linspace(0, 1, NUM_KNOTS)))
    return np.interp(column, knots, np.linspace(0, 1, len(knots)))


def _thickness(points: Values, near: NDArray[np.int64]) -> tuple[float, float]:
    """The median thickness of neighbourhoods, and over their width."""
    clouds = points[near]
    sizes = np.linalg.svd(clouds - clouds.mean(1, keepdims=True), compute_uv=False)
    return float(np.median(sizes[:, -1])), float(np.median(sizes[:, -1] / np.maximum(sizes[:, -2], 1e-30)))
