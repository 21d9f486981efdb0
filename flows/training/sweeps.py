"""Sweeps: names for the jobs, and a table of their results at the end."""

from __future__ import annotations

import contextlib
import csv
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flows import plots
from flows.training.folder import RUNS, new_folder
from flows.training.summary import flat

COLUMNS = (  # of the table: title, figure, its standard error, form
    ("NLL", "test_nll", "test_nll_se", ".4f"),
    ("free energy", "importance_weights.free_energy", "importance_weights.free_energy_se", ".4f"),
    ("ESS", "importance_weights.effective_sample_size", None, ".3f"),
    ("gap", "gap", "test_nll_se", ".4f"),
    ("bits/dim", "test_bits_per_dim", "test_bits_per_dim_se", ".4f"),
    ("NFE", "nfe", None, ".0f"),
    ("steps", "steps", None, ","),
    ("seconds", "seconds", None, ".0f"),
)
LONGEST = 100  # characters; folders have a limit, and names a reader

_folders: dict[str | None, Path] = {}  # of the sweep that runs in this process, by what was given for it


def job_name(overrides: Sequence[str], arguments: Sequence[str], number: int) -> str:
    """What sets a job apart: ``divergence-exact_seed-1`` for the overrides that the command line sweeps over.

    Args:
        overrides: of the job, each ``key=value``.
        arguments: the command line of the sweep.
        number: of the job, which names it where the values do not tell, or would make the name too long.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    given = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    swept = {o.key_or_group for o in OverridesParser.create().parse_overrides(given) if o.is_sweep_override()}
    pairs = [override.lstrip("+").partition("=") for override in overrides]
    name = "_".join(f"{key}-{value}" for key, _, value in pairs if key in swept)
    name = re.sub(r"[^\w.,\[\]+-]+", "-", name)
    return name if 0 < len(name) <= LONGEST else "_".join(filter(None, [str(number), name[:LONGEST]]))


def current_job() -> str | None:
    """The name of the job of a sweep that is running; ``None`` outside a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    settings = HydraConfig.get()
    if settings.mode != RunMode.MULTIRUN:
        return None
    _folders.setdefault(settings.sweep.dir, Path(settings.sweep.dir))  # where hydra.sweep.dir itself was given
    return job_name(settings.overrides.task, sys.argv[1:], settings.job.num)


@contextlib.contextmanager
def sweeping() -> Iterator[None]:
    """Around a program that may turn out to be a sweep: makes its folder, and sums up its runs at the end.

    Settings may use ``${job_name:}`` and ``${sweep_folder:...}``: the name of the current job, and the folder of the
    sweep, which is the one given, or a new one for null. When a sweep ends, however it ends, a table of the runs is
    printed, and written as ``sweep.csv`` into its folder, with their densities or samples on one sheet, ``sweep.png``.
    """
    from omegaconf import OmegaConf

    def folder(given: str | None) -> str:
        if given not in _folders:
            _folders[given] = new_folder(RUNS / "sweeps") if given is None else Path(given)
        return str(_folders[given])

    _folders.clear()
    OmegaConf.register_new_resolver("job_name", current_job, replace=True)
    OmegaConf.register_new_resolver("sweep_folder", folder, replace=True)
    try:
        yield
    finally:
        for path in dict.fromkeys(_folders.values()):
            if results := sweep_results(path):
                _write_csv(path / "sweep.csv", results)
                print(f"\n{sweep_table(results)}\n\nall figures in {path / 'sweep.csv'}")
                if _draw(path / "sweep.png", results):
                    print(f"all pictures in {path / 'sweep.png'}")


def sweep_results(folder: Path) -> dict[str, dict[str, Any]]:
    """What ``summary.json`` holds for each finished run in the folder of a sweep, flat, by the name of its job."""
    return {path.parent.name: flat(json.loads(path.read_text())) for path in sorted(folder.glob("*/summary.json"))}


def sweep_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each run, with the columns that at least one of them has."""
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
    """A figure with its standard error, as far as they are known."""
    value, spread = result.get(name), result.get(error) if error else None
    if value is None:
        return ""
    return format(value, form) + (f" ± {spread:{form}}" if spread is not None else "")


def _draw(path: Path, results: Mapping[str, Mapping[str, Any]]) -> bool:
    """Put the densities, or else the samples, of the runs on one sheet; whether there are any."""
    for name in ("density", "samples"):
        pictures = {run: path.parent / run / "plots" / f"{name}.png" for run in results}
        if all(picture.exists() for picture in pictures.values()):
            gaps = {run: _cell(result, "gap", "test_nll_se") for run, result in results.items()}
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
