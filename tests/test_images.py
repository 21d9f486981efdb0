"""Image data: what the embedded sets hold, files that the tests write, and what is said of bad ones."""

import itertools
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from flows.cli.config import compose_node
from flows.datasets import Digits, ImageFiles, Images, LabelledImages, PhotoPatches
from flows.errors import DataWarning, FileError, InvalidTypeError, InvalidValueError, MissingPackageError

CONF = Path(__file__).resolve().parents[1] / "conf"


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(count, shape=(1, 4, 4), num_levels=256, seed=0):
    return torch.randint(num_levels, (count, *shape), generator=rng(seed), dtype=torch.uint8)


def in_parts(train, validation=None, test=None, labels=None):
    parts = {"train": train, "validation": train[:3] if validation is None else validation}
    parts["test"] = train[:3] if test is None else test
    if labels is None:
        return {part: LabelledImages(images) for part, images in parts.items()}
    return {part: LabelledImages(images, labels[: len(images)]) for part, images in parts.items()}


def joined(batches):
    return torch.cat([batch.x for batch in batches])


# Embedded sets


def test_digits():
    dataset = Digits()
    parts = [joined(dataset.test_batches(100)), joined(dataset.validation_batches(64)), dataset.reference()]
    assert (
        [len(part) for part in parts]
        == [dataset.num_test, dataset.num_validation, 1797 - 359 - 180]
        == [359, 180, 1258]
    )
    assert (dataset.event_shape, dataset.num_levels, dataset.entropy, dataset.context_shape) == (
        (1, 8, 8),
        17,
        None,
        None,
    )
    found = torch.cat(parts).flatten(1)
    expected = torch.from_numpy(load_digits().data)
    assert torch.equal(found.sum(0), expected.sum(0))
    assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, expected.tolist()))
    again = joined(Digits().test_batches(1000, dtype=torch.float32))
    assert again.dtype == torch.float32
    assert torch.equal(again.double(), parts[0])
    assert not torch.equal(joined(Digits(split_seed=1).test_batches(359)), parts[0])


def test_digits_by_class():
    dataset = Digits(conditional=True)
    assert (dataset.context_shape, dataset.num_classes) == ((10,), 10)
    (batch,) = dataset.test_batches(1000)
    assert torch.equal(batch.context.argmax(1), dataset.labels("test"))
    assert torch.equal(batch.context.sum(1), torch.ones(359))
    lookup = {tuple(row): label for row, label in zip(load_digits().data.tolist(), load_digits().target, strict=True)}
    for drawn in (batch, dataset.train_stream(50, rng(), dtype=torch.float32).next()):
        labels = [lookup[tuple(row)] for row in drawn.x.double().flatten(1).tolist()]
        assert drawn.context.argmax(1).tolist() == labels
        assert drawn.context.dtype == drawn.x.dtype


def test_patches_are_pieces_of_the_photographs_and_parts_do_not_overlap():
    """Mark every pixel by its place: patches of different parts must share no mark, and training must see most."""
    photos = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    dataset = PhotoPatches(flip=False)
    assert (dataset.event_shape, dataset.num_levels) == ((3, 8, 8), 256)
    windows = {}
    for number, photo in enumerate(photos):
        views = np.lib.stride_tricks.sliding_window_view(photo, (8, 8), axis=(0, 1))[::2, ::2]
        for row, column in itertools.product(range(views.shape[0]), range(views.shape[1])):
            windows.setdefault(views[row, column].tobytes(), []).append((number, 2 * row, 2 * column))
    covered = {part: np.zeros((2, 427, 640), dtype=bool) for part in ("train", "validation", "test")}
    parts = {"validation": joined(dataset.validation_batches(10_000)), "test": joined(dataset.test_batches(10_000))}
    parts["train"] = dataset.reference()
    repeated = 0
    for part, patches in parts.items():
        for patch in patches.numpy().astype(np.uint8):
            places = windows[patch.tobytes()]  # every patch is a window
            repeated += len(places) > 1
            if len(places) == 1:
                number, row, column = places[0]
                if part != "train":  # these lie side by side
                    assert not covered[part][number, row : row + 8, column : column + 8].any()
                covered[part][number, row : row + 8, column : column + 8] = True
    assert repeated < 0.02 * sum(map(len, parts.values()))
    for one, two in itertools.combinations(covered.values(), 2):
        assert not (one & two).any()
    assert dataset.num_test == 16 * 104
    assert dataset.num_validation == 16 * 52
    assert covered["train"].mean() > 0.5


