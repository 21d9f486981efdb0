"""Images as files hold them: what every reader of images returns, one `StoredImages` a split."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 1000  # images that are read at once
Block = "Sequence[Encoded] | np.ndarray"  # pictures, or arrays (n, H, W) or (n, H, W, C)
IMAGE_WORDS = ("x", "image", "images", "img", "imgs", "pixels", "data", "features", "inputs", "samples", "pictures")
LABEL_WORDS = (
    *("y", "label", "labels", "target", "targets", "class", "classes", "fine_label", "fine_labels", "category"),
)


@dataclass(frozen=True)
class Encoded:
    """A picture in a format such as PNG, in memory or in a file."""

    source: bytes | Path
    name: str  # for messages


@dataclass(frozen=True)
class StoredImages:
    """The images of one split, read block by block."""

    where: str  # the file or data set, for messages
    count: int
    blocks: Callable[[], Iterator[Sequence[Encoded] | np.ndarray]]
    labels: Sequence[Any] | np.ndarray | None = None  # one an image, in any form
    class_names: tuple[str, ...] | None = None  # what labels are numbers of, if the file says so
    highest: int | None = None  # of 16-bit levels, if all are at hand


def of_array(
    images: np.ndarray,  # (n, H, W) or (n, H, W, C)
    where: str,
    labels: Sequence[Any] | np.ndarray | None = None,
    class_names: tuple[str, ...] | None = None,
) -> StoredImages:
    """Return images that one array holds."""

    def blocks() -> Iterator[np.ndarray]:
        return (images[start : start + BLOCK] for start in range(0, len(images), BLOCK))

    highest = int(images.max()) if images.dtype == np.uint16 and images.size else None
    return StoredImages(where, len(images), blocks, labels, class_names, highest)
