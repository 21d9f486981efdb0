"""Files of the corpus that no text describes: binary tables, pictures, folders, and what is no file at all."""

from __future__ import annotations

import datetime
import decimal
import io
import os
import socket
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from flows.datasets.splits import random_split

VALUES = np.random.default_rng(0).normal(size=(30, 2)).round(6)


def _damaged(data: bytes, cut: float | None, flip: float | None, add: int) -> bytes:
    """Cut a file to a part of its length, turn a bit around at a part of its length, or add zeros."""
    if cut is not None:
        data = data[: int(cut * len(data))]
    if flip is not None:
        changed = bytearray(data)
        changed[int(flip * len(data))] ^= 0x10
        data = bytes(changed)
    return data + b"\0" * add


def damage(
    path: Path, recipe: str, cut: float | None = None, flip: float | None = None, add: int = 0, **options
) -> None:
    """Write a file with another recipe, then damage it."""
    RECIPES[recipe](path, **options)
    path.write_bytes(_damaged(path.read_bytes(), cut, flip, add))


CONDITIONS = {
    "words": lambda i: ("red", "blue")[i % 2],
    "truths": lambda i: i % 2 == 0,
    "one": lambda i: "red",
    "constant": lambda i: 3,
    "rare": lambda i: "rare" if i == random_split(60, FRACTIONS, 0, "", "rows")["test"][0] else ("red", "blue")[i % 2],
}
FRACTIONS = {"test": 0.1, "validation": 0.1}


def csv_with_condition(path: Path, kind: str) -> None:
    """A value y and a condition c."""
    values = np.random.default_rng(0).normal(size=60).round(6).tolist()
    path.write_text("c,y\n" + "".join(f"{CONDITIONS[kind](i)},{y}\n" for i, y in enumerate(values)))


ARRAYS = {
    "plain": lambda: VALUES,
    "float32": lambda: VALUES.astype(np.float32),
    "float16": lambda: VALUES.astype(np.float16),
    "longdouble": lambda: VALUES.astype(np.longdouble),
    "big_endian": lambda: VALUES.astype(">f8"),
    "fortran": lambda: np.asfortranarray(VALUES),
    "integers": lambda: np.random.default_rng(0).integers(10**9, size=(30, 2)),
    "huge_integers": lambda: np.random.default_rng(0).integers(2**60, 2**62, size=(30, 2)),
    "unsigned": lambda: np.random.default_rng(0).integers(2**63, 2**64 - 1, size=(30, 2), dtype=np.uint64),
    "booleans": lambda: VALUES > 0,
    "complex": lambda: VALUES + 1j,
    "rank0": lambda: np.float64(3.0),
    "rank1": lambda: VALUES[:, 0],
    "rank3": lambda: VALUES[:, :, None],
    "no_rows": lambda: VALUES[:0],
    "no_columns": lambda: VALUES[:, :0],
    "words": lambda: VALUES.astype(str),
    "bytes": lambda: VALUES.astype("S8"),
    "dates": lambda: np.full((30, 2), "2020-01-01", "datetime64[D]"),
    "structured": lambda: np.array([(a, b) for a, b in VALUES.tolist()], [("a", float), ("b", float)]),
    "nan": lambda: np.where(np.arange(60).reshape(30, 2) == 7, np.nan, VALUES),
    "infinite": lambda: np.where(np.arange(60).reshape(30, 2) == 7, np.inf, VALUES),
    "too_large_for_float64": lambda: np.where(
        np.arange(60).reshape(30, 2) == 7, np.longdouble("1e400"), VALUES.astype(np.longdouble)
    ),
    "objects": lambda: VALUES.astype(object),
}


def npy(path: Path, array: str = "plain", version: tuple[int, int] | None = None) -> None:
    with path.open("wb") as file:
        np.lib.format.write_array(file, np.asanyarray(ARRAYS[array]()), version and tuple(version))


def npy_header(path: Path, header: str) -> None:
    """An .npy file with a header of one's own above 60 numbers."""
    text = header.encode().ljust(117) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + VALUES.tobytes())


