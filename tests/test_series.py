"""Time series in memory: batches, splits, streams, and what is refused."""

import pytest
import torch

import flows
from flows.datasets import Series, SeriesBatch
from flows.errors import DataWarning, InvalidTypeError, InvalidValueError


def ramps(count=10, extra=1):
    """Series i has 5 + extra·i points, t = i, i + 1, ... and the states (t, −t)."""
    times = [torch.arange(5 + extra * i, dtype=torch.float64) + i for i in range(count)]
    return times, [torch.stack([t, -t], 1) for t in times]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_batches_are_padded_to_their_longest_series():
    data = Series(*ramps())
    seen = {}
    for batch in (data.part("train"), data.part("validation"), data.part("test"), next(data.train_stream(3, rng()))):
        lengths = batch.mask.sum(1)
        assert batch.x.shape == (len(batch), int(lengths.max()), 2)
        for i, length in enumerate(lengths.tolist()):
            assert batch.mask[i].tolist() == [j < length for j in range(batch.mask.shape[1])]
            t = batch.times[i]
            assert torch.equal(t[:length], t[0] + torch.arange(length))
            assert bool((t[length:] == t[length - 1]).all())
            assert torch.equal(batch.x[i, :length].double(), torch.stack([t, -t], 1)[:length])
            assert not batch.x[i, length:].any()
            assert not batch.observed[i, length:].any()
            assert batch.observed[i, :length].all()
            seen[float(t[0])] = length
    assert len(seen) == 10  # every series is in one split


def test_streams_resume_bit_for_bit_and_times_stay_exact():
    times, values = ramps(20)
    data = Series([t + 1.7e9 for t in times], values, torch.arange(20.0)[:, None])
    stream = data.train_stream(5, rng(3), dtype=torch.float32)
    next(stream)
    state = stream.state_dict()
    expected = [next(stream) for _ in range(7)]
    again = data.train_stream(5, rng(9), dtype=torch.float32)
    again.load_state_dict(state)
    for one, other in zip(expected, (next(again) for _ in range(7)), strict=True):
        for part in ("x", "context", "times", "mask", "observed"):
            assert torch.equal(getattr(one, part), getattr(other, part))
        assert one.times.dtype == torch.float64
        assert one.x.dtype == torch.float32
        assert torch.equal(one.times[:, 0] - 1.7e9, one.context[:, 0].double())


def test_missing_values_are_masked_only_when_asked_for():
    times, values = ramps()
    values[4][2, 1] = torch.nan
    with pytest.raises(InvalidValueError, match=r"series '4' has a missing value at time 6, entry 1 .*missing=mask"):
        Series(times, values)
    data = Series(times, values, missing="mask")
    found = torch.cat([(~part.observed & part.mask[..., None]).nonzero() for part in map(data.part, data.split)])
    assert found[:, 1:].tolist() == [[2, 1]]
    # In between, the reference interpolates: this ramp is linear, so nothing changes.
    assert torch.equal(data.reference(), Series(*ramps()).reference())


def test_series_begin_at_a_whole_state():
    times, values = ramps()
    values[4][:2, 1] = torch.nan
    with pytest.warns(DataWarning, match=r"1 of 10 series .* 2 points were left out, and series '4' begins at time 6"):
        data = Series(times, values, missing="mask")
    assert int(data._all.points.counts[4]) == 7
    values[4][:, 1] = torch.nan
    with pytest.raises(InvalidValueError, match="'4' has no state that was observed whole"):
        Series(times, values, missing="mask")


def test_split_in_time_predicts_what_follows():
    times, values = ramps(3, extra=10)
    data = Series(times, values, split_by="time", validation_fraction=0.2, test_fraction=0.2)
    train, validation, test = map(data.part, ("train", "validation", "test"))
    for i, t in enumerate(times):
        parts = [batch.times[i][batch.mask[i]] for batch in (train, validation, test)]
        assert torch.equal(parts[0][-1], parts[1][0])  # a model starts from the last state that it was trained on
        assert torch.equal(parts[1][-1], parts[2][0])
        assert torch.equal(torch.cat([parts[0], parts[1][1:], parts[2][1:]]), t)
        assert len(parts[1]) == len(parts[2]) == 1 + len(t) // 5
    alone = Series(times[2:], values[2:], split_by="time")
    assert [len(part) for part in alone.split.values()] == [1, 1, 1]
    with pytest.raises(InvalidValueError, match=r"there is 1 series, .* set split_by=time"):
        Series(times[2:], values[2:])
    with pytest.raises(InvalidValueError, match="'0' has 3 points, too few to train on its beginning"):
        Series([t[:3] for t in times], [x[:3] for x in values], split_by="time")


def test_split_in_time_starts_from_whole_states():
    times, values = [torch.arange(10.0)], [torch.arange(10.0)[:, None].repeat(1, 2)]
    values[0][7, 0] = values[0][6, 0] = torch.nan  # the last but two
    data = Series(times, values, missing="mask", split_by="time")
    assert [data.part(split).times[0].tolist() for split in ("train", "validation", "test")] == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [5, 6, 7, 8],
        [8, 9],
    ]


