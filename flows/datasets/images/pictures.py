"""Images of one data set, brought to one mode, size and number of levels."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from flows.checks import fits_in_memory
from flows.datasets.images.images import MAX_LEVELS
from flows.datasets.images.stored import Encoded, StoredImages
from flows.errors import DataWarning, FileError, InvalidValueError, warn

if TYPE_CHECKING:
    from PIL.Image import Image

MODES = ("L", "RGB")  # grey and colour, one byte a channel
UPPER_BITS = "has 16 bits a level, of which the upper 8 are kept"
MAX_NAMED = 5  # files in a message


class UnreadableError(Exception):
    """One picture cannot be decoded."""


class Decoder:
    """Decodes the splits of one data set, all to one shape.

    Args:
        where: the data set, for messages.
        mode, size, num_levels, scale, skip_unreadable: see `flows.datasets.ImageFiles`.
    """

    def __init__(
        self,
        where: str,
        mode: str | None,
        size: tuple[int, int] | None,
        num_levels: int,
        scale: float | None,
        skip_unreadable: bool,
    ):
        self.where, self.mode, self.size, self.num_levels = where, mode, size, num_levels
        self.scale, self.skip_unreadable = scale, skip_unreadable
        self.largest_value: int | None = None  # of all arrays of numbers
        self.largest_16_bit: int | None = None  # stored level of all 16-bit arrays, which share one scale
        self._losses: dict[str, list[str]] = {}  # what is lost, and of which pictures
        self._first: tuple[str, str, tuple[int, int]] | None = None  # name, mode and size of the first picture

    def __call__(self, stored: StoredImages, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the images (n, C, H, W) of a split, and which of the stored ones they are.

        Raises:
            FileError: pictures cannot be read, and `skip_unreadable` is not set; or none can.
            InvalidValueError: pictures differ in mode or size, or hold what is no level.
        """
        from flows.progress import new_bar

        if not stored.count:
            raise InvalidValueError(f"{stored.where} has no image in the split {split!r}")
        images: np.ndarray | None = None
        kept: list[int] = []
        unreadable: list[str] = []
        row = 0
        with new_bar(total=stored.count, desc=f"{stored.where}, {split}", leave=False, delay=2) as bar:
            for block in stored.blocks():
                name = f"of the split {split!r} of {stored.where}"
                for index, pixels in self._decoded(block, name, row, unreadable):
                    if images is None:
                        levels = np.dtype(np.uint8 if self.num_levels <= 256 else np.int32)
                        needed = stored.count * pixels[0].size * levels.itemsize
                        fits_in_memory(f"{stored.count:,} images of {pixels[0].size:,} numbers each", needed)
                        images = np.empty((stored.count, *pixels.shape[1:]), levels)
                    if pixels.shape[1:] != images.shape[1:]:
                        raise InvalidValueError(
                            f"{stored.where}: image {row + index} has the shape {pixels.shape[1:]} beside "
                            f"{images.shape[1:]}; all images must have one size and one number of channels: set size "
                            "or mode"
                        )
                    images[len(kept) : len(kept) + len(pixels)] = pixels
                    kept += range(row + index, row + index + len(pixels))
                row += len(block)
                bar.update(len(block))
        self._tell(split, stored, unreadable)
        if images is None:
            raise FileError(f"{stored.where}: none of the {stored.count:,} images of the split {split!r} can be read")
        return images[: len(kept)], np.array(kept)

    def _decoded(
        self, block: Sequence[Encoded] | np.ndarray, name: str, row: int, unreadable: list[str]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the position of each image, or of all, in a block, and the images (n, C, H, W)."""
        if isinstance(block, np.ndarray):
            yield 0, self._of_arrays(block, name, row)
            return
        for index, picture in enumerate(block):
            try:
                yield index, self._of_file(picture)[None]
            except UnreadableError as error:
                unreadable.append(f"{picture.name} cannot be read as a picture ({error})")

    def _tell(self, split: str, stored: StoredImages, unreadable: Sequence[str]) -> None:
        """Warn of what files hold and the data do not."""
        if unreadable:
            shown = "; ".join(unreadable[:MAX_NAMED])
            more = f"; and {len(unreadable) - MAX_NAMED:,} more" if len(unreadable) > MAX_NAMED else ""
            if not self.skip_unreadable:
                it = "it" if len(unreadable) == 1 else "them"
                raise FileError(
                    f"{shown}{more}; repair or remove {it}, or set skip_unreadable=true to go on without "
                    f"({len(unreadable):,} of the {stored.count:,} pictures of the split {split!r})"
                )
            warn(
                f"{stored.where}: {len(unreadable):,} of the {stored.count:,} pictures of the split {split!r} are left "
                f"out, as they cannot be read: {shown}{more}",
                DataWarning,
            )
        for loss, names in self._losses.items():
            more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            warn(f"{self.where}, split {split!r}: {names[0]}{more} {loss}", DataWarning)
        self._losses.clear()

    # Arrays

    def _of_arrays(self, block: np.ndarray, name: str, row: int) -> np.ndarray:
        """Return images (n, H, W) or (n, H, W, C) as levels (n, C, H, W)."""
        levels = self._levels(block, name, row)
        channels = 1 if levels.ndim == 3 else levels.shape[3]
        if channels == 4 and self.mode is None:
            raise InvalidValueError(
                f"{self.where} has images of 4 channels (RGBA); convert them with mode=RGB, or L for grey"
            )
        fitting = self.mode is None or channels == {"L": 1, "RGB": 3}[self.mode]
        if fitting and (self.size is None or levels.shape[1:3] == self.size):
            return levels[:, None] if levels.ndim == 3 else np.moveaxis(levels, -1, 1)
        if self.num_levels > 256 or channels not in (1, 3, 4):
            raise InvalidValueError(
                f"{self.where} has images of {channels} channels and up to {self.num_levels:,} levels, which are not "
                "converted or scaled here; leave mode and size out, and do it before"
            )
        if levels.ndim == 4 and channels == 1:
            levels = levels[..., 0]
        from PIL import Image

        pictures = (Image.fromarray(image.astype(np.uint8)) for image in levels)
        return np.stack([self._pixels(p, f"image {row + i} {name}") for i, p in enumerate(pictures)])

    def _levels(self, block: np.ndarray, name: str, row: int) -> np.ndarray:
        """Return an array as levels, whole numbers from 0."""
        if block.dtype.kind not in "fiub":
            raise InvalidValueError(f"{self.where} must hold numbers, got {block.dtype}; convert the images to uint8")
        if block.dtype.kind == "b":
            if self.num_levels == 2:
                return block.astype(np.uint8)
            if self.mode is None:
                raise InvalidValueError(
                    f"{self.where} has images of 1 bit; keep their two levels with num_levels=2, or convert them to 0 "
                    "and 255 with mode=L"
                )
            return np.where(block, self.num_levels - 1, 0)
        if block.dtype.kind == "f":
            block = self._whole(block, name, row)
        elif self.scale is not None:
            raise InvalidValueError(
                f"{self.where} holds whole numbers ({block.dtype}), which need no scale={self.scale:g}; leave it out"
            )
        if (
            block.dtype == np.uint16
            and self.mode is not None
            and self.num_levels <= 256
            and (self.largest_16_bit or block.max()) > 255
        ):
            self._losses.setdefault(UPPER_BITS, []).append(f"image {row} {name}")
            block = block >> 8
        self.largest_value = max(self.largest_value or 0, int(block.max()))
        wrong = (block < 0) | (block >= self.num_levels)
        if wrong.any():
            index = tuple(wrong.nonzero()[i][0] for i in range(block.ndim))
            value = block[index]
            most = int(block.max()) + 1
            cure = f"set num_levels={most} or more" if value > 0 and most <= MAX_LEVELS else "levels count from 0"
            if block.dtype.itemsize == 2 and value > 0:
                cure += ", or convert 16 bits to 8 with mode=L or RGB" * (block.dtype == np.uint16)
            raise InvalidValueError(
                f"image {row + int(index[0])} {name} has the value {value:g}, which is no level from 0 to "
                f"{self.num_levels - 1} ({int(wrong.sum()):,} such values in its block); {cure}"
            )
        return block

    def _whole(self, block: np.ndarray, name: str, row: int) -> np.ndarray:
        if not np.isfinite(block).all():
            first = _first_of(~np.isfinite(block))
            raise InvalidValueError(f"image {row + first} {name} has NaN or infinite values; repair or remove it")
        scaled = block if self.scale is None else block.astype(np.float64) * self.scale
        levels = np.rint(scaled)
        between = np.abs(scaled - levels) > 0.01 if self.scale is not None else scaled != levels
        if between.any():
            first = _first_of(between)
            if self.scale is None:
                low, high = float(block.min()), float(block.max())
                cure = "round them, as levels are counted"
                if low >= 0 and high <= 1:
                    cure = f"if they are levels over {self.num_levels - 1}, set scale={self.num_levels - 1}"
                elif low >= -1 and high <= 1:
                    cure = "if -1 is black and 1 is white, save ((images + 1) * 127.5).round().astype('uint8')"
                raise InvalidValueError(
                    f"image {row + first} {name} has values that are no whole numbers (from {low:g} to {high:g}); "
                    f"{cure}"
                )
            loss = f"has values between levels (scale={self.scale:g}), which are rounded"
            self._losses.setdefault(loss, []).append(f"image {row + first} {name}")
        return levels.clip(-1.0, 2.0**60).astype(np.int64)  # what is no level stays none

    # Pictures in files

    def _of_file(self, encoded: Encoded) -> np.ndarray:  # (C, H, W), levels
        from PIL import Image, ImageOps

        source = io.BytesIO(encoded.source) if isinstance(encoded.source, bytes) else encoded.source
        try:
            with Image.open(source) as file:
                picture = file
                if getattr(file, "is_animated", False):
                    frames = f"has {getattr(file, 'n_frames', 'several')} frames, of which the first is used"
                    self._losses.setdefault(frames, []).append(encoded.name)
                deep = ";16" in str(getattr(file, "tile", "")) and picture.mode in ("L", "LA", "RGB", "RGBA")
                ImageOps.exif_transpose(picture, in_place=True)
                picture.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UnreadableError(error) from error
        self._check(picture, encoded.name, deep)
        if picture.mode.startswith("I"):
            return self._of_sixteen_bits(picture, encoded.name)
        if deep:
            self._losses.setdefault(UPPER_BITS, []).append(encoded.name)
        return self._pixels(picture, encoded.name)

    def _of_sixteen_bits(self, picture: Image, name: str) -> np.ndarray:
        levels = np.array(picture).astype(np.int64)
        if self.num_levels > 256:
            if self.size is not None and self.size != levels.shape:
                raise InvalidValueError(f"{name} has the mode {picture.mode}, which is not scaled; leave size out")
        else:
            from PIL import Image

            self._losses.setdefault(UPPER_BITS, []).append(name)
            return self._pixels(Image.fromarray((levels.clip(0, 65535) >> 8).astype(np.uint8)), name)
        return self._in_range(levels[None], name)

    def _pixels(self, picture: Image, name: str) -> np.ndarray:  # (C, H, W)
        from PIL import Image, ImageOps

        if picture.mode == "1" and self.num_levels == 2:
            if self.size is not None and self.size != picture.size[::-1]:
                raise InvalidValueError(f"{name} has the mode 1, whose two levels are not scaled; leave size out")
            return np.array(picture)[None].astype(np.uint8)
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
        return self._in_range(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1), name)

    def _in_range(self, pixels: np.ndarray, name: str) -> np.ndarray:
        if pixels.max() >= self.num_levels:
            raise InvalidValueError(
                f"{name} has the value {pixels.max()}, which is no level from 0 to {self.num_levels - 1}; "
                "set num_levels"
            )
        return pixels

    def _check(self, picture: Image, name: str, deep: bool) -> None:
        """Raise `InvalidValueError` unless all pictures have or get one mode, one size, and levels that fit."""
        grey16 = picture.mode.startswith("I")
        if picture.mode.startswith("F"):
            raise InvalidValueError(f"{name} has the mode F, fractions without levels; save it with 8 bits a channel")
        if (grey16 or deep) and (self.mode is None or (grey16 and self.mode == "RGB" and self.num_levels > 256)):
            if not grey16:
                raise InvalidValueError(
                    f"{name} has 16 bits a channel, more than 256 levels, of which only 8 can be read; convert with "
                    "mode=RGB or L"
                )
            if self.num_levels <= 256 or self.mode == "RGB":
                raise InvalidValueError(
                    f"{name} has the mode {picture.mode}, with more than 256 levels; keep them with num_levels=65536, "
                    "or convert to 8 bits a channel with mode=L"
                )
        elif self.mode is None and picture.mode not in MODES and not (picture.mode == "1" and self.num_levels == 2):
            two = ", or keep two levels with num_levels=2" if picture.mode == "1" else ""
            raise InvalidValueError(
                f"{name} has the mode {picture.mode}; convert pictures to grey or colour with mode=L or RGB{two}"
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


def _first_of(marks: np.ndarray) -> int:
    """Return the position of the first image that has a mark."""
    return int(np.argwhere(marks)[0][0])
