"""Importance weights w = p̃(x)/q(x) of samples x of q, for an unnormalised p̃."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from flows.errors import InvalidTypeError, InvalidValueError


def log_density_of(target: Any) -> Callable[[Tensor], Tensor]:
    """log p̃ of an object with `log_density(x)` or `log_prob(x)`, or of a function.

    Raises:
        TypeError: neither.
    """
    for name in ("log_density", "log_prob"):
        if hasattr(target, name):
            return getattr(target, name)
    if callable(target):
        return cast(Callable[[Tensor], Tensor], target)
    raise InvalidTypeError(
        f"a target must have log_density(x) or log_prob(x), or be a function x -> log density, got "
        f"{type(target).__name__}"
    )


def log_weights(
    target: Any,
    x: Tensor,  # (B, *event), samples of q
    log_prob: Tensor,  # (B,), log q(x)
) -> Tensor:  # (B,)
    """log w.

    Raises:
        ValueError: the target does not return one number for each sample.
    """
    log_density = log_density_of(target)(x)
    if log_density.shape != log_prob.shape:
        raise InvalidValueError(
            f"the target must return one log-density a point, of shape {tuple(log_prob.shape)}, got "
            f"{tuple(log_density.shape)}"
        )
    return log_density - log_prob


def log_z(log_weight: Tensor) -> Tensor:  # 0-d
    """log mean w, which estimates log Z (low by about half its variance)."""
    return torch.logsumexp(log_weight, 0) - math.log(len(log_weight))


def effective_sample_size(log_weight: Tensor) -> Tensor:  # 0-d
    """Effective sample size (Σw)²/(n Σw²), between 1/n and 1."""
    doubled = 2 * torch.logsumexp(log_weight, 0) - torch.logsumexp(2 * log_weight, 0)
    return torch.exp(doubled - math.log(len(log_weight)))
