"""Discrete data need a transform that dequantises, and it must know their levels."""

from __future__ import annotations

from flows.datasets import Dataset
from flows.errors import InvalidValueError
from flows.transforms import Transform


def check_levels(transform: Transform, dataset: Dataset) -> None:
    """Raise ``ValueError`` unless ``transform`` dequantises the levels of ``dataset``, or both have none.

    A density on whole numbers could grow without bound, and its likelihood would mean nothing.
    """
    kind, expected, found = type(transform).__name__, dataset.num_levels, transform.num_levels
    if expected is not None and found is None:
        raise InvalidValueError(
            f"the data {dataset.name!r} are whole numbers from 0 to {expected - 1}, on which a density can grow "
            f"without bound, and the transform {kind} leaves them so; choose one that begins with Dequantise, such as "
            "transform=dequantise_logit"
        )
    if expected is None and found is not None:
        raise InvalidValueError(
            f"the transform {kind} dequantises whole numbers, and the data {dataset.name!r} are continuous; choose "
            "another one, such as transform=standardise"
        )
    if expected != found:
        raise InvalidValueError(
            f"the data {dataset.name!r} have {expected} levels, and the transform was built for {found}; build it with "
            f"num_levels={expected}"
        )
