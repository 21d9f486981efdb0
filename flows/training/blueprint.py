"""Builds a model without memory first, to compare it with the weights in a file before it is built in earnest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as trees

from flows.errors import InvalidValueError
from flows.training.registration import watching

T = TypeVar("T", bound=nn.Module)
SPARE_ELEMENTS = 1 << 20  # of tensors that are in no file, such as the frequencies of time features
SPARE_TENSORS = 1_000
CALLS_A_TENSOR = 100  # of functions of torch in the constructors


class MisfitError(InvalidValueError):
    """Settings describe another model than the weights beside them."""


def build_like(build: Callable[[], T], weights: Mapping[str, Any]) -> T:
    """Return `build()` if it makes a model whose tensors are no more and no larger than `weights`.

    It is called on the meta device first, where tensors take no memory, and stopped when it has made too many.

    Args:
        build: the same at each call.
        weights: the state that the model shall load.

    Raises:
        MisfitError: it makes more, or other shapes.
    """
    tensors = [weight for weight in weights.values() if isinstance(weight, Tensor)]
    budget = _Budget(len(tensors), sum(weight.numel() for weight in tensors))
    with watching(budget, budget.tensor, budget.module), torch.device("meta"):
        plan = build()
    check_shapes(weights, plan.state_dict())
    return build()


def check_shapes(weights: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Compare names and shapes with those of a model.

    Raises:
        MisfitError: names what is missing, unexpected or of another shape.
    """
    missing, unexpected = [sorted(a.keys() - b.keys()) for a, b in ((expected, weights), (weights, expected))]
    complaints = [f"{_some(missing)} missing"] if missing else []
    complaints += [f"{_some(unexpected)} unexpected"] if unexpected else []
    for name in sorted(expected.keys() & weights.keys()):
        weight, own = weights[name], expected[name]
        if isinstance(own, Tensor) and not isinstance(weight, Tensor):
            complaints.append(f"{name} is a {type(weight).__name__}, and a tensor was expected")
        elif isinstance(own, Tensor) and weight.shape != own.shape:
            complaints.append(f"{name} has the shape {tuple(weight.shape)}, and {tuple(own.shape)} was expected")
    if complaints:
        raise MisfitError("; ".join(complaints[:5]) + ("; ..." if len(complaints) > 5 else ""))


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more are" if len(names) > 4 else " is")


class _Budget(TorchFunctionMode):
    """Stops a constructor that makes more than fits a file."""

    def __init__(self, tensors: int, elements: int) -> None:
        super().__init__()
        self.thread = threading.get_ident()
        self.most_elements = 4 * elements + SPARE_ELEMENTS
        self.elements = 2 * elements + SPARE_ELEMENTS  # left to register
        self.tensors = 2 * tensors + SPARE_TENSORS
        self.modules = 20 * tensors + SPARE_TENSORS
        self.calls = CALLS_A_TENSOR * (tensors + SPARE_TENSORS)
        self.file = f"{tensors:,} tensors with {elements:,} numbers"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls -= 1
        result = func(*args, **(kwargs or {}))
        if self.calls < 0:
            self._refuse("takes too many steps to build")
        for made in trees.tree_leaves(result):
            if isinstance(made, Tensor) and made.numel() > self.most_elements:
                self._refuse(f"needs a tensor of {made.numel():,} numbers")
        return result

    def tensor(self, module: nn.Module, name: str, tensor: Tensor | None) -> None:
        if tensor is None or threading.get_ident() != self.thread:
            return
        self.tensors -= 1
        self.elements -= tensor.numel()
        if self.tensors < 0 or self.elements < 0:
            self._refuse(f"needs more for {type(module).__name__}.{name} alone and what comes before it")

    def module(self, module: nn.Module, name: str, child: nn.Module | None) -> None:
        if threading.get_ident() == self.thread:
            self.modules -= 1
            if self.modules < 0:
                self._refuse("has too many modules")

    def _refuse(self, what: str) -> None:
        raise MisfitError(f"the model of the settings {what}, and the weights in the file are {self.file}")
