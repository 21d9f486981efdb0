"""Layers that no solve can go through: random ones, and those that mix the points of a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from flows.errors import InvalidValueError

RANDOM = (
    "{name} is random in training mode, so its output changes from call to call: no step meets a tolerance, and a "
    "solve means nothing"
)
MIXING = (
    "{name} normalises by the mean and variance of the batch{why}: the velocity of a point depends on the other "
    "points, and so would its solution and its log-density"
)
EVAL = "Call eval() on the model before solving"
RANDOM_CURE = f"{EVAL}; to train through solves, set its dropout to 0, and regularise with weight_decay instead"
MIXING_CURE = f"{EVAL}; to train through solves, replace it by nn.GroupNorm or nn.LayerNorm"
UNTRACKED_CURE = "Replace it by nn.GroupNorm or nn.LayerNorm, or set track_running_stats=True and call eval()"


def _dropout(module: Any) -> tuple[str, str] | None:
    return (RANDOM, RANDOM_CURE) if module.training and getattr(module, "p", 0) > 0 else None


def _inner_dropout(module: Any) -> tuple[str, str] | None:
    return (RANDOM, RANDOM_CURE) if module.training and getattr(module, "dropout", 0) > 0 else None


def _slope(module: Any) -> tuple[str, str] | None:
    return (RANDOM, f"{EVAL}, or replace it by nn.LeakyReLU") if module.training else None


def _batch_norm(module: Any) -> tuple[str, str] | None:
    if module.training:
        return MIXING.replace("{why}", " in training mode"), MIXING_CURE
    return (
        (MIXING.replace("{why}", " in every mode"), UNTRACKED_CURE)
        if getattr(module, "running_mean", 0) is None
        else None
    )


DROPOUTS = ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout")
BATCH_NORMS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm")
KINDS: dict[str, Callable[[Any], tuple[str, str] | None]] = {  # by the name of the class, also of a scripted one
    **dict.fromkeys(("_DropoutNd", *DROPOUTS), _dropout),
    **dict.fromkeys(("_BatchNorm", *BATCH_NORMS), _batch_norm),
    **dict.fromkeys(("MultiheadAttention", "RNN", "LSTM", "GRU"), _inner_dropout),
    "RReLU": _slope,
}


def check_steady(field: Any, path: str = "field") -> None:
    """Refuse a field with a layer that no solve can go through, as it stands: in training or in evaluation mode.

    It looks at the layers alone and costs microseconds; a field that calls `functional.dropout` is found when its
    values are examined.

    Raises:
        InvalidValueError: there is one; the message names it and the cure.
    """
    if not isinstance(field, nn.Module):
        return
    for module in field.modules():
        check = _check_of(type(module))
        if check is _scripted:
            check = KINDS.get(getattr(module, "original_name", ""))
        if check is not None and (found := check(module)):
            path += (
                next(f".{name}" for name, one in field.named_modules() if one is module) if module is not field else ""
            )
            kind = getattr(module, "original_name", type(module).__name__)
            raise InvalidValueError(f"{path}: {found[0].format(name=kind)}. {found[1]}")


@functools.cache
def _check_of(kind: type) -> Callable[[Any], tuple[str, str] | None] | None:
    """The check of a class of layers; None for nearly all."""
    if issubclass(kind, torch.jit.ScriptModule):
        return _scripted
    names = [base.__name__ for base in kind.__mro__ if base.__module__.startswith("torch.nn.")]
    return next((KINDS[name] for name in names if name in KINDS), None)


def _scripted(module: Any) -> tuple[str, str] | None:
    """Stands for the check of the class that was scripted."""
    raise NotImplementedError
