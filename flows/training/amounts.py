"""Refuses amounts that no machine holds before anything of that size is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flows.checks import FASTEST_STEP, can_be_finished, fits_in_memory
from flows.datasets import Dataset
from flows.errors import InvalidValueError
from flows.evaluation.density import FlowEvaluator
from flows.models.cnf import CNF
from flows.training.annotations import is_list
from flows.training.registration import watching
from flows.training.trusted import NO_AMOUNTS

COPIES = 4  # of the weights while training, at least: gradients, two moments of the optimiser, the average
BYTES = 4  # of the smallest number that a model computes with
MAX_MODULES = 20_000
MAX_CALLS = 1_000_000  # of functions of torch in one constructor


def check_whole_numbers(config: Any, part: str) -> None:
    """Refuse whole numbers in the settings of a part that are too large for a width or a number of things.

    Raises:
        InvalidValueError: names the setting and the memory that it would take.
    """
    if isinstance(config, Mapping):
        for name, value in config.items():
            if not any(word in str(name) for word in NO_AMOUNTS):
                check_whole_numbers(value, f"{part}.{name}")
    elif is_list(config):
        for value in config:
            check_whole_numbers(value, part)
    elif isinstance(config, int) and abs(config) > 10**9:
        fits_in_memory(f"{part}: {config:,} numbers", BYTES * abs(config))


def check_size(build: Callable[[], nn.Module], part: str) -> None:
    """Call `build` where tensors take no memory, and count what it makes.

    What it raises else is not told here, but when the module is built in earnest.

    Raises:
        InvalidValueError: training it would take too much memory, or it has too many modules.
    """
    state, count = torch.get_rng_state(), _Count(part)
    try:
        with watching(count, count.add, count.add_module), torch.device("meta"):
            build()
    except Exception:  # such as a number that is read from a tensor without values
        if count.refusal is not None:
            raise count.refusal from None
    finally:
        torch.set_rng_state(state)


def check_batch(name: str, size: int, shape: tuple[int, ...], copies: int = 1) -> None:
    """Refuse a batch that does not fit.

    Args:
        name: of the setting.
        size: points of the batch.
        shape: of a point.
        copies: of each point, such as one for each probe.

    Raises:
        InvalidValueError: names the setting and the memory that it would take.
    """
    with_copies = f", {copies:,} copies of each" if copies > 1 else ""
    fits_in_memory(f"{name}: {size:,} points of shape {shape}{with_copies}", BYTES * size * math.prod(shape) * copies)


def check_evaluation(evaluator: Any, flow: Any, dataset: Dataset, part: str = "evaluation") -> None:
    """Refuse an evaluation whose probes do not fit, long before the first one.

    Raises:
        InvalidValueError: names the setting and the memory that it would take.
    """
    if not isinstance(evaluator, FlowEvaluator) or not isinstance(flow, CNF):
        return
    points = min(evaluator.batch_size, max(dataset.num_test, dataset.num_validation))
    num_draws = getattr(evaluator, "num_draws", 1)
    copies = getattr(evaluator.estimator(flow), "num_probes", 1)
    name = f"{part}." if part else ""
    check_batch(f"{name}divergence", points, dataset.event_shape, copies)
    can_be_finished(f"{name}num_draws: {num_draws:,} solves of each batch", FASTEST_STEP * num_draws)


class _Count(TorchFunctionMode):
    """Counts tensors and modules while they are made, and stops when there are too many."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part
        self.refusal: InvalidValueError | None = None
        self.bytes = self.modules = self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if self.calls > MAX_CALLS:
            self._refuse(f"{self.part} takes too many steps to build; choose smaller numbers")
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_meta:
            self._check(result.numel() * result.element_size())
        return result

    def add(self, module: nn.Module, name: str, tensor: Tensor | None) -> None:
        if tensor is not None and tensor.is_meta:
            self.bytes += tensor.numel() * tensor.element_size()
            self._check(self.bytes)

    def add_module(self, module: nn.Module, name: str, child: nn.Module | None) -> None:
        self.modules += 1
        if self.modules > MAX_MODULES:
            self._refuse(f"{self.part} has more than {MAX_MODULES:,} modules; choose smaller numbers")

    def _check(self, num_bytes: int) -> None:
        try:
            fits_in_memory(f"{self.part}: its weights, with all that training keeps for each,", COPIES * num_bytes)
        except InvalidValueError as error:
            self._refuse(str(error))

    def _refuse(self, message: str) -> None:
        self.refusal = InvalidValueError(message)
        raise self.refusal
