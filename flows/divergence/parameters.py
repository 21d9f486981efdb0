"""Tensors that an estimator learns: those of modules and parameters among its options."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from flows.divergence.base import DivergenceEstimator
from flows.divergence.probes import ProbeFamily
from flows.vector_field import BoundField

Learned = nn.Module | nn.Parameter


def learned_parts(estimator: DivergenceEstimator) -> list[Learned]:
    """Modules and parameters that the options of an estimator hold, each once, such as those of its probes."""
    found = {id(part): part for part in _parts(estimator)}
    return list(found.values())


def learned_tensors(estimator: DivergenceEstimator) -> list[Tensor]:
    """Parameters of an estimator that need a gradient."""
    parts = learned_parts(estimator)
    tensors = [t for part in parts for t in (part.parameters() if isinstance(part, nn.Module) else [part])]
    return [tensor for tensor in tensors if tensor.requires_grad]


def _parts(value: Any) -> Iterator[Learned]:
    if isinstance(value, BoundField):  # whose parameters are the flow's
        return
    if isinstance(value, nn.Module | nn.Parameter):
        yield value
    elif isinstance(value, DivergenceEstimator | ProbeFamily) or dataclasses.is_dataclass(value):
        for option in vars(value).values():
            yield from _parts(option)
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _parts(entry)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for entry in value:
            yield from _parts(entry)
