"""Images as whole numbers: levels 0, ..., L − 1 in every channel of every pixel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flows.arguments import checked
from flows.checks import whole_number
from flows.datasets.base import Dataset, as_rows, one_hot
from flows.datasets.batches import Batch, EpochStream, convert
from flows.datasets.splits import random_split
from flows.errors import InvalidValueError

NUM_REFERENCE = 10_000  # training images that transforms are fitted to and plots are drawn from
MAX_BYTES_ON_DEVICE = 2**30  # a larger training split stays on the CPU and is moved batch by batch
MAX_LEVELS = 2**24  # float32 holds all whole numbers up to here


@checked
@dataclass(frozen=True)
class LabelledImages:
    """Images, with their classes if there are any.

    Example:
        ```python
        import torch

        import flows

        images = flows.datasets.LabelledImages(torch.randint(17, (20, 1, 8, 8)), torch.arange(20) % 2)
        ```
    """

    images: Tensor  # (n, C, H, W), whole numbers
    labels: Tensor | None = None  # (n,)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: Tensor | slice) -> LabelledImages:
        return LabelledImages(self.images[indices], None if self.labels is None else self.labels[indices])

    def split(
        self, validation_fraction: float, test_fraction: float, seed: int = 0, source: str = "the images"
    ) -> dict[str, LabelledImages]:
        """Split at random into "train", "validation" and "test".

        Raises:
            InvalidValueError: there are too few images.
        """
        fractions = {"test": test_fraction, "validation": validation_fraction}
        splits = random_split(len(self), fractions, seed, source, "images")
        return {split: self[indices] for split, indices in splits.items()}


@checked
class Images(Dataset):
    """Images of one size, held in memory.

    Batches hold the levels as floating-point numbers. A flow needs a transform that dequantises them
    (`flows.transforms.Dequantise`), as whole numbers have no density.

    Args:
        parts: the splits "train", "validation" and "test".
        num_levels: L.
        num_classes: number of classes. Default: None, no labels.
        name: name of the runs.
        conditional: give the class of each image as its context, one-hot.
        flip: mirror half of the training images, chosen anew in each batch. It suits data whose left and right mean
            the same.
        source: what messages call the data.

    Raises:
        InvalidValueError: a split is empty, is not (n, C, H, W), differs in shape from the others, or holds values that
            are no levels; or `conditional` is set and there are no labels.

    Example:
        ```python
        import torch

        import flows

        pixels = torch.randint(256, (100, 1, 8, 8), dtype=torch.uint8)
        parts = flows.datasets.LabelledImages(pixels).split(validation_fraction=0.1, test_fraction=0.2)
        dataset = flows.datasets.Images(parts)
        ```
    """

    num_reference: int = NUM_REFERENCE

    def __init__(
        self,
        parts: Mapping[str, LabelledImages],
        num_levels: int = 256,
        num_classes: int | None = None,
        name: str = "images",
        conditional: bool = False,
        flip: bool = False,
        source: str = "the images",
    ):
        if set(parts) != {"train", "validation", "test"}:
            raise InvalidValueError(f"parts must be train, validation and test, got {', '.join(parts) or 'none'}")
        self.num_levels = whole_number("num_levels", num_levels, 2, MAX_LEVELS, "most pictures have 256")
        self.name = name
        self.source = source
        self.flip = flip
        self.split_settings: dict[str, Any] = {"flip": flip}
        self.event_shape = tuple(parts["train"].images.shape[1:])
        self._parts = {
            split: LabelledImages(
                _levels(found.images, self.event_shape, self.num_levels, f"{source}, {split} split"), found.labels
            )
            for split, found in parts.items()
        }
        self.num_validation, self.num_test = len(parts["validation"]), len(parts["test"])
        if conditional:
            if num_classes is None or any(found.labels is None for found in parts.values()):
                raise InvalidValueError(f"{source} have no classes to condition on; set conditional=False")
            self.num_classes, self.context_shape = num_classes, (num_classes,)

    def labels(self, split: str) -> Tensor | None:
        """Return the classes (n,) of the "train", "validation" or "test" images, if known."""
        return self._parts[split].labels

    def rows_for_hashing(self) -> dict[str, np.ndarray]:
        return {split: as_rows(found.images) for split, found in self._parts.items()}

    def labels_for_hashing(self) -> dict[str, np.ndarray] | None:
        if self.num_classes is None:
            return None
        return {split: found.labels.numpy() for split, found in self._parts.items() if found.labels is not None}

    def train_stream(
        self,
        batch_size: int,
        generator: torch.Generator,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ImageStream:
        """Return an endless stream of training images, reshuffled at each pass."""
        return ImageStream(
            self.name, self._parts["train"], self.num_classes, self.flip, batch_size, generator, device, dtype
        )

    def held_out(self, split: Literal["validation", "test"]) -> Batch:
        found = self._parts[split]
        return Batch(found.images, _contexts(found.labels, self.num_classes))

    def reference(self) -> Tensor:
        """Return up to `num_reference` random training images (n, C, H, W), the same at each call."""
        train = self._parts["train"].images
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        return convert(train[order[: self.num_reference]], None, None, self.name)


class ImageStream(EpochStream):
    """Batches of images without replacement, with optional mirroring."""

    unit = "images"

    def __init__(
        self,
        dataset: str,
        images: LabelledImages,
        num_classes: int | None,
        flip: bool,
        batch_size: int,
        generator: torch.Generator,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(dataset, len(images), batch_size, generator, device, dtype)
        small = images.images.nbytes <= MAX_BYTES_ON_DEVICE
        self._images = images.images.to(self.device) if small else images.images
        self._labels = images.labels
        self._num_classes = num_classes
        self._flip = flip

    def next(self) -> Batch:
        chosen = self.draw()
        x = self._images[chosen.to(self._images.device)].to(self.device, self.dtype)
        if self._flip:
            mirrored = torch.rand(len(x), generator=self.generator) < 0.5
            x = torch.where(mirrored.to(self.device)[:, None, None, None], x.flip(-1), x)
        context = _contexts(None if self._labels is None else self._labels[chosen], self._num_classes, self.dtype)
        return Batch(x, None if context is None else context.to(self.device))


@checked
class Digits(Images):
    """1,797 handwritten digits, part of scikit-learn.

    They have 8 × 8 pixels and 17 levels, 0 to 16: a pixel counts the dark dots in a 4 × 4 block. [Alpaydin & Kaynak
    1998, Optical Recognition of Handwritten Digits, UCI]

    Args:
        conditional: give the digit as the context.
        validation_fraction, test_fraction: fractions of the images, rounded to whole images.
        split_seed: seed of the random split.

    Raises:
        InvalidValueError: a fraction is out of range, or a split would be empty.

    Example:
        ```python
        import flows

        data = flows.datasets.Digits(conditional=True)
        data.event_shape, data.num_levels, data.num_classes  # (1, 8, 8), 17, 10
        ```
    """

    def __init__(
        self,
        conditional: bool = False,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
    ):
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        images = LabelledImages(torch.from_numpy(pixels).byte().view(-1, 1, 8, 8), torch.from_numpy(labels).long())
        parts = images.split(validation_fraction, test_fraction, split_seed, "digits")
        super().__init__(parts, 17, 10, "digits", conditional, source="digits")
        fractions = {"validation_fraction": validation_fraction, "test_fraction": test_fraction}
        self.split_settings |= {**fractions, "split_seed": split_seed}


def _contexts(labels: Tensor | None, num_classes: int | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """Encode labels for a conditional flow; without `num_classes` there are no contexts."""
    if num_classes is None:
        return None
    assert labels is not None  # Images checks it
    return one_hot(labels, num_classes, dtype)


def _levels(images: Tensor, event_shape: tuple[int, ...], num_levels: int, source: str) -> Tensor:
    """Return the images in the smallest type that holds the levels."""
    if images.ndim != 4 or tuple(images.shape[1:]) != event_shape or not len(images):
        raise InvalidValueError(
            f"{source}: expected at least one image (n, channels, height, width), all of one shape, got "
            f"{tuple(images.shape)}" + (f" beside {event_shape}" if images.ndim == 4 else "")
        )
    if images.dtype == torch.uint8 and int(images.max()) < num_levels:
        return images
    stored = images.to(torch.uint8 if num_levels <= 256 else torch.int32)
    wrong = (images < 0) | (images > num_levels - 1) | (stored != images)
    if wrong.any():
        index = tuple(wrong.nonzero()[0].tolist())
        raise InvalidValueError(
            f"{source}: image {index[0]} has the value {images[index].item():g} at {index[1:]}, which is no level from "
            f"0 to {num_levels - 1} ({int(wrong.sum())} such values); set num_levels, or give levels as whole numbers"
        )
    return stored
