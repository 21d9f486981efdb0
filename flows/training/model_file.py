"""The file of a model: its tensors and what builds it again, in the format of safetensors.

The tensors are the state of the model, by their own names, and tensors among the arguments of its parts, as
`arguments/<part>`. The metadata, texts by name, hold the settings and a checksum of everything. Reading runs no code.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flows.errors import InvalidTypeError
from flows.training.checkpoint import CheckpointError, DamagedCheckpointError
from flows.training.described import Description
from flows.training.plain import plain_content
from flows.training.settings_text import settings_text
from flows.writing import write_result

FORMAT = "flows model"
VERSION = 1  # of the arrangement, and of what fields make of the same weights
ARGUMENTS = "arguments/"  # before the names of tensors among the arguments
MAX_HEADER = 100_000_000  # bytes, as safetensors has it
COMPLEX = {torch.complex64: torch.float32, torch.complex128: torch.float64}


def write_model(
    path: Path,
    state: Mapping[str, Any],
    description: Description,
    extra: Mapping[str, Any],
    version: str,
) -> Path:
    """Write a model into one file, whole or not at all.

    Args:
        state: of the model.
        description: what builds it again; without settings the file holds weights alone.
        extra: plain values for what is more than a model.
        version: of this package.

    Raises:
        InvalidTypeError: the state holds something else than tensors and plain values.
        FileError: the file cannot be written.
    """
    from safetensors.torch import save

    content = plain_content({"state": dict(state), "arguments": description.arguments})
    tensors = {name: value for name, value in content["state"].items() if isinstance(value, Tensor)}
    others = {name: value for name, value in content["state"].items() if not isinstance(value, Tensor)}
    tensors |= {f"{ARGUMENTS}{name}": value for name, value in content["arguments"].items()}
    is_complex = [name for name, value in tensors.items() if value.is_complex()]
    tensors = {name: torch.view_as_real(t).contiguous() if t.is_complex() else t for name, t in tensors.items()}
    # Copies have plain strides, unlike an expanded tensor, whose bytes cannot be read in a row.
    tensors = {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    try:
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "flows": version,
            "extra": json.dumps({"state": others, "complex": is_complex, **extra}),
            "data": json.dumps(description.data),
            "dtype": description.dtype,
            **({} if description.settings is None else {"settings": settings_text(description.settings)}),
        }
    except (TypeError, ValueError) as error:
        raise InvalidTypeError(
            f"an extra state of the model cannot be saved ({error}); let get_extra_state return tensors, or numbers, "
            "texts, lists and dicts of them"
        ) from error
    whole = save(tensors, metadata | {"checksum": _checksum(metadata, tensors)})
    return write_result(path, lambda file: file.write(whole))


def is_model_file(path: Path) -> bool:
    """Whether a file begins as those of safetensors do."""
    try:
        with path.open("rb") as file:
            return file.read(9)[8:] == b"{"
    except OSError:
        return False


def read_model(path: Path) -> dict[str, Any]:
    """Read a file of `write_model` as the content of a checkpoint: no code in the file is run.

    Raises:
        DamagedCheckpointError: the file is damaged, or no model of this package.
        CheckpointError: it cannot be read now, or is of another version.
    """
    from safetensors import SafetensorError, safe_open

    _check_header(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            _check_format(path, metadata)
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DamagedCheckpointError(f"{path} is truncated or damaged and cannot be read: {error}") from error
    except MemoryError as error:
        raise CheckpointError(f"there is not enough memory to read {path}; close other programs") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from error
    if metadata.pop("checksum", None) != _checksum(metadata, tensors):
        raise DamagedCheckpointError(
            f"{path} is damaged: its checksum does not fit its content; copy the file again, or save the model again"
        )
    try:
        extra, data = json.loads(metadata["extra"]), json.loads(metadata["data"])
        tensors |= {name: torch.view_as_complex(tensors[name]) for name in extra.pop("complex")}
        state = {name: value for name, value in tensors.items() if not name.startswith(ARGUMENTS)}
        state |= extra.pop("state")
        arguments = {name.removeprefix(ARGUMENTS): t for name, t in tensors.items() if name.startswith(ARGUMENTS)}
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError) as error:
        raise DamagedCheckpointError(
            f"{path} is not as flows writes models ({type(error).__name__}: {error})"
        ) from error
    return {
        "data": data,
        "dtype": metadata.get("dtype", "float32"),
        "ema": state,
        "position": {"step": 0},
        "config": None,
        "described": metadata.get("settings"),
        "arguments": arguments,
        "extra": extra,
    }


def _check_header(path: Path) -> None:
    """Compare the length that the file announces for its header with its own."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= min(size - 8, MAX_HEADER):
        raise DamagedCheckpointError(
            f"{path} is truncated or damaged: its header has {length:,} bytes by its own account, and the file {size:,}"
        )


def _check_format(path: Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise DamagedCheckpointError(
            f"{path} holds tensors, but nothing says that flows.save wrote it; build the flow, and load them by "
            "flow.load_state_dict(safetensors.torch.load_file(path))"
        )
    version, by = metadata.get("version"), metadata.get("flows", "an unknown version")
    if version != str(VERSION):
        newer = str(version).isdigit() and int(str(version)) > VERSION
        cure = "upgrade this package" if newer else "read it with the version that wrote it, and save it again"
        raise CheckpointError(
            f"{path} was written by flows {str(by)[:40]} in version {str(version)[:40]} of the format, and this one "
            f"reads version {VERSION}; {cure}"
        )


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
