"""Images in columns of Parquet files and of Hugging Face data sets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from flows.datasets.images.arrays import in_layout
from flows.datasets.images.stored import BLOCK, IMAGE_WORDS, LABEL_WORDS, Encoded, StoredImages
from flows.datasets.tables.readers import opened_parquet, whole_parquet
from flows.errors import FileError, InvalidValueError


def read_parquet_images(
    files: Mapping[str, Sequence[Path]], where: str, image: str | None, label: str | None
) -> dict[str, StoredImages]:
    """Read Parquet files by split, each with a column of pictures and perhaps one of classes."""
    found = {}
    for split, paths in files.items():
        opened = [(path, opened_parquet(path)) for path in paths]
        path, first = opened[0]
        columns = Columns(first.schema_arrow, where, image, label)
        image, label = columns.image, columns.label  # all splits use the columns of the first one
        needed = {name for name in (image, label) if name is not None}
        for other, file in opened:
            if lacking := needed - set(file.schema_arrow.names):
                raise InvalidValueError(f"{other} has no column {lacking.pop()!r}, which {path} has; keep them apart")

        def tables(names: list[str], opened: list = opened) -> Iterator[Any]:
            for path, file in opened:
                with whole_parquet(path):
                    yield from file.iter_batches(batch_size=BLOCK, columns=names)

        count = sum(file.metadata.num_rows for _, file in opened)
        found[split] = columns.stored(count, tables, split, where)
    return found


class Columns:
    """Which columns of a table hold pictures and classes."""

    def __init__(
        self,
        schema: Any,
        where: str,
        image: str | None,
        label: str | None,
        class_names: Mapping[str, Sequence[str]] | None = None,
        pictures: Sequence[str] | None = None,
    ):
        features = _features(schema)
        if class_names is None:
            classes = {name: kind for name, kind in features.items() if kind.get("_type") == "ClassLabel"}
            class_names = {name: kind["names"] for name, kind in classes.items() if kind.get("names")}
        if pictures is None:
            pictures = [name for name, feature in features.items() if feature.get("_type") == "Image"]
        self.schema, self.where, self.names_of = schema, where, class_names
        every = list(schema.names)
        for name in (image, label):
            if name is not None and name not in every:
                raise InvalidValueError(f"{where} has no column {name!r}; it has {', '.join(map(repr, every))}")
        self.image = image or self._find_image([name for name in pictures if name in every])
        self.label = label or self._find_label()

    def _find_image(self, known: Sequence[str]) -> str:
        likely = [name for name in self.schema.names if _holds_pictures(self.schema.field(name).type)]
        for candidates in (known, likely):
            if len(candidates) > 1:
                candidates = [name for name in candidates if name.lower() in IMAGE_WORDS] or candidates
            if candidates:
                break
        if len(candidates) != 1:
            names = ", ".join(map(repr, self.schema.names))
            raise InvalidValueError(
                f"{self.where} has {len(candidates)} columns of pictures among {names}; name the right one with "
                "image=...; pictures are bytes, structs of bytes and path, or lists of numbers"
            )
        return candidates[0]

    def _find_label(self) -> str | None:
        classes = [name for name in self.names_of if name in self.schema.names]
        if len(classes) == 1:
            return classes[0]
        named = [name for word in LABEL_WORDS for name in self.schema.names if name.lower() == word]
        named = [name for name in named if name != self.image and (not classes or name in classes)]
        return named[0] if named else None

    def stored(self, count: int, tables: Callable[[list[str]], Iterator[Any]], split: str, where: str) -> StoredImages:
        """Return the images of a split."""

        def blocks() -> Iterator[Sequence[Encoded] | np.ndarray]:
            row = 0
            for table in tables([self.image]):
                column = _plain(table.column(0))
                with _readable(where, self.image):
                    block = _block(column, row, split, where, self.image)
                yield block
                row += len(column)

        labels, names = self._labels(tables, where)
        return StoredImages(where, count, blocks, labels, names)

    def _labels(
        self, tables: Callable[[list[str]], Iterator[Any]], where: str
    ) -> tuple[list[Any] | None, tuple[str, ...] | None]:
        import pyarrow as pa

        if self.label is None:
            return None, None
        kind = self.schema.field(self.label).type
        value = kind.value_type if pa.types.is_dictionary(kind) else kind
        words = pa.types.is_string(value) or pa.types.is_large_string(value)
        if not (words or pa.types.is_integer(value) or pa.types.is_floating(value) or pa.types.is_boolean(value)):
            raise InvalidValueError(f"{where}: the column {self.label!r} holds {kind}, not classes")
        with _readable(where, self.label):
            labels = [label for table in tables([self.label]) for label in table.column(0).to_pylist()]
        names = self.names_of.get(self.label)
        if names is not None and not words:  # Hugging Face has −1 for "unknown"
            labels = [None if label == -1 else label for label in labels]
        return labels, None if names is None or words else tuple(map(str, names))


@contextmanager
def _readable(where: str, name: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise FileError(f"{where}: the column {name!r} holds text that is not UTF-8 ({error})") from error


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Return what Hugging Face wrote about the columns; nothing if it is absent or damaged."""
    try:
        content = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return {name: feature for name, feature in content["info"]["features"].items() if isinstance(feature, dict)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _holds_pictures(kind: Any) -> bool:
    import pyarrow as pa

    kind = _storage(kind)
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_bytes(field.type) for field in kind)
    if _is_list(kind):
        while _is_list(kind):
            kind = kind.value_type
        return pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return _is_bytes(kind)


