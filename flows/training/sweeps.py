"""Names for a sweep and its jobs."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from flows.training.folder import RUNS, new_folder

LONGEST = 100  # characters; folders have a limit, and names a reader


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
    """The name of the job of a sweep that is running; None outside a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    settings = HydraConfig.get()
    if settings.mode != RunMode.MULTIRUN:
        return None
    return job_name(settings.overrides.task, sys.argv[1:], settings.job.num)


def register_resolvers() -> None:
    """Make ``${job_name:}`` and ``${sweep_folder:...}`` available to settings.

    They are the name of the current job of a sweep, and the folder of the sweep: the one given, or a new one for null.
    """
    from omegaconf import OmegaConf

    def folder(given: str | None) -> str:
        return given or str(new_folder(RUNS / "sweeps"))

    OmegaConf.register_new_resolver("job_name", current_job, replace=True)
    OmegaConf.register_new_resolver("sweep_folder", folder, replace=True, use_cache=True)  # one folder a sweep
