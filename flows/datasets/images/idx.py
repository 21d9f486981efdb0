"""Arrays in the idx format of MNIST, plain or compressed by gzip."""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, cast

import numpy as np

from flows.checks import fits_in_memory
from flows.datasets.folders import SPLIT_OF
from flows.datasets.images.arrays import in_layout, paired
from flows.datasets.images.stored import StoredImages
from flows.errors import FileError, InvalidValueError

KINDS = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
MAX_AXES = 4
SPLITS_HERE = SPLIT_OF | {"t10k": "test"}  # as MNIST calls its 10,000 test images


def is_idx(start: bytes) -> bool:
    """Whether a file that starts so is an idx file."""
    return len(start) >= 4 and start[:2] == b"\0\0" and start[2] in KINDS and 1 <= start[3] <= MAX_AXES


def is_named_idx(path: Path) -> bool:
    """Whether the name of a file is one of idx files, such as train-images-idx3-ubyte.gz."""
    return bool(re.search(r"idx\d|ubyte", path.name.lower()))


def read_idx(path: Path) -> np.ndarray:
    """Read an array, plain or compressed.

    Raises:
        FileError: the file is damaged, cut off, or no idx file.
        InvalidValueError: it does not fit in memory.
    """
    try:
        with open(path, "rb") as plain:
            compressed = plain.read(2) == b"\x1f\x8b"
            plain.seek(0)
            if not compressed:
                return _read(plain, path)
            with gzip.open(plain) as file:
                return _read(cast("IO[bytes]", file), path)
    except (EOFError, OSError, zlib.error) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path} is damaged or cut off ({error}); copy or download it anew") from error


def _read(file: IO[bytes], path: Path) -> np.ndarray:
    start = file.read(4)
    if not is_idx(start):
        shown = " ".join(f"{byte:02x}" for byte in start) or "nothing"
        raise FileError(
            f"{path} is no idx file: it begins with {shown}, expected 00 00 08 03 for images (n, height, width) or "
            "00 00 08 01 for labels; choose the file as it was downloaded, or convert the images to .npz"
        )
    lengths = file.read(4 * start[3])
    if len(lengths) < 4 * start[3]:
        raise FileError(f"{path} is cut off in its header; copy or download it anew")
    shape = struct.unpack(f">{start[3]}I", lengths)
    dtype = np.dtype(KINDS[start[2]])
    expected = math.prod(shape) * dtype.itemsize
    fits_in_memory(f"{path} of shape {shape}", expected)
    content = file.read(expected)
    if len(content) < expected:
        raise FileError(
            f"{path} is cut off: its header announces {expected:,} bytes for the shape {shape}, and {len(content):,} "
            "are there; copy or download it anew"
        )
    if file.read(1):
        raise FileError(f"{path} holds more bytes than its header announces for the shape {shape}; download it anew")
    return np.frombuffer(content, dtype).reshape(shape)


def read_idx_images(path: Path) -> StoredImages:
    """Read a file of images, and the file of labels beside it if there is one.

    Raises:
        InvalidValueError: the file holds labels, or as many labels as images are missing.
    """
    images = read_idx(path)
    if images.ndim < 3:
        raise InvalidValueError(
            f"{path} has the shape {images.shape}: it holds labels, no images; give the path of the file of images, "
            "such as train-images-idx3-ubyte.gz, or of the folder of both"
        )
    labels = labels_beside(path)
    values = None if labels is None else read_idx(labels)
    return paired(in_layout(images, str(path)), values, str(path), labels and labels.name)


def labels_beside(path: Path) -> Path | None:
    """Return the file of labels that belongs to a file of images, or None."""
    name = path.name.removesuffix(".gz")
    for old, new in (("images", "labels"), ("image", "label"), ("x_", "y_"), ("X_", "y_")):
        if old in name:
            named = re.sub(r"idx\d", "idx1", name.replace(old, new))
            found = [path.with_name(named + end) for end in ("", ".gz")]
            return next((file for file in found if file.is_file()), None)
    return None


def idx_by_split(files: Sequence[Path]) -> dict[str, Path]:
    """Return the file of images of each split: train-images... and t10k-images... are those of MNIST.

    Raises:
        InvalidValueError: several files hold images of one split.
    """
    images = [file for file in files if "label" not in file.name.lower()]
    found: dict[str, Path] = {}
    for file in sorted(images, key=lambda file: file.suffix == ".gz"):  # plain ones first
        words = re.split(r"[^a-z0-9]+", file.name.lower())
        split = next((SPLITS_HERE[word] for word in words if word in SPLITS_HERE), "train")
        other = found.setdefault(split, file)
        if other != file and other.name != file.name.removesuffix(".gz"):
            raise InvalidValueError(
                f"{file.parent} holds {other.name} and {file.name}, both with images of the split {split!r}; give the "
                "path of one of them"
            )
    return found
