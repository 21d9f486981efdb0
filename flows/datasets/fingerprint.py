"""Fingerprints: what identifies the data of a run and their split, in a few numbers and hashes of rows.

A fingerprint is kept in every checkpoint. `flows.datasets.recognition` compares it with data.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from flows.datasets.base import Dataset

Rows = Mapping[str, NDArray[Any]]  # (n, k) by split

SPLITS = ("train", "validation", "test")
MAX_KEPT = 2**16  # hashes of training rows in a fingerprint, 8 bytes each
MAX_SETTING = 64  # numbers in a setting that is kept
BLOCK = 2**20  # words of pictures that are hashed at once
DIGITS = 30  # binary digits below the spread of a column that are compared
STEP, FIRST, SECOND = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def fingerprint_of_rows(
    rows: Rows,
    columns: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    labels: Rows | None = None,  # (n, ...) by split
    fixed: bool = True,
) -> dict[str, Any]:
    """Return the fingerprint of finite data.

    It tells whether rows were added, removed, changed or reordered, whether columns were, and which rows were trained
    on. Rows are hashed to 64 bits. Numbers are rounded first, to 2⁻³⁰ of the spread of their column, so that a file
    that was saved in another format is recognised. Of more than 65,536 training rows, those with the smallest hashes
    are kept.

    Args:
        rows: the examples of each split, without noise.
        columns: names of the columns.
        settings: plain values that decide the split, and what else the training data depend on.
        labels: the class or context of each example, if flows are conditional on it.
        fixed: whether "train" holds all training rows, in the order of training.
    """
    units = None if columns is None else rounding_steps(np.concatenate([rows[split] for split in SPLITS]))
    hashes = {split: hash_rows(rows[split], units) for split in SPLITS}
    every = np.concatenate([hashes[split] for split in SPLITS])
    trained = np.unique(hashes["train"])
    return {
        "kind": "rows",
        "rows": {split: len(hashes[split]) for split in SPLITS},
        "digest": digest(every),
        "parts": {split: digest(hashes[split]) for split in SPLITS},
        "order": {split: digest(hashes[split], in_order=True) for split in SPLITS},
        "units": None if units is None else [float(unit) for unit in units],
        "columns": None if units is None else column_digests(rows, units),
        "labels": None if labels is None else label_digest(hashes, labels),
        "settings": dict(settings or {}),
        "fixed": fixed,
        "trained": torch.from_numpy(trained[:MAX_KEPT].view(np.int64).copy()),
        "trained_distinct": len(trained),
    }


def fingerprint_of_draws(dataset: Dataset, probe: NDArray[np.float64] | None) -> dict[str, Any]:
    """Return the fingerprint of data that are drawn afresh: settings, and numbers that follow from all of them."""
    return {
        "kind": "draws",
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "probe": None if probe is None else torch.from_numpy(probe.copy()),
        "settings": plain_settings(dataset),
        "sizes": {"num_validation": dataset.num_validation, "num_test": dataset.num_test},
    }


def plain_settings(dataset: object) -> dict[str, Any]:
    """Return the constructor's arguments that the object keeps under their names, where they are plain values."""
    try:
        names = list(inspect.signature(type(dataset)).parameters)
    except (TypeError, ValueError):
        return {}
    found = {name: _plain(getattr(dataset, name, None)) for name in names if not name.startswith("num_")}
    return {name: value for name, value in found.items() if value is not None}


def _plain(value: object) -> Any:
    if isinstance(value, torch.Tensor | np.ndarray):
        value = value.tolist() if torch.as_tensor(value).numel() <= MAX_SETTING else None
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    if isinstance(value, list | tuple) and len(value) <= MAX_SETTING:
        inside = [_plain(entry) for entry in value]
        return None if None in inside else inside
    return None


