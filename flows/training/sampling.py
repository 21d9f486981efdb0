"""Drawing many samples and writing them to a file."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flows.errors import InvalidValueError
from flows.models.cnf import CNF
from flows.training.folder import OutputFolderError

ENDINGS = (".npy", ".csv")


def samples_file(path: str | os.PathLike[str]) -> Path:
    """A file that :func:`save_samples` can write; tell before samples are drawn for it.

    Raises:
        ValueError: it has another ending.
    """
    path = Path(path)
    if path.suffix not in ENDINGS:
        raise InvalidValueError(f"output must end in {' or '.join(ENDINGS)}, got {str(path)!r}")
    return path


def draw(
    flow: CNF,
    num_samples: int,
    batch_size: int,
    generator: torch.Generator,
    context: Tensor | None = None,  # (n, *context), one for each sample
) -> Tensor:  # (n, *event), on the CPU
    """Sample in batches, one solve each."""
    for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidValueError(f"{name} must be a whole number >= 1, got {value!r}")
    with torch.no_grad():
        parts = []
        for start in range(0, num_samples, batch_size):
            size = min(batch_size, num_samples - start)
            if context is None:
                parts.append(flow.sample((size,), generator=generator))
            else:
                parts.append(flow.sample((), context[start : start + size].to(flow.base.zero), generator))
        return torch.cat([part.cpu() for part in parts])


def save_samples(
    path: str | os.PathLike[str],
    samples: Tensor,  # (n, *event)
    names: Sequence[str] | None = None,  # of the columns of a .csv; x0, x1, ... by default
    num_levels: int | None = None,  # of discrete samples
) -> Path:
    """Write samples as .npy, of their full shape, or as .csv, one flattened sample a row with a header.

    An .npy file holds discrete samples as whole numbers of the smallest unsigned type that has all levels.

    Raises:
        ValueError: another ending.
        OutputFolderError: the file cannot be written.
    """
    path = samples_file(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npy":
            kind = samples.numpy().dtype if num_levels is None else np.min_scalar_type(num_levels - 1)
            np.save(path, samples.numpy().astype(kind))
        else:
            rows = samples.flatten(1).numpy()
            with path.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow(
                    [f"x{i}" for i in range(rows.shape[1])] if names is None else names
                )
                np.savetxt(file, rows, delimiter=",", fmt="%.17g" if rows.dtype == np.float64 else "%.9g")
    except OSError as error:
        raise OutputFolderError(f"{path} cannot be written ({error.strerror}); choose another output") from error
    return path
