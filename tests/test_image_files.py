"""Images in the files that people have: each is read as it is meant, or refused in words that say what to do."""

import gzip
import io
import json
import pickle
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from flows.datasets import ImageFiles
from flows.datasets.images.plain_pickle import ForeignObjectError, read_pickle
from flows.errors import DataWarning, FileError, InvalidValueError

N = 30


def pixels(count=N, shape=(5, 4), seed=0, high=256):
    return np.random.default_rng(seed).integers(0, high, (count, *shape), dtype=np.uint8)


def labels(count=N):
    return np.arange(count) % 3


def contents(dataset):
    """Every image with its class, whatever its split."""
    parts = {"train": dataset._parts["train"], **{part: dataset._parts[part] for part in ("validation", "test")}}
    found = {}
    for part in parts.values():
        classes = [None] * len(part) if part.labels is None else part.labels.tolist()
        found |= {image.numpy().tobytes(): label for image, label in zip(part.images, classes, strict=True)}
    return found


def expected(images, classes=None):  # images (n, C, H, W)
    classes = [None] * len(images) if classes is None else classes.tolist()
    return {np.ascontiguousarray(image).tobytes(): label for image, label in zip(images, classes, strict=True)}


def check(path, images, classes=None, **settings):
    dataset = ImageFiles(path=path, **settings)
    assert contents(dataset) == expected(images, classes)
    assert dataset.event_shape == images.shape[1:]
    return dataset


# Arrays


@pytest.mark.parametrize(
    ("image", "label"),
    [("images", "labels"), ("x", "y"), ("X", "Y"), ("data", "target"), ("arr_0", "arr_1"), ("pics", "kind")],
)
def test_npz(image, label, tmp_path):
    x, y = pixels(), labels()
    np.savez(tmp_path / "a.npz", **{image: x, label: y})
    dataset = check(tmp_path / "a.npz", x[:, None], y, conditional=True)
    assert dataset.class_names == ("0", "1", "2")
    assert (dataset.num_validation, dataset.num_test) == (3, 3)
    np.savez_compressed(tmp_path / "b.npz", **{image: x})
    assert check(tmp_path / "b.npz", x[:, None]).class_names is None


