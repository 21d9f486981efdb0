"""Images from the Hugging Face hub, from folders, and from files.

All are read with the library `datasets` of Hugging Face.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from flows.arguments import checked
from flows.checks import existing_path, fits_in_memory, whole_number
from flows.datasets.folders import Found, find_pictures, find_tables
from flows.datasets.images import Images, LabelledImages
from flows.datasets.splits import random_split
from flows.errors import DataWarning, FileError, InvalidTypeError, InvalidValueError, MissingPackageError

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image

MODES = ("L", "RGB")  # grey and colour, one byte a channel


@checked(own=("size",))
class HubImages(Images):
    """Images of the Hugging Face hub, of a folder of pictures, or of Parquet files.

    All pictures are decoded once and held in memory, one byte a level. Needs the extra `images`:
    `pip install -e '.[images]'`.

    Args:
        source: name on the hub. It is downloaded once, then found in the local cache.
        path: a folder or file, instead of `source`. One of

            - a folder of pictures; sub-folders "train", "validation" and "test" are splits, and sub-folders of those
              are classes; without splits, sub-folders are classes,
            - a Parquet file or a folder of them; files belong to the split whose word begins their name,
            - a folder that `save_to_disk` wrote.
        name: name of the runs.
        mode: "L" (grey) or "RGB" to convert all pictures. Default: keep them; they must all have the same mode.
        size: (height, width) to crop and scale all pictures to. Default: keep them; they must all have the same size.
        image, label: names of the columns. Default: find them.
        validation_split, test_split: names of the splits in the data.
        validation_fraction, test_fraction: fraction of the training images to set aside if the data lack that split.
            None: raise an error.
        split_seed: seed of the random split.
        conditional: give the class as the context.
        flip: mirror half of the training images, chosen anew in each batch.
        num_levels: number of levels.

    A `DataWarning` counts files and splits that are not used.

    Raises:
        FileError: there is no such path, it cannot be read, a picture is corrupt, or the data set is neither in the
            cache nor can be downloaded.
        MissingPackageError: `datasets` is not installed.
        InvalidTypeError: a setting has the wrong type.
        InvalidValueError: pictures differ in size or mode, a value is no level, a split or column is missing, there are
            too few images, or they do not fit in memory.

    Example:
        `HubImages(path="pictures", mode="RGB", size=(32, 32))` reads a folder of pictures of any size.
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
        validation_split: str | None = "validation",
        test_split: str | None = "test",
        validation_fraction: float | None = 0.1,
        test_fraction: float | None = 0.1,
        split_seed: int = 0,
        conditional: bool = False,
        flip: bool = False,
        num_levels: int = 256,
    ):
        if mode is not None and mode not in MODES:
            raise InvalidValueError(f"mode must be L (grey) or RGB, or null for pictures as they are, got {mode!r}")
        shape = _checked_size(size)
        found = _load(source, path)
        where = str(source if path is None else path)
        reader = _Reader(where, mode, shape, image, label, num_levels)
        wanted = {"validation": validation_split, "test": test_split}
        if validation_split is not None and validation_split == test_split:
            raise InvalidValueError(
                f"validation_split and test_split are both {test_split!r}; set validation_split=null to set a fraction "
                "of the training images aside"
            )
        fractions = {"test": test_fraction, "validation": validation_fraction}
        if "train" not in found:
            raise InvalidValueError(
                f"{where} has no split 'train', only {', '.join(map(repr, found))}; rename one, or merge them"
            )
        parts = {part: reader(found[split], split) for part, split in wanted.items() if split and split in found}
        train = reader(found["train"], "train")
        meant = {"train", "validation", "test", *wanted.values()}  # those replaced by settings are left out on purpose
        unused = {split: len(rows) for split, rows in found.items() if split not in meant}
        if unused:
            counts = ", ".join(f"{split!r} ({count:,} images)" for split, count in unused.items())
            warnings.warn(
                f"{where}: the split {counts} is not used; name it with validation_split or test_split",
                DataWarning,
                stacklevel=2,
            )
        missing = {}
        for part in (part for part in fractions if part not in parts):
            fraction = fractions[part]
            if fraction is None:
                raise InvalidValueError(
                    f"{where} has no split {wanted[part]!r}, only {', '.join(map(repr, found))}; name another one with "
                    f"{part}_split, or set a fraction of the training images aside with {part}_fraction=0.1"
                )
            missing[part] = fraction
        if missing:
            split = random_split(len(train), missing, split_seed, where, "images")
            parts |= {part: train[indices] for part, indices in split.items()}
        if conditional:
            reader.check_labels()
        super().__init__({"train": train, **parts}, num_levels, reader.num_classes, name, conditional, flip, where)
        self.split_settings |= {f"{part}_fraction": missing.get(part) for part in fractions}
        self.split_settings |= {"split_seed": split_seed, **{f"{part}_split": split for part, split in wanted.items()}}


