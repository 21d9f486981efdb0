"""Conditions for evaluating the dynamics again in a backward pass: random numbers, precision, order of derivatives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from flows.errors import ComputationError


def random_state(device: torch.device) -> tuple[Tensor, ...]:
    """The states of torch's global generators that dynamics on this device may draw from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return tuple(states)


def same_random_state(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    """Whether nothing was drawn between two calls of `random_state`."""
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def set_random_state(states: tuple[Tensor, ...], device: torch.device) -> None:
    """Put torch's global generators into states that `random_state` returned."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


@contextmanager
def restored_random_state(device: torch.device) -> Iterator[None]:
    """Put torch's global generators back at the end."""
    before = random_state(device)
    try:
        yield
    finally:
        set_random_state(before, device)


def refuse_second_derivative(gradient: str) -> None:
    """Raise if autograd would record a backward pass. Its graph would silently lack the solve."""
    if torch.is_grad_enabled():
        raise ComputationError(
            f"gradient={gradient!r} has first derivatives only, but create_graph=True asks for second ones; use "
            "gradient='backprop'"
        )


class Precision:
    """The thread's autocast setting at construction, to restore where autograd evaluates the dynamics again.

    The cache of converted weights stays off: it could hold weights that were converted without gradients.
    """

    def __init__(self, device: torch.device) -> None:
        self.device_type = device.type
        self.enabled = torch.is_autocast_enabled(device.type)
        self.dtype = torch.get_autocast_dtype(device.type) if self.enabled else None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if not self.enabled:
            yield
            return
        with torch.autocast(self.device_type, dtype=self.dtype, cache_enabled=False):
            yield
