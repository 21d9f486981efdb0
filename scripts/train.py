"""Train a flow; see `python scripts/train.py --help`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from flows.training.console import readable_errors
from flows.training.resume import resumed_config
from flows.training.runs import build_trainer
from flows.training.settings import plain_settings
from flows.training.sweeps import current_job, sweeping

CONFIG = Path(__file__).resolve().parents[1] / "conf" / "train.yaml"


@hydra.main(version_base="1.3", config_path=str(CONFIG.parent), config_name=CONFIG.stem)
def main(composed: DictConfig) -> float | None:
    with readable_errors(job=current_job()):
        config, checkpoint = settings(composed)
        trainer = build_trainer(config, checkpoint)
        summary = trainer.fit()
        trainer.fabric.print(summary)  # once, however many processes train
        return summary.validation_nll  # what a sweeper minimises


def settings(composed: DictConfig) -> tuple[dict[str, Any], Path | None]:
    """Plain settings, and the checkpoint if they are those of a run to continue."""
    context = HydraConfig.get()
    if composed.resume is not None:
        return resumed_config(composed.resume, context.overrides.task, composed.trust)
    config = plain_settings(composed)
    if current_job() is not None:
        config["output_dir"] = context.runtime.output_dir  # each job of a sweep has a folder of its own
    return config, None


if __name__ == "__main__":
    with readable_errors(CONFIG), sweeping():
        main()
