"""What a checkpoint may hold: nested dicts, lists and tuples of plain tensors, numbers and text."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flows.errors import InvalidTypeError, InvalidValueError
from flows.training.unpickling import DTYPES, STORAGES, Unsuitable

SCALARS = (bool, int, float, str, bytes, type(None))
READABLE = {*STORAGES.values(), *DTYPES.values()}
MAX_DEPTH = 60
KINDS = "tensors, numbers, text, None, and lists, tuples and dicts of them"


def plain_content(value: Any, where: str = "", storages: set[int] | None = None, depth: int = 0) -> Any:
    """Return a copy of nested values in which each tensor has numbers of its own.

    Tensors that are whole already are not copied.

    Raises:
        InvalidTypeError: a value cannot be kept in a checkpoint; the message names its place.
    """
    storages = set() if storages is None else storages
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, torch.Size):
        value = tuple(value)
    if type(value) in SCALARS:
        return value
    if isinstance(value, Tensor):
        return _own_numbers(value, where, storages)
    if depth > MAX_DEPTH:
        raise InvalidValueError(
            f"{where[:200]} cannot be kept in a checkpoint: it is nested too deeply, or holds itself"
        )
    if type(value) in (dict, OrderedDict):
        for key in value:
            if type(key) not in (str, int):
                raise InvalidTypeError(_refused(f"{where} has the key {key!r}", key))
        copy = type(value)(
            (key, plain_content(element, _join(where, key), storages, depth + 1)) for key, element in value.items()
        )
        if hasattr(value, "_metadata"):  # of a module's state: versions
            copy._metadata = plain_content(value._metadata, _join(where, "_metadata"), storages, depth + 1)
        return copy
    if type(value) in (list, tuple):
        return type(value)(
            plain_content(element, _join(where, i), storages, depth + 1) for i, element in enumerate(value)
        )
    raise InvalidTypeError(_refused(where, value))


def check_plain(content: Any) -> None:
    """Check what was read from a checkpoint of unknown origin.

    Raises:
        InvalidValueError: a tensor is no plain one, or a container occurs twice or is nested too deeply.
    """
    seen: set[int] = set()
    waiting: list[tuple[Any, str, int]] = [(content, "", 0)]
    while waiting:
        value, where, depth = waiting.pop()
        if isinstance(value, Unsuitable):
            raise InvalidValueError(f"{where} is {value.what}; expected a plain tensor that owns all its numbers")
        if isinstance(value, Tensor):
            if id(value) in seen:
                raise InvalidValueError(f"{where} is the same tensor as another one; expected one of its own")
            seen.add(id(value))
        elif isinstance(value, (dict, list, tuple)):
            scalars = type(value) is tuple and all(type(element) in SCALARS for element in value)
            if not scalars and id(value) in seen:
                raise InvalidValueError(f"{where} is the same {type(value).__name__} as another one, or holds itself")
            if depth > MAX_DEPTH:
                raise InvalidValueError(f"{where[:200]} is nested too deeply")
            seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += [(element, _join(where, key), depth + 1) for key, element in items]
            if (versions := getattr(value, "_metadata", None)) is not None:
                waiting.append((versions, _join(where, "_metadata"), depth + 1))
        elif type(value) not in SCALARS:
            raise InvalidValueError(f"{where} is a {type(value).__name__}; expected {KINDS}")


def _own_numbers(value: Tensor, where: str, storages: set[int]) -> Tensor:
    plain = type(value) in (Tensor, torch.nn.Parameter, torch.nn.Buffer)
    if not plain or value.layout != torch.strided or value.is_quantized or value.is_nested or value.is_meta:
        kind = type(value).__name__ if not plain else "sparse, quantised, nested or meta tensor"
        raise InvalidTypeError(
            f"{where} cannot be kept in a checkpoint: it is a {kind}; checkpoints hold plain dense tensors, numbers "
            "and text"
        )
    if value.dtype not in READABLE:
        raise InvalidTypeError(
            f"{where} cannot be kept in a checkpoint: its numbers are {str(value.dtype).removeprefix('torch.')}; "
            "convert it to another dtype, such as complex64 or float32"
        )
    value = value.detach().resolve_conj().resolve_neg()
    storage = value.untyped_storage()
    whole = value.is_contiguous() and storage.nbytes() == value.numel() * value.itemsize
    if not whole or storage.data_ptr() in storages:
        value = value.clone(memory_format=torch.contiguous_format)
    elif storage.data_ptr():
        storages.add(storage.data_ptr())
    return value


def _refused(where: str, value: Any) -> str:
    if "_extra_state" in where:
        cure = "let the get_extra_state of that module return such values, and set_extra_state take them"
    elif where.startswith("data"):
        cure = "return such values from description() of the data"
    else:
        cure = "return such values from its state_dict"
    return (
        f"{where or 'the content'} cannot be kept in a checkpoint: it is a {type(value).__qualname__}, and checkpoints "
        f"hold {KINDS}; {cure}"
    )


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)
