"""Images as whole numbers: levels 0, ..., L - 1 in every channel of every pixel."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flows.datasets.base import Batch, Dataset, convert, fixed_batches, one_hot
from flows.datasets.passes import EpochStream, random_split
from flows.errors import InvalidValueError

NUM_REFERENCE = 10_000  # training images to fit transforms and draw plots with
STAYS_ON_THE_CPU = 2**30  # bytes; a larger training part is not moved to the device as a whole


@dataclass(frozen=True)
class LabelledImages:
    """Images with the class of each, where there are classes."""

    images: Tensor  # (n, C, H, W), whole numbers
    labels: Tensor | None = None  # (n,)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: Tensor | slice) -> "LabelledImages":
        return LabelledImages(self.images[indices], None if self.labels is None else self.labels[indices])

    def split(
        self, validation_fraction: float, test_fraction: float, seed: int = 0, source: str = "the images"
    ) -> dict[str, "LabelledImages"]:
        """Cut into parts at random; raises ValueError where there are too few images."""
        shares = {"test": test_fraction, "validation": validation_fraction}
        return {
            part: self[indices] for part, indices in random_split(len(self), shares, seed, source, "images").items()
        }


class Images(Dataset):
    """Images of one size from memory, in three parts.

    Batches hold levels as floating-point numbers. A flow needs a transform that dequantises them
    (`flows.transforms.Dequantise`), since no density is defined on a set of whole numbers.

    Args:
        parts: "train", "validation" and "test".
        num_levels: L.
        num_classes: of the labels, where there are any.
        name: what runs are called after.
        conditional: whether batches hold the class as their context, one-hot, for a conditional flow.
        flip: mirror half of the training images, drawn anew each time; where left and right mean the same.
        source: what error messages call the data.

    Raises:
        ValueError: a part is empty, not (n, C, H, W), of another shape than the others, or holds other values than
            levels; `conditional` without labels.
    """

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
        if isinstance(num_levels, bool) or not isinstance(num_levels, int) or num_levels < 2:
            raise InvalidValueError(f"num_levels must be a whole number >= 2, such as 256, got {num_levels!r}")
        self.name = name
        self.num_levels = num_levels
        self.flip = flip
        self.event_shape = tuple(parts["train"].images.shape[1:])
        self._parts = {
            part: LabelledImages(
                _levels(found.images, self.event_shape, num_levels, f"{source}, {part} part"), found.labels
            )
            for part, found in parts.items()
        }
        self.num_validation, self.num_test = len(parts["validation"]), len(parts["test"])
        if conditional:
            if num_classes is None or any(found.labels is None for found in parts.values()):
                raise InvalidValueError(f"{source} have no classes to condition on; set conditional=False")
            self.num_classes, self.context_shape = num_classes, (num_classes,)

    def labels(self, part: str) -> Tensor | None:
        """The classes of the images of "train", "validation" or "test", (n,), where they are known."""
        return self._parts[part].labels

    def train_stream(
        self,
        batch_size: int,
        generator: torch.Generator,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "ImageStream":
        """Return an endless stream over the training images, shuffled anew for each pass."""
        return ImageStream(
            self.name, self._parts["train"], self.num_classes, self.flip, batch_size, generator, device, dtype
        )

    def validation_batches(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Iterator[Batch]:
        return self._in_batches("validation", batch_size, device, dtype)

    def test_batches(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Iterator[Batch]:
        return self._in_batches("test", batch_size, device, dtype)

    def reference(self) -> Tensor:
        """Return up to 10,000 training images, (n, C, H, W), drawn once, in torch's default dtype."""
        train = self._parts["train"].images
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        return convert(train[order[:NUM_REFERENCE]], None, None, self.name)

    def _in_batches(
        self, part: str, batch_size: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> Iterator[Batch]:
        found = self._parts[part]
        contexts = None if self.num_classes is None else one_hot(found.labels, self.num_classes)
        return fixed_batches(found.images, batch_size, device, dtype, self.name, contexts)


class ImageStream(EpochStream):
    """Batches of images without replacement, mirrored at random where asked for; see `EpochStream`."""

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
        small = images.images.nbytes <= STAYS_ON_THE_CPU
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
        if self._num_classes is None:
            return Batch(x)
        return Batch(x, one_hot(self._labels[chosen], self._num_classes, self.dtype).to(self.device))


class Digits(Images):
    """1,797 handwritten digits of 8 × 8 pixels with 17 levels, 0 to 16; embedded in scikit-learn.

    Source: Alpaydin & Kaynak 1998, Optical Recognition of Handwritten Digits (UCI); pixels count the dark dots in
    4 × 4 blocks.

    Args:
        conditional: whether batches hold the digit as their context.
        validation_fraction, test_fraction: shares of the images, rounded to whole ones.
        split_seed: which images go where.
    """

    def __init__(
        self,
        conditional: bool = False,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
    ):
        from sklearn.datasets import load_digits

        data = load_digits()
        images = LabelledImages(torch.from_numpy(data.images).byte().unsqueeze(1), torch.from_numpy(data.target).long())
        parts = images.split(validation_fraction, test_fraction, split_seed, "digits")
        super().__init__(parts, 17, 10, "digits", conditional, source="digits")


def _levels(images: Tensor, event_shape: tuple[int, ...], num_levels: int, source: str) -> Tensor:
    """The images in the smallest type that holds the levels."""
    if images.ndim != 4 or tuple(images.shape[1:]) != event_shape or not len(images):
        raise InvalidValueError(
            f"{source}: expected at least one image of shape (n, channels, height, width), all of one shape, got "
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
