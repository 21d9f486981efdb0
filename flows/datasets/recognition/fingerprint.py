"""Fingerprints: what identifies the data of a run and their split, in a few numbers and hashes of rows.

A fingerprint is kept in every checkpoint. `flows.datasets.recognition.comparison` compares it with data.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from flows.datasets.recognition.hashing import STEP, digest, hash_rows, mix, rounded, rounding_steps
from flows.datasets.recognition.rounded_rows import rounded_entry

if TYPE_CHECKING:
    from flows.datasets.base import Dataset

Rows = Mapping[str, NDArray[Any]]  # (n, k) by split

SPLITS = ("train", "validation", "test")
MAX_KEPT = 2**16  # hashes of training rows in a fingerprint, 8 bytes each
MAX_SETTING = 64  # numbers in a setting that is kept


def fingerprint_of_rows(
    rows: Rows,
    columns: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    labels: Rows | None = None,  # (n, ...) by split
    fixed: bool = True,
    joined: bool = False,
) -> dict[str, Any]:
    """Return the fingerprint of finite data.

    It tells whether rows were added, removed, changed or reordered, whether columns were, and which rows were trained
    on. Rows are hashed to 64 bits. Numbers are rounded first, to 2⁻³⁰ of the spread of their column, so that a file
    that was saved in another format is recognised. Of more than 65,536 training rows, those with the smallest hashes
    are kept. For tables, `rounded_entry` adds coarse hashes.

    Args:
        rows: the examples of each split, without noise.
        columns: names of the columns.
        settings: plain values that decide the split, and what else the training data depend on.
        labels: the class or context of each example, if flows are conditional on it.
        fixed: whether "train" holds all training rows, in the order of training.
        joined: whether labels are a part of what a row is, as the conditions of a table are.
    """
    units = None if columns is None else rounding_steps(np.concatenate([rows[split] for split in SPLITS]))
    hashes = {split: hash_rows(rows[split], units) for split in SPLITS}
    joined = joined and labels is not None
    label_units = None
    if joined and labels is not None:
        label_units = rounding_steps(np.concatenate([labels[split] for split in SPLITS])).tolist()
        hashes, labels = joined_hashes(hashes, labels, label_units), None
    every = np.concatenate([hashes[split] for split in SPLITS])
    trained = np.unique(hashes["train"])
    rounds = units is not None and fixed and not joined
    return {
        "kind": "rows",
        "rows": {split: len(hashes[split]) for split in SPLITS},
        "digest": digest(every),
        "parts": {split: digest(hashes[split]) for split in SPLITS},
        "order": {split: digest(hashes[split], in_order=True) for split in SPLITS},
        "units": None if units is None else [float(unit) for unit in units],
        "columns": None if units is None else column_digests(rows, units),
        "labels": None if labels is None else label_digest(hashes, labels),
        **({"label_units": label_units} if joined else {}),
        "settings": dict(settings or {}),
        "fixed": fixed,
        "trained": torch.from_numpy(trained[:MAX_KEPT].view(np.int64).copy()),
        "trained_distinct": len(trained),
        "rounded": rounded_entry({split: rows[split] for split in SPLITS}) if rounds else None,
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


def column_digests(
    rows: Rows, units: Sequence[float] | NDArray[np.float64], order: Sequence[int] | None = None
) -> list[str]:
    """Return a digest of each column that does not depend on the order of the rows."""
    chosen = range(len(units)) if order is None else order
    digests = []
    for position, column in enumerate(chosen):
        values = [rounded(rows[split][:, column], units[position]) for split in SPLITS]
        digests.append(digest(np.concatenate(values)))
    return digests


def joined_hashes(hashes: Rows, labels: Rows, units: Sequence[float]) -> dict[str, NDArray[np.uint64]]:
    """Return hashes of rows together with their labels, which are rounded to `units`."""
    return {split: mix(hashes[split] + STEP * hash_rows(labels[split], units)) for split in SPLITS}


def label_digest(hashes: Rows, labels: Rows) -> str:
    """Return a digest of which example has which class."""
    given = {split: np.ascontiguousarray(labels[split]).reshape(len(hashes[split]), -1) for split in SPLITS}
    return digest(np.concatenate([mix(hashes[split] + STEP * hash_rows(given[split])) for split in SPLITS]))
