"""Time series: states observed at times. An example is a series, or a piece of one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from flows.arguments import checked
from flows.checks import whole_number
from flows.datasets.base import Dataset
from flows.datasets.recognition.hashing import hash_rows, word_keys
from flows.datasets.series.batches import AllSeries, EndToEnd, SeriesBatch, SeriesStream
from flows.datasets.series.checks import (
    Checked,
    checked_contexts,
    checked_inputs,
    checked_names,
    checked_series,
    end_to_end_inputs,
    input_names,
    tell_late_starts,
)
from flows.datasets.series.pieces import Piece, cut_in_time, cut_windows
from flows.datasets.splits import checked_fractions, content_split, random_split
from flows.errors import InvalidValueError

FEWEST = 4  # series: two to train on, one for validation, one for test
SLACK = 0.02  # share of the longest training series by which others may go on and count as inside its span
TIME_STEP = 2.0**-30  # of the largest time: finer differences of times are rounding


@checked
class Series(Dataset):
    """Time series in memory, split by series.

    Nothing is scaled here; a transform such as `Standardise`, fitted to `reference()`, does that. Times and values are
    kept in float64.

    The first state of a series is where a model starts, so it must be observed whole. Later values may be missing.

    By default the split shuffles series. `split_by="content"` decides by the id of a series alone, whatever other
    series there are. `split_by="time"` cuts each series: its beginning is for training, its end for test, and what lies
    between for validation. So one long series is enough. With `window`, the examples are short pieces of series.

    Args:
        times: the times of each series, a list of (T_i,) or one tensor (N, T); strictly increasing.
        values: the values of each series, a list of (T_i, *event) or one tensor (N, T, *event).
        context: what is known of each series besides, (N, *context): parameters, treatments, static covariates.
        missing: "error" refuses NaN; "mask" takes it for a value that was not observed. Series then begin at their
            first state that was observed whole; a `DataWarning` says what was left out.
        columns: names of the entries of a state. Default: "x0", "x1", ...
        name: name of the runs.
        ids: what messages and predictions call each series. Default: "0", "1", ...
        inputs: covariates that change in time, a list of (S_i, k) or one tensor (N, S, k). They must cover the series.
            A batch has them in its context, (B, S, 1 + k), with their times in column 0; see `SeriesBatch`. Static
            covariates are then further columns, so `context` must be (N, c).
        input_times: the times of the inputs, a list of (S_i,) or one tensor (N, S). Default: `times`.
        input_columns: names of the inputs. Default: "u0", "u1", ...
        validation_fraction, test_fraction: fractions of the series, or with `split_by="time"` of the points of each;
            one at least.
        split_seed: seed of the random split.
        split_by: "position", "content" or "time".
        window: number of points of an example. Neighbouring windows share a point, from which the later one starts.
            Default: whole series.
        source: what messages call the data.

    Attributes:
        split: the indices of the examples of "train", "validation" and "test".
        examples: the series, the first point and the number of points of each example.
        ids: the names of the series.
        input_columns: names of the inputs, empty without any.

    Raises:
        InvalidTypeError, InvalidValueError: times, values and inputs do not fit each other, times do not increase, a
            series has a single point, a value is missing where it must not be, or inputs end too early. The message
            names the series and the time.

    Example:
        ```python
        import torch

        import flows

        times = [torch.linspace(0, 1 + i / 10, 20 + i) for i in range(10)]
        values = [torch.stack([t.sin(), t.cos()], 1) for t in times]
        data = flows.datasets.Series(times, values)
        batch = next(data.train_stream(4, torch.Generator().manual_seed(0)))
        batch.x.shape, batch.times.shape  # (4, T, 2) and (4, T) with the T of the longest series in the batch
        ```
    """

    columns: Sequence[str] | None
    label_differences = "times, missing values, covariates or inputs are others"

    def __init__(
        self,
        times: Sequence[Any] | Tensor,
        values: Sequence[Any] | Tensor,
        context: ArrayLike | Tensor | None = None,
        missing: Literal["error", "mask"] = "error",
        columns: Sequence[str] | None = None,
        name: str = "series",
        ids: Sequence[str | int] | None = None,
        inputs: Sequence[Any] | Tensor | None = None,
        input_times: Sequence[Any] | Tensor | None = None,
        input_columns: Sequence[str] | None = None,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        split_by: Literal["position", "content", "time"] = "position",
        window: int | None = None,
        source: str = "the series",
    ):
        count = len(times)
        self.name, self.source = name, source
        self.ids = [str(i) for i in (range(count) if ids is None else ids)]
        input_times = times if input_times is None else input_times
        numbers = {"values": len(values), "ids": len(self.ids), "inputs": count if inputs is None else len(inputs)}
        for what, number in {**numbers, "times of inputs": len(input_times)}.items():
            if number != count:
                raise InvalidValueError(f"{source}: expected {what} for each of {count} series, got {number}")
        tables = [
            checked_series(t, x, label, missing, columns, source)
            for t, x, label in zip(times, values, self.ids, strict=True)
        ]
        shapes = {table.x.shape[1:]: table.label for table in tables}
        if len(shapes) > 1:
            one, other = list(shapes.items())[:2]
            raise InvalidValueError(
                f"{source}: all states must have one shape, but those of series {one[1]!r} have {tuple(one[0])} and "
                f"those of series {other[1]!r} {tuple(other[0])}"
            )
        tell_late_starts(tables, source)
        self.event_shape = tuple(next(iter(shapes)))
        self.columns = checked_names(columns, self.event_shape, source)
        known = checked_contexts(context, count, inputs is not None, source)
        own = None
        if inputs is not None:
            sampled = [checked_inputs(t, u, of, source) for t, u, of in zip(input_times, inputs, tables, strict=True)]
            own = end_to_end_inputs(sampled, source)
        self.input_columns = input_names(input_columns, own, source)
        self.context_shape = None if known is None else tuple(known.shape[1:])
        if own is not None:
            self.context_shape = (int(own.counts.max()), 1 + len(self.input_columns) + sum(self.context_shape or ()))
        fractions = {"test": test_fraction, "validation": validation_fraction}
        whole = [table.observed.flatten(1).all(1) for table in tables]
        pieces = _split(whole, self.ids, fractions, split_seed, split_by, source)
        if window is not None:
            window = whole_number("window", window, 2)
            pieces = {
                split: [w for p in part for w in cut_windows(p, whole[p.series], window)]
                for split, part in pieces.items()
            }
        self.split_settings = {
            **{f"{split}_fraction": float(fraction) for split, fraction in fractions.items()},
            **{"split_seed": int(split_seed), "split_by": split_by, "window": window},
        }
        self._arrange(tables, pieces, known, own)

    def _arrange(
        self,
        tables: Sequence[Checked],
        pieces: Mapping[str, Sequence[Piece]],
        context: Tensor | None,
        inputs: EndToEnd | None,
    ) -> None:
        """Lay all series end to end; examples are numbered by series and start."""
        flat = [torch.cat([getattr(table, part) for table in tables]) for part in ("times", "x", "observed")]
        lengths = torch.tensor([len(table.times) for table in tables])
        first = (lengths.cumsum(0) - lengths).tolist()
        place = {"train": 0, "validation": 1, "test": 2}  # an end of training before what follows from it
        order = sorted(
            (p.series, p.start, place[split], i) for split, part in pieces.items() for i, p in enumerate(part)
        )
        number = {(which, i): position for position, (*_, which, i) in enumerate(order)}
        self.split = {
            split: torch.tensor([number[place[split], i] for i in range(len(part))]) for split, part in pieces.items()
        }
        self.num_validation, self.num_test = len(self.split["validation"]), len(self.split["test"])
        names = list(place)
        self.examples = [pieces[names[which]][i] for *_, which, i in order]
        starts = torch.tensor([first[p.series] + p.start for p in self.examples])
        counts = torch.tensor([p.count for p in self.examples])
        of = torch.tensor([p.series for p in self.examples])
        self._all = AllSeries(EndToEnd(counts, *flat, starts=starts), of, context, inputs)

    def part(self, split: str) -> SeriesBatch:
        """All series of a split, in float64."""
        return self._all.batch(self.split[split])

    @property
    def training_span(self) -> float:
        """How long training series go on, from their first to their last time.

        Series of irregular times end here and there: 2 % beyond the longest is not yet beyond.
        """
        return (1 + SLACK) * float(self._durations("train").max())

    def description(self) -> dict[str, Any]:
        return {
            **super().description(),
            "training_span": self.training_span,
            "input_columns": list(self.input_columns),
        }

    def _durations(self, split: str) -> Tensor:
        """The time that each example of a split takes."""
        points, chosen = self._all.points, self.split[split]
        first, times = points.starts[chosen], points.tensors[0]
        return times[first + points.counts[chosen] - 1] - times[first]

    def train_stream(
        self,
        batch_size: int,
        generator: torch.Generator,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> SeriesStream:
        """Return an endless stream of batches of training series, reshuffled at each pass.

        The times of a batch are in float64, whatever the dtype.
        """
        return SeriesStream(self.name, self._all, self.split["train"], batch_size, generator, device, dtype)

    def held_out(self, split: Literal["validation", "test"]) -> SeriesBatch:
        return self.part(split)

    def reference(self) -> Tensor:
        """Return all training states, (n, *event), in float64. Missing values are interpolated linearly in time."""
        states = [x if bool(seen.all()) else _filled(t, x, seen) for t, x, seen in self._points_of("train")]
        return torch.cat(states)

    def rows_for_hashing(self) -> dict[str, np.ndarray]:
        """Return all states but those that models start from, (n, k), 0 where values are missing."""
        return {
            split: torch.cat([x[1:] for _, x, _ in self._points_of(split)]).flatten(1).numpy() for split in self.split
        }

    def labels_for_hashing(self) -> dict[str, np.ndarray]:
        """Return what else is known of each state: its time, what is missing, and start and context of its series."""
        times, x, _ = self._all.points.tensors
        step = TIME_STEP * max(1.0, float(times.abs().max()))
        firsts = {piece.series: i for i, piece in reversed(list(enumerate(self.examples)))}
        places = torch.tensor([firsts[series] for series in range(len(firsts))])
        starts = self._all.points.starts[places]
        known = [x[starts].flatten(1), (times[starts, None] / step).round()]
        context = self._all.batch(places).context
        known += [] if context is None else [context.flatten(1)]
        of_series = (hash_rows(torch.cat(known, 1).numpy()) >> np.uint64(11)).astype(np.float64)  # all 53 bits
        found = {}
        for split, chosen in self.split.items():
            labels = []
            for series, (t, _, observed) in zip(self._all.of[chosen].tolist(), self._points_of(split), strict=True):
                here = torch.full((len(t) - 1, 1), float(of_series[series]), dtype=torch.float64)
                labels.append(torch.cat([(t[1:, None] / step).round(), observed[1:].flatten(1), here], 1))
            found[split] = torch.cat(labels).numpy()
        return found

    def reordered(self, columns: Sequence[int]) -> Series:
        """Return the same series with their columns in another order."""
        order, new = list(columns), copy.copy(self)
        new._fingerprint = None
        new.columns = [list(self.columns or [])[i] for i in order]
        points = self._all.points
        times, x, observed = points.tensors
        moved = EndToEnd(points.counts, times, x[:, order], observed[:, order], starts=points.starts)
        new._all = replace(self._all, points=moved)
        return new

    def _points_of(self, split: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The times, values and observed entries of each example of a split."""
        points = self._all.points
        for i in self.split[split].tolist():
            start, count = int(points.starts[i]), int(points.counts[i])
            times, x, observed = (tensor[start : start + count] for tensor in points.tensors)
            yield times, x, observed

    def _in_batches(
        self,
        split: Literal["validation", "test"],
        batch_size: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> Iterator[SeriesBatch]:
        batch_size = whole_number("batch_size", batch_size)
        parts = self.split[split].split(batch_size)
        return (self._all.batch(chosen).to(device, dtype, self.name) for chosen in parts)


def _split(
    whole: Sequence[Tensor],
    ids: Sequence[str],
    fractions: Mapping[str, float],
    seed: int,
    split_by: str,
    source: str,
) -> dict[str, list[Piece]]:
    """The examples of each split: series, or parts of them."""
    if split_by == "time":
        return cut_in_time(whole, ids, fractions, seed, source)
    if len(whole) < FEWEST:
        there = "is 1 series" if len(whole) == 1 else f"are {len(whole)} series"
        raise InvalidValueError(
            f"{source}: there {there}, too few to split by series; set split_by=time to train on the beginning of each "
            "series, and to validate and test on what follows (window=50 cuts a long one into examples of 50 points)"
        )
    if split_by == "content":
        keys = word_keys(np.asarray(ids), whole_number("split_seed", seed, 0))
        places = content_split(keys, fractions, seed, source, "series")
    else:
        checked_fractions(fractions, seed, "series")
        one = 1 / len(whole)
        at_least_one = {split: max(fraction, one) for split, fraction in fractions.items()}
        places = random_split(len(whole), at_least_one, seed, source, "series")
    return {split: [Piece(i, 0, len(whole[i])) for i in part.tolist()] for split, part in places.items()}


def _filled(
    times: Tensor,  # (T,)
    x: Tensor,  # (T, *event)
    observed: Tensor,  # (T, *event)
) -> Tensor:  # (T, *event)
    """The values with linear interpolation where they are missing; after the last one, it is repeated."""
    columns = zip(x.flatten(1).T.numpy(), observed.flatten(1).T.numpy(), strict=True)
    filled = [np.interp(times.numpy(), times.numpy()[seen], column[seen]) for column, seen in columns]
    return torch.from_numpy(np.stack(filled, 1)).view_as(x)