def rounding_steps(table: NDArray[Any]) -> NDArray[np.float64]:  # (k,)
    """Return the step of each column to which values are rounded before they are compared."""
    columns = (np.ascontiguousarray(column) for column in table.T)  # ten times faster than all at once
    quartiles = [np.quantile(column, [0.25, 0.75], method="nearest") for column in columns]
    low, high = np.array(quartiles, np.float64).T
    largest = np.maximum(np.abs(low), np.abs(high))
    largest = np.where(largest > 0, largest, np.abs(table).max(0))
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        spread = np.where(high > low, high - low, largest)
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
        return _mix(_hash_bytes(rows))
    total = np.zeros(len(rows), np.uint64)
    chosen = list(range(rows.shape[1]) if order is None else order)
    for column, unit, salt in zip(chosen, units, _salts(len(chosen)), strict=True):
        total += _mix(_rounded(rows[:, column], unit) + salt)
    return _mix(total)


def column_digests(
    rows: Rows, units: Sequence[float] | NDArray[np.float64], order: Sequence[int] | None = None
) -> list[str]:
    """Return a digest of each column that does not depend on the order of the rows."""
    chosen = range(len(units)) if order is None else order
    digests = []
    for position, column in enumerate(chosen):
        values = [_rounded(rows[split][:, column], units[position]) for split in SPLITS]
        digests.append(digest(np.concatenate(values)))
    return digests


def label_digest(hashes: Rows, labels: Rows) -> str:
    """Return a digest of which example has which class."""
    given = {split: np.ascontiguousarray(labels[split]).reshape(len(hashes[split]), -1) for split in SPLITS}
    return digest(np.concatenate([_mix(hashes[split] + STEP * hash_rows(given[split])) for split in SPLITS]))


def digest(hashes: NDArray[np.uint64], in_order: bool = False) -> str:
    """Return a digest of numbers, by default whatever their order."""
    mixed = _mix(hashes + _salts(len(hashes))) if in_order else _mix(hashes)
    return f"{int(mixed.sum(dtype=np.uint64)):016x}"


def content_keys(table: NDArray[np.float64], seed: int) -> NDArray[np.uint64]:  # (n,)
    """Return a pseudo-random number for each row that depends on its values alone, in whatever order of columns."""
    start = _mix(np.full(1, seed, np.uint64) + STEP)
    total = np.zeros(len(table), np.uint64)
    for values in table.T:
        bits = (np.ascontiguousarray(values) + 0.0).view(np.uint64)
        total += _mix(((bits + np.uint64(0x800)) >> np.uint64(12)) + start)  # the last 12 bits vary between readers
    return _mix(total + start)


def word_keys(words: NDArray[Any], seed: int) -> NDArray[np.uint64]:  # (n,)
    """Return a pseudo-random number for each word or number, the same for equal ones."""
    values, member = np.unique(words, return_inverse=True)
    texts = (f"{seed} {value}".encode() for value in values.tolist())
    keys = [int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") for text in texts]
    return np.array(keys, np.uint64)[member]


def _rounded(values: NDArray[Any], unit: float) -> NDArray[np.uint64]:
    with np.errstate(over="ignore", invalid="ignore"):
        return (np.rint(values.astype(np.float64) / unit) + 0.0).view(np.uint64)


def _hash_bytes(rows: NDArray[Any]) -> NDArray[np.uint64]:
    flat = np.ascontiguousarray(rows).reshape(len(rows), -1)
    width = flat.shape[1] * flat.dtype.itemsize
    words = -(-width // 8)
    salts = _salts(words)
    total = np.empty(len(flat), np.uint64)
    step = max(1, BLOCK // max(1, words))
    for start in range(0, len(flat), step):
        part = flat[start : start + step]
        padded = np.zeros((len(part), 8 * words), np.uint8)
        padded[:, :width] = part.view(np.uint8)
        total[start : start + step] = _mix(padded.view(np.uint64) + salts).sum(1, dtype=np.uint64)
    return total


def _salts(count: int) -> NDArray[np.uint64]:
    """Return a number for each position."""
    return STEP * np.arange(1, count + 1, dtype=np.uint64)


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread the bits of whole numbers. [Steele, Lea & Flood 2014, SplitMix64]"""
    bits = (bits ^ (bits >> np.uint64(30))) * FIRST
    bits = (bits ^ (bits >> np.uint64(27))) * SECOND
    return bits ^ (bits >> np.uint64(31))
