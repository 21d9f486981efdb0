"""Which reader a file or folder of images needs: its first bytes decide, and its name where they do not."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from flows.datasets.folders import (
    PICTURES,
    Found,
    every_file,
    find_pictures,
    find_tables,
    split_of_name,
    tell_unused,
)
from flows.datasets.images.arrays import by_split, in_layout, paired, read_npy, read_npz
from flows.datasets.images.columns import read_parquet_images
from flows.datasets.images.hub import is_saved, read_saved
from flows.datasets.images.idx import idx_by_split, is_idx, is_named_idx, read_idx_images
from flows.datasets.images.python_batches import is_pickle, read_batch_file, read_batches
from flows.datasets.images.stored import Encoded, StoredImages
from flows.errors import FileError, InvalidValueError

CURES = {
    ".zip": "unpack it with unzip, and give the folder",
    ".tar": "unpack it with tar -xf, and give the folder",
    ".tgz": "unpack it with tar -xzf, and give the folder",
    ".gz": "unpack it with gunzip or tar -xzf, and give the file or folder",
    ".xz": "unpack it, and give the file or folder",
    ".rar": "unpack it, and give the folder",
    ".7z": "unpack it, and give the folder",
    ".csv": "save it as .npz: numpy.savez('images.npz', images=..., labels=...) with images (n, height, width)",
    ".mat": "save its arrays as .npz: numpy.savez('images.npz', images=..., labels=...)",
    ".h5": "save its arrays as .npz: numpy.savez('images.npz', images=..., labels=...)",
    ".hdf5": "save its arrays as .npz: numpy.savez('images.npz', images=..., labels=...)",
    ".pt": "save its tensors as .npz: numpy.savez('images.npz', images=x.numpy(), labels=y.numpy())",
    ".pth": "save its tensors as .npz: numpy.savez('images.npz', images=x.numpy(), labels=y.numpy())",
}
EXPECTED = "a folder of pictures, .npz, .npy, idx, .parquet, or CIFAR's batches"


def read_path(path: Path, image: str | None, label: str | None) -> dict[str, StoredImages]:
    """Read the splits of a file or folder of images.

    Raises:
        FileError: it holds no images, or is damaged.
        InvalidValueError: its content is no set of images.
    """
    return _folder(path, image, label) if path.is_dir() else _file(path, image, label)


def kind_of(path: Path) -> str | None:
    """Return the kind of a file: "parquet", "npy", "npz", "idx", "pickle", "picture", or None."""
    suffix = path.suffix.lower()
    if suffix in PICTURES:
        return "picture"
    start = _start(path)
    if start[:4] == b"PAR1" or suffix == ".parquet":
        return "parquet"
    if start[:6] == b"\x93NUMPY" or (suffix == ".npy" and start[:2] != b"PK"):
        return "npy"
    if suffix == ".npz" or (start[:2] == b"PK" and _is_npz(path)):
        return "npz"
    if is_idx(start) or is_named_idx(path):
        return "idx"
    return "pickle" if is_pickle(path, start) else None


def _start(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(8)
    except OSError as error:
        raise FileError(f"cannot read {path}: {error}") from error


def _is_npz(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return bool(archive.namelist()) and all(name.endswith(".npy") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def _file(path: Path, image: str | None, label: str | None) -> dict[str, StoredImages]:
    kind = kind_of(path)
    if kind == "parquet":
        return read_parquet_images({"train": [path]}, str(path), image, label)
    if kind == "npz":
        return read_npz(path, image, label)
    if kind == "npy":
        return {"train": _npy_images(path)}
    if kind == "idx":
        return {"train": read_idx_images(path)}
    if kind == "pickle":
        return {"train": read_batch_file(path, image, label)}
    if kind == "picture":
        raise InvalidValueError(f"{path} is a single picture; give the path of a folder of pictures")
    if not path.stat().st_size:
        raise FileError(f"{path} is empty; expected {EXPECTED}")
    cure = CURES.get(path.suffix.lower(), "convert it")
    raise FileError(f"{path} cannot be read as images: expected {EXPECTED}; {cure}")


def _npy_images(path: Path) -> StoredImages:
    """Read the images of a file, and their labels from a file beside it, such as y.npy beside x.npy."""
    images = in_layout(read_npy(path), str(path))
    labels = None
    for old, new in (("images", "labels"), ("image", "label"), ("x", "y"), ("X", "y"), ("X", "Y"), ("data", "labels")):
        if path.stem == old or path.stem.startswith(f"{old}_") or path.stem.endswith(f"_{old}"):
            stem = path.stem[: -len(old)] + new if path.stem.endswith(f"_{old}") else new + path.stem[len(old) :]
            beside = path.with_name(stem + path.suffix)
            if labels is None and beside != path and beside.is_file():
                labels = beside
    return paired(images, None if labels is None else read_npy(labels), str(path), labels and labels.name)


def _folder(folder: Path, image: str | None, label: str | None) -> dict[str, StoredImages]:
    if is_saved(folder):
        return read_saved(folder, image, label)
    pictures = find_pictures(folder)
    if pictures is not None:
        return _pictures(pictures, folder)
    tables = find_tables(folder)
    if tables is not None:
        return read_parquet_images(tables.files, str(folder), image, label)
    files = every_file(folder)
    kinds: dict[str | None, list[Path]] = {}
    for file in files:
        kinds.setdefault(kind_of(file), []).append(file)
    others = kinds.pop(None, [])
    if len(kinds) > 1:
        counts = " and ".join(f"{len(found):,} {kind} files" for kind, found in kinds.items())
        raise InvalidValueError(
            f"{folder} holds {counts}; move one kind elsewhere, or give the path of the file that holds the images"
        )
    if not kinds:
        suffixes = Counter(file.suffix.lower() or "no suffix" for file in others)
        held = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(suffixes.items())) or "no files"
        raise FileError(f"{folder} holds no images: expected {EXPECTED}, found {held}")
    tell_unused(folder, len(files), others)
    ((kind, found),) = kinds.items()
    return FOLDERS[str(kind)](found, folder, image, label)


def _idx_folder(files: Sequence[Path], folder: Path, image: str | None, label: str | None) -> dict[str, StoredImages]:
    return {split: read_idx_images(file) for split, file in idx_by_split(files).items()}


def _npy_folder(files: Sequence[Path], folder: Path, image: str | None, label: str | None) -> dict[str, StoredImages]:
    paths = {str(file.relative_to(folder).with_suffix("")): file for file in files}
    arrays = {name: read_npy(path) for name, path in paths.items()}
    return by_split(
        str(folder), {name: array.shape for name, array in arrays.items()}, arrays.__getitem__, image, label
    )


def _npz_folder(files: Sequence[Path], folder: Path, image: str | None, label: str | None) -> dict[str, StoredImages]:
    if len(files) == 1:
        return read_npz(files[0], image, label)
    found: dict[str, StoredImages] = {}
    for file in files:
        inside = read_npz(file, image, label)
        split = split_of_name(file.stem)
        if split is None or split in found or list(inside) != ["train"]:
            raise InvalidValueError(
                f"{folder} holds {len(files)} .npz files; name them train.npz, validation.npz and test.npz, or give "
                "the path of one"
            )
        found[split] = inside["train"]
    return found


FOLDERS = {"idx": _idx_folder, "npy": _npy_folder, "npz": _npz_folder, "pickle": read_batches}


def _pictures(found: Found, folder: Path) -> dict[str, StoredImages]:
    """Return the pictures of a folder by split; the classes of all splits share their numbers."""
    names = sorted({label for labels in found.labels.values() for label in labels if label is not None})
    number = {name: i for i, name in enumerate(names)}
    result = {}
    for split, files in found.files.items():
        encoded = [Encoded(file, str(file)) for file in files]
        labels = [None if label is None else number[label] for label in found.labels[split]] if names else None
        result[split] = StoredImages(
            str(folder), len(files), lambda encoded=encoded: iter([encoded]), labels, tuple(names) or None
        )
    return result