def test_windows_share_points_and_lose_none():
    times, values = ramps(10, extra=3)
    values[4][6, 1] = torch.nan
    data = Series(times, values, missing="mask", window=4)
    seen = {}
    for split in data.split:
        batch = data.part(split)
        for t, mask in zip(batch.times, batch.mask, strict=True):
            own = t[mask]
            assert len(own) <= 5
            seen.setdefault((split, float(own[-1])), own)
        assert batch.observed[:, 0].all()
    pieces = {}
    for piece in data.examples:
        pieces.setdefault(piece.series, []).append(piece)
    for series, found in pieces.items():
        assert [p.start for p in found] == [0, *(p.start + p.count - 1 for p in found[:-1])]
        assert found[-1].start + found[-1].count == len(times[series])
        assert all(bool(values[series][p.start].isfinite().all()) for p in found)
    of = {split: {data.examples[i].series for i in chosen.tolist()} for split, chosen in data.split.items()}
    assert sum(map(len, of.values())) == 10  # windows of a series stay together


def test_split_by_content_keeps_series_where_they_are():
    times, values = ramps(40, extra=0)
    settings = {"split_by": "content", "validation_fraction": 0.2, "test_fraction": 0.2}
    ids = [f"patient {i}" for i in range(40)]
    one = Series(times, values, ids=ids, **settings)
    other = Series(times[5:][::-1], values[5:][::-1], ids=ids[5:][::-1], **settings)
    named = [{split: {d.ids[i] for i in d.split[split].tolist()} for split in d.split} for d in (one, other)]
    for split, kept in named[1].items():
        assert kept <= named[0][split]


def test_until_counts_from_the_start_of_each_series():
    batch = Series(*ramps()).part("train").until(4.5)
    assert batch.x.shape[1] == 5
    assert batch.mask.all()
    assert torch.equal(batch.times - batch.times[:, :1], torch.arange(5.0).double().expand(len(batch), -1))


def test_standardise_fits_to_series_as_to_tables():
    data = Series(*ramps())
    train = data.part("train")
    assert torch.equal(data.reference(), train.x[train.mask])
    transform = flows.transforms.Standardise(2).fit(data.reference())
    y = transform(data.reference())[0]
    torch.testing.assert_close(y.mean(0), torch.zeros(2, dtype=y.dtype), atol=1e-6, rtol=0)
    torch.testing.assert_close(y.std(0), torch.ones(2, dtype=y.dtype), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, x: t[3].__setitem__(2, t[3][1]), "series '3' repeats the time 4; times must increase"),
        (lambda t, x: t[3].__setitem__(2, 0.0), "series '3' goes back from the time 4 to 0"),
        (lambda t, x: t[3].__setitem__(2, torch.nan), "series '3' has times that are NaN"),
        (lambda t, x: x[3].__setitem__((2, 0), torch.inf), "'3' has an infinite value in its values at time 5"),
        (lambda t, x: (t.__setitem__(3, t[3][:1]), x.__setitem__(3, x[3][:1])), "'3' has 1 point, .* two or more"),
        (lambda t, x: x.__setitem__(3, x[3][:, :1]), r"'0' have \[2\] .*|all states must have one shape"),
        (lambda t, x: x.__setitem__(3, x[3][:, 0]), r"values\[:, None\]"),
        (lambda t, x: x.pop(), "expected values for each of 10 series, got 9"),
    ],
)
def test_bad_series_are_refused(change, words):
    times, values = ramps()
    change(times, values)
    with pytest.raises(InvalidValueError, match=words):
        Series(times, values)


def test_texts_are_refused():
    times, values = ramps()
    values[2] = [["1", "2"]] * 7
    with pytest.raises(InvalidTypeError, match="values of series '2' must hold real numbers"):
        Series(times, values)


def test_inputs_travel_in_the_context():
    times, values = ramps()
    own = [torch.linspace(float(t[0]) - 1, float(t[-1]), 7 + i) for i, t in enumerate(times)]
    settings = {"inputs": [t[:, None] ** 2 for t in own], "input_times": own}
    data = Series(times, values, torch.arange(10.0)[:, None], **settings)
    assert data.input_columns == ["u0"]
    assert data.context_shape == (16, 3)
    batch = data.part("train")
    assert isinstance(batch, SeriesBatch)
    assert batch.context.shape == (8, 16, 3)
    sampled, inputs, known = batch.context.unbind(-1)
    assert torch.equal(sampled[:, 0] + 1, batch.times[:, 0])
    assert torch.equal(sampled[:, -1], batch.times[:, -1])
    torch.testing.assert_close(inputs, sampled**2)
    assert torch.equal(known, batch.times[:, :1].expand(-1, 16))
    own[6] = own[6][:-1]
    with pytest.raises(InvalidValueError, match=r"inputs of series '6' end at time .*, before its last state at 16"):
        Series(times, values, inputs=[t[:, None] for t in own], input_times=own)


def test_batches_hold_the_rows_of_their_series_where_some_end_early():
    data = flows.datasets.Pendulum(num_series=20, num_times=10, beyond=5.0)
    whole = data.part("train")
    streamed = next(data.train_stream(100, torch.Generator().manual_seed(0), dtype=torch.float64))
    tested = next(iter(data.test_batches(100, dtype=torch.float64)))
    assert (streamed.times.diff(dim=1) > 0).all()
    torch.testing.assert_close(streamed.x.sort(0).values, whole.x.sort(0).values)
    assert torch.equal(tested.x, data.part("test").x)
