"""The rows of a file that a trained model is to score: all of them, if it was not trained on that file."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.conditions import Conditions
from flows.datasets import Dataset
from flows.datasets.recognition.comparison import compare
from flows.datasets.tables.readers import column_names
from flows.datasets.tables.tabular import ALL
from flows.errors import DataWarning, FlowsError, InvalidValueError, warn
from flows.training.building import build_dataset
from flows.training.loading import LoadedRun
from flows.training.settings import TARGET, parameter_names

FILES = ("path", "validation_path", "test_path")
SPLIT = (  # settings that choose a split
    *("validation_fraction", "test_fraction", "split_seed", "split_by", "group_column"),
    *("test_rows", "validation_rows", "validation_path", "test_path"),
)


def all_rows(run: LoadedRun, config: Mapping[str, Any]) -> Dataset:
    """The data that `config["data"]` describes, with all rows in the test part.

    Columns come in the order of the run, whatever else the file holds. Noise is added in rounding units of the run.

    Raises:
        InvalidValueError: these data have no rows that could be taken together, as drawn ones.
    """
    data = config["data"]
    if not can_score(data):
        name = run.data.get("name") if isinstance(data, Mapping) else data
        raise InvalidValueError(f"part=all takes all rows of a table, and the data {name!r} are none; leave it out")
    own = {name: value for name, value in data.items() if name not in SPLIT}
    columns = list(run.data.get("columns") or [])
    if _holds(data, columns, run.conditions):
        own["columns"] = columns
    elif data.get("group_column") is not None:
        own["group_column"] = data["group_column"]  # which is no feature
    noise = ((run.data.get("fingerprint") or {}).get("settings") or {}).get("noise")
    if data.get("dequantise_columns") is not None and noise:
        own["dequantise_columns"] = noise
    return build_dataset({"data": {**own, "test_rows": ALL}}, True, conditions=run.conditions)


def is_another_file(run: LoadedRun, config: Mapping[str, Any], changes: Mapping[str, Any] | None) -> bool:
    """Whether changed settings of the data name a file with other rows than those of the run.

    A file with the same rows has only moved, and its split stays. Settings of a split ask for one.
    """
    if not changes or "path" not in changes or not can_score(config["data"]) or any(name in SPLIT for name in changes):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return not compare(run.data, all_rows(run, config)).same_rows


def can_score(data: Any) -> bool:
    """Whether all rows of such data can be taken together."""
    names = parameter_names(data.get(TARGET)) if isinstance(data, Mapping) else []
    return "path" in names and "test_rows" in names


def _holds(data: Mapping[str, Any], columns: list[str], conditions: Conditions | None) -> bool:
    """Whether the file has the columns of the run by name."""
    if not columns or columns == [str(i) for i in range(len(columns))]:
        return False
    reading = {name: data[name] for name in ("delimiter", "header") if name in data}
    try:
        known, _ = column_names(Path(data["path"]), **reading)
    except (FlowsError, OSError, TypeError, KeyError):
        return False  # told when the file is read
    missing = [name for name in columns if name not in known]
    if not missing:
        return True
    if data.get("columns") is not None or known == [str(i) for i in range(len(known))]:
        return False
    others = {*(conditions.columns if conditions else ()), data.get("group_column")}
    left = [name for name in known if name not in others]
    text = (
        f"{data['path']} lacks {', '.join(map(repr, missing))}; the columns of the run are {', '.join(columns)}, those "
        f"of the file {', '.join(left)}"
    )
    if any(name in known and left[i : i + 1] != [name] for i, name in enumerate(columns)):
        raise InvalidValueError(f"{text}; rename them, or choose them in the order of the run with data.columns=[...]")
    if len(left) == len(columns):
        warn(f"{text}, which are taken in this order", DataWarning)
    return False