def _checked_size(size: object) -> tuple[int, int] | None:
    if size is None:
        return None
    message = f"size must be [height, width] in pixels, such as [32, 32], got {size!r}"
    if isinstance(size, str) or not isinstance(size, Iterable):
        raise InvalidTypeError(message)
    sides = tuple(whole_number("each entry of size", side, otherwise="it counts pixels") for side in size)
    if len(sides) != 2:
        raise InvalidValueError(message)
    return sides


class _Reader:
    """Decodes the splits of one data set, all to one shape."""

    def __init__(
        self,
        where: str,
        mode: str | None,
        size: tuple[int, int] | None,
        image: str | None,
        label: str | None,
        num_levels: int,
    ):
        self.where, self.mode, self.size, self.num_levels = where, mode, size, num_levels
        self.image, self.label = image, label
        self.num_classes: int | None = None
        self._unlabelled: dict[str, int] = {}  # images without a class, by split
        self._losses: dict[str, list[str]] = {}  # what is lost, and of which pictures
        self._first: tuple[str, str, tuple[int, int]] | None = None  # name, mode and size of the first picture

    def __call__(self, split: datasets.Dataset, part: str) -> LabelledImages:
        import datasets
        from tqdm import tqdm

        image, label = self._find_columns(split)
        if isinstance(split.features[image], datasets.Image):
            split = split.cast_column(image, datasets.Image(decode=False))  # so that errors can name the file
        if not len(split):
            raise InvalidValueError(f"{self.where} has no image in the split {part!r}")
        blocks = split.select_columns([image]).iter(batch_size=1000)  # faster than one row at a time
        rows = (value for block in blocks for value in cast("dict[str, list]", block)[image])
        images: np.ndarray | None = None
        for row, value in enumerate(tqdm(rows, f"{self.where}, {part}", len(split), leave=False, delay=2)):
            pixels = self._pixels(value, f"image {row} of the split {part!r} of {self.where}")
            if images is None:
                fits_in_memory(f"{len(split):,} images of {pixels.size:,} bytes each", len(split) * pixels.size)
                images = np.empty((len(split), *pixels.shape), dtype=np.uint8)
            images[row] = pixels
        assert images is not None
        self._tell_losses(part)
        given = [] if label is None else [value for value in split[label][:] if value is not None and value >= 0]
        self._unlabelled[part] = 0 if label is None else len(split) - len(given)
        labels = None if label is None or self._unlabelled[part] else torch.tensor(given, dtype=torch.long)
        return LabelledImages(torch.from_numpy(images), labels)

    def _tell_losses(self, part: str) -> None:
        """Warn of what pictures hold and the data do not."""
        for loss, names in self._losses.items():
            more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            warnings.warn(f"{self.where}, split {part!r}: {names[0]}{more} {loss}", DataWarning, stacklevel=4)
        self._losses.clear()

    def check_labels(self) -> None:
        """Raise `InvalidValueError` if an image has no class although others do."""
        for part, count in self._unlabelled.items():
            if self.num_classes is not None and count:
                raise InvalidValueError(
                    f"{self.where}: {count:,} images of the split {part!r} have no class, and conditional=true gives "
                    "each image its class; sort them into folders, or leave that split out"
                )

    def _find_columns(self, split: datasets.Dataset) -> tuple[str, str | None]:
        """Return the columns of images and labels, and set the number of classes.

        All splits use the columns that the first one has.
        """
        import datasets

        columns = split.features
        names = ", ".join(map(repr, columns))
        for name in (self.image, self.label):
            if name is not None and name not in columns:
                raise InvalidValueError(f"{self.where} has no column {name!r}; it has {names}")
        if self.image is None:
            pictures = [name for name, kind in columns.items() if isinstance(kind, datasets.Image)]
            if len(pictures) != 1:
                raise InvalidValueError(
                    f"{self.where} has {len(pictures)} columns of pictures among {names}; name the right one with "
                    "image=..."
                )
            self.image = pictures[0]
        classes = [name for name, kind in columns.items() if isinstance(kind, datasets.ClassLabel)]
        self.label = self.label or (classes[0] if len(classes) == 1 else None)
        if self.label is not None:
            kind = columns[self.label]
            if not isinstance(kind, datasets.ClassLabel):
                raise InvalidValueError(f"{self.where}: the column {self.label!r} holds {kind}, not classes")
            self.num_classes = len(kind.names)
        return self.image, self.label

    def _pixels(self, value: Mapping[str, Any], name: str) -> np.ndarray:  # (C, H, W), bytes
        from PIL import Image, ImageOps

        source = value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"])
        if value["path"]:
            name = value["path"] if value["bytes"] is None else f"{name} ({value['path']})"
        try:
            with Image.open(source) as file:
                picture = file
                if getattr(file, "is_animated", False):
                    frames = f"has {getattr(file, 'n_frames', 'several')} frames, of which the first is used"
                    self._losses.setdefault(frames, []).append(name)
                ImageOps.exif_transpose(picture, in_place=True)
                picture.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise FileError(f"{name} cannot be read as a picture ({error}); repair or remove it") from error
        self._check(picture, name)
        if self.mode is not None:
            if picture.has_transparency_data and picture.convert("RGBA").getchannel("A").getextrema() != (255, 255):
                loss = f"has transparent parts, which {self.mode} shows in the colours stored below; fill them first"
                self._losses.setdefault(loss, []).append(name)
            picture = picture.convert(self.mode)
        if self.size is not None:
            height, width = self.size
            fits_in_memory(f"a picture of {height} × {width} pixels", 3 * height * width)
            picture = ImageOps.fit(picture, (width, height), Image.Resampling.BOX)
        pixels = np.array(picture)
        if self.num_levels < 256 and pixels.max() >= self.num_levels:
            raise InvalidValueError(
                f"{name} has the value {pixels.max()}, which is no level from 0 to {self.num_levels - 1}; "
                "set num_levels"
            )
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def _check(self, picture: Image, name: str) -> None:
        """Raise `InvalidValueError` unless all pictures have or get one byte a level, one mode and one size."""
        if picture.mode.startswith(("I", "F")):
            raise InvalidValueError(
                f"{name} has the mode {picture.mode}, with more than 256 levels; save it with 8 bits a channel"
            )
        if self.mode is None and picture.mode not in MODES:
            raise InvalidValueError(
                f"{name} has the mode {picture.mode}; convert pictures to grey or colour with mode=L or RGB"
            )
        first = self._first = self._first or (name, picture.mode, picture.size)
        if self.mode is None and picture.mode != first[1]:
            raise InvalidValueError(
                f"{name} has the mode {picture.mode}, but {first[0]} has {first[1]}; convert all with mode=RGB or L"
            )
        if self.size is None and picture.size != first[2]:
            sizes = [f"{width} × {height}" for width, height in (picture.size, first[2])]
            raise InvalidValueError(
                f"{name} has {sizes[0]} pixels (width × height), but {first[0]} has {sizes[1]}; scale all to one size "
                "with size=[height, width]"
            )


