"""Many samples of a trained flow: under which contexts, in batches, and into a file."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from flows.checks import check_number, fits_in_memory
from flows.conditions import Conditions
from flows.datasets import Dataset, one_hot
from flows.datasets.table_contexts import read_contexts
from flows.errors import InvalidValueError
from flows.models.cnf import CNF
from flows.writing import write_result

ENDINGS = (".npy", ".csv")
MAX_SAMPLES = 10**9  # in one file, and in memory


def draw_samples(
    flow: CNF,
    num_samples: int,
    batch_size: int = 10_000,
    generator: torch.Generator | None = None,
    context: Tensor | None = None,  # (n, *context), one for each sample
) -> Tensor:  # (n, *event), on the CPU
    """Sample in batches, one solve each.

    Raises:
        InvalidValueError: a number is less than one, or too large to be meant.
    """
    check_number("num_samples", num_samples, whole=True, at_least=1, at_most=MAX_SAMPLES)
    check_number("batch_size", batch_size, whole=True, at_least=1)
    num_bytes = num_samples * math.prod(flow.event_shape) * flow.dtype.itemsize
    fits_in_memory(f"num_samples: {num_samples:,} samples of shape {flow.event_shape}", num_bytes)
    with torch.no_grad():
        parts = []
        for start in range(0, num_samples, batch_size):
            size = min(batch_size, num_samples - start)
            if context is None:
                parts.append(flow.sample((size,), generator=generator))
            else:
                parts.append(flow.sample((), context[start : start + size].to(flow.device), generator))
        return torch.cat([part.cpu() for part in parts])


def samples_file(path: str | os.PathLike[str]) -> Path:
    """Check that `save_samples` can write this file; worth knowing before the samples are drawn.

    Raises:
        InvalidValueError: the ending is neither .npy nor .csv.
    """
    path = Path(path)
    if path.suffix not in ENDINGS:
        raise InvalidValueError(f"output must end in {' or '.join(ENDINGS)}, got {str(path)!r}")
    return path


def save_samples(
    path: str | os.PathLike[str],
    samples: Tensor,  # (n, *event)
    names: Sequence[str] | None = None,  # of the columns of a .csv; x0, x1, ... by default
    num_levels: int | None = None,  # of discrete samples
    given: Mapping[str, Sequence[str | float]] | None = None,  # conditions of each sample, for a .csv
    num_contexts: int = 1,  # that the samples come from in turn, equally many from each
) -> Path:
    """Write samples as .npy in their full shape, or as .csv with a header and one flattened sample a row.

    An .npy file holds discrete samples in the smallest unsigned type that has all levels. With several contexts its
    shape is (contexts, samples of each, *event). A .csv has the conditions in its first columns.

    Raises:
        InvalidValueError: the ending is neither .npy nor .csv.
        FileError: the file cannot be written.
    """
    path = samples_file(path)
    if path.suffix == ".npy":
        kind = samples.numpy().dtype if num_levels is None else np.min_scalar_type(num_levels - 1)
        full = samples.reshape(num_contexts, -1, *samples.shape[1:]) if num_contexts > 1 else samples
        return write_result(path, lambda file: np.save(file, full.numpy().astype(kind)))
    rows = samples.flatten(1).numpy()
    header = [f"x{i}" for i in range(rows.shape[1])] if names is None else names
    return write_result(path, lambda file: _write_csv(file, rows, header, given or {}))


def _write_csv(
    file: BinaryIO, rows: np.ndarray, header: Sequence[str], given: Mapping[str, Sequence[str | float]]
) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*given, *header])
    digits = "%.17g" if rows.dtype == np.float64 else "%.9g"
    if not given:
        np.savetxt(text, rows, delimiter=",", fmt=digits)
    else:
        for conditions, row in zip(zip(*given.values(), strict=True), rows.tolist(), strict=True):
            words = [one if isinstance(one, str) else f"{one:.17g}" for one in conditions]
            writer.writerow([*words, *(digits % value for value in row)])
    text.detach()  # flushes, and leaves the file open


def chosen_context(
    context_shape: Sequence[int] | None,
    num_classes: int | None,
    label: int | None = None,
    values: Any = None,
    conditions: Conditions | None = None,
) -> Tensor | None:  # (*context) or (n, *context), or None if neither is given
    """The context given by the number of a class or by its values.

    Args:
        context_shape, num_classes: of the flow.
        label: the number of a class.
        values: the numbers of a context. With conditions, words and numbers: by name, in a list in their order, or in a
            .csv or .parquet file with a context a row.
        conditions: names and categories of the entries of a context.

    Raises:
        InvalidValueError: the flow has no contexts, or the choice does not fit them.
    """
    if label is None and values is None:
        return None
    if context_shape is None:
        raise InvalidValueError("the flow is unconditional and takes neither a class nor a context")
    if label is not None and values is not None:
        raise InvalidValueError("give a class or a context, not both")
    if label is not None:
        if num_classes is None:
            raise InvalidValueError(
                f"the contexts of this flow are no classes but {tuple(context_shape)} numbers; give a context instead"
            )
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < num_classes:
            raise InvalidValueError(f"class must be a whole number from 0 to {num_classes - 1}, got {label!r}")
        return one_hot(torch.tensor(label), num_classes)
    if isinstance(values, str) and conditions is not None and Path(values).suffix:
        return read_contexts(values, conditions)
    if isinstance(values, Mapping):
        if conditions is None:
            raise InvalidValueError(
                f"the entries of the contexts of this flow have no names, so context must be a list of numbers, "
                f"{math.prod(context_shape)} of them, got {values!r}"
            )
        return conditions.encode(values)
    if conditions is not None:
        listed = list(values) if isinstance(values, Sequence) and not isinstance(values, str) else [values]
        if len(listed) != len(conditions):
            raise InvalidValueError(
                f"context must have {len(conditions)} entries, such as {conditions.example()}, got {values!r}"
            )
        return conditions.encode(dict(zip(conditions.columns, listed, strict=True)))
    try:
        context = torch.tensor(values, dtype=torch.get_default_dtype())
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidValueError(f"context must be a list of numbers, got {values!r}") from error
    if context.numel() != math.prod(context_shape):
        raise InvalidValueError(f"context must have {math.prod(context_shape)} numbers, got {context.numel()}")
    return context.reshape(tuple(context_shape))


def comparable_points(dataset: Dataset, context: Tensor | None) -> Tensor:  # (n, *event)
    """Points of the data to show beside samples under `context` (m, *context).

    If all samples share a context that the data has, these are the points with that context; otherwise all points.
    """
    if context is not None and bool((context == context[0]).all()):
        batch = next(iter(dataset.validation_batches(dataset.num_validation)))
        same = (batch.context == context[0].to(batch.context)).flatten(1).all(1)
        if same.any():
            return batch.x[same]
    return dataset.reference()
