"""Images that are streamed by the library `datasets` of Hugging Face, a window at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flows.arguments import checked
from flows.checks import existing_path, whole_number
from flows.datasets.base import Dataset
from flows.datasets.batches import Batch, BatchStream, convert
from flows.datasets.images.columns import Columns
from flows.datasets.images.files import checked_size
from flows.datasets.images.hub import streamed
from flows.datasets.images.pictures import MODES, Decoder
from flows.datasets.images.stored import StoredImages
from flows.errors import InvalidValueError


@checked
class StreamedImages(Dataset):
    """Images of Parquet files, or of the Hugging Face hub, that are read while they are trained on.

    Needs the extra `images`: `pip install -e '.[images]'`. The first images of the split are the test and validation
    parts; all others train. They are read in the order of the files, a window at a time, and the images of a window are
    shuffled. Those left over at its end are too few for a batch and are skipped in that pass. So files must not be
    sorted by class. A stream resumes bit for bit from the position that `datasets` gives and the order of a window.

    Args:
        source: name of a data set on the hub, which is read over the network.
        path: a .parquet file or a folder of them, instead of `source`.
        split: of the data set on the hub.
        name: name of the runs.
        mode, size: see `ImageFiles`.
        image: name of the column of pictures. Default: find it.
        num_validation, num_test: sizes of these parts.
        window: images that are shuffled together and held in memory.
        flip: mirror half of the training images, chosen anew in each batch.

    Raises:
        FileError: there is no such file or data set, or a picture is damaged.
        MissingPackageError: `datasets` is not installed.
        InvalidValueError: there are too few images, they differ in size or mode, or there is no column of pictures.

    Example:
        ```python
        import io

        import pyarrow as pa
        import pyarrow.parquet as pq
        from PIL import Image

        import flows

        pictures = []
        for level in range(60):
            picture = io.BytesIO()
            Image.new("L", (4, 4), level).save(picture, "png")
            pictures.append(picture.getvalue())
        pq.write_table(pa.table({"image": pictures}), "pictures.parquet")
        data = flows.datasets.StreamedImages(path="pictures.parquet", num_validation=5, num_test=5)
        data.event_shape  # (1, 4, 4)
        ```
    """

    num_levels = 256

    def __init__(
        self,
        source: str | None = None,
        path: str | Path | None = None,
        split: str = "train",
        name: str = "streamed_images",
        mode: Literal["L", "RGB"] | None = None,
        size: Sequence[int] | None = None,
        image: str | None = None,
        num_validation: int = 1000,
        num_test: int = 1000,
        window: int = 10_000,
        flip: bool = False,
    ):
        for argument, number in (("num_validation", num_validation), ("num_test", num_test), ("window", window)):
            whole_number(argument, number)
        if mode is not None and mode not in MODES:
            raise InvalidValueError(f"mode must be L (grey) or RGB, or null for pictures as they are, got {mode!r}")
        if (source is None) == (path is None):
            raise InvalidValueError(f"give either source or path, got source={source!r} and path={path!r}")
        files = None if path is None else _files(path)
        self.name, self.source, self.flip = name, str(path if source is None else source), flip
        self.num_validation, self.num_test = num_validation, num_test
        self._images = _Source(source, files, split, self.source, image, mode, checked_size(size))
        held = num_validation + num_test
        first = next(self._images.windows(0, held, None), (np.empty((0, 1, 1, 1), np.uint8), None))[0]
        training = self._images.windows(held, window, None)
        reference = next(training, (first[:0], None))[0]
        if len(first) < held or not len(reference):
            raise InvalidValueError(
                f"{self.source} has {len(first) + len(reference):,} images, too few for {num_validation:,} of "
                f"validation, {num_test:,} of the test and some for training; choose a smaller num_validation and "
                "num_test"
            )
        self.event_shape = tuple(first.shape[1:])
        self._held_out = {"test": torch.from_numpy(first[:num_test]), "validation": torch.from_numpy(first[num_test:])}
        self._reference, self._window = torch.from_numpy(reference), window
        self.split_settings = {"flip": flip, "window": window, "split": split}

    def train_stream(
        self,
        batch_size: int,
        generator: torch.Generator,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> StreamedImageStream:
        """Return an endless stream of training images."""
        first = self.num_validation + self.num_test
        return StreamedImageStream(
            self.name, self._images, first, self._window, self.flip, batch_size, generator, device, dtype
        )

    def held_out(self, split: Literal["validation", "test"]) -> Batch:
        return Batch(self._held_out[split])

    def reference(self) -> Tensor:
        """Return the first training images (n, C, H, W), at most a window of them."""
        return convert(self._reference, None, None, self.name)


class StreamedImageStream(BatchStream):
    """Batches of the images of one window after the other, each in a random order."""

    def __init__(
        self,
        dataset: str,
        images: _Source,
        first: int,  # image of training
        window: int,
        flip: bool,
        batch_size: int,
        generator: torch.Generator,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(dataset, min(batch_size, window), generator, device, dtype)
        self._images, self._first, self._size, self._flip = images, first, window, flip
        self._begin("")

    def next(self) -> Batch:
        for _ in range(3):  # the rest of a pass, a short window at its end, and the next pass
            if self._position + self.batch_size <= len(self._order):
                break
            self._advance()
        else:
            raise InvalidValueError(
                f"{self.dataset!r} has fewer training images than a batch, {self.batch_size}; choose a smaller "
                "batch_size"
            )
        chosen = self._order[self._position : self._position + self.batch_size]
        self._position += self.batch_size
        x = self._pixels[chosen].to(self.device, self.dtype)
        if self._flip:
            mirrored = torch.rand(len(x), generator=self.generator) < 0.5
            x = torch.where(mirrored.to(self.device)[:, None, None, None], x.flip(-1), x)
        return Batch(x)

    def state_dict(self) -> dict[str, Any]:
        own = {"before": self._before, "order": self._order.clone(), "position": self._position}
        return super().state_dict() | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        before, order, position = state["before"], state["order"], state["position"]
        whole = isinstance(order, Tensor) and order.dtype == torch.long and order.ndim == 1
        if not (whole and isinstance(before, str) and type(position) is int and 0 <= position <= len(order)):
            raise InvalidValueError("the saved position is damaged: it is no place in a window of images")
        super().load_state_dict(state)
        self._begin(before)
        if len(order):
            self._read()
            if not torch.equal(order.sort().values, torch.arange(len(self._pixels))):
                raise InvalidValueError(
                    f"the saved position belongs to other images than {self.dataset!r} has now; resume with the data "
                    "that the run was started with"
                )
        self._order, self._position = order.clone(), position

    def _begin(self, before: str) -> None:
        """Go to where a window begins; the empty text is the start."""
        self._before, self._after = before, before
        self._windows: Iterator[tuple[np.ndarray, str]] | None = None
        self._pixels, self._order, self._position = torch.empty(0), torch.empty(0, dtype=torch.long), 0

    def _advance(self) -> None:
        self._before = self._after
        if not self._read():
            self._begin("")  # the next pass
            self._read()
        self._order = torch.randperm(len(self._pixels), generator=self.generator)
        self._position = 0

    def _read(self) -> bool:
        if self._windows is None:
            self._windows = self._images.windows(self._first, self._size, self._before or None)
        found = next(self._windows, None)
        if found is not None:
            self._pixels, self._after = torch.from_numpy(found[0]), found[1]
        return found is not None


class _Source:
    """Where images are streamed from."""

    def __init__(
        self,
        source: str | None,
        files: Sequence[Path] | None,
        split: str,
        where: str,
        image: str | None,
        mode: str | None,
        size: tuple[int, int] | None,
    ):
        self._arguments = (source, files, split)
        self._where, self._image = where, image
        self._decoder = Decoder(where, mode, size, 256, None, False)

    def windows(self, first: int, size: int, state: str | None) -> Iterator[tuple[np.ndarray, str]]:
        """Yield the images (n, C, H, W) from `first` on, or from a state, with the state behind them."""
        rows = streamed(*self._arguments).skip(first).with_format("arrow")  # this one keeps the state
        if state is not None:
            try:
                rows.load_state_dict(json.loads(state))
            except Exception as error:  # the library raises many types
                raise InvalidValueError(f"the saved position in {self._where} is damaged ({error})") from error
        for table in rows.iter(batch_size=size):
            columns = Columns(table.schema, self._where, self._image, None)

            def tables(names: list[str], table: Any = table) -> Iterator[Any]:
                yield table.select(names)

            blocks = columns.stored(len(table), tables, "train", self._where).blocks
            yield (
                self._decoder(StoredImages(self._where, len(table), blocks), "train")[0],
                json.dumps(rows.state_dict()),
            )


def _files(path: str | Path) -> list[Path]:
    found = existing_path("path", path, "Parquet file or folder of them", folder=True)
    files = sorted(found.glob("*.parquet")) if found.is_dir() else [found]
    if not files or any(file.suffix.lower() != ".parquet" for file in files):
        raise InvalidValueError(
            f"{path} must be a .parquet file or a folder of them; data=images reads other files whole"
        )
    return files
