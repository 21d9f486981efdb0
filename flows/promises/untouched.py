"""What an examination does to a field for a while, and puts back."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

REGISTERED = {"_parameters", "_buffers", "_modules"}  # attributes of a module that hold what it has registered
OF_TORCH = set(vars(nn.Module()))  # attributes of every module, among them its hooks
MAX_ENTRIES = 10_000  # of a container whose contents are put back


@contextmanager
def awake(field: Any) -> Iterator[None]:
    """Give parameters that are zero other values for a while: a field that starts at zero shows nothing."""
    asleep: list[tuple[Tensor, Tensor]] = []
    if isinstance(field, nn.Module):
        with torch.no_grad():
            for weights in field.parameters():
                plain = weights.is_floating_point() and not isinstance(weights, nn.parameter.UninitializedParameter)
                if plain and weights.numel() and weights.device.type != "meta" and not bool(weights.any()):
                    asleep.append((weights, weights.data))
                    ramp = torch.linspace(0.1, 0.6, weights.numel(), dtype=weights.dtype, device=weights.device)
                    weights.data = ramp[torch.randperm(len(ramp), generator=torch.Generator().manual_seed(0))].view_as(
                        weights
                    )
    try:
        yield
    finally:
        for weights, data in asleep:
            weights.data = data


@contextmanager
def untouched(field: Any, device: torch.device) -> Iterator[None]:
    """Put random numbers, buffers, attributes and modes back."""
    modules = list(field.modules()) if isinstance(field, nn.Module) else []
    buffers = [(buffer, buffer.detach().clone(), buffer._version) for module in modules for buffer in _own(module)]
    attributes = [(module.__dict__, _attributes(module)) for module in modules]
    generators = torch.get_rng_state(), random.getstate()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    numpy = sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()
    recording, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    precision = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    try:
        if precision is None:
            yield
        else:  # autocast would keep weights that were converted without gradients
            with torch.autocast(device.type, dtype=precision, cache_enabled=False):
                yield
    finally:
        torch.set_grad_enabled(recording)
        torch.set_default_dtype(dtype)
        torch.set_rng_state(generators[0])
        random.setstate(generators[1])
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        for own, (plain, containers) in attributes:
            for key in own.keys() - plain.keys() - REGISTERED:
                del own[key]
            own.update(plain)
            for container, content in containers:
                _refill(container, content)
        with torch.no_grad():
            for buffer, content, count in buffers:
                if buffer._version != count:
                    buffer.detach().copy_(content)


def _own(module: nn.Module) -> list[Tensor]:
    return [buffer for buffer in module._buffers.values() if buffer is not None and not buffer.is_inference()]


def _attributes(module: nn.Module) -> tuple[dict[str, Any], list[tuple[Any, Any]]]:
    """The values of a module's own attributes, and the contents of its containers."""
    plain = {key: value for key, value in module.__dict__.items() if key not in REGISTERED}
    containers = [pair for key, value in plain.items() if key not in OF_TORCH for pair in _containers(value)]
    return plain, containers


def _containers(value: Any, depth: int = 3) -> Iterator[tuple[Any, Any]]:
    """A container with its contents, and those within it."""
    if isinstance(value, list | dict | set | deque) and len(value) <= MAX_ENTRIES:
        yield value, dict(value) if isinstance(value, dict) else list(value)
        for part in value.values() if isinstance(value, dict) else value:
            yield from _containers(part, depth - 1) if depth else ()


def _refill(container: Any, content: Any) -> None:
    container.clear()
    container.extend(content) if isinstance(container, list | deque) else container.update(content)
