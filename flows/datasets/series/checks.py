"""Checks of time series: times that increase, states to start from, inputs that cover them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flows.datasets.series.batches import EndToEnd
from flows.errors import DataWarning, InvalidTypeError, InvalidValueError, warn


@dataclass(frozen=True)
class Checked:
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


def checked_series(
    given: Any, rows: Any, label: str, missing: str, columns: Sequence[str] | None, source: str
) -> Checked:
    times, x = _checked_times(given, rows, label, source, "values")
    observed = ~x.isnan()
    start = 0
    if not bool(observed.all()):
        place = (~observed).nonzero()[0].tolist()
        entry = f"entry {', '.join(map(str, place[1:]))} of the state"
        if columns is not None and len(columns) > place[1]:
            entry = f"column {list(columns)[place[1]]!r}"
        where = f"at time {times[place[0]].item():.15g}, {entry}"
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
    return Checked(label, times[start:], x[start:].nan_to_num(0.0), observed[start:], start)


def tell_late_starts(tables: Sequence[Checked], source: str) -> None:
    late = [table for table in tables if table.left_out]
    if late:
        warn(
            f"{source}: {len(late)} of {len(tables)} series begin with states that were not observed whole, from which "
            f"no model can start; these {sum(table.left_out for table in late)} points were left out, and series "
            f"{late[0].label!r} begins at time {late[0].times[0].item():.15g}",
            DataWarning,
        )


def checked_inputs(given: Any, rows: Any, of: Checked, source: str) -> tuple[Tensor, Tensor]:
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


def end_to_end_inputs(sampled: Sequence[tuple[Tensor, Tensor]], source: str) -> EndToEnd:
    sizes = {values.shape[1] for _, values in sampled}
    if len(sizes) > 1:
        raise InvalidValueError(f"{source}: all series must have the same inputs, got {sorted(sizes)} of them")
    counts = torch.tensor([len(times) for times, _ in sampled])
    return EndToEnd(counts, torch.cat([torch.cat([times[:, None], values], 1) for times, values in sampled]))


def input_names(columns: Sequence[str] | None, inputs: EndToEnd | None, source: str) -> list[str]:
    size = 0 if inputs is None else inputs.tensors[0].shape[1] - 1
    names = [f"u{i}" for i in range(size)] if columns is None else list(columns)
    if len(names) != size or len(set(names)) < size:
        raise InvalidValueError(f"{source}: there are {size} inputs, each with its own name, got {names}")
    return names


def checked_contexts(context: Any, count: int, with_inputs: bool, source: str) -> Tensor | None:
    if context is None:
        return None
    known = _numbers(context, f"{source}: the contexts")
    if known.ndim < 2 or len(known) != count or not bool(known.isfinite().all()):
        raise InvalidValueError(
            f"{source}: {count} series need contexts ({count}, *context) of finite numbers, got a tensor of shape "
            f"{tuple(known.shape)}{' with NaN or infinite values' if len(known) == count else ''}"
        )
    if with_inputs and known.ndim != 2:
        raise InvalidValueError(f"{source}: beside inputs, contexts must be ({count}, c), got {tuple(known.shape)}")
    return known


def checked_names(columns: Sequence[str] | None, event_shape: tuple[int, ...], source: str) -> list[str] | None:
    if len(event_shape) != 1:
        if columns is not None:
            raise InvalidValueError(f"{source}: states of shape {event_shape} have no columns; leave columns out")
        return None
    names = [f"x{i}" for i in range(event_shape[0])] if columns is None else list(columns)
    if len(names) != event_shape[0] or len(set(names)) < len(names):
        raise InvalidValueError(f"{source}: states have {event_shape[0]} entries, each with its own name, got {names}")
    return names