def test_bad_patches():
    with pytest.raises(ValueError, match="a patch of size 40 does not fit into a region of 32 pixels"):
        PhotoPatches(size=40)
    with pytest.raises(ValueError, match="region must fit into a photograph of 427 × 640 pixels, got 500"):
        PhotoPatches(region=500)
    with pytest.raises(ValueError, match="stride must be a whole number >= 1, got 0"):
        PhotoPatches(stride=0)
    with pytest.raises(ValueError, match="photo_patches has 2 regions, too few to split"):
        PhotoPatches(region=400)


# The stream


def test_mirroring():
    images = noise(64)
    plain = Images(in_parts(images)).train_stream(64, rng())
    mirrored = Images(in_parts(images), flip=True).train_stream(64, rng())
    counts = torch.zeros(2)
    for _ in range(20):
        batch = mirrored.next().x
        same = (batch[:, None] == images).flatten(2).all(2).any(1)
        turned = (batch[:, None] == images.flip(-1)).flatten(2).all(2).any(1)
        assert (same ^ turned).all()
        counts += torch.stack([same.sum(), turned.sum()])
        assert (plain.next().x[:, None] == images).flatten(2).all(2).any(1).all()
    assert (counts / 1280 - 0.5).abs().max() < 4 * 0.5 / 1280**0.5
    dataset = Images(in_parts(images), flip=True)
    assert torch.equal(joined(dataset.test_batches(2)), images[:3].double())


def test_stream_resumes_in_the_middle_of_a_pass(tmp_path):
    dataset = Images(in_parts(noise(40), labels=torch.arange(40) % 3), num_classes=3, conditional=True, flip=True)
    stream = dataset.train_stream(16, rng(1))
    stream.next()
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    expected = [stream.next() for _ in range(6)]
    resumed = dataset.train_stream(16, rng(2))
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for batch in expected:
        again = resumed.next()
        assert torch.equal(again.x, batch.x)
        assert torch.equal(again.context, batch.context)
    with pytest.raises(ValueError, match="belongs to 40 training images, but 'images' now has 30"):
        Images(in_parts(noise(30))).train_stream(16, rng()).load_state_dict(stream.state_dict())


def test_batches_are_levels_in_the_dtype_that_was_asked_for():
    images = noise(40, num_levels=17)
    dataset = Images(in_parts(images), num_levels=17)
    for dtype in (torch.float32, torch.float64):
        stream = dataset.train_stream(40, rng(), dtype=dtype)
        x = stream.next().x
        assert x.dtype == dtype
        assert torch.equal(x.sort(0).values, images.to(dtype).sort(0).values)
    assert len(dataset.train_stream(16, rng()).next()) == 16


def test_levels_beyond_a_byte():
    images = noise(10).int() * 16
    assert torch.equal(
        Images(in_parts(images), num_levels=4096).reference().sort(0).values, images.double().sort(0).values
    )


# Bad images in memory


def test_bad_images():
    images = noise(10, num_levels=17)
    bad = images.clone()
    bad[4, 0, 2, 1] = 17
    with pytest.raises(
        ValueError,
        match=r"the images, train split: image 4 has the value 17 at \(0, 2, 1\), .* level from 0 to 16 \(1 such",
    ):
        Images(in_parts(bad), num_levels=17)
    with pytest.raises(ValueError, match=r"image 0 has the value 0\.5 at .* give levels as whole numbers"):
        Images(in_parts(torch.full((4, 1, 2, 2), 0.5)))
    with pytest.raises(ValueError, match="image 0 has the value -1 at"):
        Images(in_parts(torch.full((4, 1, 2, 2), -1)))
    with pytest.raises(ValueError, match=r"test split: .* got \(10, 1, 3, 3\) beside \(1, 4, 4\)"):
        Images(in_parts(images, test=noise(10, (1, 3, 3))))
    with pytest.raises(ValueError, match=r"expected at least one image .* got \(0, 1, 4, 4\)"):
        Images(in_parts(images, validation=images[:0]))
    with pytest.raises(ValueError, match="num_levels must be a whole number >= 2 and <= 16777216, got 1"):
        Images(in_parts(images), num_levels=1)
    with pytest.raises(ValueError, match="the images have no classes to condition on; set conditional=False"):
        Images(in_parts(images), conditional=True)
    with pytest.raises(ValueError, match="parts must be train, validation and test, got train"):
        Images({"train": LabelledImages(images)})
    with pytest.raises(ValueError, match="the images has 4 images, too few to split: 4 training, 0 test, 0 valid"):
        LabelledImages(images[:4]).split(0.1, 0.1)