def npz(path: Path, arrays: list[str], compressed: bool = False) -> None:
    save = np.savez_compressed if compressed else np.savez
    save(path, **{name: np.asanyarray(ARRAYS[name]()) for name in arrays})


def zip_of_words(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "no arrays")


def zip_bomb(path: Path) -> None:
    """A small file whose array has 8 PB by its own words."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000, 1)}".ljust(117) + b"\n"
        file.writestr("a.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)


COLUMNS = {
    "plain": lambda: pa.array(VALUES[:, 1]),
    "float16": lambda: pa.array(VALUES[:, 1].astype(np.float16)),
    "integers": lambda: pa.array(np.random.default_rng(0).integers(1000, 10**6, size=30)),
    "huge_integers": lambda: pa.array(np.random.default_rng(0).integers(2**60, 2**62, size=30)),
    "booleans": lambda: pa.array((VALUES[:, 1] > 0).tolist()),
    "words": lambda: pa.array([f"word {i}" for i in range(30)]),
    "dates": lambda: pa.array([datetime.date(2020, 1, 1 + i) for i in range(30)]),
    "timestamps": lambda: pa.array([datetime.datetime(2020, 1, 1 + i) for i in range(30)]),
    "durations": lambda: pa.array([datetime.timedelta(days=i) for i in range(30)]),
    "times": lambda: pa.array([datetime.time(1, i) for i in range(30)]),
    "decimals": lambda: pa.array([decimal.Decimal(str(v)) for v in VALUES[:, 1].tolist()]),
    "binary": lambda: pa.array([bytes([i]) for i in range(30)]),
    "lists": lambda: pa.array([[1.0, float(i)] for i in range(30)]),
    "structs": lambda: pa.array([{"x": 1.0, "y": float(i)} for i in range(30)]),
    "maps": lambda: pa.array([[("k", float(i))] for i in range(30)], pa.map_(pa.string(), pa.float64())),
    "nulls": lambda: pa.array([None if i == 4 else v for i, v in enumerate(VALUES[:, 1].tolist())]),
    "all_null": lambda: pa.nulls(30),
    "all_null_numbers": lambda: pa.nulls(30, pa.float64()),
    "nan": lambda: pa.array([float("nan") if i == 4 else v for i, v in enumerate(VALUES[:, 1].tolist())]),
    "dictionary_of_numbers": lambda: pa.array(VALUES[:, 1]).dictionary_encode(),
    "dictionary_of_words": lambda: pa.array([f"word {i}" for i in range(30)]).dictionary_encode(),
    "constant": lambda: pa.array([1.5] * 30),
}


def parquet(path: Path, column: str = "plain", names: tuple[str, str] = ("a", "b"), rows: int = 30, **options) -> None:
    table = pa.Table.from_arrays([pa.array(VALUES[:, 0]), COLUMNS[column]()], names=list(names))
    pq.write_table(table.slice(0, rows), path, **options)


def parquet_without_columns(path: Path) -> None:
    pq.write_table(pa.table({}), path)


def parquet_of_pandas(path: Path) -> None:
    import pandas as pd

    frame = pd.DataFrame(VALUES, columns=["a", "b"], index=np.arange(30) * 7 % 31)
    frame.to_parquet(path)


def feather(path: Path) -> None:
    import pyarrow.feather

    pyarrow.feather.write_feather(pa.table({"a": VALUES[:, 0]}), str(path))


def gzipped(path: Path) -> None:
    import gzip

    path.write_bytes(gzip.compress(b"a,b\n1,2\n"))


def pickled(path: Path) -> None:
    import pickle

    path.write_bytes(pickle.dumps({"a": [1, 2]}))


def _random(i: int, *shape: int, levels: int = 256, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(i).integers(levels, size=shape, dtype=dtype)


PICTURES = {
    "plain": lambda i: Image.fromarray(_random(i, 6, 5)),
    "rgb": lambda i: Image.fromarray(_random(i, 6, 5, 3)),
    "rgba": lambda i: Image.fromarray(_random(i, 6, 5, 4)),
    "grey_alpha": lambda i: Image.fromarray(_random(i, 6, 5, 4)).convert("LA"),
    "one_bit": lambda i: Image.fromarray(_random(i, 6, 5, levels=2) * 255).convert("1"),
    "sixteen_bit": lambda i: Image.fromarray(_random(i, 6, 5, levels=2**16, dtype=np.uint16)),
    "floats": lambda i: Image.fromarray(_random(i, 6, 5).astype(np.float32)),
    "palette": lambda i: PICTURES["rgb"](i).quantize(16),
    "cmyk": lambda i: PICTURES["rgb"](i).convert("CMYK"),
    "larger": lambda i: Image.fromarray(_random(i, 9, 5)),
    "one_shade": lambda i: Image.new("L", (6, 5), 7),
}


def _save(picture: Image.Image, path: Path, kind: str | None = None, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, kind, **options)


def folder(
    path: Path,
    pictures: str = "plain",
    count: int = 12,
    suffix: str = ".png",
    places: list[str] = (".",),
    other: str | None = None,  # the kind of one more picture
    other_name: str = "zz.png",
    extra: dict[str, str] | None = None,  # text of further files
    name: str = "{i:02}",
    special: str | None = None,
) -> Path:
    """A folder of pictures."""
    for place in places:
        for i in range(count):
            _save(PICTURES[pictures](i), path / place / (name.format(i=i) + suffix))
    if other is not None:
        _save(PICTURES[other](99), path / other_name)
    for file, text in (extra or {}).items():
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_text(text)
    if special is not None:
        SPECIAL[special](path)
    return path


SPECIAL = {
    "fifo": lambda path: os.mkfifo(path / "pipe.png"),
    "device": lambda path: (path / "zero.png").symlink_to("/dev/zero"),
    "broken_link": lambda path: (path / "gone.png").symlink_to(path / "nowhere.png"),
    "link_to_itself": lambda path: (path / "self.png").symlink_to(path / "self.png"),
    "circle": lambda path: (path / "circle").symlink_to(path, target_is_directory=True),
    "empty_folder": lambda path: (path / "empty").mkdir(),
    "cut": lambda path: (path / "00.png").write_bytes((path / "00.png").read_bytes()[:60]),
    "cut_jpeg": lambda path: (path / "00.jpg").write_bytes((path / "00.jpg").read_bytes()[:-40]),
    "flip": lambda path: (path / "00.png").write_bytes(_damaged((path / "00.png").read_bytes(), None, 0.6, 0)),
    "nothing": lambda path: (path / "00.png").write_bytes(b""),
    "text": lambda path: (path / "00.png").write_text("I am no picture"),
    "html": lambda path: (path / "00.jpg").write_text("<html>404 not found</html>"),
    "jpeg_named_png": lambda path: PICTURES["plain"](0).save(path / "00.png", "jpeg"),
    "animated": lambda path: PICTURES["plain"](0).save(
        path / "zz.gif", save_all=True, append_images=[PICTURES["plain"](1), PICTURES["plain"](2)]
    ),
    "bomb": lambda path: (path / "00.png").write_bytes(png_of_size(60_000, 60_000)),
    "no_size": lambda path: (path / "00.png").write_bytes(png_of_size(0, 5)),
    "turned": lambda path: _turned(path / "zz.jpg"),
    "webp_cut": lambda path: (path / "00.webp").write_bytes((path / "00.webp").read_bytes()[:50]),
}


def _turned(path: Path) -> None:
    """A picture of 5 × 6 pixels that its EXIF data turn to 6 × 5."""
    exif = Image.Exif()
    exif[274] = 6
    PICTURES["plain"](0).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


def png_of_size(width: int, height: int) -> bytes:
    """A small PNG file that claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 40)) + chunk(b"IEND", b"")
    )


