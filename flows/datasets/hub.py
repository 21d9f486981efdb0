"""Images from the Hugging Face hub, or from folders and files, through the library `datasets`."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from flows.datasets.images import Images, LabelledImages
from flows.datasets.passes import random_split
from flows.errors import InvalidValueError

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image

CHANNELS = {"L": 1, "RGB": 3}  # of the modes that are taken as they are


class HubImages(Images):
    """Images of a data set of the Hugging Face hub, of a folder of pictures, or of Parquet files.

    All are decoded once and kept in memory, one byte a level. Needs `pip install -e '.[images]'`.

    Args:
        source: name on the hub, which is downloaded once and then found in the local cache.
        path: instead of `source`, a folder of pictures (one sub-folder a class, where there are classes; below
            "train", "validation" and "test", where those are given), a Parquet file or a folder of them, or a folder
            that `save_to_disk` has left.
        name: what runs are called after.
        mode: "L" or "RGB", to which pictures are converted; None takes them as they are, if all are alike.
        size: (height, width), to which pictures are cropped and scaled; None takes them as they are, if all are alike.
        image, label: names of the columns; None finds them.
        validation_split, test_split: names of the parts to validate and to test on, where the data come in parts.
        validation_fraction, test_fraction: where they lack such a part, the share of the training part to set aside
            for it; None: that is an error.
        split_seed: which images are set aside.
        conditional: whether batches hold the class as their context.
        flip: mirror half of the training images, drawn anew each time.
        num_levels: of the pictures; 256 for usual ones.

    Raises:
        FileNotFoundError: no such path, or a data set that is neither in the cache nor can be downloaded.
        ImportError: `datasets` is not installed.
        ValueError: a corrupt picture, pictures of several sizes or modes, values that are no levels, a part or column
            that is missing, or too few images; the message names the file and the value.
    """

    def __init__(
        self,
        source: str | None = None,
        path: str | Path | None = None,
        name: str = "image_folder",
        mode: str | None = None,
        size: Sequence[int] | None = None,
        image: str | None = None,
        label: str | None = None,
        validation_split: str | None = None,
        test_split: str | None = "test",
        validation_fraction: float | None = 0.1,
        test_fraction: float | None = 0.1,
        split_seed: int = 0,
        conditional: bool = False,
        flip: bool = False,
        num_levels: int = 256,
    ):
        if mode not in (None, *CHANNELS):
            raise InvalidValueError(f"mode must be L (grey) or RGB, or null for pictures as they are, got {mode!r}")
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise InvalidValueError(f"size must be [height, width] in pixels, such as [32, 32], got {size!r}")
        found = _load(source, path)
        where = str(source if path is None else path)
        reader = _Reader(where, mode, size, image, label, num_levels)
        wanted = {"validation": validation_split, "test": test_split}
        shares = {"test": test_fraction, "validation": validation_fraction}
        if "train" not in found:
            raise InvalidValueError(
                f"{where} has no part 'train', only {', '.join(map(repr, found))}; rename one, or merge them"
            )
        parts = {part: reader(found[split], split) for part, split in wanted.items() if split in found}
        train = reader(found["train"], "train")
        missing = {part: shares[part] for part in shares if part not in parts}
        for part in (part for part, share in missing.items() if share is None):
            raise InvalidValueError(
                f"{where} has no part {wanted[part]!r}, only {', '.join(map(repr, found))}; name another one with "
                f"{part}_split, or set a share of the training part aside with {part}_fraction=0.1"
            )
        if missing:
            split = random_split(len(train), missing, split_seed, where, "images")
            parts |= {part: train[indices] for part, indices in split.items()}
        super().__init__({"train": train, **parts}, num_levels, reader.num_classes, name, conditional, flip, where)


class _Reader:
    """Decodes the parts of one data set, all to one shape."""

    def __init__(
        self,
        where: str,
        mode: str | None,
        size: Sequence[int] | None,
        image: str | None,
        label: str | None,
        num_levels: int,
    ):
        self.where, self.mode, self.size, self.num_levels = where, mode, size, num_levels
        self.image, self.label = image, label
        self.num_classes: int | None = None
        self._first: tuple[str, str, tuple[int, int]] | None = None  # name, mode and size of the first picture

    def __call__(self, split: datasets.Dataset, part: str) -> LabelledImages:
        import datasets

        self._find_columns(split)
        if isinstance(split.features[self.image], datasets.Image):
            split = split.cast_column(self.image, datasets.Image(decode=False))  # so that the file can be named
        if not len(split):
            raise InvalidValueError(f"{self.where} has no image in the part {part!r}")
        blocks = split.select_columns([self.image]).iter(batch_size=1000)  # faster than one row at a time
        rows = (value for block in blocks for value in block[self.image])
        images: np.ndarray | None = None
        for row, value in enumerate(tqdm(rows, f"{self.where}, {part}", len(split), leave=False, delay=2)):
            pixels = self._pixels(value, f"image {row} of the part {part!r} of {self.where}")
            if images is None:
                images = np.empty((len(split), *pixels.shape), dtype=np.uint8)
            images[row] = pixels
        labels = None if self.num_classes is None else torch.tensor(split[self.label][:], dtype=torch.long)
        return LabelledImages(torch.from_numpy(images), labels)

    def _find_columns(self, split: datasets.Dataset) -> None:
        """Set the names of the columns and the number of classes, from what the first part has."""
        import datasets

        columns = split.features
        for name in (self.image, self.label):
            if name is not None and name not in columns:
                raise InvalidValueError(f"{self.where} has no column {name!r}; it has {', '.join(map(repr, columns))}")
        pictures = [name for name, kind in columns.items() if isinstance(kind, datasets.Image)]
        if self.image is None and len(pictures) != 1:
            raise InvalidValueError(
                f"{self.where} has {len(pictures)} columns of pictures among {', '.join(map(repr, columns))}; say with "
                "image=... which one to take"
            )
        self.image = self.image or pictures[0]
        classes = [name for name, kind in columns.items() if isinstance(kind, datasets.ClassLabel)]
        self.label = self.label or (classes[0] if len(classes) == 1 else None)
        if self.label is not None:
            if self.label not in classes:
                raise InvalidValueError(
                    f"{self.where}: the column {self.label!r} holds {columns[self.label]}, not classes"
                )
            self.num_classes = columns[self.label].num_classes

    def _pixels(self, value: Mapping[str, Any], name: str) -> np.ndarray:  # (C, H, W), bytes
        from PIL import Image, ImageOps

        name = value["path"] if value["bytes"] is None else f"{name} ({value['path']})" if value["path"] else name
        try:
            with Image.open(value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"])) as file:
                picture = file
                ImageOps.exif_transpose(picture, in_place=True)
                picture.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise InvalidValueError(f"{name} cannot be read as a picture ({error}); repair or remove it") from error
        self._check(picture, name)
        if self.mode is not None:
            picture = picture.convert(self.mode)
        if self.size is not None:
            height, width = self.size
            picture = ImageOps.fit(picture, (width, height), Image.Resampling.BOX)
        pixels = np.array(picture)
        if self.num_levels < 256 and pixels.max() >= self.num_levels:
            raise InvalidValueError(
                f"{name} has the value {pixels.max()}, which is no level from 0 to {self.num_levels - 1}; "
                "set num_levels"
            )
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def _check(self, picture: Image, name: str) -> None:
        """Raise ValueError unless pictures have one byte a level and are all alike, where nothing makes them so."""
        if picture.mode.startswith(("I", "F")):
            raise InvalidValueError(
                f"{name} has the mode {picture.mode}, of more than 256 levels; save it with 8 bits a channel"
            )
        if self.mode is None and picture.mode not in CHANNELS:
            raise InvalidValueError(
                f"{name} has the mode {picture.mode}; convert pictures to grey or colour with mode=L or RGB"
            )
        first = self._first = self._first or (name, picture.mode, picture.size)
        if self.mode is None and picture.mode != first[1]:
            raise InvalidValueError(
                f"{name} has the mode {picture.mode}, and {first[0]} has {first[1]}; convert them all with mode=RGB "
                "or L"
            )
        if self.size is None and picture.size != first[2]:
            sizes = [f"{width} × {height}" for width, height in (picture.size, first[2])]
            raise InvalidValueError(
                f"{name} is {sizes[0]} pixels wide and high, and {first[0]} is {sizes[1]}; bring them to one size with "
                "size=[height, width]"
            )


def _load(source: str | None, path: str | Path | None) -> Mapping[str, datasets.Dataset]:
    """The parts of a data set by name."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"reading {source or path} needs the library datasets of Hugging Face: pip install -e '.[images]'"
        ) from error
    if path is None:
        if source is None:
            raise InvalidValueError(
                "give the name of a data set on the hub, source=..., or the path of a folder, path=..."
            )
        try:
            return _by_part(datasets.load_dataset(source))
        except Exception as error:
            raise FileNotFoundError(
                f"the data set {source!r} is not in the local cache ({datasets.config.HF_DATASETS_CACHE}) and cannot "
                f"be downloaded ({_reason(error)}). Where there is a network, this command gets it: "
                f"python -c \"import datasets; datasets.load_dataset('{source}')\". Else set path to a folder of "
                "pictures or Parquet files"
            ) from error
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"no folder or file of images at {path}; path is read from {Path.cwd()} unless absolute"
        )
    saved = path.is_dir() and any((path / name).exists() for name in ("dataset_dict.json", "dataset_info.json"))
    try:
        if saved:
            return _by_part(datasets.load_from_disk(str(path)))
        if path.is_dir():
            return _by_part(datasets.load_dataset(str(path)))
        return _by_part(datasets.load_dataset("parquet", data_files=str(path)))
    except Exception as error:
        raise InvalidValueError(
            f"{path} cannot be read as a folder of pictures, Parquet files or a saved data set ({_reason(error)})"
        ) from error


def _by_part(found: datasets.Dataset | datasets.DatasetDict) -> Mapping[str, datasets.Dataset]:
    import datasets

    return {"train": found} if isinstance(found, datasets.Dataset) else dict(found)


def _reason(error: BaseException) -> str:
    """The first line of what the library says, and of what it goes back to."""
    lines = [str(e).strip().partition("\n")[0] for e in (error, error.__cause__) if e is not None]
    return "; ".join(line for line in lines if line) or type(error).__name__