def test_the_split_is_that_of_the_seed(tmp_path):
    np.savez(tmp_path / "a.npz", x=pixels(), y=labels())
    one, again, other = (ImageFiles(path=tmp_path / "a.npz", split_seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.held_out("test").x, again.held_out("test").x)
    assert not torch.equal(one.held_out("test").x, other.held_out("test").x)


@pytest.mark.parametrize(
    "names",
    [
        ("x_train", "y_train", "x_test", "y_test"),
        ("train_images", "train_labels", "test_images", "test_labels"),
        ("Xtrain", "ytrain", "Xtest", "ytest"),
        ("train.x", "train.y", "test.x", "test.y"),
    ],
)
def test_npz_with_splits(names, tmp_path):
    x, y, held, classes = pixels(), labels()[:, None], pixels(6, seed=1), labels(6)[:, None]
    np.savez(tmp_path / "a.npz", **dict(zip(names, (x, y, held, classes), strict=True)))
    dataset = ImageFiles(path=tmp_path / "a.npz", conditional=True)
    assert torch.equal(dataset.held_out("test").x[:, 0], torch.from_numpy(held))
    assert dataset.labels("test").tolist() == labels(6).tolist()
    assert (dataset.num_validation, dataset.num_test) == (3, 6)
    for name, array in zip(names, (x, y, held, classes), strict=True):
        (tmp_path / "folder").mkdir(exist_ok=True)
        np.save(tmp_path / "folder" / f"{name}.npy", array)
    again = ImageFiles(path=tmp_path / "folder", conditional=True)
    assert contents(again) == contents(dataset)


def test_separate_files(tmp_path):
    for seed, name in enumerate(("train", "validation", "test")):
        np.savez(tmp_path / f"{name}.npz", x=pixels(9, seed=seed), y=np.array(["a", "b", "c"] * 3))
    given = {f"{part}_path": tmp_path / f"{part}.npz" for part in ("validation", "test")}
    dataset = ImageFiles(path=tmp_path / "train.npz", conditional=True, **given)
    assert torch.equal(dataset.held_out("test").x[:, 0], torch.from_numpy(pixels(9, seed=2)))
    assert (len(dataset.reference()), dataset.class_names) == (9, ("a", "b", "c"))
    assert contents(ImageFiles(path=tmp_path, conditional=True)) == contents(dataset)
    with pytest.raises(FileError, match=r"no folder or file of images at .*none; a relative"):
        ImageFiles(path=tmp_path / "train.npz", test_path=tmp_path / "none")


@pytest.mark.parametrize(
    ("shape", "first", "channels"),
    [((5, 4, 3), False, 3), ((3, 5, 4), True, 3), ((5, 4, 1), False, 1), ((1, 5, 4), True, 1), ((3, 32, 32), True, 3)],
)
def test_layouts(shape, first, channels, tmp_path):
    x = pixels(shape=shape)
    np.save(tmp_path / "a.npy", x)
    dataset = check(tmp_path / "a.npy", x if first else x.transpose(0, 3, 1, 2))
    assert dataset.event_shape[0] == channels


@pytest.mark.parametrize("dtype", ["int64", "float32", "float64", "uint16", ">i4", "bool"])
def test_dtypes(dtype, tmp_path):
    x = pixels(high=2)
    np.save(tmp_path / "a.npy", x.astype(dtype))
    check(tmp_path / "a.npy", x[:, None], num_levels=2)


def test_labels_beside_an_array(tmp_path):
    np.save(tmp_path / "x.npy", pixels())
    np.save(tmp_path / "y.npy", labels())
    check(tmp_path / "x.npy", pixels()[:, None], labels())


def test_rows_of_numbers_are_square_pictures(tmp_path):
    x = pixels(shape=(3, 5, 5))
    np.save(tmp_path / "grey.npy", x[:, 0].reshape(N, -1))
    with pytest.warns(DataWarning, match="rows of 25 numbers are taken for pictures of 5 × 5 pixels in grey"):
        check(tmp_path / "grey.npy", x[:, :1])
    np.save(tmp_path / "colour.npy", x.reshape(N, -1))
    with pytest.warns(DataWarning, match="rows of 75 numbers .* 5 × 5 pixels in colour, red before green"):
        check(tmp_path / "colour.npy", x)


def test_fractions_become_levels_when_asked(tmp_path):
    x = pixels()
    np.save(tmp_path / "a.npy", (x / 255).astype(np.float32))
    check(tmp_path / "a.npy", x[:, None], scale=255)
    np.save(tmp_path / "b.npy", (x + 0.25) / 256)
    with pytest.warns(DataWarning, match=r"values between levels \(scale=255\), which are rounded"):
        ImageFiles(path=tmp_path / "b.npy", scale=255)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (np.array(["cat", "dog", "eel"])[labels()], ("cat", "dog", "eel")),
        (np.array([b"cat", b"dog", b"eel"])[labels()], ("cat", "dog", "eel")),
        (labels() * 4.0 + 3, ("3", "7", "11")),
        (np.array([-1, 5, 1000])[labels()], ("-1", "5", "1000")),
        (np.eye(3)[labels()], ("0", "1", "2")),
        (labels() == 0, ("0", "1")),
    ],
)
def test_labels_of_any_form(given, names, tmp_path):
    np.savez(tmp_path / "a.npz", images=pixels(), labels=given)
    dataset = ImageFiles(path=tmp_path / "a.npz", conditional=True)
    assert dataset.class_names == names
    assert dataset.context_shape == (len(names),)
    if len(names) == 3:
        check(tmp_path / "a.npz", pixels()[:, None], labels())


# idx


def idx(path, array, magic=None, cut=0, more=b"", compress=False):
    head = bytes([0, 0, 8, array.ndim]) if magic is None else magic
    content = head + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes() + more
    content = content[: len(content) - cut]
    path.write_bytes(gzip.compress(content) if compress else content)


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-images.idx3-ubyte"])
def test_idx(name, end, tmp_path):
    x, y, held = pixels(), labels(), pixels(6, seed=1)
    for start, images in (("train", x), ("t10k", held)):
        file = tmp_path / f"{name}{end}".replace("train", start)
        idx(file, images, compress=bool(end))
        idx(file.with_name(file.name.replace("images", "labels").replace("idx3", "idx1")), labels(len(images)))
    check(tmp_path / f"{name}{end}", x[:, None], y, conditional=True)
    dataset = ImageFiles(path=tmp_path, conditional=True)
    assert torch.equal(dataset.held_out("test").x[:, 0], torch.from_numpy(held))
    assert (dataset.num_classes, dataset.num_validation) == (3, 3)


