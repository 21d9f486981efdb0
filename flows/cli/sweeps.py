"""Sweeps: names for the jobs, and a table of their results at the end."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from flows import plots
from flows.training.files import RUNS, new_folder
from flows.training.loggers import flat

COLUMNS = (  # of the table: title, figure, its standard error, format
    ("NLL", "test_nll", "test_nll_se", ".4f"),
    ("free energy", "test_free_energy", "test_free_energy_se", ".4f"),
    ("ESS", "test_effective_sample_size", None, ".3f"),
    ("gap", "test_gap", "test_nll_se", ".4f"),
    ("bits/dim", "test_bits_per_dim", "test_bits_per_dim_se", ".4f"),
    ("NFE", "test_nfe", None, ".0f"),
    ("steps", "steps", None, ","),
    ("seconds", "seconds", None, ".0f"),
)
MAX_NAME_LENGTH = 100  # of a job, which is also the name of a folder

# The processes in which a launcher runs jobs inherit these variables.
SWEPT, NEW_FOLDER = "FLOWS_SWEPT", "FLOWS_SWEEP_FOLDER"  # the keys that are swept over; the folder if none is given

_folders: dict[str | None, Path] = {}  # of the sweep in this process, by the folder that was given for it


def swept_keys(arguments: Sequence[str]) -> list[str]:
    """The settings that a command line sweeps over."""
    given = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    return [str(o.key_or_group) for o in OverridesParser.create().parse_overrides(given) if o.is_sweep_override()]


def job_name(overrides: Sequence[str], swept: Sequence[str], number: int) -> str:
    """The name of a job by what sets it apart: `divergence-exact_seed-1`.

    Args:
        overrides: of the job, each `key=value`.
        swept: the keys that the sweep varies.
        number: of the job; part of the name if the values give none, or one that is too long.
    """
    pairs = [override.lstrip("+").partition("=") for override in overrides]
    name = "_".join(f"{key}-{value}" for key, _, value in pairs if key in swept)
    name = re.sub(r"[^\w.,\[\]+-]+", "-", name)
    return name if 0 < len(name) <= MAX_NAME_LENGTH else "_".join(filter(None, [str(number), name[:MAX_NAME_LENGTH]]))


def current_job() -> str | None:
    """The name of the running job; `None` outside a sweep."""
    settings = HydraConfig.get()
    if settings.mode != RunMode.MULTIRUN:
        return None
    _folders.setdefault(settings.sweep.dir, Path(settings.sweep.dir))  # if hydra.sweep.dir itself was given
    return job_name(settings.overrides.task, os.environ.get(SWEPT, "").split(), settings.job.num)


def sweep_folder(given: str | None) -> str:
    """The folder of the sweep: the given one, or a new one."""
    if given not in _folders:
        if given is None:
            if NEW_FOLDER not in os.environ:
                os.environ[NEW_FOLDER] = str(new_folder(RUNS / "sweeps"))
            _folders[given] = Path(os.environ[NEW_FOLDER])
        else:
            _folders[given] = Path(given)
    return str(_folders[given])


OmegaConf.register_new_resolver("job_name", current_job, replace=True)
OmegaConf.register_new_resolver("sweep_folder", sweep_folder, replace=True)


@contextlib.contextmanager
def sweeping(arguments: Sequence[str]) -> Iterator[None]:
    """Sum up the runs at the end if the program with these arguments is a sweep.

    Settings may refer to `${job_name:}` and `${sweep_folder:...}`. When a sweep ends, also by an error, a table of the
    runs is printed and written into its folder as `sweep.csv`, with their densities or samples on one sheet,
    `sweep.png`.
    """
    _folders.clear()
    before = {name: os.environ.pop(name, None) for name in (SWEPT, NEW_FOLDER)}
    with contextlib.suppress(HydraException):  # reported when Hydra parses them
        os.environ[SWEPT] = " ".join(swept_keys(arguments))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        for path in dict.fromkeys(_folders.values()):
            if results := sweep_results(path):
                _write_csv(path / "sweep.csv", results)
                print(f"\n{sweep_table(results)}\n\nall figures in {path / 'sweep.csv'}")
                if _draw(path / "sweep.png", results):
                    print(f"all pictures in {path / 'sweep.png'}")


def sweep_results(folder: Path) -> dict[str, dict[str, Any]]:
    """The content of `summary.json` of each finished run, with dotted names, by the name of the job."""
    return {path.parent.name: flat(json.loads(path.read_text())) for path in sorted(folder.glob("*/summary.json"))}


def sweep_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each run; columns that no run has are left out."""
    columns = {
        title: [_cell(result, name, error, form) for result in results.values()] for title, name, error, form in COLUMNS
    }
    columns = {"run": list(results)} | {name: cells for name, cells in columns.items() if any(cells)}
    widths = [max(len(name), *map(len, cells)) for name, cells in columns.items()]
    rows = [list(columns), *zip(*columns.values(), strict=True)]
    forms = ["<", *[">"] * (len(columns) - 1)]
    return "\n".join(
        "  ".join(f"{cell:{form}{width}}" for cell, form, width in zip(row, forms, widths, strict=True)) for row in rows
    )


def _cell(result: Mapping[str, Any], name: str, error: str | None = None, form: str = ".4f") -> str:
    """A figure with its standard error, if they are known."""
    value, spread = result.get(name), result.get(error) if error else None
    if value is None:
        return ""
    return format(value, form) + (f" ± {spread:{form}}" if spread is not None else "")


def _draw(path: Path, results: Mapping[str, Mapping[str, Any]]) -> bool:
    """Put the densities of the runs, or else their samples, on one sheet. Returns whether there are any."""
    for name in ("density", "samples"):
        pictures = {run: path.parent / run / "plots" / f"{name}.png" for run in results}
        if all(picture.exists() for picture in pictures.values()):
            gaps = {run: _cell(result, "test_gap", "test_nll_se") for run, result in results.items()}
            titles = {run: f"{run}, gap {gap} nats" if gap else run for run, gap in gaps.items()}
            plots.contact_sheet({titles[run]: picture for run, picture in pictures.items()}).savefig(path)
            return True
    return False


def _write_csv(path: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in results.values() for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["run", *names], lineterminator="\n")
        writer.writeheader()
        writer.writerows({"run": run, **row} for run, row in results.items())
