"""`flows train`: train a model on data, test it, and leave everything in one folder."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from flows.cli.arguments import refuse
from flows.cli.config import check_program_settings, plain, plain_settings, run_with_hydra
from flows.cli.errors import readable_errors
from flows.cli.grammar import readable_arguments
from flows.cli.jobs import current_job, recorded_job, swept
from flows.cli.resuming import RESUME_SETTINGS, find_run, resumed_config
from flows.cli.steps import share_steps
from flows.cli.sweeps import sweep_table, sweeping
from flows.cli.teacher import with_teacher
from flows.training.building import PARTS
from flows.training.continuing import AUTO
from flows.training.estimator_use import notice
from flows.training.loggers import flat
from flows.training.runs import build_trainer
from flows.training.settings import TARGET
from flows.training.trusted import may_download


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; `arguments` are those of the command line by default."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with readable_errors("train", arguments):
        arguments = readable_arguments(arguments)
        with sweeping(arguments):
            run_with_hydra(train, "train", arguments)


def train(composed: DictConfig) -> float | None:
    """Train with the composed settings; returns the figure that a sweeper minimises.

    It is None, which sweepers such as Optuna take for a failed trial, if the job failed or its test is unresolved.
    """
    job = current_job()
    with recorded_job(job), readable_errors(job=job):
        score, unresolved = _train(composed)
        return score if unresolved is None else None
    return None


def _train(composed: DictConfig) -> tuple[float | None, str | None]:
    """The score of the run, and why its test is unresolved."""
    config, checkpoint = chosen_settings(composed)
    if composed.resume == AUTO:
        found = find_run(config, composed.trust)
        if found.summary is not None:
            folder = Path(config["output_dir"])
            print(f"all is done in {folder}:\n\n{sweep_table({folder.name: flat(found.summary)})}")
            return found.summary.get("validation_score"), found.summary.get("test_unresolved")
        checkpoint = found.checkpoint or AUTO
    from_file = composed.resume not in (None, AUTO)
    trainer = build_trainer(config, checkpoint, network=not from_file or may_download(None, composed.trust))
    if current_job() is not None:
        trainer.labels = {name: yaml.safe_load(value) for name, value in swept().items()}
    if trainer.resumed_step is not None:
        trainer.fabric.print(f"resumes after step {trainer.resumed_step:,} of the run in {trainer.source}")
    if (caution := notice(trainer.model, trainer.stages)) is not None:
        trainer.fabric.print(f"Caution: {caution}")
    summary = trainer.fit()
    trainer.fabric.print(summary)  # once, however many processes train
    return summary.validation_score, summary.metrics.get("unresolved")


def chosen_settings(composed: DictConfig) -> tuple[dict[str, Any], Path | str | None]:
    """Plain settings, and the checkpoint of the run that they continue, if one was given."""
    context = HydraConfig.get()
    if composed.resume not in (None, AUTO):
        check_program_settings({name: composed[name] for name in RESUME_SETTINGS if name in composed})
        chosen = plain(composed, resolve=True)
        return resumed_config(composed.resume, context.overrides.task, composed.trust, chosen)
    config = with_teacher(plain_settings(composed), context.overrides.task, composed.trust)
    share_steps(config)
    check_parts(config, context.overrides.task)
    if current_job() is not None:
        config["output_dir"] = context.runtime.output_dir  # each job of a sweep has a folder of its own
    return config, None


def check_parts(config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Refuse parts that the model does not take, as far as the command line chooses them.

    Raises:
        InvalidValueError: such a part is among the overrides.
    """
    kind = config["model"].get(TARGET) if isinstance(config.get("model"), Mapping) else None
    reason = f"{kind} has no such part; leave it out, or choose another model"
    refuse(overrides, {part: reason for part in PARTS if part not in config})