def test_idx_plain_and_compressed_are_one(tmp_path):
    idx(tmp_path / "train-images-idx3-ubyte", pixels())
    idx(tmp_path / "train-images-idx3-ubyte.gz", pixels(), compress=True)
    check(tmp_path, pixels()[:, None])


def broken_idx(path, how):
    x = pixels()
    match how:
        case "cut":
            idx(path, x, cut=7)
        case "header":
            path.write_bytes(b"\0\0\x08\x03\0\0")
        case "more":
            idx(path, x, more=b"xx")
        case "magic":
            idx(path, x, magic=b"\0\0\x07\x03")
        case "swapped":
            idx(path, x, magic=b"\x03\x08\0\0")
        case "empty":
            path.write_bytes(b"")
        case "huge":
            path.write_bytes(b"\0\0\x08\x03" + b"\x7f\xff\xff\xff" * 3)
        case "gz cut":
            whole = gzip.compress(bytes([0, 0, 8, 3]) + struct.pack(">3I", *x.shape) + x.tobytes())
            path.write_bytes(whole[:-20])
        case "gz flip":
            whole = bytearray(gzip.compress(bytes([0, 0, 8, 3]) + struct.pack(">3I", *x.shape) + x.tobytes()))
            whole[-6] ^= 1  # of the checksum
            path.write_bytes(whole)
        case "labels":
            idx(path, labels())
        case "page":
            path.write_text("<html>404</html>")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "cut",
            r"cut off: its header announces 600 bytes for the shape \(30, 5, 4\), and 593 are there; copy",
        ),
        ("header", "is cut off in its header; copy or download it anew"),
        ("more", "holds more bytes than its header announces"),
        ("magic", "is no idx file: it begins with 00 00 07 03, expected 00 00 08 03 for images"),
        ("swapped", "is no idx file: it begins with 03 08 00 00"),
        ("empty", "is no idx file: it begins with nothing"),
        ("huge", "would take .* more than half of this machine's"),
        ("gz cut", "is damaged or cut off"),
        ("gz flip", "is damaged or cut off .*CRC"),
        ("labels", r"has the shape \(30,\): it holds labels, no images; give the path of the file of images"),
        ("page", "is no idx file: it begins with 3c 68 74 6d"),
    ],
)
def test_broken_idx(how, message, tmp_path):
    broken_idx(tmp_path / "train-images-idx3-ubyte.gz", how)
    with pytest.raises((FileError, InvalidValueError), match=message):
        ImageFiles(path=tmp_path / "train-images-idx3-ubyte.gz")


# CIFAR's pickles


def cifar(path, images, classes, key=b"labels", protocol=2, **more):
    content = {b"data": images.reshape(len(images), -1), key: classes.tolist(), b"batch_label": b"batch 1", **more}
    path.write_bytes(pickle.dumps(content, protocol=protocol))


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_cifar10(protocol, tmp_path):
    x, y = pixels(shape=(3, 32, 32)), labels()
    for i in range(3):
        cifar(tmp_path / f"data_batch_{i + 1}", x[10 * i : 10 * i + 10], y[10 * i : 10 * i + 10], protocol=protocol)
    cifar(tmp_path / "test_batch", pixels(6, (3, 32, 32), 1), labels(6), protocol=protocol)
    names = {b"label_names": [b"cat", b"dog", b"eel"], b"num_cases_per_batch": 10}
    (tmp_path / "batches.meta").write_bytes(pickle.dumps(names, protocol=protocol))
    if protocol == 0:  # text, which only a suffix tells apart from other text
        for file in list(tmp_path.iterdir()):
            file.rename(file.with_name(file.name + ".pkl"))
    dataset = ImageFiles(path=tmp_path, conditional=True)
    assert contents(dataset) == expected(x, y) | expected(pixels(6, (3, 32, 32), 1), labels(6))
    assert (dataset.class_names, dataset.num_test) == (("cat", "dog", "eel"), 6)


