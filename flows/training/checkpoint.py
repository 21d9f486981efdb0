"""Checkpoints, written whole and read without running anything in them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flows.arguments import checked
from flows.checks import existing_path
from flows.errors import FileError, InvalidValueError
from flows.training.archive import DamagedArchiveError, read_archive, write_archive
from flows.training.files import FOLDER
from flows.training.plain import check_plain, plain_content
from flows.training.unpickling import ForeignObjectError
from flows.writing import atomic_write

FORMAT = "flows checkpoint"
VERSION = 4  # of the arrangement, and of what fields make of the same weights
MAX_EVENT = 2**28  # numbers in one point, more than any data have
MODEL_FILE = "model.safetensors"  # of a folder that holds a model alone
EXTRA = "_extra_state"  # the last word of the names of what get_extra_state has returned

# What a checkpoint must hold: to use its model, and to continue its run.
MODEL = {"data": dict, "dtype": str, "ema": dict, "position": dict}
RUN = MODEL | {
    "run": str,
    "model": dict,
    "ema_updates": int,
    "optimizer": dict,
    "means": dict,
    "ranks": list,
}


class CheckpointError(InvalidValueError):
    """A checkpoint is missing, damaged, or not one of ours."""


class DamagedCheckpointError(CheckpointError):
    """What a checkpoint holds can never be used."""


def describe(dataset: Any) -> dict[str, Any]:
    """Return plain values that identify the data of a run, and from which its model can be built again."""
    own = getattr(dataset, "description", dict)  # data of the user's own may do without
    return {"name": getattr(dataset, "name", type(dataset).__name__), **own()}


def fingerprint_entry(dataset: Any) -> dict[str, Any]:
    """Return the entry of a checkpoint by which the data of a run are told from others.

    `flows.datasets.recognition.comparison` reads it.
    """
    own = getattr(dataset, "fingerprint", None)  # data of the user's own may do without
    return {} if own is None else {"fingerprint": own()}


@checked
def save_checkpoint(path: str | os.PathLike[str], content: Mapping[str, Any]) -> Path:
    """Write `content` so that `path` holds either the old checkpoint or the whole new one.

    See `flows.writing.atomic_write`.

    Args:
        path: the file; its folder is made if needed.
        content: nested dicts and lists of tensors, numbers and text.

    Raises:
        InvalidTypeError: it holds anything else, such as an object in the extra state of a module.

    Example:
        ```python
        import flows

        flow = flows.CNF(flows.fields.MLP((2,)))
        flows.training.save_checkpoint("flow.pt", {"model": flow.state_dict()})
        content = flows.training.load_checkpoint("flow.pt")
        ```
    """
    path = Path(path)
    whole = plain_content({"format": FORMAT, "version": VERSION, **content})
    path.parent.mkdir(parents=True, exist_ok=True)
    return atomic_write(path, lambda file: write_archive(whole, file))


@checked
def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU as data: no code in the file is run.

    Raises:
        DamagedCheckpointError: the file is damaged, holds anything but data, or is no checkpoint of this package.
        CheckpointError: it is missing, cannot be read now, or is of another version.

    Example:
        ```python
        import flows

        flow = flows.CNF(flows.fields.MLP((2,)))
        flows.training.save_checkpoint("flow.pt", {"model": flow.state_dict()})
        content = flows.training.load_checkpoint("flow.pt")
        ```
    """
    path = _existing(path)
    try:
        with path.open("rb") as file:
            content = read_archive(file)
        check_plain(content)
    except ForeignObjectError as error:
        raise DamagedCheckpointError(
            f"{path} is not a flows checkpoint: it holds objects other than tensors, numbers and text ({error}), which "
            "are never loaded because they could run code"
        ) from error
    except DamagedArchiveError as error:
        raise DamagedCheckpointError(
            f"{path} is truncated or damaged and cannot be read: {error}; use another checkpoint of the run"
        ) from error
    except InvalidValueError as error:
        raise DamagedCheckpointError(f"{path} is not as flows writes checkpoints: {error}") from error
    except MemoryError as error:
        raise CheckpointError(f"there is not enough memory to read {path}; close other programs") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); use another checkpoint") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DamagedCheckpointError(f"{path} is not a flows checkpoint (it was written by something else)")
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has checkpoint version {content.get('version')!r}, this version of flows reads {VERSION}; read it "
            "with the version that wrote it, or train again"
        )
    return content


def check_content(content: Mapping[str, Any], path: str | os.PathLike[str], kinds: Mapping[str, type]) -> None:
    """Compare a checkpoint with `MODEL` or `RUN`.

    Raises:
        DamagedCheckpointError: something is missing, or of another type.
    """
    wrong = [name for name, kind in kinds.items() if not isinstance(content.get(name), kind)]
    if not wrong:
        data, weights, step = content["data"], content["ema"], content["position"].get("step")
        if not all(_is_shape(data.get(name)) for name in ("event_shape", "context_shape")):
            wrong.append("data")
        if not all(isinstance(data.get(name), (int, type(None))) for name in ("num_classes", "num_levels")):
            wrong.append("data")
        if not all(isinstance(value, torch.Tensor) or str(name).endswith(EXTRA) for name, value in weights.items()):
            wrong.append("ema")
        if type(step) is not int or step < 0:
            wrong.append("position")
    if wrong:
        raise DamagedCheckpointError(
            f"{path} is not a whole checkpoint of a run: {', '.join(wrong)} missing or not as written by flows; use "
            "another checkpoint"
        )


def _existing(path: str | os.PathLike[str], folder: bool = False) -> Path:
    """Return the path of a checkpoint; see `existing_path`."""
    try:
        return existing_path("the checkpoint", path, "checkpoint", folder)
    except FileError as error:
        raise CheckpointError(str(error)) from error


def _is_shape(sizes: Any) -> bool:
    if sizes is None:
        return True
    whole = isinstance(sizes, (list, tuple)) and len(sizes) <= 16 and all(type(size) is int for size in sizes)
    return whole and all(size > 0 for size in sizes) and math.prod(sizes) <= MAX_EVENT


@checked
def find_checkpoint(
    path: str | os.PathLike[str],  # a checkpoint file or the folder of a run
    prefer: str = "best",  # "best" or "last", where both are there
) -> Path:
    """Return the checkpoint file that `path` means.

    Raises:
        CheckpointError: there is none; the message says what is there instead.

    Example:
        ```python
        import flows

        flow = flows.CNF(flows.fields.MLP((2,)))
        flows.training.save_checkpoint("flow.pt", {"model": flow.state_dict()})
        content = flows.training.load_checkpoint("flow.pt")
        ```
    """
    if not isinstance(path, (str, os.PathLike)):
        raise CheckpointError(f"a checkpoint is a file, or the folder of a run; got {path!r}")
    path = _existing(path, folder=True)
    if path.is_file():
        return path
    if (path / MODEL_FILE).is_file():
        return path / MODEL_FILE
    other = "last" if prefer == "best" else "best"
    for folder in (path / FOLDER, path):
        for name in (prefer, other):
            if (folder / f"{name}.pt").is_file():
                return folder / f"{name}.pt"
    found = sorted(entry.name for entry in path.iterdir())[:8]
    raise CheckpointError(
        f"no checkpoint in the folder {path}: expected {FOLDER}/{prefer}.pt in it, "
        f"found {', '.join(found) if found else 'nothing'}"
    )
