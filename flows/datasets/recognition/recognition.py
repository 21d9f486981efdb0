"""Warns of data that are not those of a run, or refuses them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from flows.datasets.base import Dataset
from flows.datasets.recognition.comparison import Comparison, compare
from flows.datasets.tables.diagnosis import listed
from flows.errors import DataWarning, InvalidValueError, warn


def recognised(
    stored: Mapping[str, Any] | None,
    dataset: Dataset,
    part: Literal["validation", "test"] | None = None,  # that is evaluated; None: none
) -> tuple[Dataset, Comparison]:
    """Return the data with their columns in the order of a run, and warn of all that differs.

    Raises:
        InvalidValueError: the data have other columns, or points of another shape.
    """
    found = compare(stored, dataset)
    shape = (stored or {}).get("event_shape")
    if shape is not None and list(shape) != list(dataset.event_shape):
        raise InvalidValueError(f"these are not the data of the run: {found.text}")
    name = getattr(dataset, "source", None) or dataset.name
    if found.columns is not None and hasattr(dataset, "reordered"):
        dataset = dataset.reordered(found.columns)  # type: ignore[attr-defined]
        if not dataset.is_scored:
            warn(
                f"{name}: the columns come in another order than in the run, and were put into its order: "
                f"{listed(dataset.columns or [])}",
                DataWarning,
            )
        found = compare(stored, dataset)
    if dataset.is_scored:
        found = replace(found, differences=found.about_columns)  # these need not be the rows of the run
        if part and found.trained_on(part)[0]:
            warn(
                f"{name}: {found.trained_on_in_words(part)}, so the figures reward memory and say little about new "
                "points",
                DataWarning,
            )
            return dataset, found
    trained = found.trained_on(part)[0] if part and found.differences else 0
    if found.differences:
        known = f"; {found.trained_on_in_words(part)}" if part and found.hashes else ""
        caution = ", so the figures reward memory and say little about new points" if trained else ""
        warn(f"{name}: data or split differ from those of the run: {found.text}{known}{caution}", DataWarning)
    return dataset, found


def caution_about_outliers(stored: Mapping[str, Any] | None, outliers: Dataset, part: str) -> str | None:
    """Return a warning if outliers are training points of the run."""
    if list((stored or {}).get("event_shape") or ()) != list(outliers.event_shape):
        return None
    found = compare(stored, outliers)
    otherwise = found.found_otherwise(part)
    if not found.trained_on(part)[0] or (otherwise is not None and otherwise.left_out):
        return None
    return f"outliers: {found.trained_on_in_words(part)}, so they are no outliers"


def without_noise(stored: Mapping[str, Any] | None, samples: Tensor) -> tuple[Tensor, list[str]]:
    """Round samples in the columns that noise was added to in training, to the values that the data can take.

    Returns:
        The samples (n, columns), and the names of these columns.
    """
    settings = ((stored or {}).get("fingerprint") or {}).get("settings") or {}
    names, steps, starts = list((stored or {}).get("columns") or []), settings.get("noise"), settings.get("smallest")
    if not steps or not starts or samples.shape[1:] != (len(names),):
        return samples, []
    if not all(name in names and name in starts and step > 0 for name, step in steps.items()):
        raise InvalidValueError("the fingerprint of the data in the checkpoint is damaged; use another checkpoint")
    rounded = samples.clone()
    for name, step in steps.items():
        column = names.index(name)
        exact = samples[:, column].double()
        rounded[:, column] = (starts[name] + step * ((exact - starts[name]) / step).round()).to(samples.dtype)
    return rounded, list(steps)


def refuse_other_data(stored: Mapping[str, Any] | None, dataset: Dataset) -> None:
    """Refuse to go on with other data, or another split, than those of a run.

    If only the rounding of the values differs, warn.

    Raises:
        InvalidValueError: names all that differs.
    """
    found = compare(stored, dataset)
    differences = list(found.differences)
    if found.columns is not None:
        order = [list(dataset.columns or [])[i] for i in found.columns]
        differences.insert(0, f"the columns come in another order; set columns=[{','.join(order)}]")
    differences = [text for text in differences if text != found.rounding]
    differences += [] if differences else found.unequal
    if found.rounding and not differences:
        name = getattr(dataset, "source", None) or dataset.name
        warn(
            f"{name}: {found.rounding}; the run goes on with these values, and not bit for bit as with its own",
            DataWarning,
        )
    if differences:
        raise InvalidValueError(
            f"the run was started on other data or another split: {'; '.join(differences)}. Resume with the data and "
            "the split that it was started with, or start a new run"
        )
