"""Batches of examples, and endless streams of them that can be resumed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flows.arguments import checked
from flows.checks import whole_number
from flows.errors import InvalidTypeError, InvalidValueError


@checked
@dataclass(frozen=True)
class Batch:
    """Examples in data space, with their contexts if there are any.

    Example:
        ```python
        import torch

        import flows

        batch = flows.datasets.Moons().train_stream(batch_size=16, generator=torch.Generator()).next()
        batch.x, batch.context  # (16, 2), None
        ```
    """

    x: Tensor  # (batch, *event)
    context: Tensor | None = None  # (batch, *context), the density of x is conditional on it

    def __post_init__(self) -> None:
        if self.x.ndim == 0 or (self.context is not None and self.context.shape[:1] != self.x.shape[:1]):
            found = None if self.context is None else tuple(self.context.shape)
            raise InvalidValueError(
                "x must be (batch, *event) and context (batch, *context) with one context an example, got shapes "
                f"{tuple(self.x.shape)} and {found}"
            )

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, indices: Tensor | slice) -> Batch:
        """Select examples together with their contexts."""
        return Batch(self.x[indices], None if self.context is None else self.context[indices])


@checked
class BatchStream(ABC):
    """An endless iterator of training batches that resumes bit for bit.

    All randomness comes from one CPU generator. A seed therefore gives the same batches on every device.

    Args:
        dataset: name of the data set.
        batch_size: examples in a batch.
        generator: the source of randomness, on the CPU.
        device, dtype: of the batches. Default: the CPU and torch's default dtype.

    Example:
        ```python
        import torch

        import flows

        stream = flows.datasets.Moons().train_stream(batch_size=16, generator=torch.Generator().manual_seed(0))
        stream.next().x  # (16, 2)
        state = stream.state_dict()
        ahead = stream.next().x
        stream.load_state_dict(state)
        assert stream.next().x.equal(ahead)
        ```
    """

    def __init__(
        self,
        dataset: str,
        batch_size: int,
        generator: torch.Generator,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        batch_size = whole_number("batch_size", batch_size)
        if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
            found = getattr(generator, "device", type(generator).__name__)
            raise InvalidTypeError(
                f"a training stream needs a torch.Generator on the cpu, got {found}; pass "
                "torch.Generator().manual_seed(seed), batches are moved to the device afterwards"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.generator = generator
        self.device = torch.device("cpu") if device is None else torch.device(device)
        self.dtype = torch.get_default_dtype() if dtype is None else dtype

    @abstractmethod
    def next(self) -> Batch:
        """Return the next batch."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream: tensors, whole numbers and texts only."""
        return {"dataset": self.dataset, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position, generator included.

        Raises:
            InvalidValueError: the position belongs to another data set.
        """
        if state["dataset"] != self.dataset:
            raise InvalidValueError(
                f"the saved position belongs to the data set {state['dataset']!r}, but this one is "
                f"{self.dataset!r}; resume with the data that the run was started with"
            )
        self.generator.set_state(state["generator"].cpu())

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self.next()


class EpochStream(BatchStream):
    """Batches drawn without replacement, reshuffled at each pass.

    Every batch has min(batch_size, num_examples) examples. Examples left over at the end of a pass are too few for
    a batch and are skipped in that pass.

    Args:
        dataset: name of the data set.
        num_examples: size of the training split.
        batch_size, generator, device, dtype: see `BatchStream`.
    """

    unit = "rows"  # the word for examples in messages

    def __init__(
        self,
        dataset: str,
        num_examples: int,
        batch_size: int,
        generator: torch.Generator,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(dataset, batch_size, generator, device, dtype)
        self.num_examples = num_examples
        self.batch_size = min(self.batch_size, num_examples)
        self._permutation = torch.empty(0, dtype=torch.long)  # drawn by the first `next`
        self._position = 0

    def draw(self) -> Tensor:
        """Return the indices of the next batch, (batch,), on the CPU."""
        if self._position + self.batch_size > len(self._permutation):
            self._permutation = torch.randperm(self.num_examples, generator=self.generator)
            self._position = 0
        chosen = self._permutation[self._position : self._position + self.batch_size]
        self._position += self.batch_size
        return chosen

    def state_dict(self) -> dict[str, Any]:
        own = {"permutation": self._permutation.clone(), "position": self._position, "rows": self.num_examples}
        return super().state_dict() | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["rows"] != self.num_examples:
            raise InvalidValueError(
                f"the saved position belongs to {state['rows']} training {self.unit}, but {self.dataset!r} now has "
                f"{self.num_examples}; resume with the file and the split that the run was started with"
            )
        order, position = state["permutation"], state["position"]
        is_order = isinstance(order, Tensor) and order.dtype == torch.long and order.ndim == 1
        if not is_order or len(order) not in (0, self.num_examples) or not _is_permutation(order):
            raise InvalidValueError("the saved position is damaged: its order of the examples is none")
        if type(position) is not int or not 0 <= position <= len(order):
            raise InvalidValueError(f"the saved position is damaged: example {position!r} of {len(order)}")
        super().load_state_dict(state)
        self._permutation = order.cpu().clone()
        self._position = position


def _is_permutation(order: Tensor) -> bool:
    return bool(torch.equal(order.cpu().sort().values, torch.arange(len(order))))


def convert(points: Tensor, device: torch.device | str | None, dtype: torch.dtype | None, dataset: str) -> Tensor:
    """Copy points to a device and a dtype. Default: torch's dtype.

    Raises:
        InvalidValueError: a value is NaN or infinite in that dtype.
    """
    converted = points.to(device=device, dtype=dtype or torch.get_default_dtype(), copy=True)
    finite = torch.isfinite(converted)
    if not finite.all():
        bad = tuple(torch.nonzero(~finite)[0].tolist())
        raise InvalidValueError(
            f"data set {dataset!r}: {int((~finite).sum())} of {finite.numel()} values are NaN or infinite as "
            f"{converted.dtype}, the first is {points[bad].item()} at index {bad}; a flow needs finite data "
            "in the range of its dtype"
        )
    return converted


def convert_batch(batch: Batch, device: torch.device | str | None, dtype: torch.dtype | None, dataset: str) -> Batch:
    """Copy a batch to a device and a dtype; see `convert`.

    Raises:
        InvalidValueError: a value is not finite, or the numbers of examples and contexts differ.
    """
    if batch.context is not None and len(batch.context) != len(batch):
        raise InvalidValueError(
            f"data set {dataset!r}: {len(batch)} examples need as many contexts, got {len(batch.context)}"
        )
    context = None if batch.context is None else convert(batch.context, device, dtype, dataset)
    return Batch(convert(batch.x, device, dtype, dataset), context)
