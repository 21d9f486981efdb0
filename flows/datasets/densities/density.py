"""Densities that are sampled afresh for every training batch."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flows import checks
from flows.arguments import checked
from flows.checks import as_shape, fits_in_memory, whole_number
from flows.datasets.base import Dataset
from flows.datasets.batches import Batch, BatchStream, convert, convert_batch
from flows.datasets.recognition.fingerprint import fingerprint_of_draws
from flows.errors import InvalidTypeError, InvalidValueError

# Large, so that nobody uses the same seed for training.
SEEDS = {
    "validation": 0x5EED_0001_7A11_DA7E,
    "test": 0x5EED_0002_07E5_7AB1,
    "reference": 0x5EED_0003_4EF4_ECE5,
    "probe": 0x5EED_0007_9A0B_E000,
}
NUM_PROBES = 32  # draws that tell one density from another


@checked
class Density(Dataset):
    """A density p(x) with a sampler.

    A subclass sets `name` and implements `sample`. It sets `entropy` in nats and overrides `log_prob` if they are
    known, and sets `event_shape` unless it is (2,).

    Validation, test and reference points are drawn at first use, each from a fixed seed of its own.

    Args:
        num_validation, num_test: sizes of the fixed splits.
        num_reference: number of points that `reference()` returns.
        event_shape: shape of one example. Default: that of the class.

    Raises:
        InvalidTypeError: a size is no whole number.
        InvalidValueError: a size is below 1, or its points do not fit in memory.

    Example:
        ```python
        import torch

        import flows

        class Square(flows.datasets.Density):
            name = "square"
            entropy = 0.0

            def sample(self, n, generator):
                return torch.rand(n, 2, generator=generator)
        ```
    """

    event_shape = (2,)
    # Class attributes too, so that a subclass need not call this __init__.
    num_validation: int = 10_000
    num_test: int = 100_000
    num_reference: int = 10_000

    def __init__(
        self,
        num_validation: int = 10_000,
        num_test: int = 100_000,
        num_reference: int = 10_000,
        event_shape: int | Sequence[int] | None = None,
    ):
        if event_shape is not None:
            self.event_shape = as_shape("event_shape", event_shape)
        self.num_validation = self._checked_size("num_validation", num_validation)
        self.num_test = self._checked_size("num_test", num_test)
        self.num_reference = self._checked_size("num_reference", num_reference)

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n independent points (n, *event).

        `generator` is on the CPU and must be the only source of randomness. Default: torch's global one.
        """

    def draw(self, n: int, generator: torch.Generator | None = None) -> Batch:
        """Draw n examples, with contexts if the density is conditional."""
        points = self.sample(n, generator)
        return Batch(checked_shape(points, n, self.event_shape, f"{type(self).__name__}.sample({n}, generator)"))

    def train_stream(
        self,
        batch_size: int,
        generator: torch.Generator,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> DensityStream:
        """Return an endless stream of fresh samples."""
        return DensityStream(self, batch_size, generator, device, dtype)

    def held_out(self, split: Literal["validation", "test"]) -> Batch:
        return self._fixed(split, self.num_validation if split == "validation" else self.num_test)

    def reference(self) -> Tensor:
        return convert(self._fixed("reference", self.num_reference).x, None, None, self.name)

    def reference_contexts(self) -> Tensor | None:
        context = self._fixed("reference", self.num_reference).context
        return None if context is None else convert(context, None, None, self.name)

    def new_fingerprint(self) -> dict[str, Any]:
        return fingerprint_of_draws(self, self._probe())

    def _probe(self) -> np.ndarray | None:
        """Return a few draws, (n, k), that tell the density; None if equal generators give unequal draws."""
        with torch.random.fork_rng(devices=[]):
            first, second = (self.draw(NUM_PROBES, torch.Generator().manual_seed(SEEDS["probe"])) for _ in range(2))
        one, other = (
            torch.cat([part.double().flatten(1) for part in (batch.x, batch.context) if part is not None], 1).numpy()
            for batch in (first, second)
        )
        return one if np.array_equal(one, other) else None

    def _fixed(self, purpose: str, n: int) -> Batch:
        if purpose not in self._drawn:
            self._drawn[purpose] = self.draw(n, torch.Generator().manual_seed(SEEDS[purpose]))
        return self._drawn[purpose]

    @cached_property
    def _drawn(self) -> dict[str, Batch]:
        return {}

    def _checked_size(self, name: str, value: int) -> int:
        size = whole_number(name, value)
        bytes_each = math.prod(self.event_shape) * torch.get_default_dtype().itemsize
        fits_in_memory(f"{name}: {size:,} points of shape {self.event_shape}", size * bytes_each)
        return size


class DensityStream(BatchStream):
    """Fresh independent samples; the position is the generator's state."""

    def __init__(
        self,
        density: Density,
        batch_size: int,
        generator: torch.Generator,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(density.name, batch_size, generator, device, dtype)
        self.density = density

    def next(self) -> Batch:
        batch = self.density.draw(self.batch_size, self.generator)
        return convert_batch(batch, self.device, self.dtype, self.dataset)


def checked_shape(points: object, n: int, shape: tuple[int, ...], call: str, name: str = "event_shape") -> Tensor:
    """Return what `call` returned, detached.

    Raises:
        InvalidTypeError: it is no tensor.
        InvalidValueError: its shape is not (n, *shape).
    """
    expected = (n, *shape)
    advice = f"make it return (n, *{name}), or correct {name} = {shape}"
    if not isinstance(points, Tensor):
        raise InvalidTypeError(
            f"{call} must return a tensor of shape {expected}, got {type(points).__name__}; {advice}"
        )
    if tuple(points.shape) != expected:
        raise InvalidValueError(
            f"{call} must return a tensor of shape {expected}, got shape {tuple(points.shape)}; {advice}"
        )
    return points.detach()


def check_points(x: Tensor, *shape: int) -> Tensor:
    """Return x, or raise `InvalidValueError` if it does not hold points (*batch, *shape). Default shape: (2,)."""
    checks.check_points("x", x, shape or (2,), batched=False)
    return x
