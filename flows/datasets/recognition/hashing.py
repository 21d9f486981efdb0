"""64-bit hashes of rows of numbers, and the rounding before it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 2**20  # words of pictures that are hashed at once
DIGITS = 30  # binary digits below the spread of a column that are compared
STEP, FIRST, SECOND = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def column_spreads(table: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:  # (k,), (k,)
    """Return the distance of the quartiles of each column, and the larger of them in magnitude."""
    columns = (np.ascontiguousarray(column) for column in table.T)  # ten times faster than all at once
    quartiles = [np.quantile(column, [0.25, 0.75], method="nearest") for column in columns]
    low, high = np.array(quartiles, np.float64).T
    largest = np.maximum(np.abs(low), np.abs(high))
    largest = np.where(largest > 0, largest, np.abs(table).max(0))
    with np.errstate(over="ignore"):
        return np.where(high > low, high - low, largest), largest


def rounding_steps(table: NDArray[Any]) -> NDArray[np.float64]:  # (k,)
    """Return the step of each column to which values are rounded before they are compared."""
    spread, largest = column_spreads(table)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        fine = np.exp2(np.floor(np.log2(spread)) - DIGITS)
        coarse = 8 * np.spacing(largest)  # what readers of text may differ in
    steps = np.maximum(fine, coarse)
    return np.where(np.isfinite(steps) & (steps > 0), steps, 1.0)


def hash_rows(
    rows: NDArray[Any],  # (n, k)
    units: Sequence[float] | NDArray[np.float64] | None = None,  # None: exact
    order: Sequence[int] | None = None,  # of the columns
) -> NDArray[np.uint64]:  # (n,)
    """Return a 64-bit hash of each row."""
    if units is None:
        return mix(_hash_bytes(rows))
    total = np.zeros(len(rows), np.uint64)
    chosen = list(range(rows.shape[1]) if order is None else order)
    for column, unit, salt in zip(chosen, units, salts(len(chosen)), strict=True):
        total += mix(rounded(rows[:, column], unit) + salt)
    return mix(total)


def digest(hashes: NDArray[np.uint64], in_order: bool = False) -> str:
    """Return a digest of numbers, by default whatever their order."""
    mixed = mix(hashes + salts(len(hashes))) if in_order else mix(hashes)
    return f"{int(mixed.sum(dtype=np.uint64)):016x}"


def content_keys(table: NDArray[np.float64], seed: int) -> NDArray[np.uint64]:  # (n,)
    """Return a pseudo-random number for each row that depends on its values alone, in whatever order of columns."""
    start = mix(np.full(1, seed, np.uint64) + STEP)
    total = np.zeros(len(table), np.uint64)
    for values in table.T:
        bits = (np.ascontiguousarray(values) + 0.0).view(np.uint64)
        total += mix(((bits + np.uint64(0x800)) >> np.uint64(12)) + start)  # the last 12 bits vary between readers
    return mix(total + start)


def word_keys(words: NDArray[Any], seed: int) -> NDArray[np.uint64]:  # (n,)
    """Return a pseudo-random number for each word or number, the same for equal ones."""
    values, member = np.unique(words, return_inverse=True)
    texts = (f"{seed} {value}".encode() for value in values.tolist())
    keys = [int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") for text in texts]
    return np.array(keys, np.uint64)[member]


def rounded(values: NDArray[Any], unit: float) -> NDArray[np.uint64]:
    with np.errstate(over="ignore", invalid="ignore"):
        return (np.rint(values.astype(np.float64) / unit) + 0.0).view(np.uint64)


def _hash_bytes(rows: NDArray[Any]) -> NDArray[np.uint64]:
    flat = np.ascontiguousarray(rows).reshape(len(rows), -1)
    width = flat.shape[1] * flat.dtype.itemsize
    words = -(-width // 8)
    salt = salts(words)
    total = np.empty(len(flat), np.uint64)
    step = max(1, BLOCK // max(1, words))
    for start in range(0, len(flat), step):
        part = flat[start : start + step]
        padded = np.zeros((len(part), 8 * words), np.uint8)
        padded[:, :width] = part.view(np.uint8)
        total[start : start + step] = mix(padded.view(np.uint64) + salt).sum(1, dtype=np.uint64)
    return total


def salts(count: int) -> NDArray[np.uint64]:
    """Return a number for each position."""
    return STEP * np.arange(1, count + 1, dtype=np.uint64)


def mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread the bits of whole numbers. [Steele, Lea & Flood 2014, SplitMix64]"""
    bits = (bits ^ (bits >> np.uint64(30))) * FIRST
    bits = (bits ^ (bits >> np.uint64(27))) * SECOND
    return bits ^ (bits >> np.uint64(31))