def test_cifar100_of_python_2(tmp_path):
    """Python 2 wrote the numbers of an array as a string."""
    x = pixels(6, (3, 32, 32))
    numbers = x.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(K\x06M\x00\x0ctcnumpy\ndtype\n"
        b"(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<I", len(numbers))
        + numbers
        + b"tb"
    )
    fine = b"](K\x00K\x01K\x02K\x00K\x01K\x02e"
    (tmp_path / "train").write_bytes(b"\x80\x02}(U\x04data" + array + b"U\x0bfine_labels" + fine + b"u.")
    (tmp_path / "meta").write_bytes(pickle.dumps({"fine_label_names": ["ant", "bee", "cod"]}, protocol=2))
    dataset = ImageFiles(path=tmp_path, validation_fraction=0.2, test_fraction=0.2)
    assert contents(dataset) == expected(x, labels(6))
    assert dataset.class_names == ("ant", "bee", "cod")


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Evil(), "names builtins.print|names __builtin__.print"),
        ({b"data": Evil()}, "only arrays, lists, dicts, numbers and text are read"),
        ({b"data": np.array([None, {}], dtype=object)}, "names an array of objects"),
        ({b"data": torch.zeros(2)}, r"names torch\._utils\._rebuild_tensor_v2"),
        ({b"data": {1, 2}}, "names the opcode EMPTY_SET|names __builtin__.set|names builtins.set"),
        ([1, 2], "holds a list; expected a dict of arrays"),
        ({b"labels": [1]}, "has no array of images; it holds labels"),
        ({b"data": np.zeros((4, 5, 5), np.uint8), b"labels": [1]}, "has 4 images, but 1 labels in 'labels'"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_pickles_of_strangers(content, message, protocol, tmp_path, capsys):
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(InvalidValueError, match=message):
        ImageFiles(path=tmp_path / "data_batch_1")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02]q\x00" + b"(" * 3 + b".",
        b"\x80\x02](K\x01",
        b"\x80\x02T\xff\xff\xff\x7fabc.",
        b"\x80\x02}K\x01s.",
        b"\x80\x02]q\x00h\x00a.",  # a list that holds itself
        b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b".",
    ],
)
def test_damaged_pickles(content):
    with pytest.raises(
        (ValueError, ForeignObjectError), match=r"damaged|deeply|early|down|name|enough|truncated|only|exhausted"
    ):
        read_pickle(content)


def test_shared_lists_are_finished_once():
    content = b"\x80\x02]q\x00" + b"".join(
        b"]" + bytes([0x71, i + 1]) + b"(h" + bytes([i]) + b"h" + bytes([i]) + b"e" for i in range(60)
    )
    assert len(read_pickle(content + b".")) == 2


# Parquet


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


X = pixels()
FORMS = {
    "struct": [{"bytes": png(x), "path": f"{i}.png"} for i, x in enumerate(X)],
    "bytes": [png(x) for x in X],
    "lists": X.tolist(),
    "lists with a channel": X[..., None].tolist(),
    "fixed": pa.array(list(X.reshape(-1, 5)), pa.list_(pa.uint8(), 5)),
}


@pytest.mark.parametrize("form", [name for name in FORMS if name != "fixed"])
@pytest.mark.parametrize("metadata", [False, True])
def test_parquet(form, metadata, tmp_path):
    table = pa.table({"image": FORMS[form], "label": labels(), "id": range(N)})
    if metadata:
        features = {"label": {"names": ["cat", "dog", "eel"], "_type": "ClassLabel"}}
        features |= {"image": {"_type": "Image"}} if form in ("struct", "bytes") else {}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    dataset = check(tmp_path / "a.parquet", X[:, None], labels(), conditional=True)
    assert dataset.class_names == (("cat", "dog", "eel") if metadata else ("0", "1", "2"))


