"""Images that are read while they are trained on resume bit for bit."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from flows.datasets import StreamedImages
from flows.errors import FileError, InvalidValueError

pytest.importorskip("datasets")
PIXELS = np.random.default_rng(0).integers(0, 256, (230, 4, 4), dtype=np.uint8)
SIZES = {"num_validation": 10, "num_test": 20, "window": 60}  # windows of 60, 60, 60, 20 images


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return {"bytes": stream.getvalue(), "path": None}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for i, start in enumerate(range(0, 230, 90)):
        rows = [png(pixels) for pixels in PIXELS[start : start + 90]]
        pq.write_table(pa.table({"image": rows, "label": [0] * len(rows)}), folder / f"{i}.parquet", row_group_size=25)
    return folder


def numbers_of(x):
    places = {pixels.tobytes(): i for i, pixels in enumerate(PIXELS)}
    return [places[pixels.byte().numpy().tobytes()] for pixels in x[:, 0]]


def stream_of(data, batch_size=20, seed=0):
    return data.train_stream(batch_size, torch.Generator().manual_seed(seed))


def test_a_pass_takes_each_training_image_once(shards):
    data = StreamedImages(path=shards, **SIZES)
    assert data.event_shape == (1, 4, 4)
    assert numbers_of(data.held_out("test").x) == list(range(20))
    assert numbers_of(data.held_out("validation").x) == list(range(20, 30))
    stream = stream_of(data)
    seen = [numbers_of(next(stream).x) for _ in range(20)]
    first, second = ([i for batch in half for i in batch] for half in (seen[:10], seen[10:]))
    assert sorted(first) == sorted(second) == list(range(30, 230))
    assert first != second
    assert sorted(first[:60]) == list(range(30, 90))  # a window


@pytest.mark.parametrize("steps", [0, 1, 3, 9, 10, 13])
def test_a_stream_resumes_bit_for_bit(shards, steps):
    stream = stream_of(StreamedImages(path=shards, flip=True, **SIZES))
    for _ in range(steps):
        next(stream)
    other = stream_of(StreamedImages(path=shards, flip=True, **SIZES), seed=7)
    other.load_state_dict(stream.state_dict())
    for _ in range(14):
        assert torch.equal(next(other).x, next(stream).x)


def test_what_does_not_suit_is_refused(shards, tmp_path):
    for options, message in (
        ({"num_test": 300}, "has 230 images, too few"),
        ({"source": "a/b"}, "give either source or path"),
        ({"mode": "CMYK"}, "mode must be"),
        ({"image": "picture"}, "no column 'picture'"),
    ):
        with pytest.raises((InvalidValueError, TypeError), match=message):
            StreamedImages(path=shards, **{**SIZES, **options})
    with pytest.raises(InvalidValueError, match=r"must be a \.parquet file or a folder of them"):
        StreamedImages(path=tmp_path, **SIZES)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(FileError, match=r"cannot be streamed|not a whole"):
        StreamedImages(path=tmp_path / "x.parquet", **SIZES)
    stream = stream_of(StreamedImages(path=shards, **SIZES))
    next(stream)
    state = stream.state_dict()
    for damage in ({"position": -1}, {"order": torch.arange(3)}, {"before": "{"}):
        with pytest.raises(InvalidValueError, match="saved position"):
            stream_of(StreamedImages(path=shards, **SIZES)).load_state_dict(state | damage)
    with pytest.raises(InvalidValueError, match="fewer training images than a batch"):
        next(stream_of(StreamedImages(path=shards, **{**SIZES, "window": 300}), 250))
