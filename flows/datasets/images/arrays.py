"""Images in .npy and .npz files, as arrays of whole numbers."""

from __future__ import annotations

import math
import re
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from flows.checks import fits_in_memory
from flows.datasets.folders import SPLIT_OF
from flows.datasets.images.stored import IMAGE_WORDS, LABEL_WORDS, StoredImages, of_array
from flows.errors import DataWarning, FileError, InvalidValueError, warn

CHANNELS = (1, 3, 4)  # grey, colour, colour with transparency
OBJECTS = (
    "holds Python objects, which are not read, as they can run programs; save numbers, as numpy.stack(pictures) of one "
    "size, and words as numpy.array(labels, dtype=str)"
)
NAMES_WORDS = ("class_names", "label_names", "names", "categories")
DAMAGE = (
    *(ValueError, EOFError, OSError, OverflowError, TypeError, SyntaxError, MemoryError, KeyError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, NotImplementedError, tokenize.TokenError),
)


def read_npz(path: Path, image: str | None = None, label: str | None = None) -> dict[str, StoredImages]:
    """Read the splits of an .npz file; see `by_split`."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.removesuffix(".npy"): name for name in archive.namelist() if name.endswith(".npy")}
            headers = {key: _member_header(archive, name) for key, name in members.items()}
            shapes = {key: shape for key, (shape, _, _) in headers.items()}
            objects = [key for key, (_, _, dtype) in headers.items() if dtype.hasobject]

            def load(key: str) -> np.ndarray:
                with archive.open(members[key]) as file:
                    return _read_npy(file, f"{path}, array {key!r}", archive.getinfo(members[key]).file_size)

            return by_split(str(path), shapes, load, image, label, objects)
    except (InvalidValueError, FileError, DataWarning):
        raise
    except DAMAGE as error:
        raise FileError(f"{path} is not a whole .npz file of arrays ({error}); write it with numpy.savez") from error


def read_npy(path: Path) -> np.ndarray:
    """Return the array in a .npy file.

    Raises:
        FileError: the file is damaged, longer or shorter than its header says.
        InvalidValueError: it holds objects, or does not fit in memory.
    """
    try:
        with open(path, "rb") as file:
            return _read_npy(file, str(path), path.stat().st_size)
    except (InvalidValueError, FileError):
        raise
    except DAMAGE as error:
        raise FileError(f"{path} is not a whole .npy file of numbers ({error}); write it with numpy.save") from error


def by_split(
    where: str,
    shapes: Mapping[str, tuple[int, ...]],
    load: Callable[[str], np.ndarray],
    image: str | None,
    label: str | None,
    objects: Sequence[str] = (),
) -> dict[str, StoredImages]:
    """Sort named arrays into images and labels of splits.

    A name is a word for images or for labels, and may have a word for the split: x_train, test_labels. Other names are
    told apart by their shapes.

    Args:
        where: what messages call the arrays.
        shapes: the shape of each array by name.
        load: returns an array by its name.
        image, label: names of the arrays to take, with or without the split in them. Default: find them.
        objects: names of arrays that hold Python objects, which are not read.

    Raises:
        InvalidValueError: it is not clear which array holds the images, or a label belongs to no image.
    """
    listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "none"
    roles = _roles(shapes, image, label)
    images = {split: name for (role, split), name in roles.items() if role == "image"}
    for wanted, setting in ((image, "image"), (label, "label")):
        if wanted is not None and not any(role == setting for role, _ in roles):
            what = f"no {setting}s in the array" if wanted in shapes else "no array"
            raise InvalidValueError(f"{where} has {what} {wanted!r}; it has {listed}")
    if not images and objects:
        raise InvalidValueError(f"{where}, array {objects[0]!r} {OBJECTS}")
    if not images:
        raise InvalidValueError(
            f"{where}: which array holds the images (n, height, width) or (n, height, width, channels)? Name it with "
            f"image=...; it has {listed}"
        )
    used = {*images.values(), *(name for (role, split), name in roles.items() if role == "label" and split in images)}
    names = next((name for name in shapes if name.lower() in NAMES_WORDS), None)
    unused = [name for name in shapes if name not in used and name != names]
    if unused:
        warn(f"{where}: arrays that are not used: {', '.join(unused)}", DataWarning)
    class_names = None if names is None else tuple(str(name) for name in load(names).ravel().tolist())
    found = {}
    for split, name in images.items():
        labels = roles.get(("label", split))
        pixels = in_layout(load(name), f"{where}, array {name!r}")
        found[split] = paired(pixels, None if labels is None else load(labels), where, labels, class_names)
    return found


def paired(
    pixels: np.ndarray,
    labels: np.ndarray | Sequence[Any] | None,
    where: str,
    label_name: str | None = None,
    class_names: tuple[str, ...] | None = None,
) -> StoredImages:
    """Return images with their labels.

    Raises:
        InvalidValueError: their numbers differ.
    """
    if labels is not None and len(labels) != len(pixels):
        raise InvalidValueError(
            f"{where} has {len(pixels):,} images, but {len(labels):,} labels in {label_name}; give one label an image"
        )
    return of_array(pixels, where, labels, class_names)


def in_layout(images: np.ndarray, where: str) -> np.ndarray:  # (n, H, W) or (n, H, W, C)
    """Return images with their channels last.

    Rows of H² or 3H² numbers are taken for grey pictures, or for the three colours of a picture one after the other.

    Raises:
        InvalidValueError: the shape is no shape of images.
    """
    shape = images.shape
    cure = "give (n, height, width), (n, height, width, channels) or (n, channels, height, width)"
    if images.ndim == 5 and shape[1] == 1:  # a stack of single frames
        images, shape = images[:, 0], (shape[0], *shape[2:])
    if images.ndim == 2:
        return _unflattened(images, where)
    if images.ndim == 3:
        if shape[2] in (3, 4) and min(shape[:2]) >= 16:
            raise InvalidValueError(
                f"{where} has the shape {shape}, which looks like a single picture in colour; {cure}, for n pictures"
            )
        return images
    if images.ndim != 4:
        raise InvalidValueError(f"{where} has the shape {shape}, which is no shape of images; {cure}")
    last, first = shape[3] in CHANNELS, shape[1] in CHANNELS
    if last and first and shape[1] != shape[3] and min(shape[1:]) != shape[2]:
        # Of two lengths that may count channels, the other one is a width or height: those two are alike.
        first = abs(shape[2] - shape[3]) <= abs(shape[1] - shape[2])
        last = not first
    if last == first:
        what = "both axes 1 and 3 could be channels" if last else "no axis has 1, 3 or 4 entries, one a channel"
        raise InvalidValueError(f"{where} has the shape {shape}, where {what}; {cure}")
    return images if last else np.moveaxis(images, 1, -1)


def _unflattened(rows: np.ndarray, where: str) -> np.ndarray:
    width = rows.shape[1]
    for channels in (1, 3):
        side = math.isqrt(width // channels)
        if side > 1 and channels * side * side == width:
            kind = "in grey" if channels == 1 else "in colour, red before green before blue"
            warn(
                f"{where}: its rows of {width:,} numbers are taken for pictures of {side} × {side} pixels {kind}",
                DataWarning,
            )
            pixels = rows.reshape(len(rows), channels, side, side)
            return pixels[:, 0] if channels == 1 else np.moveaxis(pixels, 1, -1)
    raise InvalidValueError(
        f"{where} has rows of {width:,} numbers, which are no square pictures; give (n, height, width) or "
        "(n, height, width, channels)"
    )


def _roles(
    shapes: Mapping[str, tuple[int, ...]], image: str | None, label: str | None
) -> dict[tuple[str, str], str]:  # (role, split): name
    roles: dict[tuple[str, str], str] = {}
    spoken = {name: _spoken(name) for name in shapes}
    for role, wanted, words in (("image", image, IMAGE_WORDS), ("label", label, LABEL_WORDS)):
        named: dict[str, list[str]] = {}
        for name, (word, split) in spoken.items():
            chosen = wanted is not None and (name == wanted or word == wanted.lower())
            known = wanted is None and word in words and name not in (image, label)
            if (chosen or known) and len(shapes[name]) >= (2 if role == "image" else 1):
                named.setdefault(split, []).append(name)
        for split, names in named.items():
            count = shapes[roles["image", split]][0] if ("image", split) in roles else None
            # Names of the classes may stand beside labels.
            roles[role, split] = next((name for name in names if shapes[name][0] == count), names[0])
    taken = set(roles.values())
    if image is None and not any(role == "image" for role, _ in roles):
        for least in (3, 2):
            likely = [name for name, shape in shapes.items() if len(shape) >= least and name not in taken]
            if likely:
                break
        splits = {spoken[name][1] for name in likely}
        if len(splits) == len(likely):
            roles |= {("image", spoken[name][1]): name for name in likely}
    if label is None and not any(role == "label" for role, _ in roles):
        for (_, split), name in list(roles.items()):
            others = [other for other, (_, at) in spoken.items() if at == split and other not in roles.values()]
            likely = [other for other in others if shapes[other] in ((shapes[name][0],), (shapes[name][0], 1))]
            if len(likely) == 1:
                roles["label", split] = likely[0]
    return roles


def _spoken(name: str) -> tuple[str, str]:
    """Return the name of an array without the word for its split, in small letters, and that split."""
    parts = [part for part in re.split(r"[^a-z0-9]+|(?<=^[xy])(?=train|test|val)", name.lower()) if part]
    splits = [SPLIT_OF[part] for part in parts if part in SPLIT_OF]
    rest = [part for part in parts if part not in SPLIT_OF]
    return "_".join(rest), splits[0] if len(splits) == 1 else "train"


def _member_header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    with archive.open(name) as file:
        return _header(file)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if reader is None:
        raise ValueError(f"version {version} of the format is not known")
    return reader(file)


def _read_npy(file: IO[bytes], where: str, size: int) -> np.ndarray:
    """Read an array without executing anything, and no more than the file holds."""
    shape, fortran, dtype = _header(file)
    if dtype.hasobject:
        raise InvalidValueError(f"{where} {OBJECTS}")
    count = math.prod(shape)
    fits_in_memory(f"{where} of shape {shape}", count * dtype.itemsize)
    if count * dtype.itemsize > max(size, 0):
        raise FileError(
            f"{where} is cut off: its header announces {count * dtype.itemsize:,} bytes, more than the {size:,} that "
            "are there; copy it anew"
        )
    content = file.read(count * dtype.itemsize)
    if len(content) < count * dtype.itemsize or file.read(1):
        more = "more" if len(content) == count * dtype.itemsize else "fewer"
        raise FileError(f"{where} holds {more} bytes than its header announces; copy it anew")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
