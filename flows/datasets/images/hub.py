"""Images of the Hugging Face hub, and of folders that its library `datasets` wrote."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.datasets.images.columns import Columns
from flows.datasets.images.stored import BLOCK, StoredImages
from flows.errors import FileError, InvalidValueError, MissingPackageError

if TYPE_CHECKING:
    import datasets

SAVED = ("dataset_dict.json", "dataset_info.json")  # in a folder that save_to_disk wrote


def read_hub(source: str | None, image: str | None, label: str | None) -> dict[str, StoredImages]:
    """Read the splits of a data set by its name on the hub.

    Raises:
        FileError: it is neither in the local cache nor can be downloaded.
        MissingPackageError: the library `datasets` is not installed.
        InvalidValueError: there is no name, or no column of pictures.
    """
    datasets = _library(str(source))
    if _offline.get():
        _require_cached(str(source))
    if not isinstance(source, str) or not source:
        raise InvalidValueError(
            f"set either source to the name of a data set on the hub or path to a folder, got source={source!r} and "
            "path=None"
        )
    try:
        with _without_network():
            found = _by_split(datasets.load_dataset(source))
    except Exception as error:  # the library raises many types, and all mean the same here
        raise FileError(
            f"the data set {source!r} is not in the local cache ({datasets.config.HF_DATASETS_CACHE}) and cannot "
            f"be downloaded ({_reason(error)}). With a network, this command downloads it: "
            f"python -c \"import datasets; datasets.load_dataset('{source}')\". Otherwise set path to a folder of "
            "pictures or Parquet files, or to a file of images that you have"
        ) from error
    return _stored(found, source, image, label)


def streamed(source: str | None, files: Sequence[Path] | None, split: str) -> Any:
    """Return a split of a data set on the hub, or the rows of Parquet files, as an iterable of `datasets`.

    Raises:
        FileError: the data set cannot be reached, or the files cannot be read.
        MissingPackageError: the library `datasets` is not installed.
    """
    where = str(source if files is None else files[0].parent)
    datasets = _library(where)
    if files is None and _offline.get():
        raise FileError(f"{where} is streamed over the network, and settings in a file open none; pass trust=[flows]")
    try:
        if files is not None:
            names = [str(file) for file in files]
            return datasets.load_dataset("parquet", data_files={"train": names}, split="train", streaming=True)
        return datasets.load_dataset(source, split=split, streaming=True)
    except Exception as error:  # the library raises many types, and all mean the same here
        raise FileError(f"{where} cannot be streamed ({_reason(error)})") from error


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of the library wrote a folder."""
    return any((folder / name).exists() for name in SAVED)


def read_saved(folder: Path, image: str | None, label: str | None) -> dict[str, StoredImages]:
    """Read the splits that `save_to_disk` wrote.

    Raises:
        FileError: the folder is damaged.
        MissingPackageError: the library `datasets` is not installed.
        InvalidValueError: there is no column of pictures.
    """
    datasets = _library(str(folder))
    try:
        found = _by_split(datasets.load_from_disk(str(folder)))
    except Exception as error:  # the library raises many types, and all mean the same here
        raise FileError(f"{folder} cannot be read as a saved data set ({_reason(error)})") from error
    return _stored(found, str(folder), image, label)


def _stored(
    found: Mapping[str, datasets.Dataset], where: str, image: str | None, label: str | None
) -> dict[str, StoredImages]:
    import datasets

    result = {}
    for split, rows in found.items():
        names = {name: kind.names for name, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)}
        pictures = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]
        columns = Columns(rows.features.arrow_schema, where, image, label, names, pictures)
        image, label = columns.image, columns.label  # all splits use the columns of the first one

        def tables(names: list[str], rows: datasets.Dataset = rows) -> Iterator[Any]:
            yield from rows.select_columns(names).with_format("arrow").iter(batch_size=BLOCK)

        result[split] = columns.stored(len(rows), tables, split, where)
    return result


_offline: ContextVar[bool] = ContextVar("offline", default=False)


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """While entered, data are read without the network."""
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


def _library(where: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingPackageError(
            f"reading {where} needs the library datasets of Hugging Face: pip install -e '.[images]'"
        ) from error
    return datasets


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