def test_parquet_of_words_and_categories(tmp_path):
    words = pa.array(np.array(["cat", "dog", "eel"])[labels()])
    for kind in (words, words.dictionary_encode()):
        pq.write_table(pa.table({"img": FORMS["bytes"], "category": kind}), tmp_path / "a.parquet")
        assert check(tmp_path / "a.parquet", X[:, None], labels()).class_names == ("cat", "dog", "eel")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": X[:, 0, 0], "label": labels()}, "0 columns of pictures among 'image', 'label'; name the right one"),
        ({"a": FORMS["bytes"], "b": FORMS["bytes"]}, "2 columns of pictures among 'a', 'b'"),
        ({"image": [*FORMS["bytes"][:-1], None]}, "image 29 of the split 'train' of .* is empty .null.; fill it in"),
        ({"image": [*X.tolist()[:-1], X[0, :3].tolist()]}, r"have several lengths \(3, 5\).*one size"),
        ({"image": [*X.tolist()[:-1], None]}, "has empty entries .null."),
        ({"image": [b"words"] * N}, "cannot be read as a picture"),
        ({"image": FORMS["bytes"], "label": labels() + 0.5}, r"the label 0\.5 is no class; classes are whole numbers"),
    ],
)
def test_bad_columns(columns, message, tmp_path):
    pq.write_table(pa.table({name: list(column) for name, column in columns.items()}), tmp_path / "a.parquet")
    with pytest.raises((InvalidValueError, FileError), match=message):
        ImageFiles(path=tmp_path / "a.parquet")


# Depth and colour


