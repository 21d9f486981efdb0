"""Images in Python pickles, as CIFAR-10 and CIFAR-100 come: read as data, without running what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flows.checks import fits_in_memory
from flows.datasets.folders import split_of_name
from flows.datasets.images.arrays import in_layout, paired
from flows.datasets.images.plain_pickle import ForeignObjectError, read_pickle
from flows.datasets.images.stored import IMAGE_WORDS, LABEL_WORDS, StoredImages
from flows.errors import FileError, InvalidValueError

SUFFIXES = ("", ".pkl", ".pickle", ".p", ".meta")
NAMES = ("fine_label_names", "label_names", "class_names", "coarse_label_names")
LABELS_OF = {"fine_label_names": "fine_labels", "coarse_label_names": "coarse_labels"}


def is_pickle(path: Path, start: bytes) -> bool:
    """Whether a file looks like a pickle, by its first bytes and its name."""
    known = start[:1] == b"\x80" and 2 <= start[1] <= 5 if len(start) > 1 else False
    text = start[:1] in b"(c]}" and path.suffix.lower() in SUFFIXES[1:]  # the first protocol is text
    return path.suffix.lower() in SUFFIXES and (known or text)


def read_batch_file(path: Path, image: str | None, label: str | None) -> StoredImages:
    """Read the images of one pickle.

    Raises:
        FileError: the file is damaged.
        InvalidValueError: it names anything but arrays, lists, dicts, numbers and text, or holds no images.
    """
    return _join([path], image, label, None)


def read_batches(files: Sequence[Path], folder: Path, image: str | None, label: str | None) -> dict[str, StoredImages]:
    """Read the pickles of a folder: data_batch_1..5, test_batch and batches.meta, or train, test and meta."""
    metas = [file for file in files if "meta" in file.name.lower()]
    content = [_content(file) for file in metas]
    batches: dict[str, list[Path]] = {}
    for file in files:
        if file not in metas:
            batches.setdefault(split_of_name(file.name) or "train", []).append(file)
    return {split: _join(found, image, label, content[0] if content else None) for split, found in batches.items()}


def _join(files: Sequence[Path], image: str | None, label: str | None, meta: dict[str, Any] | None) -> StoredImages:
    """Return the images of several pickles as one split."""
    pixels, labels = [], []
    name: str | None = None
    for file in files:
        content = _content(file)
        listed = ", ".join(content) or "nothing"
        key = _key(content, image, IMAGE_WORDS)
        if key is None or not isinstance(content[key], np.ndarray):
            raise InvalidValueError(
                f"{file} has no array of images; it holds {listed}" + ("" if image is None else f", and not {image!r}")
            )
        pixels.append(_pictures(content[key], f"{file}, {key!r}"))
        name = _key(content, label, LABEL_WORDS)
        if name is None and label is not None:
            raise InvalidValueError(f"{file} has no labels {label!r}; it holds {listed}")
        labels.append(None if name is None else content[name])
        if name is not None and len(labels[-1]) != len(pixels[-1]):
            raise InvalidValueError(
                f"{file} has {len(pixels[-1]):,} images, but {len(labels[-1]):,} labels in {name!r}; download it anew"
            )
    shapes = {array.shape[1:] for array in pixels}
    if len(shapes) > 1:
        raise InvalidValueError(f"{files[0].parent}: the batches have images of several shapes, {shapes}; keep one")
    joined = pixels[0] if len(pixels) == 1 else np.concatenate(pixels)
    whole = None if any(given is None for given in labels) else [one for given in labels for one in given]
    names = None if meta is None or whole is None else _names(meta, name)
    return paired(joined, whole, str(files[0] if len(files) == 1 else files[0].parent), name, names)


def _pictures(array: np.ndarray, where: str) -> np.ndarray:
    """CIFAR's rows hold red, green and blue one after the other, 32 × 32 numbers each."""
    if array.ndim == 2 and array.shape[1] == 3 * 32 * 32:
        return np.moveaxis(array.reshape(-1, 3, 32, 32), 1, -1)
    return in_layout(array, where)


def _key(content: dict[str, Any], wanted: str | None, words: Sequence[str]) -> str | None:
    if wanted is not None:
        return wanted if wanted in content else None
    return next((word for word in words if content.get(word) is not None), None)


def _names(meta: dict[str, Any], label: str | None) -> tuple[str, ...] | None:
    for key in NAMES:
        if isinstance(meta.get(key), list) and LABELS_OF.get(key, label) == label:
            return tuple(
                name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in meta[key]
            )
    return None


def _content(path: Path) -> dict[str, Any]:
    fits_in_memory(str(path), 3 * path.stat().st_size)
    try:
        found = read_pickle(path.read_bytes())
    except ForeignObjectError as error:
        raise InvalidValueError(
            f"{path} is a pickle that names {error}; only arrays, lists, dicts, numbers and text are read, as anything "
            "else can run programs. Save the images with numpy.savez"
        ) from error
    except (ValueError, OSError) as error:
        raise FileError(f"{path} is no whole pickle ({error}); copy or download it anew") from error
    if isinstance(found, np.ndarray):
        return {"images": found}
    if not isinstance(found, dict):
        raise InvalidValueError(
            f"{path} holds a {type(found).__name__}; expected a dict of arrays such as 'data' and 'labels'"
        )
    return {
        key.decode("utf-8", "replace") if isinstance(key, bytes) else str(key): value for key, value in found.items()
    }
