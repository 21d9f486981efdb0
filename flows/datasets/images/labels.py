"""Classes of images: labels of any form to numbers 0, ..., K − 1, and their names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flows.errors import InvalidValueError

MAX_NAMED = 5  # classes in a message


@dataclass(frozen=True)
class Classes:
    """The classes of the images of each split."""

    numbers: Mapping[str, Tensor | None]  # (n,) by split; None if an image of the split has no class
    names: tuple[str, ...] | None  # of the classes in the order of their numbers; None: there are no classes
    unlabelled: Mapping[str, int]  # images without a class although others of the data have one

    def check_conditions(self, where: str) -> None:
        """Raise `InvalidValueError` unless a flow can be conditional on the classes of a random or given split."""
        if self.names is None:
            return  # the dataset says so
        for split, count in self.unlabelled.items():
            if count:
                raise InvalidValueError(
                    f"{where}: {count:,} images of the split {split!r} have no class, and conditional=true gives each "
                    "image its class; sort them into folders, or leave that split out"
                )
        if len(self.names) == 1:
            raise InvalidValueError(
                f"{where}: all images are of one class, {self.names[0]!r}, so there is nothing to condition on; set "
                "conditional=false"
            )

    def check_counts(self, where: str, splits: Mapping[str, Tensor | None]) -> None:
        """Raise `InvalidValueError` if a class has a single image, or none to train on."""
        if self.names is None:
            return
        counts = {split: Counter(labels.tolist()) for split, labels in splits.items() if labels is not None}
        total = sum(counts.values(), Counter())
        single = [self.names[label] for label, count in sorted(total.items()) if count == 1]
        if single:
            raise InvalidValueError(
                f"{where}: {_listed(single)} a single image, which cannot be both trained on and tested; add images, "
                "leave the class out, or set conditional=false"
            )
        missing = [self.names[label] for label in sorted(total) if label not in counts["train"]]
        if missing:
            raise InvalidValueError(
                f"{where}: {_listed(missing)} no image in the training split; add images, or choose another "
                "split_seed, or set conditional=false"
            )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:MAX_NAMED])) + (", ..." if len(names) > MAX_NAMED else "")
    return f"the class {shown} has" if len(names) == 1 else f"{len(names):,} classes ({shown}) have"


def read_classes(
    labels: Mapping[str, Sequence[Any] | np.ndarray | None], names: tuple[str, ...] | None, where: str
) -> Classes:
    """Number the classes of all splits alike.

    Labels are numbers of the classes in `names`, or, without names, any words or whole numbers, which are sorted. A
    row of zeros and a single one is a number too. None, NaN, an empty word and −1 beside 0 say "no class".

    Raises:
        InvalidValueError: a label is no class.
    """
    flat = {
        split: None if given is None else _flat(given, f"{where}, split {split!r}") for split, given in labels.items()
    }
    every = [label for values in flat.values() if values is not None for label in values if label is not None]
    if not every:
        return Classes(dict.fromkeys(labels), None, {})
    if names is None:
        kinds = {isinstance(label, str) for label in every}
        if len(kinds) > 1:
            word = next(label for label in every if isinstance(label, str))
            raise InvalidValueError(f"{where}: labels are words and numbers, such as {word!r}; use one kind")
        distinct = set(every)
        if 0 in distinct and len(distinct) > 2:
            distinct.discard(-1)
        order = {label: number for number, label in enumerate(sorted(distinct))}
        names = tuple(str(label) for label in order)
    else:
        order = {number: number for number in range(len(names))}
        wrong = next((label for label in every if label not in order and label != -1), None)
        if wrong is not None:
            raise InvalidValueError(
                f"{where}: the label {wrong!r} is no class from 0 to {len(names) - 1} ({_listed(names)} names)"
            )
    numbers: dict[str, Tensor | None] = {}
    unlabelled = {}
    for split, values in flat.items():
        found = [] if values is None else [order[label] for label in values if label in order]
        unlabelled[split] = 0 if values is None else len(values) - len(found)
        numbers[split] = None if values is None or unlabelled[split] else torch.tensor(found, dtype=torch.long)
    return Classes(numbers, names, unlabelled)


def _flat(labels: Sequence[Any] | np.ndarray, where: str) -> list[Any]:
    """Return labels as words, whole numbers, or None for no class."""
    if not isinstance(labels, np.ndarray):
        return [_class(value, where) for value in labels]
    array = labels.reshape(len(labels), -1)
    if array.shape[1] > 1:
        one_hot = array.dtype.kind in "biuf" and np.all(((array == 1).sum(1) == 1) & ((array != 0).sum(1) == 1))
        if not one_hot:
            raise InvalidValueError(
                f"{where}: labels have the shape {labels.shape}, and rows that are not one 1 among zeros; give one "
                "class an image"
            )
        return array.argmax(1).tolist()
    return [_class(value, where) for value in array.ravel().tolist()]


def _class(value: Any, where: str) -> Any:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or value == "" or value != value:
        return None
    if isinstance(value, bool | int):
        return int(value)
    if isinstance(value, float):
        if value.is_integer():
            return int(value)
        raise InvalidValueError(f"{where}: the label {value:g} is no class; classes are whole numbers or words")
    if isinstance(value, str):
        return value
    raise InvalidValueError(
        f"{where}: a label is of the type {type(value).__name__}; classes are whole numbers or words"
    )