def save(folder, pictures, suffix="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        picture.save(folder / f"{i:02}.{suffix}")


def of_mode(mode):
    grey = [Image.fromarray(x) for x in X]
    return [picture.convert("RGB").convert(mode) if mode == "P" else picture.convert(mode) for picture in grey]


@pytest.mark.parametrize("mode", ["1", "P", "RGBA", "LA"])
def test_pictures_of_other_modes_are_converted_only_when_asked(mode, tmp_path):
    save(tmp_path / "p", of_mode(mode))
    with pytest.raises(InvalidValueError, match=rf"00\.png has the mode {mode}; convert pictures to grey or colour"):
        ImageFiles(path=tmp_path / "p")
    assert ImageFiles(path=tmp_path / "p", mode="RGB").event_shape == (3, 5, 4)


def test_one_bit(tmp_path):
    save(tmp_path / "p", of_mode("1"))
    two = np.stack([np.array(picture) for picture in of_mode("1")])[:, None].astype(np.uint8)
    check(tmp_path / "p", two, num_levels=2)
    check(tmp_path / "p", two * 255, mode="L")
    np.save(tmp_path / "a.npy", two[:, 0].astype(bool))
    with pytest.raises(InvalidValueError, match="images of 1 bit; keep their two levels with num_levels=2, or convert"):
        ImageFiles(path=tmp_path / "a.npy")
    check(tmp_path / "a.npy", two * 255, mode="L")


def test_sixteen_bits(tmp_path):
    deep = np.random.default_rng(0).integers(0, 65536, (N, 5, 4), dtype=np.uint16)
    save(tmp_path / "p", [Image.fromarray(x) for x in deep])
    np.save(tmp_path / "a.npy", deep)
    with pytest.raises(InvalidValueError, match=r"mode I;16, with more than 256 levels; keep them with num_levels"):
        ImageFiles(path=tmp_path / "p")
    with pytest.raises(InvalidValueError, match=r"set num_levels=\d+ or more, or convert 16 bits to 8 with mode=L"):
        ImageFiles(path=tmp_path / "a.npy")
    for path in (tmp_path / "p", tmp_path / "a.npy"):
        check(path, deep[:, None].astype(np.int32), num_levels=65536)
        with pytest.warns(DataWarning, match="has 16 bits a level, of which the upper 8 are kept"):
            check(path, (deep >> 8).astype(np.uint8)[:, None], mode="L")


def test_sixteen_bits_in_colour(tmp_path):
    """Pillow reads 8 of them without a word."""
    size, rows = struct.pack(">II", 4, 4), b"".join(b"\0" + bytes(24) for _ in range(4))
    (tmp_path / "p").mkdir()
    for i in range(N):
        chunks = [(b"IHDR", size + bytes([16, 2, 0, 0, 0])), (b"IDAT", zlib_of(rows[:1] + bytes([i]) + rows[2:]))]
        body = b"".join(chunk(name, content) for name, content in [*chunks, (b"IEND", b"")])
        (tmp_path / f"p/{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    with pytest.raises(InvalidValueError, match=r"16 bits a channel, .* only 8 can be read; convert with mode=RGB"):
        ImageFiles(path=tmp_path / "p")
    with pytest.warns(DataWarning, match="has 16 bits a level, of which the upper 8 are kept"):
        assert ImageFiles(path=tmp_path / "p", mode="RGB").event_shape == (3, 4, 4)


def zlib_of(content):
    import zlib

    return zlib.compress(content)


def chunk(name, content):
    import zlib

    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def test_arrays_are_converted_and_scaled_when_asked(tmp_path):
    x = pixels(shape=(8, 8, 4))
    np.save(tmp_path / "a.npy", x)
    with pytest.raises(InvalidValueError, match=r"images of 4 channels \(RGBA\); convert them with mode=RGB, or L"):
        ImageFiles(path=tmp_path / "a.npy")
    x[..., 3] = 255
    np.save(tmp_path / "a.npy", x)
    check(tmp_path / "a.npy", x[..., :3].transpose(0, 3, 1, 2), mode="RGB")
    assert ImageFiles(path=tmp_path / "a.npy", mode="L", size=(4, 4)).event_shape == (1, 4, 4)


# Arrays that are refused


def saved(path, **arrays):
    np.savez(path, **arrays)
    return path


BAD_ARRAYS = {
    "objects": (np.array([None] * N, dtype=object), "array 'x' holds Python objects, which are not read"),
    "levels": (pixels().astype(int) + 1, r"has the value 256, which is no level from 0 to 255 .* set num_levels=257"),
    "negative": (pixels().astype(int) - 9, r"has the value -\d, which is no level .*; levels count from 0"),
    "unit": (pixels() / 255, r"no whole numbers \(from 0 to 1\); if they are levels over 255, set scale=255"),
    "centred": (pixels() / 127.5 - 1, r"no whole numbers \(from -1 to 1\); if -1 is black and 1 is white, save"),
    "nan": (np.where(pixels() == pixels()[7, 1, 1], np.nan, 1.0), "has NaN or infinite values; repair or remove it"),
    "infinite": (np.full((N, 3, 3), np.inf), "image 0 .* has NaN or infinite values"),
    "complex": (np.ones((N, 3, 3), complex), "must hold numbers, got complex128"),
    "words": (np.full((N, 3, 3), "a"), "must hold numbers, got <U1"),
    "single": (pixels(30, (20, 3)), r"shape \(30, 20, 3\), which looks like a single picture in colour"),
    "ambiguous": (pixels(N, (6, 7, 8)), "where no axis has 1, 3 or 4 entries, one a channel"),
    "rows": (pixels(N, (7,)), "rows of 7 numbers, which are no square pictures"),
    "none": (pixels(0), "has no image in the split 'train'"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays(case, tmp_path):
    array, message = BAD_ARRAYS[case]
    with pytest.raises((InvalidValueError, FileError), match=message):
        ImageFiles(path=saved(tmp_path / "a.npz", x=array))


BAD_NPZ = {
    "no images": ({"y": labels()}, r"which array holds the images .* it has y \(30,\)"),
    "two": ({"a": pixels(), "b": pixels()}, r"which array holds the images .* a \(30, 5, 4\), b \(30, 5, 4\)"),
    "other length": ({"x": pixels(), "y": labels(29)}, "has 30 images, but 29 labels in y; give one label an image"),
    "object labels": ({"x": pixels(), "y": np.array([None] * N, object)}, "array 'y' holds Python objects"),
    "many": ({"x": pixels(), "y": np.ones((N, 3))}, r"labels have the shape \(30, 3\), and rows that are not one 1"),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_bad_npz(case, tmp_path):
    arrays, message = BAD_NPZ[case]
    with pytest.raises(InvalidValueError, match=message):
        ImageFiles(path=saved(tmp_path / "a.npz", **arrays))


def test_arrays_that_are_not_used_are_named(tmp_path):
    saved(tmp_path / "a.npz", x=pixels(), y=labels(), weights=labels())
    with pytest.warns(DataWarning, match="arrays that are not used: weights"):
        ImageFiles(path=tmp_path / "a.npz")
    with pytest.raises(InvalidValueError, match=r"has no array 'z'; it has x \(30, 5, 4\), y"):
        ImageFiles(path=tmp_path / "a.npz", image="z")


def header(shape, dtype="|u1"):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header((10**6, 10**6, 10**6)), "would take .* more than half of this machine's"),
        (header((100, 10, 10)) + b"few", "is cut off: its header announces 10,000 bytes"),
        (header((2, 2, 2)) + bytes(9), "holds more bytes than its header announces"),
        (b"\x93NUMPY\x09\x00", "is not a whole .npy file of numbers .*version"),
        (b"\x93NUMPY", "is not a whole .npy file of numbers"),
        (b"words", "is not a whole .npy file of numbers"),
    ],
)
def test_damaged_npy(content, message, tmp_path):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises((FileError, InvalidValueError), match=message):
        ImageFiles(path=tmp_path / "a.npy")


def test_damaged_npz(tmp_path):
    whole = saved(tmp_path / "a.npz", x=pixels()).read_bytes()
    for content in (whole[:-30], whole[: len(whole) // 2], whole[:200] + bytes([whole[200] ^ 1]) + whole[201:], b"PK"):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(FileError, match=r"a\.npz is not a whole \.npz file of arrays"):
            ImageFiles(path=tmp_path / "a.npz")


def test_a_bomb_in_an_npz(tmp_path):
    """A thousandth of its size when packed: refused by what its header announces."""
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", header((10**5, 10**4, 10**4)) + bytes(10**6))
    with pytest.raises(InvalidValueError, match="would take 10 TB, more than half of this machine's"):
        ImageFiles(path=tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.zip", b"PK\x03\x04", "a.zip cannot be read as images: .* unpack it with unzip, and give the folder"),
        ("a.tar.gz", gzip.compress(b"x", mtime=0), "unpack it with gunzip or tar -xzf"),
        ("a.csv", b"1,2\n", r"save it as \.npz: numpy\.savez"),
        ("a.mat", b"MATLAB", r"save its arrays as \.npz"),
        ("a.pt", b"PK\x03\x04", r"save its tensors as \.npz"),
        ("a.npz", b"", "is not a whole .npz file"),
        ("a", b"", "a is empty; expected a folder of pictures"),
        ("a.png", b"", "a.png is a single picture; give the path of a folder"),
    ],
)
def test_other_files(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((FileError, InvalidValueError), match=message):
        ImageFiles(path=tmp_path / name)


def test_folders_of_several_kinds(tmp_path):
    saved(tmp_path / "a.npz", x=pixels())
    np.save(tmp_path / "b.npy", pixels())
    with pytest.raises(InvalidValueError, match="holds 1 npz files and 1 npy files; move one kind elsewhere"):
        ImageFiles(path=tmp_path)
    (tmp_path / "b.npy").unlink()
    (tmp_path / "notes.txt").write_text("about")
    with pytest.warns(DataWarning, match=r"2 files found, 1 files of images used; not used: 1 no images \(\.txt\)"):
        check(tmp_path, pixels()[:, None])
    (tmp_path / "a.npz").unlink()
    with pytest.raises(FileError, match=r"holds no images: expected .*, found 1 \.txt"):
        ImageFiles(path=tmp_path)


# Classes that cannot be conditioned on


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros(N), "all images are of one class, '0', so there is nothing to condition on; set conditional=false"),
        (np.arange(N) == 0, "the class '1' has a single image, which cannot be both trained on and tested; add images"),
        (np.arange(N), r"30 classes \('0', '1', '2', '3', '4', \.\.\.\) have a single image"),
        (np.where(np.arange(N) == 3, np.nan, labels()), "1 images of the split 'train' have no class"),
        (np.where(np.arange(N) == 3, -1, labels()), "1 images of the split 'train' have no class"),
    ],
)
def test_classes_that_cannot_be_conditions(given, message, tmp_path):
    saved(tmp_path / "a.npz", x=pixels(), y=given)
    assert ImageFiles(path=tmp_path / "a.npz").num_classes is None
    with pytest.raises(InvalidValueError, match=message):
        ImageFiles(path=tmp_path / "a.npz", conditional=True)


def test_a_class_without_training_images(tmp_path):
    saved(tmp_path / "a.npz", x_train=pixels(), y_train=labels(), x_test=pixels(6, seed=1), y_test=np.full(6, 7))
    with pytest.raises(InvalidValueError, match="the class '7' has no image in the training split"):
        ImageFiles(path=tmp_path / "a.npz", conditional=True)


# Files that cannot be read, and images that are there twice


def test_unreadable_pictures_are_named_and_counted(tmp_path):
    save(tmp_path / "p", [Image.fromarray(x) for x in X])
    (tmp_path / "p/03.png").write_bytes(b"words")
    (tmp_path / "p/07.png").write_bytes((tmp_path / "p/08.png").read_bytes()[:60])
    with pytest.raises(FileError, match=r"03\.png cannot be .*07\.png cannot be .* skip_unreadable=true .*2 of the 30"):
        ImageFiles(path=tmp_path / "p")
    with pytest.warns(DataWarning, match=r"2 of the 30 pictures of the split 'train' are left out.*03\.png .*07\.png"):
        dataset = ImageFiles(path=tmp_path / "p", skip_unreadable=True)
    assert contents(dataset) == expected(np.delete(X, [3, 7], 0)[:, None])
    for file in (tmp_path / "p").iterdir():
        file.write_bytes(b"words")
    with (
        pytest.warns(DataWarning, match=r"30 of the 30 pictures .* and 25 more"),
        pytest.raises(FileError, match="none of the 30 images of the split 'train' can be read"),
    ):
        ImageFiles(path=tmp_path / "p", skip_unreadable=True)


def test_labels_stay_with_their_pictures(tmp_path):
    for i, kind in enumerate(("cat", "dog", "eel")):
        save(tmp_path / "p" / kind, [Image.fromarray(x) for x in X[i::3]])
    (tmp_path / "p/cat/00.png").write_bytes(b"words")
    with pytest.warns(DataWarning, match="1 of the 30 pictures"):
        dataset = ImageFiles(path=tmp_path / "p", conditional=True, skip_unreadable=True)
    assert contents(dataset) == expected(X[1:, None], labels()[1:])
    assert dataset.class_names == ("cat", "dog", "eel")


def test_duplicates_are_counted(tmp_path):
    saved(tmp_path / "a.npz", x_train=pixels(), x_test=pixels()[:5])
    words = "5 of 35 images are duplicates of other images, and 5 of 5 test images and 0 of 3 validation images"
    with pytest.warns(DataWarning, match=words):
        ImageFiles(path=tmp_path / "a.npz")
    saved(tmp_path / "a.npz", x_train=pixels()[[0, 0, *range(30)]], x_validation=pixels(4, seed=1), x_test=X[:4] // 2)
    with pytest.warns(DataWarning, match="2 of 40 images are duplicates of other images, all in the same part"):
        ImageFiles(path=tmp_path / "a.npz")


def test_levels_that_do_not_occur(tmp_path):
    saved(tmp_path / "a.npz", x=pixels(high=17))
    with pytest.warns(DataWarning, match="the highest value is 16; if the images have 17 levels, set num_levels=17"):
        ImageFiles(path=tmp_path / "a.npz")
    check(tmp_path / "a.npz", pixels(high=17)[:, None], num_levels=17)


# A stranger's first hour


@pytest.mark.slow
def test_my_pictures(run, tmp_path):
    """The commands of docs/how_to/pictures.md on a folder of two classes."""
    for i, kind in enumerate(("cat", "dog")):
        save(tmp_path / "photos" / kind, [Image.fromarray(x) for x in pixels(40, (12, 10, 3), seed=i)])
    tiny = ["data.size=[8,8]", "data.mode=RGB", "field.channels=8", "steps=3", "reporting.progress_bar=false"]
    quick = ["objective.flow_matching.batch_size=8", "evaluation.points=4", "solver=euler", "solver.step_size=0.25"]
    given = ["data=images", "data.path=photos", "data.conditional=true", "output_dir=runs/photos", *tiny, *quick]
    code, out, err = run("train", *given)
    assert code == 0, err
    assert "bits" in out
    assert {"samples", "classes", "evaluations"} <= {path.stem for path in (tmp_path / "runs/photos/plots").iterdir()}
    code, out, err = run("sample", "checkpoint=runs/photos", "class=cat", "num_samples=4", "output=cats.png")
    assert code == 0, err
    assert (tmp_path / "cats.png").stat().st_size > 100
    code, out, err = run("evaluate", "checkpoint=runs/photos")
    assert code == 0, err
    code, _, err = run("sample", "checkpoint=runs/photos", "class=eel")
    assert (code, "cat" in err) == (2, True), err
