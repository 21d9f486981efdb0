"""`flows train`: train a model on data, test it, and leave everything in one folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from flows.cli.config import check_path, plain_settings, run_with_hydra
from flows.cli.errors import readable_errors
from flows.cli.resuming import resumed_config
from flows.cli.sweeps import current_job, sweeping
from flows.training.runs import build_trainer


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; `arguments` are those of the command line by default."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with readable_errors("train", arguments), sweeping(arguments):
        run_with_hydra(train, "train", arguments)


def train(composed: DictConfig) -> float | None:
    """Train with the composed settings; returns the figure that a sweeper minimises."""
    with readable_errors(job=current_job()):
        config, checkpoint = chosen_settings(composed)
        trainer = build_trainer(config, checkpoint)
        summary = trainer.fit()
        trainer.fabric.print(summary)  # once, however many processes train
        return summary.validation_score


def chosen_settings(composed: DictConfig) -> tuple[dict[str, Any], Path | None]:
    """Plain settings, and the checkpoint of the run that they continue."""
    context = HydraConfig.get()
    if composed.resume is not None:
        for name in ("resume", "output_dir"):
            check_path(name, composed[name])
        return resumed_config(composed.resume, context.overrides.task, composed.trust)
    config = plain_settings(composed)
    if current_job() is not None:
        config["output_dir"] = context.runtime.output_dir  # each job of a sweep has a folder of its own
    return config, None
