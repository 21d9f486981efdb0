"""The jobs of a sweep: their names, their folder, and a record of how each ends.

A launcher may run jobs in other processes or on other machines. So what is known of a job lies in its folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import OmegaConf

from flows.cli.errors import JobFailedError
from flows.training.continuing import AUTO, saved_state
from flows.training.files import RUNS, check_place, new_folder
from flows.training.processes import is_first
from flows.writing import to_json, write_text

RECORD = "job.json"  # in the folder of a job
MAX_NAME_LENGTH = 100  # of a job, which is also the name of a folder
BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"

# The processes in which a launcher runs jobs inherit these variables.
FIXED = "FLOWS_FIXED"  # the keys on the command line that are the same in all jobs
NEW_FOLDER = "FLOWS_SWEEP_FOLDER"  # the folder if none is given
SWEEP = "FLOWS_SWEEP"  # tells the jobs of this sweep from those of an earlier one in the same folder

_folders: dict[str | None, Path] = {}  # of the sweep in this process, by the folder that was given for it


def fixed_keys(arguments: Sequence[str]) -> list[str]:
    """The settings on a command line that are the same in all jobs of a sweep."""
    given = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    parsed = OverridesParser.create().parse_overrides(given)
    swept = {override.key_or_group for override in parsed if override.is_sweep_override()}
    return [str(override.key_or_group) for override in parsed if override.key_or_group not in swept]


def swept_settings(overrides: Sequence[str], fixed: Sequence[str]) -> dict[str, str]:
    """What sets a job apart.

    Args:
        overrides: of the job, each `key=value`.
        fixed: the keys that are the same in all jobs.
    """
    pairs = [override.lstrip("+").partition("=") for override in overrides]
    return {key: value for key, _, value in pairs if key not in fixed}


def job_name(swept: Mapping[str, str], number: int, numbered: bool = False) -> str:
    """The name of a job by what sets it apart: `divergence-exact_seed-1`.

    Args:
        swept: see `swept_settings`.
        number: of the job; part of the name if the values give none, or one that is too long.
        numbered: make the number part of the name, since several jobs may have the same values.
    """
    name = "_".join(f"{key}-{value}" for key, value in swept.items())
    name = re.sub(r"[^\w.,\[\]+-]+", "-", name)
    fits = not numbered and 0 < len(name) <= MAX_NAME_LENGTH
    return name if fits else "_".join(filter(None, [str(number), name[:MAX_NAME_LENGTH]]))


def current_job() -> str | None:
    """The name of the running job; `None` outside a sweep."""
    settings = HydraConfig.get()
    if settings.mode != RunMode.MULTIRUN:
        return None
    _folders.setdefault(settings.sweep.dir, Path(settings.sweep.dir))  # if hydra.sweep.dir itself was given
    # other sweepers than Hydra's own draw values, some of them twice
    return job_name(swept(), settings.job.num, numbered=settings.sweeper._target_ != BASIC_SWEEPER)


def sweep_folder(given: str | None, resume: str | None = None) -> str:
    """The folder of the sweep: the given one, or a new one."""
    if resume == AUTO:
        saved_state(given)  # refuses a sweep without a folder of its own
    if given not in _folders:
        check_place(given)
        if given is None:
            if NEW_FOLDER not in os.environ:
                os.environ[NEW_FOLDER] = str(new_folder(RUNS / "sweeps"))
            _folders[given] = Path(os.environ[NEW_FOLDER])
        else:
            _folders[given] = Path(given)
    return str(_folders[given])


OmegaConf.register_new_resolver("job_name", current_job, replace=True)
OmegaConf.register_new_resolver("sweep_folder", sweep_folder, replace=True)


@dataclass(frozen=True)
class Sweep:
    """The sweep of this process."""

    name: str

    @property
    def folders(self) -> list[Path]:
        """The folders that it has used so far: none, or one."""
        return list(dict.fromkeys(_folders.values()))


@contextlib.contextmanager
def sweep_environment(arguments: Sequence[str]) -> Iterator[Sweep]:
    """Tell the processes of the jobs what sweep they belong to."""
    _folders.clear()
    new = (FIXED, NEW_FOLDER, SWEEP) if is_first() else (FIXED, SWEEP)  # other processes use the folder of the first
    before = {name: os.environ.pop(name, None) for name in new}
    with contextlib.suppress(Exception):  # reported when Hydra parses them
        os.environ[FIXED] = " ".join(fixed_keys(arguments))
    os.environ[SWEEP] = uuid.uuid4().hex
    try:
        yield Sweep(os.environ[SWEEP])
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def recorded_job(name: str | None) -> Iterator[None]:
    """Record in the folder of a job how it ends; a job that fails does not end the sweep."""
    if name is None:
        yield
        return
    settings = HydraConfig.get()
    path = Path(settings.runtime.output_dir) / RECORD
    record = {
        "sweep": os.environ.get(SWEEP),
        "number": settings.job.num,
        "process": os.getpid(),
        "swept": swept(),
    }

    def write(status: str, **more: Any) -> None:
        if not is_first():
            return
        with contextlib.suppress(OSError):  # the run has told of it, if it writes there
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, to_json({**record, "status": status, **more}))

    write("stopped")  # unless it is told otherwise
    try:
        yield
    except JobFailedError as failure:
        write("failed", error=failure.reason, code=failure.code)
    else:
        write("done")


def job_records(folder: Path) -> dict[str, dict[str, Any]]:
    """The records of the jobs in the folder of a sweep, by their names, in the order of their numbers."""
    records = {path.parent.name: read_json(path) or {} for path in sorted(folder.glob(f"*/{RECORD}"))}
    return dict(sorted(records.items(), key=lambda named: str(named[1].get("number", "")).zfill(9)))


def failed_jobs(sweep: Sweep) -> dict[str, dict[str, Any]]:
    """The records of the jobs that failed in this sweep, not in an earlier one in the same folder."""
    return {
        name: record
        for folder in sweep.folders
        for name, record in job_records(folder).items()
        if record.get("status") == "failed" and record.get("sweep") == sweep.name
    }


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file; None if there is none or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def swept() -> dict[str, str]:
    """What the sweep varies, and its values in the running job."""
    return swept_settings(HydraConfig.get().overrides.task, os.environ.get(FIXED, "").split())
