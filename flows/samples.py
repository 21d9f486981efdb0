"""Many samples of a trained flow: under which contexts, in batches, and into a file."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flows.checks import check_number, fits_in_memory
from flows.conditions import Conditions
from flows.datasets import Dataset, one_hot
from flows.datasets.tables.contexts import read_contexts
from flows.errors import InvalidValueError
from flows.models.cnf import CNF
from flows.progress import new_bar
from flows.writing import write_columns, write_result

ENDINGS = (".npy", ".csv", ".parquet")
MAX_BATCH = 10_000  # samples in one solve, if nothing else is asked for
MAX_NUMBERS = 1_000_000  # in one solve: with fewer large samples a bar moves, and an interruption loses less
MAX_NAMES = 12  # of classes in a message
MAX_SAMPLES = 10**9  # in one file, and in memory


class SamplingInterrupted(KeyboardInterrupt):
    """Somebody pressed Ctrl-C; `samples` (n, *event) are those of the batches that were done, and may be none."""

    def __init__(self, samples: Tensor) -> None:
        super().__init__()
        self.samples = samples


def draw_samples(
    flow: CNF,
    num_samples: int,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    context: Tensor | None = None,  # (n, *context), one for each sample
    progress: str | None = None,
) -> Tensor:  # (n, *event), on the CPU
    """Sample in batches, one solve each.

    Args:
        batch_size: None: 10,000, or fewer if they are large.
        progress: title of a progress bar; None: no bar.

    Raises:
        InvalidValueError: a number is less than one, or too large to be meant.
        SamplingInterrupted: Ctrl-C; it has the samples of all batches so far.
    """
    check_number("num_samples", num_samples, whole=True, at_least=1, at_most=MAX_SAMPLES)
    size = math.prod(flow.event_shape)
    if batch_size is None:
        batch_size = max(1, min(MAX_BATCH, MAX_NUMBERS // size))
    check_number("batch_size", batch_size, whole=True, at_least=1)
    num_bytes = num_samples * size * flow.dtype.itemsize
    fits_in_memory(f"num_samples: {num_samples:,} samples of shape {flow.event_shape}", num_bytes)
    parts: list[Tensor] = []
    bar = new_bar(total=num_samples, desc=progress, unit="sample", disable=progress is None)
    with torch.no_grad(), bar:
        try:
            for start in range(0, num_samples, batch_size):
                count = min(batch_size, num_samples - start)
                if context is None:
                    drawn = flow.sample((count,), generator=generator)
                else:
                    drawn = flow.sample((), context[start : start + count].to(flow.device), generator)
                parts.append(drawn.cpu())
                bar.update(count)
        except KeyboardInterrupt:
            none = torch.zeros(0, *flow.event_shape, dtype=flow.dtype)
            raise SamplingInterrupted(torch.cat(parts) if parts else none) from None
    return torch.cat(parts)


def samples_file(path: str | os.PathLike[str]) -> Path:
    """Check that `save_samples` can write this file; worth knowing before the samples are drawn.

    Raises:
        InvalidValueError: it ends in none of .npy, .csv and .parquet.
    """
    path = Path(path)
    if path.suffix not in ENDINGS:
        raise InvalidValueError(f"output must end in .npy, .csv or .parquet, got {str(path)!r}")
    return path


def save_samples(
    path: str | os.PathLike[str],
    samples: Tensor,  # (n, *event)
    names: Sequence[str] | None = None,  # of the columns of a table; x0, x1, ... by default
    num_levels: int | None = None,  # of discrete samples
    given: Mapping[str, Sequence[str | float]] | None = None,  # conditions of each sample, for a table
    num_contexts: int = 1,  # that the samples come from in turn, equally many from each
) -> Path:
    """Write samples as .npy in their full shape, or as .csv or .parquet with one flattened sample a row.

    An .npy file holds discrete samples in the smallest unsigned type that has all levels. With several contexts its
    shape is (contexts, samples of each, *event). A table has the conditions in its first columns.

    Raises:
        InvalidValueError: it ends in none of .npy, .csv and .parquet.
        FileError: the file cannot be written.
    """
    path = samples_file(path)
    if path.suffix == ".npy":
        kind = samples.numpy().dtype if num_levels is None else np.min_scalar_type(num_levels - 1)
        full = samples.reshape(num_contexts, -1, *samples.shape[1:]) if num_contexts > 1 else samples
        return write_result(path, lambda file: np.save(file, full.numpy().astype(kind)))
    rows = samples.flatten(1)
    header = [f"x{i}" for i in range(rows.shape[1])] if names is None else names
    columns = dict(zip(header, rows.T.tolist(), strict=True))
    return write_columns(path, {**(given or {}), **columns}, digits=17 if rows.dtype == torch.float64 else 9)


def chosen_context(
    context_shape: Sequence[int] | None,
    num_classes: int | None,
    label: int | str | None = None,
    values: Any = None,
    conditions: Conditions | None = None,
    class_names: Sequence[str] | None = None,
) -> Tensor | None:  # (*context) or (n, *context), or None if neither is given
    """The context given by the number of a class or by its values.

    Args:
        context_shape, num_classes: of the flow.
        label: the name of a class, or its number from 0.
        values: the numbers of a context. With conditions, words and numbers: by name, in a list in their order, or in a
            .csv or .parquet file with a context a row.
        conditions: names and categories of the entries of a context.
        class_names: names of the classes, in their order.

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
        return one_hot(torch.tensor(class_number(label, num_classes, class_names)), num_classes)
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


def class_number(label: int | str, num_classes: int, class_names: Sequence[str] | None = None) -> int:
    """The number of a class from its name, or from the number itself; a name that is a number counts as a name.

    Raises:
        InvalidValueError: there is no such class; the message lists the names.
    """
    names = list(class_names or ())
    if str(label) in names:
        return names.index(str(label))
    if isinstance(label, int) and not isinstance(label, bool):
        numbered = [i for i, name in enumerate(names) if name.lstrip("-").isdecimal()]
        same = [i for i in numbered if int(names[i]) == label]
        if len(same) == 1:
            return same[0]
        if not numbered and 0 <= label < num_classes:
            return label
    known = f"one of {', '.join(names[:MAX_NAMES])}{', ...' * (len(names) > MAX_NAMES)}, or " if names else ""
    close = difflib.get_close_matches(str(label), names, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise InvalidValueError(f"class must be {known}a whole number from 0 to {num_classes - 1}, got {label!r}{hint}")


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