# Files


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


COUNTS = {"train": 15, "validation": 4, "test": 3}


def write_folder(folder, parts=tuple(COUNTS), kinds=("cat", "dog"), mode="RGB", suffix="png"):
    """Noise with the number of the picture in its first pixel: {part: {pixels}} of what was written."""
    generator, written = np.random.default_rng(0), {}
    shape = (6, 5, 3) if mode == "RGB" else (6, 5)
    for part, kind in itertools.product(parts, kinds):
        (folder / part / kind).mkdir(parents=True)
        for i in range(COUNTS[part]):
            pixels = generator.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / part / kind / f"{i}.{suffix}")
            planes = pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)
            written.setdefault(part, {})[planes.tobytes()] = kinds.index(kind)
    return written


def check(dataset, written, parts=tuple(COUNTS)):
    for part in parts:
        images = {"train": dataset.reference, "test": lambda: joined(dataset.test_batches(4))}
        images["validation"] = lambda: joined(dataset.validation_batches(4))
        found = {image.astype(np.uint8).tobytes() for image in images[part]().numpy()}
        assert found == set(written[part])
        if dataset.labels(part) is not None and part != "train":
            pairs = zip(images[part]().numpy(), dataset.labels(part).tolist(), strict=True)
            assert all(written[part][image.astype(np.uint8).tobytes()] == label for image, label in pairs)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_folder_parquet_and_saved_data_are_the_same(tmp_path, mode):
    written = write_folder(tmp_path / "pictures", mode=mode)
    settings = {"validation_split": "validation", "name": "mine"}
    dataset = ImageFiles(path=tmp_path / "pictures", **settings)
    assert dataset.event_shape == ((3, 6, 5) if mode == "RGB" else (1, 6, 5))
    assert (dataset.name, dataset.num_levels, dataset.num_validation, dataset.num_test) == ("mine", 256, 8, 6)
    check(dataset, written)

    loaded = datasets.load_dataset(str(tmp_path / "pictures"))
    loaded.save_to_disk(str(tmp_path / "saved"))
    check(ImageFiles(path=tmp_path / "saved", **settings), written)
    (tmp_path / "parquet").mkdir()
    for part, split in loaded.items():
        split.to_parquet(str(tmp_path / "parquet" / f"{part}-00000-of-00001.parquet"))
    by_class = ImageFiles(path=tmp_path / "parquet", conditional=True, **settings)
    check(by_class, written)
    assert by_class.num_classes == 2


def test_parts_that_are_missing_are_cut_off_the_training_part(tmp_path):
    written = write_folder(tmp_path / "pictures", parts=("train",))
    dataset = ImageFiles(path=tmp_path / "pictures", validation_fraction=0.2, test_fraction=0.1)
    parts = [joined(dataset.validation_batches(9)), joined(dataset.test_batches(9)), dataset.reference()]
    assert [len(part) for part in parts] == [6, 3, 21]
    assert {image.astype(np.uint8).tobytes() for image in torch.cat(parts).numpy()} == set(written["train"])
    file = tmp_path / "train.parquet"
    datasets.load_dataset(str(tmp_path / "pictures"))["train"].to_parquet(str(file))
    again = ImageFiles(path=file, validation_fraction=0.2, test_fraction=0.1)
    assert torch.equal(joined(again.test_batches(9)).sort(0).values, parts[1].sort(0).values)
    assert not torch.equal(joined(ImageFiles(path=file, split_seed=1).test_batches(9)), parts[1])
    with pytest.raises(
        ValueError, match=r"no split 'test', only 'train'; name another one with test_split, or set a fraction"
    ):
        ImageFiles(path=file, test_fraction=None)
    with pytest.raises(
        ValueError, match=r"train\.parquet has 30 images, too few to split: 27 training, 0 test, 3 valid"
    ):
        ImageFiles(path=file, test_fraction=0.01)


