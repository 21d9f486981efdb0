"""The contract of a data set: a training stream, two fixed splits, and points to fit transforms to."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from flows.arguments import CheckedMethods, checked
from flows.checks import fits_in_memory, whole_number
from flows.conditions import Conditions
from flows.datasets.batches import Batch, BatchStream, convert_batch
from flows.datasets.recognition.fingerprint import fingerprint_of_rows
from flows.errors import InvalidValueError, UnstatedError
from flows.naming import in_words

METHODS = (  # whose arguments are checked, in every data set
    "train_stream",
    "held_out",
    "validation_batches",
    "test_batches",
    "contexts",
    "sample",
    "sample_context",
    "sample_given",
    "draw",
    "log_prob",
    "log_density",
)


class Dataset(CheckedMethods, ABC, checks=METHODS):
    """Examples of one shape in three splits: training, validation, test.

    Subclasses set `event_shape`, `num_validation` and `num_test`, and implement `train_stream`, `held_out`
    and `reference`. All other attributes have defaults.

    Attributes:
        name: name of the runs; equal to the name of the yaml in `conf/data`. Default: that of the class in small
            letters, such as double_well for DoubleWell.
        event_shape: shape of one example.
        entropy: differential entropy in nats, which no expected NLL can fall below. With contexts it is
            H(x | context). Default: None, unknown.
        context_shape: shape of one context. Default: None, no contexts.
        num_classes: number K of classes if the context is a class. Contexts are then one-hot vectors (K,), and the
            zero vector means "no class". Default: None, no classes.
        conditions: names and categories of the entries of a context that comes from columns of a table. Default: None.
        class_names: what the classes are called, in their order. Default: None, by their numbers.
        num_levels: number L of levels if the data are whole numbers 0, ..., L − 1. A flow must dequantise them.
            Default: None, continuous data.
        bounds: low and high, two tensors (*event), between which all examples lie; ±inf where there is no bound.
            Default: None, the whole space.
        columns: names of the features of a table. Default: None, no names.
        split_settings: plain values that decide the split, and what else training data depend on. Default: none.
        has_samples: whether there are points; an energy may have none. Default: True.
        is_scored: whether all examples are in the test part, since they are only evaluated on. Default: False.
        has_log_prob: whether `log_prob` is known. Default: whether the class overrides it.
        num_validation, num_test: sizes of the fixed splits.

    Example:
        ```python
        import flows

        data: flows.datasets.Dataset = flows.datasets.Moons(num_test=1000)
        data.event_shape, data.reference().shape  # (2,), and points of the training part
        [len(batch.x) for batch in data.test_batches(500)]  # [500, 500]
        ```
    """

    def __init_subclass__(cls, **options: Any) -> None:
        """Let every data set check the number of points that it is asked for."""
        for name in ("sample", "sample_context", "draw"):
            if name in vars(cls):
                setattr(cls, name, _of_count(vars(cls)[name]))
        stated = [base for base in cls.__mro__ if "name" in vars(base) and not vars(base).get("_is_named_by_class")]
        if not stated:
            cls.name, cls._is_named_by_class = in_words(cls.__name__), True
        super().__init_subclass__(**options)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name in ("event_shape", "num_validation", "num_test"):
                example = "(2,)" if name == "event_shape" else "1000"
                raise UnstatedError(
                    f"the data set {type(self).__name__} does not state {name}; set it in the class, such as "
                    f"{name} = {example}, or call super().__init__() if that sets it"
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    name: str
    _is_named_by_class: bool
    event_shape: tuple[int, ...]
    entropy: float | None = None
    context_shape: tuple[int, ...] | None = None
    num_classes: int | None = None
    class_names: Sequence[str] | None = None
    conditions: Conditions | None = None
    num_levels: int | None = None
    bounds: tuple[Tensor, Tensor] | None = None
    columns: Sequence[str] | None = None
    split_settings: Mapping[str, Any] = MappingProxyType({})
    has_samples: bool = True
    is_scored: bool = False
    num_validation: int
    num_test: int
    labels_identify: bool = False  # whether examples are the same only if their contexts are, too
    label_differences: str = "the classes are numbered otherwise, or examples have other classes"  # for messages
    _fingerprint: dict[str, Any] | None = None

    @abstractmethod
    def train_stream(
        self,
        batch_size: int,
        generator: torch.Generator,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> BatchStream:
        """Return an endless stream of training batches, drawn with `generator` (on the CPU).

        `device` and `dtype` are those of the batches. Points of a table stay in float64 all the same.
        """

    @abstractmethod
    def held_out(self, split: Literal["validation", "test"]) -> Batch:
        """Return all examples of a fixed split as they are stored.

        The points and their order must be the same at each call.
        """

    @abstractmethod
    def reference(self) -> Tensor:
        """Return training points (n, *event) to fit transforms and draw plots.

        They have torch's default dtype, those of a table float64.
        """

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the true log p(x | context) in nats, (*batch,), if it is known.

        Args:
            x: points (*batch, *event).
            context: contexts that broadcast to x, for a conditional density.

        Raises:
            NotImplementedError: it is not known; `has_log_prob` is then False.
        """
        raise NotImplementedError(f"{type(self).__name__} has no log_prob; check has_log_prob first")

    @property
    def has_log_prob(self) -> bool:
        return type(self).log_prob is not Dataset.log_prob

    @checked
    def validation_batches(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Iterator[Batch]:
        """Iterate once over the validation split, always in the same order."""
        return self._in_batches("validation", batch_size, device, dtype)

    @checked
    def test_batches(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Iterator[Batch]:
        """Iterate once over the test split, always in the same order."""
        return self._in_batches("test", batch_size, device, dtype)

    @checked
    def contexts(self, n: int) -> Tensor | None:
        """Return n contexts (n, *context) of the validation split, repeated if it is smaller.

        Without contexts, return None.
        """
        n = whole_number("n", n)
        if self.context_shape is None:
            return None
        found = next(iter(self.validation_batches(n))).context
        assert found is not None, f"{self.name} states a context_shape but has no contexts"
        return found[torch.arange(n) % len(found)]

    def moments(self) -> tuple[Tensor, Tensor] | None:
        """Return mean and standard deviation of all training points, (*event) each in float64.

        None where `reference()` has all of them.
        """
        return None

    def reference_contexts(self) -> Tensor | None:
        """Return contexts (n, *context) of the training part to fit an encoder; None without contexts.

        The default takes those of the validation part.
        """
        return None if self.context_shape is None else self.contexts(self.num_validation)

    def row_numbers(self, split: Literal["validation", "test"]) -> Tensor:  # (n,)
        """Return the place of each example of a split where it comes from, such as its row in a file, from 0."""
        return torch.arange(self.num_test if split == "test" else self.num_validation)

    def description(self) -> dict[str, Any]:
        """Return the data set's name and shapes as plain values, for checkpoints."""
        return {
            "name": self.name,
            "event_shape": list(self.event_shape),
            "context_shape": None if self.context_shape is None else list(self.context_shape),
            "num_classes": self.num_classes,
            **({} if self.class_names is None else {"class_names": list(self.class_names)}),
            **({} if self.conditions is None else {"conditions": self.conditions.as_dict()}),
            "num_levels": self.num_levels,
            "columns": None if self.columns is None else list(self.columns),
        }

    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies data and split, for checkpoints: plain values and tensors. It is computed once."""
        if self._fingerprint is None:
            self._fingerprint = self.new_fingerprint()
        return self._fingerprint

    def new_fingerprint(self) -> dict[str, Any]:
        """Compute `fingerprint()`. Override this for data that are no fixed rows."""
        if not self.has_samples:
            return {"kind": "unknown"}
        rows = self.rows_for_hashing()
        labels, joined = self.labels_for_hashing(), self.labels_identify
        return fingerprint_of_rows(rows, self.columns, self.split_settings, labels, self._fixed_rows, joined)

    def rows_for_hashing(self) -> dict[str, np.ndarray]:
        """Return the examples of each split, (n, k), without noise: by default `reference()` and `held_out(...)`."""
        held = {split: self.held_out(split).x for split in ("validation", "test")}
        return {split: as_rows(x) for split, x in {"train": self.reference(), **held}.items()}

    def labels_for_hashing(self) -> dict[str, np.ndarray] | None:
        """Return the class or context of each example of each split, or None if flows do not depend on them.

        The default is the contexts of `held_out(...)`; those of training points are unknown.
        """
        if self.context_shape is None:
            return None
        held = {split: self.held_out(split).context for split in ("validation", "test")}
        known = {split: as_rows(context) for split, context in held.items() if context is not None}
        return {"train": np.zeros((len(self.reference()), 1)), **known}

    @property
    def _fixed_rows(self) -> bool:
        """Whether `rows_for_hashing` returns all training rows in their order, not just `reference()`."""
        return type(self).rows_for_hashing is not Dataset.rows_for_hashing

    def _in_batches(
        self,
        split: Literal["validation", "test"],
        batch_size: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> Iterator[Batch]:
        batch_size = whole_number("batch_size", batch_size)  # here, as a generator would raise at its first batch only
        found = self.held_out(split)
        starts = range(0, len(found), batch_size)
        return (convert_batch(found[start : start + batch_size], device, dtype, self.name) for start in starts)


def as_rows(x: Tensor) -> np.ndarray:
    """Return points (n, *event) as rows (n, k) of an array: floating-point numbers in float64, others as they are."""
    flat = x.detach().cpu().flatten(1)
    return (flat.double() if flat.is_floating_point() else flat).numpy()


def _of_count(method: Callable[..., Any]) -> Callable[..., Any]:
    """The same method with a check of its first argument, the number of points."""

    @functools.wraps(method)
    def counted(self: Dataset, n: int, *arguments: Any, **named: Any) -> Any:
        whole_number("n", n, 0)
        size = math.prod(getattr(self, "event_shape", ()))
        fits_in_memory(f"n: {n:,} points", n * size * torch.get_default_dtype().itemsize)
        return method(self, n, *arguments, **named)

    return counted


@checked
def one_hot(
    labels: Tensor,  # (*batch), whole numbers
    num_classes: int,
    dtype: torch.dtype | None = None,
) -> Tensor:  # (*batch, num_classes)
    """Encode classes 0, ..., num_classes − 1 as one-hot contexts.

    Raises:
        InvalidValueError: a label is no whole number in that range.

    Example:
        ```python
        import torch

        import flows

        flows.datasets.one_hot(torch.tensor([0, 2]), num_classes=3)  # [[1, 0, 0], [0, 0, 1]]
        ```
    """
    if labels.is_floating_point() or (labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes):
        raise InvalidValueError(
            f"labels must be whole numbers from 0 to {num_classes - 1}, got {labels.unique().tolist()[:8]}"
        )
    return torch.nn.functional.one_hot(labels.long(), num_classes).to(dtype or torch.get_default_dtype())
