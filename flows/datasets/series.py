"""Time series: states observed at times, one example a series."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from flows.arguments import checked
from flows.checks import whole_number
from flows.datasets.base import Dataset
from flows.datasets.series_batches import AllSeries, EndToEnd, SeriesBatch, SeriesStream
from flows.datasets.splits import random_split
from flows.errors import DataWarning, InvalidTypeError, InvalidValueError


@checked
class Series(Dataset):
    """Time series in memory, split by series.

    Nothing is scaled here; a transform such as `Standardise`, fitted to `reference()`, does that. Times and values are
    kept in float64.

    The first state of a series is where a model starts, so it must be observed whole. Later values may be missing.

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
        input_times: the times of the inputs, a list of (S_i,) or one tensor (N, S). Default: `times`.
        validation_fraction, test_fraction: fractions of the series, rounded to whole ones.
        split_seed: seed of the random split.
        source: what messages call the data.

    Attributes:
        split: the indices of the series of "train", "validation" and "test".
        input_size: number k of inputs, 0 without any.

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
        validation_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
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
            _checked_series(t, x, label, missing, source) for t, x, label in zip(times, values, self.ids, strict=True)
        ]
        fractions = {"test": test_fraction, "validation": validation_fraction}
        self.split = random_split(len(tables), fractions, split_seed, source, "series")
        self.num_validation, self.num_test = len(self.split["validation"]), len(self.split["test"])
        shapes = {table.x.shape[1:]: table.label for table in tables}
        if len(shapes) > 1:
            one, other = list(shapes.items())[:2]
            raise InvalidValueError(
                f"{source}: all states must have one shape, but those of series {one[1]!r} have {tuple(one[0])} and "
                f"those of series {other[1]!r} {tuple(other[0])}"
            )
        _tell_late_starts(tables, source)
        self.event_shape = tuple(next(iter(shapes)))
        self.columns = _checked_names(columns, self.event_shape, source)
        known = None if context is None else _numbers(context, f"{source}: the contexts")
        if known is not None and (known.ndim < 2 or len(known) != count or not bool(known.isfinite().all())):
            raise InvalidValueError(
                f"{source}: {count} series need contexts ({count}, *context) of finite numbers, got a tensor of shape "
                f"{tuple(known.shape)}"
            )
        self.context_shape = None if known is None else tuple(known.shape[1:])
        lengths = torch.tensor([len(table.times) for table in tables])
        flat = (torch.cat([getattr(table, part) for table in tables]) for part in ("times", "x", "observed"))
        own = None
        if inputs is not None:
            sampled = [_checked_inputs(t, u, of, source) for t, u, of in zip(input_times, inputs, tables, strict=True)]
            own = _end_to_end_inputs(sampled, source)
        self.input_size = 0 if own is None else own.tensors[1].shape[1]
        self._all = AllSeries(EndToEnd(lengths, *flat), known, own)

    def part(self, split: str) -> SeriesBatch:
        """All series of a split, in float64."""
        return self._all.batch(self.split[split])

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
        states = []
        for i in self.split["train"].tolist():
            start, count = int(self._all.points.starts[i]), int(self._all.points.counts[i])
            times, x, observed = (tensor[start : start + count] for tensor in self._all.points.tensors)
            states.append(x if bool(observed.all()) else _filled(times, x, observed))
        return torch.cat(states)

    def _in_batches(
        self,
        split: Literal["validation", "test"],
        batch_size: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> Iterator[SeriesBatch]:
        batch_size = whole_number("batch_size", batch_size)
        place = torch.device("cpu") if device is None else torch.device(device)
        series = self._all.to(place, torch.get_default_dtype() if dtype is None else dtype, self.name)
        return (series.batch(chosen) for chosen in self.split[split].split(batch_size))


@dataclass(frozen=True)
class _Table:
    """One series, checked."""

    label: str
    times: Tensor  # (T,)
    x: Tensor  # (T, *event), 0 where nothing was observed
    observed: Tensor  # (T, *event)
    left_out: int  # points before the first state that was observed whole


def _numbers(given: Any, what: str) -> Tensor:
    """A copy in float64, on the CPU."""
    try:
        if isinstance(given, Tensor):
            return given.detach().to("cpu", torch.float64, copy=True)
        array = np.asarray(given)
        if array.dtype.kind not in "fiubO":  # text that looks like numbers, and dates
            raise TypeError(f"their type is {array.dtype}")
        return torch.from_numpy(np.array(array, dtype=np.float64))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidTypeError(f"{what} must hold real numbers only: {error}") from error


def _checked_times(given: Any, rows: Any, label: str, source: str, what: str) -> tuple[Tensor, Tensor]:
    """Times (T,), which increase, and what goes with them, (T, ...)."""
    times = _numbers(given, f"{source}: the times of series {label!r}")
    values = _numbers(rows, f"{source}: the {what} of series {label!r}")
    if times.ndim != 1 or values.ndim < 2 or len(values) != len(times):
        hint = "; for a single number a time, write values[:, None]" if values.ndim == 1 else ""
        raise InvalidValueError(
            f"{source}: series {label!r} needs times (T,) and {what} (T, ...), got {tuple(times.shape)} and "
            f"{tuple(values.shape)}{hint}"
        )
    if not bool(times.isfinite().all()):
        raise InvalidValueError(
            f"{source}: series {label!r} has times that are NaN or infinite; fill them in or remove those rows"
        )
    wrong = (times.diff() <= 0).nonzero()
    if len(wrong):
        earlier, later = times[int(wrong[0]) : int(wrong[0]) + 2].tolist()
        found = f"repeats the time {later:.15g}"
        if later < earlier:
            found = f"goes back from the time {earlier:.15g} to {later:.15g}"
        raise InvalidValueError(f"{source}: series {label!r} {found}; times must increase, with one row for each")
    if bool(values.isinf().any()):
        place = int(values.isinf().flatten(1).any(1).nonzero()[0])
        raise InvalidValueError(
            f"{source}: series {label!r} has an infinite value in its {what} at time {times[place].item():.15g}; "
            "correct it or remove that row"
        )
    return times, values


def _checked_series(given: Any, rows: Any, label: str, missing: str, source: str) -> _Table:
    times, x = _checked_times(given, rows, label, source, "values")
    observed = ~x.isnan()
    start = 0
    if not bool(observed.all()):
        place = (~observed).nonzero()[0].tolist()
        where = f"at time {times[place[0]].item():.15g} (entry {', '.join(map(str, place[1:]))} of the state)"
        if missing == "error":
            raise InvalidValueError(
                f"{source}: series {label!r} has a missing value {where}; set missing=mask to leave missing values "
                "out of the loss, or fill them in"
            )
        whole = observed.flatten(1).all(1).nonzero()
        if not len(whole):
            raise InvalidValueError(
                f"{source}: series {label!r} has no state that was observed whole, and a model needs one to start "
                "from; fill in the values at its first time, or leave that series out"
            )
        start = int(whole[0])
    if len(times) - start < 2:
        after = f" from its first whole state on, {start} before it" if start else ""
        raise InvalidValueError(
            f"{source}: series {label!r} has {len(times) - start} point{after}, and a trajectory needs two or more; "
            "leave that series out"
        )
    return _Table(label, times[start:], x[start:].nan_to_num(0.0), observed[start:], start)


def _tell_late_starts(tables: Sequence[_Table], source: str) -> None:
    late = [table for table in tables if table.left_out]
    if late:
        warnings.warn(
            f"{source}: {len(late)} of {len(tables)} series begin with states that were not observed whole, from which "
            f"no model can start; these {sum(table.left_out for table in late)} points were left out, and series "
            f"{late[0].label!r} begins at time {late[0].times[0].item():.15g}",
            DataWarning,
            stacklevel=3,
        )


def _checked_inputs(given: Any, rows: Any, of: _Table, source: str) -> tuple[Tensor, Tensor]:
    """The times (S,) and values (S, k) of the inputs of a series, which cover it."""
    times, values = _checked_times(given, rows, of.label, source, "inputs")
    if values.ndim != 2 or not len(times) or bool(values.isnan().any()):
        what = "holds NaN; fill them in" if values.isnan().any() else f"have the shape {tuple(values.shape)}"
        raise InvalidValueError(f"{source}: the inputs of series {of.label!r} must be numbers (S, k), {what}")
    first, last = float(times[0]), float(times[-1])
    start, end = float(of.times[0]), float(of.times[-1])
    if first > start or last < end:
        found = f"begin at time {first:.15g}, after its first state at {start:.15g}"
        if last < end:
            found = f"end at time {last:.15g}, before its last state at {end:.15g}"
        raise InvalidValueError(
            f"{source}: the inputs of series {of.label!r} {found}; nothing is extrapolated, so give them for the whole "
            "series or cut it"
        )
    return times, values


def _end_to_end_inputs(sampled: Sequence[tuple[Tensor, Tensor]], source: str) -> EndToEnd:
    sizes = {values.shape[1] for _, values in sampled}
    if len(sizes) > 1:
        raise InvalidValueError(f"{source}: all series must have the same inputs, got {sorted(sizes)} of them")
    counts = torch.tensor([len(times) for times, _ in sampled])
    return EndToEnd(counts, torch.cat([times for times, _ in sampled]), torch.cat([values for _, values in sampled]))


def _checked_names(columns: Sequence[str] | None, event_shape: tuple[int, ...], source: str) -> list[str] | None:
    if len(event_shape) != 1:
        if columns is not None:
            raise InvalidValueError(f"{source}: states of shape {event_shape} have no columns; leave columns out")
        return None
    names = [f"x{i}" for i in range(event_shape[0])] if columns is None else list(columns)
    if len(names) != event_shape[0] or len(set(names)) < len(names):
        raise InvalidValueError(f"{source}: states have {event_shape[0]} entries, each with its own name, got {names}")
    return names


def _filled(
    times: Tensor,  # (T,)
    x: Tensor,  # (T, *event)
    observed: Tensor,  # (T, *event)
) -> Tensor:  # (T, *event)
    """The values with linear interpolation where they are missing; after the last one, it is repeated."""
    columns = zip(x.flatten(1).T.numpy(), observed.flatten(1).T.numpy(), strict=True)
    filled = [np.interp(times.numpy(), times.numpy()[seen], column[seen]) for column, seen in columns]
    return torch.from_numpy(np.stack(filled, 1)).view_as(x)