def picture(path: Path, kind: str = "plain", cut: float | None = None, size: list[int] | None = None) -> None:
    """One picture, for `ImageDensity`."""
    if size is not None:
        path.write_bytes(png_of_size(*size))
        return
    _save(PICTURES[kind](0), path)
    path.write_bytes(_damaged(path.read_bytes(), cut, None, 0))


def parquet_of_images(path: Path, cut: float | None = None, words: bool = False) -> None:
    column = [b"no picture"] * 12
    if not words:
        column = []
        for i in range(12):
            buffer = io.BytesIO()
            PICTURES["plain"](i).save(buffer, "png")
            column.append(buffer.getvalue())
    import datasets

    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": [{"bytes": b, "path": None} for b in column]}, features).to_parquet(str(path))
    path.write_bytes(_damaged(path.read_bytes(), cut, None, 0))


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link_to(path: Path, target: str) -> None:
    path.symlink_to(target)


def link_to_fifo(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to(path.with_name("pipe"))


def unix_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def directory(path: Path) -> None:
    path.mkdir()


def long_name(path: Path) -> str:
    return str(path.with_name("a" * 5000 + ".csv"))


def null_character(path: Path) -> str:
    return str(path) + "\0.csv"


def csv_of_bytes(path: Path, start: str, count: int = 30) -> None:
    """Text in another encoding above lines of numbers."""
    lines = "".join(f"{a},{b}\n" for a, b in VALUES.tolist()[:count])
    path.write_bytes(bytes.fromhex(start) + lines.encode())


def pandas_csv(path: Path, index: bool = True, name: str | None = None) -> None:
    import pandas as pd

    frame = pd.DataFrame(VALUES, columns=["a", "b"])
    frame.index.name = name
    frame.to_csv(path, index=index)


def series_rows(count: int = 6, points: int = 5) -> list[list[float]]:
    """Rows id, time, x, y of time series in long form."""
    return [
        [i, j / 2, round(float(np.sin(i + j / 2)), 4), round(float(np.cos(i + j / 3)), 4)]
        for i in range(count)
        for j in range(points)
    ]


def _write_rows(path: Path, rows: list[list]) -> None:
    path.write_text("id,time,x,y\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))


def interleaved_series(path: Path) -> None:
    _write_rows(path, sorted(series_rows(), key=lambda row: row[1]))


def series_since_1970(path: Path) -> None:
    _write_rows(path, [[row[0], 1.7e9 + row[1], *row[2:]] for row in series_rows()])


def series_dates(path: Path, form: str = "%Y-%m-%d", first: str | None = None) -> None:
    start = datetime.datetime(2024, 1, 1)
    rows = [[i, (start + datetime.timedelta(days=2 * t)).strftime(form), x, y] for i, t, x, y in series_rows()]
    if first is not None:
        rows[0][1] = first
    _write_rows(path, rows)


def series_npy(path: Path) -> None:
    np.save(path, np.array(series_rows()))


def series_parquet(
    path: Path, ids: str = "numbers", times: str = "numbers", values: str = "numbers", index: bool = False
) -> None:
    i, t, x, y = (list(column) for column in zip(*series_rows(), strict=True))
    start = datetime.datetime(2024, 1, 1)
    columns = {
        "id": {
            "numbers": lambda: pa.array(i),
            "words": lambda: pa.array([f"patient {n}" for n in i]).dictionary_encode(),
            "null": lambda: pa.array([None if row == 2 else n for row, n in enumerate(i)]),
        }[ids](),
        "time": {
            "numbers": lambda: pa.array(t),
            "dates": lambda: pa.array([(start + datetime.timedelta(days=2 * u)).date() for u in t]),
            "nanoseconds": lambda: pa.array([1704067200 * 10**9 + round(u * 1e9) for u in t], pa.timestamp("ns")),
            "null": lambda: pa.array([None if row == 2 else u for row, u in enumerate(t)]),
        }[times](),
        "x": pa.array([[u] for u in x]) if values == "lists" else pa.array(x),
        "y": pa.array(y),
    }
    if index:
        columns["__index_level_0__"] = pa.array(range(len(i)))
    pq.write_table(pa.table(columns), path)


RECIPES = {
    name: value
    for name, value in list(globals().items())
    if callable(value) and getattr(value, "__module__", None) == __name__ and not name.startswith("_")
}