def test_pictures_are_brought_to_one_mode_and_size(tmp_path):
    write_folder(tmp_path / "pictures", parts=("train",), kinds=("all",))
    Image.new("L", (9, 4), 77).save(tmp_path / "pictures/train/all/0.png")
    Image.new("RGBA", (4, 9), (10, 20, 30, 255)).save(tmp_path / "pictures/train/all/1.png")
    dataset = ImageFiles(
        path=tmp_path / "pictures", mode="RGB", size=[4, 4], validation_fraction=0.3, test_fraction=0.3
    )
    parts = [joined(dataset.validation_batches(9)), joined(dataset.test_batches(9)), dataset.reference()]
    flat = torch.cat(parts)
    assert flat.shape == (15, 3, 4, 4)
    constant = flat[(flat == flat[:, :, :1, :1]).flatten(1).all(1)][:, :, 0, 0].tolist()
    assert sorted(constant) == [[10, 20, 30], [77, 77, 77]]
    assert ImageFiles(path=tmp_path / "pictures", mode="L", size=[3, 2]).event_shape == (1, 3, 2)


def test_a_camera_held_sideways(tmp_path):
    """A picture is turned as its file says, which swaps height and width."""
    folder = tmp_path / "pictures/train/all"
    folder.mkdir(parents=True)
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn clockwise
    for i in range(20):
        Image.fromarray(pixels + np.uint8(i)).save(folder / f"{i}.png", exif=exif)
    (batch,) = ImageFiles(path=tmp_path / "pictures").test_batches(2)
    turned = torch.from_numpy(np.rot90(pixels, -1).copy()).double()
    assert torch.equal(batch.x[0, 0] - batch.x[0, 0].min(), turned)


def test_hub_names(monkeypatch, tmp_path):
    """What a yaml asks the hub for is served from here; the first call of a data set needs a network, others do not."""
    names = {"mnist": "ylecun/mnist", "cifar10": "uoft-cs/cifar10", "imagenet32": "benjamin-paine/imagenet-1k-32x32"}
    names["fashion_mnist"] = "zalando-datasets/fashion_mnist"
    asked = []

    def serve(source):
        asked.append(source)
        splits = {}
        for start, split in enumerate(("train", "validation" if "imagenet" in source else "test")):
            pictures = [Image.fromarray(noise(1, (4, 4), seed=60 * start + i).numpy()[0]) for i in range(60)]
            columns = {"img" if "cifar" in source else "image": pictures, "label": [i % 10 for i in range(60)]}
            kinds = {name: datasets.Image() for name in columns} | {"label": datasets.ClassLabel(num_classes=10)}
            splits[split] = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
        return datasets.DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", serve)
    for name, source in names.items():
        config = compose_node("train", [f"data={name}", "output_dir=x", "data.conditional=true"]).data
        dataset = instantiate(config)
        assert asked[-1] == source
        assert (dataset.name, dataset.num_levels, dataset.num_classes, dataset.num_test) == (name, 256, 10, 60)
        assert dataset.event_shape == ((1, 4, 4) if "mnist" in name else (3, 4, 4))
        assert dataset.num_validation == round(60 * config.get("validation_fraction", 0.1))
        assert dataset.flip == ("mnist" not in name)


def test_a_missing_download_says_what_would_provide_it(monkeypatch):
    def offline(source):
        raise ConnectionError(f"Couldn't reach {source!r} on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(FileError) as caught:
        ImageFiles(source="ylecun/mnist")
    for part in (
        "'ylecun/mnist' is not in the local cache",
        "cannot be downloaded (Couldn't reach 'ylecun/mnist' on the Hub)",
        "python -c \"import datasets; datasets.load_dataset('ylecun/mnist')\"",
        "set path to a folder of pictures or Parquet files",
    ):
        assert part in str(caught.value)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingPackageError, match=r"reading ylecun/mnist needs .* pip install -e '\.\[images\]'"):
        ImageFiles(source="ylecun/mnist")


# Every picture is used, or its absence is said


def write_pictures(folder, names):
    """One picture a name, each of its own; they are returned by name."""
    written = {}
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (3, 4), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
        written[name] = pixels.tobytes()
    return written


def read_pictures(dataset):
    """Parts and their pictures, with classes where there are any."""
    parts = {"train": dataset.reference(), "validation": dataset.held_out("validation").x}
    parts["test"] = dataset.held_out("test").x
    return {part: {image.byte().numpy().tobytes() for image in images} for part, images in parts.items()}


