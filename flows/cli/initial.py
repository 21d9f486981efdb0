"""What a prediction starts from: initial states, contexts and times, inline or from files."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flows.checks import existing_path, fits_in_memory
from flows.datasets.tables.readers import column_names, read_table, read_words
from flows.errors import InvalidValueError

FILES = (".csv", ".parquet")
MAX_TIMES = 10_000_000


@dataclass(frozen=True)
class Initial:
    """Initial states with their names and contexts."""

    ids: list[str]
    states: Tensor  # (N, *event), float64
    context: Tensor | None  # (N, *context), float64


def read_initial(
    given: Any,
    columns: Sequence[str],  # of the entries of a state
    event_shape: Sequence[int],
    context: Any = None,
    context_shape: Sequence[int] | None = None,
    context_columns: Sequence[str] = (),
    id_column: str | None = None,
    input_columns: Sequence[str] = (),
    usual_id: str | None = None,
) -> Initial:
    """Read initial states: numbers of one or several, or a file.

    Args:
        context: the numbers of a context for all; None: from the columns `context_columns` of the file. For a model
            with inputs u(t), a table (S, 1 + k) of them, or a file with the columns `input_columns`.
        input_columns: of inputs, their times first and static covariates last; none for other models.
        usual_id: the column that named series in training, which is taken where the file has it.

    Raises:
        FileError, InvalidValueError: the states or contexts are missing or have another shape; says which.
    """
    if input_columns:
        known = _table_of_inputs(context, input_columns)
    else:
        known = None if context is None else _one_context(context, context_shape)
    if context_shape is not None and known is None and not context_columns:
        raise InvalidValueError(
            f"the model needs a context of shape {tuple(context_shape)} for each initial state: give context=[...]"
        )
    if isinstance(given, str):
        path = existing_path("initial", given, "file of initial states")
        if path.suffix.lower() not in FILES:
            raise InvalidValueError(f"initial must be numbers or a {' or '.join(FILES)} file, got {given!r}")
        names, _ = column_names(path)
        wanted = [*columns, *(context_columns if known is None and context_shape is not None else ())]
        missing = [name for name in wanted if name not in names]
        if missing:
            raise InvalidValueError(
                f"{path} lacks the columns {', '.join(missing)}; it needs one for each of {', '.join(wanted)}, and has "
                f"{', '.join(names)}"
            )
        values = torch.from_numpy(read_table(path, wanted)[0])
        if id_column is None and usual_id in names:
            id_column = usual_id
        if id_column is None:
            ids = [str(i) for i in range(len(values))]
        elif id_column in names:
            ids = read_words(path, names.index(id_column), "id")
        else:
            raise InvalidValueError(f"{path} has no column {id_column!r} for id=...; it has {', '.join(names)}")
        states = values[:, : len(columns)].reshape(-1, *event_shape)
        if known is None and context_shape is not None:
            assert len(context_columns) == math.prod(context_shape), "names and shape come from one run"
            return Initial(ids, states, values[:, len(columns) :].reshape(-1, *context_shape))
    else:
        if known is None and context_shape is not None:
            raise InvalidValueError(
                f"the model needs the context {', '.join(context_columns)} of each initial state: give context=[...], "
                "or an initial file with these columns"
            )
        if id_column is not None:
            raise InvalidValueError("id names a column of an initial file, and initial is numbers; leave id out")
        states = _inline_states(given, columns, event_shape)
        ids = [str(i) for i in range(len(states))]
    if not len(states):
        raise InvalidValueError(f"initial={given} holds no state; give at least one")
    return Initial(ids, states, None if known is None else known.expand(len(states), *known.shape))


def read_times(given: Any) -> Tensor:  # (T,), float64
    """Read times: a list, the text `start:end:step`, or a file.

    Raises:
        FileError, InvalidValueError: they are no numbers, fewer than two, or do not go one way.
    """
    if isinstance(given, str) and Path(given).suffix.lower() in FILES:
        path = existing_path("times", given, "file of times")
        names, _ = column_names(path)
        if "time" not in names and len(names) != 1:
            raise InvalidValueError(f"{path} must have a column 'time' or a single column, got {', '.join(names)}")
        times = torch.from_numpy(read_table(path, ["time" if "time" in names else names[0]])[0][:, 0])
    elif isinstance(given, str):
        times = _range(given)
    else:
        times = _numbers("times", given)
    if times.ndim != 1 or len(times) < 2 or not bool(times.isfinite().all()):
        raise InvalidValueError(f"times must be two or more finite numbers, got {_brief(given)}")
    steps = times.diff()
    wrong = (steps * (1 if times[-1] > times[0] else -1) <= 0).nonzero()
    if len(wrong):
        earlier, later = times[int(wrong[0])].item(), times[int(wrong[0]) + 1].item()
        raise InvalidValueError(
            f"times must increase (or decrease, to go back in time), got {later:g} after {earlier:g}; sort them and "
            "leave repeated ones out"
        )
    return times


def _range(text: str) -> Tensor:
    """The times of start:end:step; the end counts if a step meets it."""
    try:
        start, end, step = (float(part) for part in text.split(":"))
    except ValueError:
        raise InvalidValueError(
            f"times must be a list such as [0,0.5,1], start:end:step such as 0:10:0.1, or a file, got {text!r}"
        ) from None
    if not all(map(math.isfinite, (start, end, step))) or step == 0 or (end - start) / step < 1 - 1e-9:
        raise InvalidValueError(
            f"times={text} holds fewer than two times: from {start:g} to {end:g} in steps of {step:g}"
        )
    count = math.floor((end - start) / step * (1 + 1e-12) + 1e-9) + 1
    if count > MAX_TIMES:
        raise InvalidValueError(
            f"times={text} are {count:,} times; take a larger step, at most {MAX_TIMES:,} are possible"
        )
    return start + step * torch.arange(count, dtype=torch.float64)


def _inline_states(given: Any, columns: Sequence[str], event_shape: Sequence[int]) -> Tensor:
    values, size = _numbers("initial", given), math.prod(event_shape)
    shown = ", ".join(columns[:8]) + (", ..." if len(columns) > 8 else "")
    one = values.ndim <= max(1, len(event_shape)) and values.numel() == size
    several = values.ndim > 1 and values.flatten(1).shape[1] == size
    if not (one or several):
        raise InvalidValueError(
            f"a state of this model has {size} numbers ({shown}), and initial has the shape {tuple(values.shape)}; "
            "give such a state, or a list of them"
        )
    if not bool(values.isfinite().all()):
        raise InvalidValueError(
            "initial holds NaN or infinite values; a state with missing values cannot be solved from"
        )
    return values.reshape(-1, *event_shape)


def _table_of_inputs(given: Any, columns: Sequence[str]) -> Tensor:  # (S, 1 + k)
    shown = ", ".join(columns)
    if given is None:
        raise InvalidValueError(
            f"the model is driven by inputs: give context=inputs.csv, with the columns {shown}, or context=[[...],...] "
            "with a row of these numbers for each sample"
        )
    if not isinstance(given, str):
        values = _numbers("context", given)
        if values.ndim != 2 or values.shape[1] != len(columns) or not len(values):
            raise InvalidValueError(
                f"context must be a table of inputs with the columns {shown}, got the shape {tuple(values.shape)}"
            )
        return values
    path = existing_path("context", given, "file of inputs")
    names, _ = column_names(path)
    missing = [name for name in columns if name not in names]
    if missing:
        raise InvalidValueError(
            f"{path} lacks the columns {', '.join(missing)} of the inputs; it needs {shown}, and has {', '.join(names)}"
        )
    return torch.from_numpy(read_table(path, list(columns))[0])


def _one_context(given: Any, context_shape: Sequence[int] | None) -> Tensor:
    if context_shape is None:
        raise InvalidValueError("the model takes no context; leave context out")
    values = _numbers("context", given)
    if values.numel() != math.prod(context_shape):
        raise InvalidValueError(
            f"a context of this model has {math.prod(context_shape)} numbers (shape {tuple(context_shape)}), got "
            f"{values.numel()}"
        )
    return values.reshape(*context_shape)


def _numbers(name: str, given: Any) -> Tensor:
    try:
        if isinstance(given, str) or given is None:
            raise TypeError(f"{given!r} is none")
        return torch.as_tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InvalidValueError(f"{name} must be numbers or a file, got {_brief(given)} ({error})") from error


def _brief(given: Any) -> str:
    return re.sub(r"(?s)^(.{60}).+$", r"\1...", str(given))


def check_size(num_states: int, num_times: int, size: int) -> None:
    """Refuse predictions that do not fit in memory."""
    fits_in_memory(f"{num_states:,} states at {num_times:,} times", 4 * num_states * num_times * size * 8)
