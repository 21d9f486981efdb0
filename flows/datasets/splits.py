"""Random splits of finite data into training, validation and test examples."""

from __future__ import annotations

from collections.abc import Mapping

import torch
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
    names = [f"{split}_fraction" for split in fractions]
    for name, fraction in zip(names, fractions.values(), strict=True):
        check_number(name, fraction, above=0, below=1)
    seed = whole_number("split_seed", seed, 0, 2**63 - 1)
    if sum(fractions.values()) >= 1:
        values = " + ".join(map(str, fractions.values()))
        raise InvalidValueError(f"{' + '.join(names)} must leave training {unit}, got {values} >= 1")
    sizes = {split: round(count * fraction) for split, fraction in fractions.items()}
    training = count - sum(sizes.values())
    if min(sizes.values()) < 1 or training < 2:
        found = ", ".join(f"{size} {split}" for split, size in {"training": max(training, 0), **sizes}.items())
        raise InvalidValueError(
            f"{source} has {count} {unit}, too few to split: {found} {unit}, needed at least 2 training {unit} and 1 "
            f"in each other split; bring more {unit} or change {' and '.join(names)}"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    parts = order.split([*sizes.values(), training])
    return dict(zip([*sizes, "train"], parts, strict=True))
