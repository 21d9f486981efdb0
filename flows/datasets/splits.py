"""Splits of finite data into training, validation and test examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from flows.checks import check_number, whole_number
from flows.errors import InvalidValueError


def random_split(
    count: int, fractions: Mapping[str, float], seed: int, source: str, unit: str
) -> dict[str, Tensor]:  # split: indices
    """Shuffle `count` examples and cut them into splits.

    Args:
        count: number of examples.
        fractions: the fraction of each split but "train", which gets all remaining examples. Fractions are rounded
            to whole examples.
        seed: of the shuffle.
        source, unit: words for the data set and its examples in messages.

    Raises:
        InvalidTypeError: a fraction or the seed is no number.
        InvalidValueError: a fraction is out of range, or a split would be empty.
    """
    names = checked_fractions(fractions, seed, unit)
    sizes = {split: round(count * fraction) for split, fraction in fractions.items()}
    training = count - sum(sizes.values())
    _check_sizes({"training": training, **sizes}, count, source, unit, names)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(int(seed)))
    parts = order.split([*sizes.values(), training])
    return dict(zip([*sizes, "train"], parts, strict=True))


def given_split(
    count: int,
    given: Mapping[str, Sequence[int] | ArrayLike],
    fractions: Mapping[str, float],
    seed: int,
    source: str,
    unit: str,
) -> dict[str, Tensor]:  # split: indices
    """Take the parts that are given, and choose the others at random from what is left.

    Args:
        given: the rows of "test", of "validation" or of both. The fraction of the other part is of the rows left.

    Other arguments and errors are those of `random_split`.

    Raises:
        InvalidValueError: the rows of a part are no distinct whole numbers from 0 to below `count`.
    """
    parts: dict[str, Tensor] = {}
    left = np.ones(count, bool)
    for split, chosen in given.items():
        name, rows = f"{split}_rows", np.asarray(chosen)
        if rows.ndim != 1 or not len(rows) or rows.dtype.kind not in "iu":
            raise InvalidValueError(f"{name} must be a list of whole numbers, got {type(chosen).__name__} {rows!r}")
        outside = rows[(rows < 0) | (rows >= count)]
        if len(outside) or len(np.unique(rows)) < len(rows):
            what = f"row {outside[0]} does not exist" if len(outside) else "a row comes twice"
            raise InvalidValueError(f"{source} has {count} {unit}, from 0 to {count - 1}, and in {name} {what}")
        if not left[rows].all():
            raise InvalidValueError(f"{source}: row {rows[~left[rows]][0]} is in test_rows and in validation_rows")
        left[rows] = False
        parts[split] = torch.from_numpy(np.sort(rows).astype(np.int64))
    others = torch.from_numpy(np.flatnonzero(left))
    missing = {split: fraction for split, fraction in fractions.items() if split not in given}
    if not missing:
        _check_sizes(
            {"training": len(others), **{split: len(rows) for split, rows in parts.items()}}, count, source, unit
        )
        return {**parts, "train": others}
    found = random_split(len(others), missing, seed, source, unit)
    return {**parts, **{split: others[chosen] for split, chosen in found.items()}}


def content_split(
    keys: NDArray[np.uint64],  # (n,), pseudo-random numbers that depend on the content of each example
    fractions: Mapping[str, float],
    seed: int,
    source: str,
    unit: str,
) -> dict[str, Tensor]:  # split: indices
    """Split examples by their content, whatever their order: equal content stays in one split.

    Appending examples moves no other one to another split. The sizes therefore only come close to the fractions, within
    about √n. Each split is sorted by its keys. Arguments and errors are those of `random_split`.
    """
    names = checked_fractions(fractions, seed, unit)
    order = np.argsort(keys, kind="stable")
    place = keys[order].astype(np.float64) / 2.0**64
    edges = np.searchsorted(place, np.cumsum(list(fractions.values())))
    parts = dict(zip([*fractions, "train"], np.split(order, edges), strict=True))
    sizes = {"training" if split == "train" else split: len(part) for split, part in parts.items()}
    _check_sizes(sizes, len(keys), source, unit, names)
    return {split: torch.from_numpy(part) for split, part in parts.items()}


def group_split(
    groups: ArrayLike,  # (n,), numbers or words
    fractions: Mapping[str, float],
    seed: int,
    source: str,
    unit: str,
) -> dict[str, Tensor]:  # split: indices
    """Split examples so that those of a group stay in one split.

    Groups are shuffled; each split but "train" takes groups until its size is as close to its fraction as it gets, and
    one group at least. Arguments and errors are those of `random_split`.
    """
    names = checked_fractions(fractions, seed, unit)
    values, member = np.unique(np.asarray(groups), return_inverse=True)
    if len(values) < 3:
        raise InvalidValueError(
            f"{source} has {len(values)} groups, needed at least one in each of training, validation and test; choose "
            "another group_column, or none"
        )
    counts = np.bincount(member)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(int(seed))).tolist()
    part_of = np.full(len(values), len(fractions))
    for part, fraction in enumerate(fractions.values()):
        left, taken = fraction * len(member), 0
        others = len(fractions) - part  # that need a group too
        while len(order) > others and (not taken or counts[order[0]] <= 2 * left):
            group = order.pop(0)
            part_of[group] = part
            left, taken = left - counts[group], taken + 1
    splits = {name: np.flatnonzero(part_of[member] == i) for i, name in enumerate([*fractions, "train"])}
    sizes = {"training" if split == "train" else split: len(rows) for split, rows in splits.items()}
    _check_sizes(sizes, len(member), source, unit, names)
    return {split: torch.from_numpy(rows) for split, rows in splits.items()}


def checked_fractions(fractions: Mapping[str, float], seed: int, unit: str) -> list[str]:
    """Check the settings of a split; return the names of the fractions."""
    names = [f"{split}_fraction" for split in fractions]
    for name, fraction in zip(names, fractions.values(), strict=True):
        check_number(name, fraction, above=0, below=1)
    whole_number("split_seed", seed, 0, 2**63 - 1)
    if sum(fractions.values()) >= 1:
        values = " + ".join(map(str, fractions.values()))
        raise InvalidValueError(f"{' + '.join(names)} must leave training {unit}, got {values} >= 1")
    return names


def _check_sizes(
    sizes: Mapping[str, int], count: int, source: str, unit: str, names: Sequence[str] = ("the parts",)
) -> None:
    if sizes["training"] >= 2 and min(sizes.values()) >= 1:
        return
    found = ", ".join(f"{max(size, 0)} {split}" for split, size in sizes.items())
    raise InvalidValueError(
        f"{source} has {count} {unit}, too few to split: {found} {unit}, needed at least 2 training {unit} and 1 in "
        f"each other split; bring more {unit} or change {' and '.join(names)}"
    )