def numbered(*patterns, count=10):
    return [pattern.format(i) for pattern in patterns for i in range(count)]


HALVES = {"validation_fraction": 0.2, "test_fraction": 0.2}


@pytest.mark.parametrize(
    "names",
    [
        numbered("photo_{}.png", "photo_{}-train.png", "photo_{}-test.png"),
        numbered("bus/{}.png", "train/{}.png", "car/{}.png"),
        numbered("test/{}.png", "other/{}.png"),
        numbered("a/train_{}.png", "b/{}.png"),
        numbered("{}.PNG", "deep/deeper/{}.Jpg", "{}.jpeg"),
        numbered("{}.png", "train/{}.png"),
        numbered("train station/{}.png", "x.train.y/{}.png"),
    ],
)
def test_no_picture_is_lost(names, tmp_path):
    names = [name.replace(".Jpg", ".Bmp").replace(".jpeg", ".gif") for name in names]  # without loss
    written = write_pictures(tmp_path / "pictures", names)
    parts = read_pictures(ImageFiles(path=tmp_path / "pictures", mode="L", **HALVES))
    assert sum(map(len, parts.values())) == len(names)
    assert set.union(*parts.values()) == set(written.values())


def test_class_folders_without_splits(tmp_path):
    names = numbered("bus/{}.png", "train/{}.png", "car/{}.png")
    written = write_pictures(tmp_path / "pictures", names)
    dataset = ImageFiles(path=tmp_path / "pictures", conditional=True, **HALVES)
    assert dataset.num_classes == 3
    batch = dataset.held_out("test")
    by_pixels = {pixels: name.split("/")[0] for name, pixels in written.items()}
    found = [by_pixels[image.numpy().tobytes()] for image in batch.x]
    assert [["bus", "car", "train"][label] for label in batch.context.argmax(1).tolist()] == found


@pytest.mark.parametrize(
    "words", [("train", "val", "test"), ("Training", "dev", "eval"), ("train", "valid", "testing")]
)
@pytest.mark.parametrize("pattern", ["{0}/{1}.png", "{0}/x/{1}.png", "cat/{0}/{1}.png"])
def test_split_folders(words, pattern, tmp_path):
    names = [pattern.format(word, i) for word in words for i in range(4)]
    written = write_pictures(tmp_path / "pictures", names)
    parts = read_pictures(ImageFiles(path=tmp_path / "pictures"))
    for word, part in zip(words, ("train", "validation", "test"), strict=True):
        assert parts[part] == {pixels for name, pixels in written.items() if word in name}


def test_splits_without_classes(tmp_path):
    write_pictures(tmp_path / "pictures", numbered("train/{}.png", "test/{}.png"))
    dataset = ImageFiles(path=tmp_path / "pictures")
    assert (dataset.num_validation, dataset.num_test, dataset.labels("train")) == (1, 10, None)
    with pytest.raises(InvalidValueError, match="have no classes to condition on"):
        ImageFiles(path=tmp_path / "pictures", conditional=True)


def test_classes_in_one_split_alone(tmp_path):
    write_pictures(tmp_path / "pictures", numbered("train/a/{}.png", "train/b/{}.png", "test/{}.png"))
    dataset = ImageFiles(path=tmp_path / "pictures")
    assert sorted(dataset.labels("train").unique().tolist()) == [0, 1]
    assert dataset.labels("test") is None
    with pytest.raises(InvalidValueError, match=r"10 images of the split 'test' have no class, .* sort them into fold"):
        ImageFiles(path=tmp_path / "pictures", conditional=True)


def test_missing_classes_of_saved_data(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=2)})
    pictures = [Image.new("L", (3, 3), i) for i in range(20)]
    for missing in (None, -1):
        rows = {"image": pictures, "label": [missing, 0, *[1] * 18]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "set.parquet"))
        assert ImageFiles(path=tmp_path / "set.parquet").labels("train") is None
        with pytest.raises(InvalidValueError, match="1 images of the split 'train' have no class"):
            ImageFiles(path=tmp_path / "set.parquet", conditional=True)