_offline: ContextVar[bool] = ContextVar("offline", default=False)


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """While entered, data are read without the network, and nothing is written beside them."""
    token = _offline.set(True)
    try:
        yield
    finally:
        _offline.reset(token)


@contextlib.contextmanager
def _without_network() -> Iterator[None]:
    """Tell the libraries of Hugging Face to stay offline, if that is wanted."""
    from datasets import config
    from huggingface_hub import constants

    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if _offline.get():
        config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _require_cached(source: str) -> None:
    """Raise `FileError` unless a data set of the hub has been downloaded before."""
    from datasets import config

    def words(name: str) -> str:
        return name.lower().replace("_", "").replace("/", "")

    cache = Path(config.HF_DATASETS_CACHE)
    names = [entry.name for entry in cache.iterdir()] if cache.is_dir() else []
    if words(source) not in map(words, names):
        raise FileError(
            f"the file asks for the data set {source[:100]!r} of the hub, which is not in the local cache ({cache}); "
            "settings in a file open no network. Choose the data on the command line, data=..., or pass trust=[flows]"
        )


def _parquet(files: Mapping[str, list[str]]) -> Mapping[str, datasets.Dataset]:
    import datasets

    if not _offline.get():
        return _by_split(datasets.load_dataset("parquet", data_files=dict(files)))
    import pyarrow.parquet

    return {  # the library would write a copy of them
        split: datasets.concatenate_datasets(
            [datasets.Dataset(pyarrow.parquet.ParquetFile(name).read()) for name in names]
        )
        for split, names in files.items()
    }


