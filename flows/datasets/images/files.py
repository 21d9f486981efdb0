"""Images of a file, a folder or the Hugging Face hub, as a data set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from flows.arguments import checked
from flows.checks import check_number, existing_path, whole_number
from flows.datasets.folders import SPLIT_OF
from flows.datasets.images.hub import read_hub
from flows.datasets.images.images import MAX_LEVELS, Images, LabelledImages
from flows.datasets.images.labels import Classes, read_classes
from flows.datasets.images.pictures import MODES, Decoder
from flows.datasets.images.sources import read_path
from flows.datasets.images.stored import StoredImages
from flows.datasets.recognition.hashing import hash_rows
from flows.datasets.splits import random_split
from flows.errors import DataWarning, InvalidTypeError, InvalidValueError, warn


@checked(own=("size",))
class ImageFiles(Images):
    """Images of any file that people have, decoded once and held in memory.

    Args:
        source: name of a data set on the Hugging Face hub. It is downloaded once, then found in the local cache. Needs
            the extra `images`: `pip install -e '.[images]'`.
        path: a file or folder, instead of `source`. One of

            - a folder of pictures; sub-folders "train", "validation" and "test" are splits, and sub-folders of those
              are classes; without splits, sub-folders are classes,
            - an .npz or .npy file of images (n, height, width), (n, height, width, channels) or
              (n, channels, height, width); labels are the array "labels", "y" or "targets" beside them, or the file
              y.npy beside x.npy; names may tell splits apart, as x_train and y_test do,
            - idx files of MNIST, plain or .gz, with the file of labels beside that of images; or the folder of them,
            - Parquet files with a column of pictures: bytes, structs of bytes and path, or lists of numbers; files
              belong to the split whose word begins their name,
            - CIFAR's Python pickles, data_batch_1 or the folder of them, read without running what is in them,
            - a folder that `save_to_disk` of Hugging Face wrote.
        validation_path, test_path: files or folders of those splits, of any of these kinds. Default: those in `path`.
        name: name of the runs.
        mode: "L" (grey) or "RGB" to convert all images, also those of 1 or 16 bits, to 8 bits a channel. Default: keep
            them; they must all have the same mode.
        size: (height, width) to crop and scale all images to. Default: keep them; they must all have the same size.
        image, label: names of the columns or arrays. Default: find them.
        validation_split, test_split: names of the splits in the data.
        validation_fraction, test_fraction: fraction of the training images to set aside if the data lack that split.
            None: raise an error.
        split_seed: seed of the random split.
        conditional: give the class as the context.
        flip: mirror half of the training images, chosen anew in each batch.
        num_levels: number of levels: 2 for pictures of 1 bit, 65,536 for those of 16 bits.
        scale: factor from stored fractions to levels: 255 for numbers from 0 to 1. Default: levels are stored.
        skip_unreadable: leave out pictures that cannot be read, and count them in a warning. Default: raise an error.

    A `DataWarning` counts files and splits that are not used, test images that are also training images, and pictures
    that lose something, such as transparency.

    Attributes:
        class_names: names of the classes by number, if there are any.

    Raises:
        FileError: there is no such path, it cannot be read, pictures are corrupt, or the data set is neither in the
            cache nor can be downloaded.
        MissingPackageError: `datasets` is not installed, which `source` needs.
        InvalidTypeError: a setting has the wrong type.
        InvalidValueError: images differ in size or mode, a value is no level, a split or column is missing, there are
            too few images, they do not fit in memory, or classes cannot be conditioned on.

    Example:
        ```python
        from pathlib import Path

        from PIL import Image

        import flows

        Path("pictures").mkdir()
        for i in range(20):
            Image.new("L", (8, 8), 10 * i).save(f"pictures/{i}.png")
        data = flows.datasets.ImageFiles(path="pictures", mode="RGB", size=(4, 4))
        data.event_shape  # (3, 4, 4)
        ```
    """

    def __init__(
        self,
        source: str | None = None,
        path: str | Path | None = None,
        validation_path: str | Path | None = None,
        test_path: str | Path | None = None,
        name: str = "images",
        mode: str | None = None,
        size: Sequence[int] | None = None,
        image: str | None = None,
        label: str | None = None,
        validation_split: str | None = "validation",
        test_split: str | None = "test",
        validation_fraction: float | None = 0.1,
        test_fraction: float | None = 0.1,
        split_seed: int = 0,
        conditional: bool = False,
        flip: bool = False,
        num_levels: int = 256,
        scale: float | None = None,
        skip_unreadable: bool = False,
    ):
        if mode is not None and mode not in MODES:
            raise InvalidValueError(f"mode must be L (grey) or RGB, or null for pictures as they are, got {mode!r}")
        whole_number("num_levels", num_levels, 2, MAX_LEVELS, "most pictures have 256")
        if scale is not None:
            check_number("scale", scale, above=0, otherwise="255 for values from 0 to 1")
        if validation_split is not None and validation_split == test_split:
            raise InvalidValueError(
                f"validation_split and test_split are both {test_split!r}; set validation_split=null to set a fraction "
                "of the training images aside"
            )
        decoder = Decoder("", mode, checked_size(size), num_levels, scale, skip_unreadable)
        where = str(source if path is None else path)
        decoder.where = where
        found = read_hub(source, image, label) if path is None else _read("path", path, image, label)
        wanted = {"validation": validation_split, "test": test_split}
        chosen = _chosen(found, wanted, where)
        for part, given in (("validation", validation_path), ("test", test_path)):
            if given is not None:
                chosen[part] = _single(_read(f"{part}_path", given, image, label), part, given)
        classes, parts = _decode(chosen, decoder, where)
        fractions = {"test": test_fraction, "validation": validation_fraction}
        missing = {}
        for part in (part for part in fractions if part not in parts):
            fraction = fractions[part]
            if fraction is None:
                raise InvalidValueError(
                    f"{where} has no split {wanted[part]!r}, only {', '.join(map(repr, found))}; name another one with "
                    f"{part}_split, or set a fraction of the training images aside with {part}_fraction=0.1"
                )
            missing[part] = fraction
        train = parts["train"]
        if missing:
            split = random_split(len(train), missing, split_seed, where, "images")
            parts |= {part: train[indices] for part, indices in split.items()}
        if conditional:
            classes.check_conditions(where)
            classes.check_counts(where, {part: held.labels for part, held in parts.items()})
        self.class_names = classes.names
        num_classes = None if classes.names is None else len(classes.names)
        super().__init__(parts, num_levels, num_classes, name, conditional, flip, where)
        self.split_settings |= {f"{part}_fraction": missing.get(part) for part in fractions}
        self.split_settings |= {"split_seed": split_seed, **{f"{part}_split": split for part, split in wanted.items()}}
        _tell_repeated(self, where)


def _read(setting: str, path: str | Path, image: str | None, label: str | None) -> dict[str, StoredImages]:
    return read_path(existing_path(setting, path, "folder or file of images", folder=True), image, label)


def _chosen(found: Mapping[str, StoredImages], wanted: Mapping[str, str | None], where: str) -> dict[str, StoredImages]:
    """Return the stored images by part, and warn of splits that are left out."""
    if "train" not in found:
        raise InvalidValueError(
            f"{where} has no split 'train', only {', '.join(map(repr, found))}; rename one, or merge them"
        )
    for part, split in wanted.items():
        if split and split != part and split not in found:
            read_as = SPLIT_OF.get(split.lower())
            cure = "" if read_as is None else f"; {split!r} is read as {read_as!r}"
            raise InvalidValueError(
                f"{where} has no split {split!r}, only {', '.join(map(repr, found))}{cure}; name one of them with "
                f"{part}_split, or set it to null for a fraction of the training images"
            )
    meant = {"train", "validation", "test", *wanted.values()}  # those replaced by settings are left out on purpose
    unused = {split: stored.count for split, stored in found.items() if split not in meant}
    if unused:
        counts = ", ".join(f"{split!r} ({count:,} images)" for split, count in unused.items())
        warn(f"{where}: the split {counts} is not used; name it with validation_split or test_split", DataWarning)
    held = {part: found[split] for part, split in wanted.items() if split and split in found}
    return {"train": found["train"], **held}


def _single(found: Mapping[str, StoredImages], part: str, path: object) -> StoredImages:
    if len(found) > 1 and part not in found:
        raise InvalidValueError(
            f"{part}_path: {path} has the splits {', '.join(map(repr, found))}, and none is {part!r}; give one split"
        )
    return found[part] if part in found else next(iter(found.values()))


def _decode(
    chosen: Mapping[str, StoredImages], decoder: Decoder, where: str
) -> tuple[Classes, dict[str, LabelledImages]]:
    """Return the classes of all parts, and their images with the numbers of these classes."""
    names = {stored.class_names for stored in chosen.values() if stored.class_names is not None}
    labels = {}
    pixels = {}
    decoder.largest_16_bit = max((stored.highest or 0 for stored in chosen.values()), default=0) or None
    for part, stored in chosen.items():
        pixels[part], kept = decoder(stored, part)
        given = stored.labels
        if given is not None and len(names) > 1 and stored.class_names is not None:  # classes of several sources
            given = [None if label is None else stored.class_names[label] for label in given]
        labels[part] = given[kept] if isinstance(given, np.ndarray) else given and [given[i] for i in kept.tolist()]
    count = max(2, (decoder.largest_value or 0) + 1)
    if decoder.largest_value is not None and 2 * decoder.largest_value < decoder.num_levels - 1:
        warn(
            f"{where}: the highest value is {decoder.largest_value}; if the images have {count} levels, set "
            f"num_levels={count}, as bits per dimension of {decoder.num_levels:,} levels are other bits",
            DataWarning,
        )
    classes = read_classes(labels, names.pop() if len(names) == 1 else None, where)
    return classes, {
        part: LabelledImages(torch.from_numpy(images), classes.numbers[part]) for part, images in pixels.items()
    }


def _tell_repeated(dataset: ImageFiles, where: str) -> None:
    """Warn of images that are there more than once, as tables do."""
    keys = {part: hash_rows(rows) for part, rows in dataset.rows_for_hashing().items()}
    every = np.concatenate(list(keys.values()))
    copies = len(every) - len(np.unique(every))
    if not copies:
        return
    known = {part: int(np.isin(keys[part], keys["train"]).sum()) for part in ("validation", "test")}
    found = f"{where}: {copies:,} of {len(every):,} images are duplicates of other images"
    shared = ", all in the same part of the split"
    if any(known.values()):
        shared = (
            f", and {known['test']:,} of {len(keys['test']):,} test images and {known['validation']:,} of "
            f"{len(keys['validation']):,} validation images are also training images, so the figures reward memory"
        )
    warn(f"{found}{shared}; drop the duplicates if they are no data of their own", DataWarning)


def checked_size(size: object) -> tuple[int, int] | None:
    if size is None:
        return None
    message = f"size must be [height, width] in pixels, such as [32, 32], got {size!r}"
    if isinstance(size, str) or not isinstance(size, Iterable):
        raise InvalidTypeError(message)
    sides = tuple(whole_number("each entry of size", side, otherwise="it counts pixels") for side in size)
    if len(sides) != 2:
        raise InvalidValueError(message)
    return sides