def _storage(kind: Any) -> Any:
    return _storage(kind.storage_type) if hasattr(kind, "storage_type") else kind


def _plain(column: Any) -> Any:
    """Return a column in one piece, without an extension type."""
    import pyarrow as pa

    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = pa.concat_arrays(column.chunks)
    return column.storage if isinstance(column, pa.ExtensionArray) else column


def _block(column: Any, row: int, split: str, where: str, name: str) -> Sequence[Encoded] | np.ndarray:
    import pyarrow as pa

    def called(i: int) -> str:
        return f"image {row + i} of the split {split!r} of {where}"

    kind = column.type
    if not _holds_pictures(kind) and not pa.types.is_struct(kind):
        raise InvalidValueError(
            f"{where}: the column {name!r} holds {kind}, no pictures: bytes, structs of bytes and path, or lists of "
            "numbers"
        )
    if _is_list(kind):
        return _numbers(column, row, split, where, name)
    pictures = []
    for i, value in enumerate(column.to_pylist()):
        given: dict[str, Any] = value if isinstance(value, dict) else {"bytes": value}
        content, path = given.get("bytes"), given.get("path")
        if content is not None:
            pictures.append(Encoded(content, f"{called(i)} ({path})" if path else called(i)))
        elif path:
            pictures.append(Encoded(Path(path), path))
        else:
            raise InvalidValueError(f"{called(i)} is empty (null); fill it in, or remove the row")
    return pictures


def _numbers(column: Any, row: int, split: str, where: str, name: str) -> np.ndarray:
    """Return nested lists of numbers as an array."""
    shape: list[int] = [len(column)]
    values = column
    while _is_list(values.type):
        if values.null_count:
            raise InvalidValueError(f"{where}: the column {name!r} has empty entries (null) from row {row}")
        flat = values.flatten()
        lengths = len(flat) // max(len(values), 1)
        sizes = {lengths} if hasattr(values.type, "list_size") else set(values.value_lengths().unique().to_pylist())
        if len(sizes) > 1:
            listed = ", ".join(map(str, sorted(sizes)[:5]))
            raise InvalidValueError(
                f"{where}: the lists in the column {name!r} of the split {split!r} have several lengths ({listed}), "
                f"near row {row}; all images must have one size"
            )
        shape.append(lengths)
        values = flat
    if values.null_count:
        raise InvalidValueError(f"{where}: the column {name!r} has missing numbers (null) from row {row}")
    try:
        array = values.to_numpy(zero_copy_only=False).reshape(shape)
    except ValueError as error:
        raise FileError(f"{where}: the column {name!r} is damaged ({error})") from error
    return in_layout(array, f"{where}, column {name!r}")
