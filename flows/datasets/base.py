"""What a data set offers: batches to train on, fixed ones to evaluate on, points to fit transforms on."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flows.errors import InvalidValueError


@dataclass(frozen=True)
class Batch:
    """Examples in data space."""

    x: Tensor  # (batch, *event)
    context: Tensor | None = None  # (batch, *context), floating point; what the density of x is conditional on

    def __len__(self) -> int:
        return len(self.x)


class BatchStream(ABC):
    """An endless iterator of training batches that can stop anywhere and resume bit for bit.

    All randomness comes from one CPU generator, whatever the device of the batches, so that a seed gives the
    same batches everywhere.
    """

    def __init__(
        self,
        dataset: str,
        batch_size: int,
        generator: torch.Generator,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_batch_size(batch_size)
        if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
            found = getattr(generator, "device", type(generator).__name__)
            raise InvalidValueError(
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
        """Return what the rest of the stream depends on: tensors, ints and strings only."""
        return {"dataset": self.dataset, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`, the generator included. Raises ValueError for another data set's state."""
        if state["dataset"] != self.dataset:
            raise InvalidValueError(
                f"the saved position belongs to the data set {state['dataset']!r}, this one is "
                f"{self.dataset!r}; resume with the data that the run was started with"
            )
        self.generator.set_state(state["generator"].cpu())

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self.next()


class Dataset(ABC):
    """Examples of one shape, in three parts: training, validation, test.

    Attributes:
        name: what runs are called after; equal to the name of the yaml in `conf/data`.
        event_shape: shape of one example.
        entropy: differential entropy in nats, the floor of the expected NLL; None where unknown. With contexts it is
            the conditional entropy H(x | context).
        context_shape: shape of the context of one example, which every batch then holds; None without contexts.
        num_classes: K where the context is a class. It is then a one-hot vector of `context_shape` (K,), and the
            zero vector stands for no class in particular. None for other contexts.
        has_samples: whether there are points at all; an energy may have none.
        num_levels: L where data are whole numbers 0, ..., L - 1, which a flow has to dequantise; None for others.
        num_validation, num_test: sizes of the two fixed parts.
    """

    name: str
    event_shape: tuple[int, ...]
    entropy: float | None = None
    context_shape: tuple[int, ...] | None = None
    num_classes: int | None = None
    has_samples: bool = True
    num_levels: int | None = None
    num_validation: int
    num_test: int

    @abstractmethod
    def train_stream(
        self,
        batch_size: int,
        generator: torch.Generator,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> BatchStream:
        """Return training batches of `batch_size`, drawn with `generator` (on the CPU)."""

    @abstractmethod
    def validation_batches(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Iterator[Batch]:
        """Iterate once over the validation part, the same points in the same order at each call."""

    @abstractmethod
    def test_batches(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Iterator[Batch]:
        """Iterate once over the test part, the same points in the same order at each call."""

    @abstractmethod
    def reference(self) -> Tensor:
        """Return (n, *event) training points in torch's default dtype, to fit transforms and draw plots."""

    def contexts(self, n: int) -> Tensor | None:
        """Return n contexts, (n, *context), those of the validation part in turn; None where there are none."""
        if self.context_shape is None:
            return None
        check_batch_size(n)
        found = next(iter(self.validation_batches(n))).context
        return found[torch.arange(n) % len(found)]


def check_batch_size(batch_size: int) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InvalidValueError(f"batch_size must be a whole number >= 1, got {batch_size!r}")


def convert(points: Tensor, device: torch.device | str | None, dtype: torch.dtype | None, dataset: str) -> Tensor:
    """Copy `points` to a device and dtype (default: torch's), or raise InvalidValueError where one is not finite."""
    converted = points.to(device=device, dtype=dtype or torch.get_default_dtype(), copy=True)
    finite = torch.isfinite(converted)
    if not finite.all():
        bad = tuple(torch.nonzero(~finite)[0].tolist())
        raise InvalidValueError(
            f"data set {dataset!r}: {int((~finite).sum())} of {finite.numel()} values are NaN or infinite as "
            f"{converted.dtype}, the first, {points[bad].item()}, at index {bad}; a flow needs finite data "
            "in the range of its dtype"
        )
    return converted


def fixed_batches(
    points: Tensor,  # (n, *event)
    batch_size: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    dataset: str,
    contexts: Tensor | None = None,  # (n, *context)
) -> Iterator[Batch]:
    """Cut `points` into batches in order; the last may be smaller. A bad batch_size raises at the call."""
    check_batch_size(batch_size)
    starts = range(0, len(points), batch_size)
    return (
        converted_batch(points[i : i + batch_size], _cut(contexts, i, batch_size), device, dtype, dataset)
        for i in starts
    )


def converted_batch(
    points: Tensor,  # (n, *event)
    contexts: Tensor | None,  # (n, *context)
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    dataset: str,
) -> Batch:
    """A batch on a device and in a dtype, both parts checked as by `convert`."""
    if contexts is not None and len(contexts) != len(points):
        raise InvalidValueError(
            f"data set {dataset!r}: {len(points)} examples need as many contexts, got {len(contexts)}"
        )
    context = None if contexts is None else convert(contexts, device, dtype, dataset)
    return Batch(convert(points, device, dtype, dataset), context)


def one_hot(
    labels: Tensor,  # (*batch), whole numbers
    num_classes: int,
    dtype: torch.dtype | None = None,
) -> Tensor:  # (*batch, num_classes)
    """The contexts of classes 0 ... num_classes - 1: one at the place of the class and zero elsewhere.

    Raises:
        ValueError: a label is no whole number in that range.
    """
    if labels.is_floating_point() or (labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes):
        raise InvalidValueError(
            f"labels must be whole numbers from 0 to {num_classes - 1}, got {labels.unique().tolist()[:8]}"
        )
    return torch.nn.functional.one_hot(labels.long(), num_classes).to(dtype or torch.get_default_dtype())


def _cut(contexts: Tensor | None, start: int, size: int) -> Tensor | None:
    return None if contexts is None else contexts[start : start + size]
