"""Sweeps: a table of the results at the end, and one sheet of pictures."""

from __future__ import annotations

import contextlib
import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.cli.errors import SweepFailedError, report
from flows.cli.jobs import failed_jobs, job_records, read_json, sweep_environment
from flows.errors import FileError
from flows.training.files import SUMMARY
from flows.training.loggers import flat
from flows.training.processes import is_first
from flows.writing import write_result

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
SCORES = ("test_nll", "test_free_energy")  # the first that there is ranks a run
DONE, UNRESOLVED, DAMAGED = "done", "unresolved", "damaged summary"
LITTLE_USE = 0.1  # of the steps took the divergence that a sweep varies: too few to tell estimators apart
STATUS, ERROR = "status", "error"  # columns of the table that are no figures


@contextlib.contextmanager
def sweeping(arguments: Sequence[str]) -> Iterator[None]:
    """Sum up the runs at the end if the program with these arguments is a sweep.

    Settings may refer to `${job_name:}` and `${sweep_folder:...}`. When a sweep ends, also by an error, a table of the
    runs is printed and written into its folder as `sweep.csv`, with their densities or samples on one sheet,
    `sweep.png`.

    Raises:
        SweepFailedError: at the end, if a job failed.
    """
    with sweep_environment(arguments) as sweep:
        try:
            yield
        finally:
            for folder in sweep.folders:
                sum_up(folder)
        if failures := failed_jobs(sweep):
            raise SweepFailedError(failures)


def sum_up(folder: Path) -> None:
    """Write and print the table of a sweep, and draw its sheet."""
    results = sweep_results(folder)
    if not results or not is_first():  # each of several processes comes here
        return
    try:
        write_result(folder / "sweep.csv", _csv(results))
        print(f"\n{sweep_table(results)}\n\nall figures in {folder / 'sweep.csv'}")
        if note := _note(results):
            print(note)
        if _draw(folder / "sweep.png", results):
            print(f"all pictures in {folder / 'sweep.png'}")
    except OSError as error:
        report(f"\nThe summary of the sweep is not complete: {error}")


def sweep_results(folder: Path) -> dict[str, dict[str, Any]]:
    """What is known of each job, by its name, the best first.

    These are its status, the settings that the sweep varied, and the content of `summary.json` with dotted names. Runs
    on the same data follow their scores; those without a resolved score come last.
    """
    records = job_records(folder)
    names = [*records, *(path.parent.name for path in sorted(folder.glob(f"*/{SUMMARY}")))]
    results = {name: _result(folder / name, records.get(name, {})) for name in dict.fromkeys(names)}
    data = list(dict.fromkeys(str(result.get("data")) for result in results.values() if "data" in result))

    def rank(named: tuple[str, Mapping[str, Any]]) -> tuple[Any, ...]:
        result = named[1]
        place = data.index(str(result["data"])) if "data" in result else len(data)
        order = (DONE, UNRESOLVED)
        status = order.index(result[STATUS]) if result[STATUS] in order else len(order)
        scores = [result[name] for name in SCORES if isinstance(result.get(name), int | float)]
        score = scores[0] if scores and math.isfinite(scores[0]) else math.inf
        return min(status, 1), place, status, score

    return dict(sorted(results.items(), key=rank))


def _result(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    summary = read_json(folder / SUMMARY)
    status = str(record.get("status", DONE))
    if summary is None and status == DONE:
        status = DAMAGED if (folder / SUMMARY).exists() else "without summary"
    elif summary is not None and summary.get("test_unresolved"):
        status = UNRESOLVED
    swept, error = record.get("swept"), record.get("error")
    return {
        STATUS: status,
        **(swept if isinstance(swept, dict) else {}),
        **({} if summary is None else flat(summary)),
        **({} if error is None else {ERROR: error}),
    }


def sweep_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each run; columns that no run has are left out."""
    columns = {
        title: [_cell(result, name, error, form) for result in results.values()] for title, name, error, form in COLUMNS
    }
    status = [str(result.get(STATUS, DONE)) for result in results.values()]
    columns[STATUS] = status if any(word not in (DONE, UNRESOLVED) for word in status) else []
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
    if value is None and result.get(f"{name}_unresolved") is not None:
        return UNRESOLVED
    if not isinstance(value, int | float):
        return ""
    return format(value, form) + (f" ± {spread:{form}}" if isinstance(spread, int | float) else "")


def _draw(path: Path, results: Mapping[str, Mapping[str, Any]]) -> bool:
    """Put the densities of the runs, or else their samples, on one sheet. Returns whether there are any."""
    from flows import plots  # slow to import

    for name in ("density", "samples"):
        pictures = {run: path.parent / run / "plots" / f"{name}.png" for run in results}
        titles = {run: _title(run, results[run]) for run, picture in pictures.items() if picture.exists()}
        if not titles:
            continue
        try:
            sheet = plots.contact_sheet({titles[run]: pictures[run] for run in titles})
        except (ValueError, SyntaxError, OSError) as error:  # matplotlib and Pillow raise these on damaged files
            raise FileError(f"a picture {name}.png of the runs in {path.parent} cannot be read ({error})") from error
        write_result(path, sheet)
        return True
    return False


def _note(results: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Say so if the sweep varies a divergence that hardly plays a part."""
    if not any(name.partition(".")[0] == "divergence" for result in results.values() for name in result):
        return None
    counts = [(result.get("divergence_steps"), result.get("steps")) for result in results.values()]
    known = [(used, steps) for used, steps in counts if isinstance(used, int) and isinstance(steps, int) and steps]
    if len(known) < len(counts) or not known or max(used / steps for used, steps in known) > LITTLE_USE:
        return None
    used, steps = max(known)
    part = "plays no part in these figures" if not used else f"took part in {used:,} of {steps:,} steps alone"
    return (
        f"\ndivergence {part}: flow matching takes an exact divergence or none, and the test has its own, "
        "evaluation.divergence; objective=maximum_likelihood trains with it"
    )


def _title(run: str, result: Mapping[str, Any]) -> str:
    for name, error, form in (("gap", "nll_se", "gap {} nats"), ("bits_per_dim", "bits_per_dim_se", "{} bits/dim")):
        if figure := _cell(result, f"test_{name}", f"test_{error}"):
            return f"{run}, {figure}" if figure == UNRESOLVED else f"{run}, {form.format(figure)}"
    return run


def _csv(results: Mapping[str, Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in results.values() for name in row))
    names.sort(key=lambda name: name == ERROR)  # long, and the last
    text = io.StringIO()
    writer = csv.DictWriter(text, ["run", *names], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"run": run, **row} for run, row in results.items())
    return text.getvalue()