def _generic(path: Path) -> object:
    import datasets

    if _offline.get():
        raise InvalidValueError(
            f"{path} is no folder of pictures or Parquet files, and reading it would write a copy; choose the data on "
            "the command line, data=..., or pass trust=[flows]"
        )
    return datasets.load_dataset(str(path))


def _load(source: str | None, path: str | Path | None) -> Mapping[str, datasets.Dataset]:
    """Return the splits of a data set by name."""
    try:
        import datasets
    except ImportError as error:
        raise MissingPackageError(
            f"reading {source or path} needs the library datasets of Hugging Face: pip install -e '.[images]'"
        ) from error
    if _offline.get() and path is None:
        _require_cached(str(source))
    if path is not None:
        return _load_path(existing_path("path", path, "folder or file of images", folder=True))
    if not isinstance(source, str) or not source:
        raise InvalidValueError(
            f"set either source to the name of a data set on the hub or path to a folder, got source={source!r} and "
            "path=None"
        )
    try:
        with _without_network():
            return _by_split(datasets.load_dataset(source))
    except Exception as error:  # the library raises many types, and all mean the same here
        from datasets import config

        raise FileError(
            f"the data set {source!r} is not in the local cache ({config.HF_DATASETS_CACHE}) and cannot "
            f"be downloaded ({_reason(error)}). With a network, this command downloads it: "
            f"python -c \"import datasets; datasets.load_dataset('{source}')\". Otherwise set path to a folder of "
            "pictures or Parquet files"
        ) from error


def _load_path(path: Path) -> Mapping[str, datasets.Dataset]:
    import datasets

    saved = path.is_dir() and any((path / name).exists() for name in ("dataset_dict.json", "dataset_info.json"))
    try:
        if saved:
            return _by_split(datasets.load_from_disk(str(path)))
        if path.is_dir():
            pictures = find_pictures(path)
            if pictures is not None:
                return _pictures(pictures)
            tables = find_tables(path)
            if tables is not None:
                files = {split: [str(file) for file in found] for split, found in tables.files.items()}
                return _parquet(files)
            return _by_split(_generic(path))
        return _parquet({"train": [str(path)]})
    except (InvalidValueError, DataWarning):  # ours; the warning where warnings are errors
        raise
    except Exception as error:  # the library raises many types, and all mean the same here
        raise FileError(
            f"{path} cannot be read as a folder of pictures, Parquet files or a saved data set ({_reason(error)})"
        ) from error


def _pictures(found: Found) -> Mapping[str, datasets.Dataset]:
    """Return pictures of a folder by split; the classes of all splits share their numbers."""
    import datasets

    names = sorted({label for labels in found.labels.values() for label in labels if label is not None})
    features: dict[str, Any] = {"image": datasets.Image(decode=False)}
    if names:
        features["label"] = datasets.ClassLabel(names=names)
    result = {}
    for split, files in found.files.items():
        columns: dict[str, list] = {"image": [{"path": str(file), "bytes": None} for file in files]}
        if names:
            columns["label"] = list(found.labels[split])
        result[split] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return result


def _by_split(found: object) -> Mapping[str, datasets.Dataset]:
    import datasets

    if isinstance(found, datasets.Dataset):
        return {"train": found}
    assert isinstance(found, datasets.DatasetDict)
    return {str(name): split for name, split in found.items()}


def _reason(error: BaseException) -> str:
    """Return the first line of an error's message and of its cause's."""
    lines = [str(e).strip().partition("\n")[0] for e in (error, error.__cause__) if e is not None]
    return "; ".join(line for line in lines if line) or type(error).__name__