def test_files_that_are_not_used_are_counted(tmp_path):
    folder = tmp_path / "pictures"
    write_pictures(folder, numbered("train/{}.png", "test/{}.png", "spare/{}.png"))
    (folder / "notes.txt").write_text("about")
    (folder / "train/.DS_Store").write_text("hidden")
    words = r"31 files found, 20 pictures used; not used: 10 in spare, which is no split, 1 no pictures \(\.txt\)"
    with pytest.warns(DataWarning, match=words):
        assert ImageFiles(path=folder).num_test == 10


def test_names_that_speak_of_splits(tmp_path):
    write_pictures(tmp_path / "pictures", numbered("train_{}.png", "test_{}.png"))
    with pytest.warns(DataWarning, match="names of files begin with splits .10 'test', 10 'train'., .* sub-folders"):
        assert ImageFiles(path=tmp_path / "pictures", **HALVES).num_test == 4


def test_linked_folders_are_followed_once(tmp_path):
    written = write_pictures(tmp_path / "elsewhere", numbered("{}.png", count=20))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "pictures")
    parts = read_pictures(ImageFiles(path=tmp_path / "pictures"))
    assert sum(map(len, parts.values())) == len(written)


def parquet(path, count, start=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [Image.new("L", (3, 3), start + i) for i in range(count)]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": pictures}, features=features).to_parquet(str(path))


@pytest.mark.parametrize(
    ("names", "sizes"),
    [
        (["photos-0.parquet", "photos-train.parquet"], (16, 2, 2)),
        (["bus.parquet", "train.parquet"], (16, 2, 2)),
        (["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"], (9, 1, 10)),
        (["train/0.parquet", "test/0.parquet"], (9, 1, 10)),
        (["data/train-0.parquet", "data/validation-0.parquet"], (9, 10, 1)),
    ],
)
def test_folders_of_parquet_files(names, sizes, tmp_path):
    for i, name in enumerate(names):
        parquet(tmp_path / "set" / name, 10, 10 * i)
    parts = read_pictures(ImageFiles(path=tmp_path / "set"))
    assert tuple(len(parts[part]) for part in ("train", "validation", "test")) == sizes


def test_parquet_files_of_no_split_are_counted(tmp_path):
    for i, name in enumerate(("train.parquet", "test.parquet", "extra.parquet")):
        parquet(tmp_path / "set" / name, 10, 10 * i)
    words = "3 files found, 2 Parquet files used; not used: 1 of no split, such as extra.parquet"
    with pytest.warns(DataWarning, match=words):
        ImageFiles(path=tmp_path / "set")
    write_pictures(tmp_path / "set", ["preview.png"])
    with pytest.raises(InvalidValueError, match="holds 1 pictures and 3 Parquet files; move one kind elsewhere"):
        ImageFiles(path=tmp_path / "set")


def test_splits_that_are_not_used_are_counted(tmp_path):
    features = datasets.Features({"image": datasets.Image()})
    split = datasets.Dataset.from_dict({"image": [Image.new("L", (3, 3), i) for i in range(20)]}, features=features)
    datasets.DatasetDict(train=split, extra=split.select(range(10))).save_to_disk(str(tmp_path / "saved"))
    with pytest.warns(DataWarning, match=r"split 'extra' \(10 images\) is not used; name it with"):
        ImageFiles(path=tmp_path / "saved")
    with pytest.raises(InvalidValueError, match="validation_split and test_split are both 'test'"):
        ImageFiles(path=tmp_path / "saved", validation_split="test")


# Bad files


def test_bad_pictures(tmp_path):
    folder = tmp_path / "pictures/train/all"
    write_folder(tmp_path / "pictures", parts=("train",), kinds=("all",))
    Image.new("L", (5, 6)).save(folder / "3.png")
    with pytest.raises(ValueError, match=r"3\.png has the mode L, but .*\.png has RGB; convert all with mode=RGB or L"):
        ImageFiles(path=tmp_path / "pictures")
    Image.new("P", (5, 6)).save(folder / "3.png")
    with pytest.raises(ValueError, match=r"3\.png has the mode P; convert pictures to grey or colour with mode="):
        ImageFiles(path=tmp_path / "pictures")
    Image.new("I;16", (5, 6)).save(folder / "3.png")
    with pytest.raises(
        ValueError, match=r"3\.png has the mode I;16, with more than 256 levels; keep them with num_lev"
    ):
        ImageFiles(path=tmp_path / "pictures")
    Image.new("RGB", (7, 6)).save(folder / "3.png")
    with pytest.raises(ValueError, match=r"3\.png has 7 × 6 pixels .*, but .*\.png has 5 × 6; scale .* size=\["):
        ImageFiles(path=tmp_path / "pictures")
    whole = (folder / "2.png").read_bytes()
    (folder / "3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileError, match=r"all/3\.png cannot be read as a picture \(.*\); repair or remove it"):
        ImageFiles(path=tmp_path / "pictures")
    (folder / "3.png").write_bytes(b"not a picture")
    with pytest.raises(FileError, match=r"all/3\.png cannot be read as a picture \(cannot identify"):
        ImageFiles(path=tmp_path / "pictures")
    (folder / "3.png").write_bytes(whole)
    with pytest.raises(ValueError, match=r"\.png has the value \d+, which is no level from 0 to 16; set num_levels"):
        ImageFiles(path=tmp_path / "pictures", num_levels=17)


def test_bad_pictures_in_parquet_are_named_by_row(tmp_path):
    pictures = [{"bytes": b"broken" if i == 4 else png(), "path": f"{i}.png"} for i in range(20)]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": pictures}, features=features).to_parquet(str(tmp_path / "set.parquet"))
    with pytest.raises(FileError, match=r"image 4 of the split 'train' of .*set\.parquet \(4\.png\) cannot be read"):
        ImageFiles(path=tmp_path / "set.parquet")


def png():
    import io

    buffer = io.BytesIO()
    Image.new("L", (3, 3), 5).save(buffer, "png")
    return buffer.getvalue()


def test_bad_places_and_settings(tmp_path):
    with pytest.raises(FileError, match=r"no folder or file of images at .*nowhere; a relative path starts at"):
        ImageFiles(path=tmp_path / "nowhere")
    (tmp_path / "set.parquet").write_bytes(b"no table")
    with pytest.raises(FileError, match=r"set\.parquet is not a whole Parquet file"):
        ImageFiles(path=tmp_path / "set.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match=r"empty holds no images: expected a folder of pictures, .* found no files"):
        ImageFiles(path=tmp_path / "empty")
    with pytest.raises(ValueError, match=r"set either source to the name of a data set on the hub or path"):
        ImageFiles()
    with pytest.raises(ValueError, match=r"mode must be L \(grey\) or RGB, or null .* got 'CMYK'"):
        ImageFiles(path=tmp_path, mode="CMYK")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(FileError, match=r"is no regular file but a (device|pipe)"):
            ImageFiles(path=path)
    with pytest.raises(InvalidTypeError, match=r"size must be \[height, width\] in pixels, .* got 32"):
        ImageFiles(path=tmp_path, size=32)
    with pytest.raises(InvalidTypeError, match="each entry of size must be a whole number >= 1, got True"):
        ImageFiles(path=tmp_path, size=[True, 8])
    with pytest.raises(ValueError, match=r"size must be \[height, width\] in pixels, such as \[32, 32\], got \[8\]"):
        ImageFiles(path=tmp_path, size=[8])
    features = datasets.Features({"a": datasets.Image(), "b": datasets.Image(), "n": datasets.Value("int64")})
    rows = {
        "a": [Image.new("L", (3, 3), i) for i in range(20)],
        "b": [Image.new("L", (3, 3), i) for i in range(20)],
        "n": list(range(20)),
    }
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(
        ValueError, match=r"two has 2 columns of pictures among 'a', 'b', 'n'; name the right one with image=..."
    ):
        ImageFiles(path=tmp_path / "two")
    with pytest.raises(ValueError, match="two has no column 'c'; it has 'a', 'b', 'n'"):
        ImageFiles(path=tmp_path / "two", image="c")
    with pytest.raises(ValueError, match=r"the column 'b' holds .*, not classes"):
        ImageFiles(path=tmp_path / "two", image="a", label="b")
    with pytest.raises(ValueError, match=r"20 classes \('0', '1', '2', '3', '4', \.\.\.\) have a single image"):
        ImageFiles(path=tmp_path / "two", image="a", label="n", conditional=True)
    assert ImageFiles(path=tmp_path / "two", image="b").event_shape == (1, 3, 3)


@pytest.mark.parametrize("name", ["digits", "photo_patches"])
def test_yaml(name):
    config = OmegaConf.load(CONF / "data" / f"{name}.yaml")
    del config["defaults"]
    dataset = instantiate(config)
    assert dataset.name == name
    assert len(dataset.reference()) <= 40_000
