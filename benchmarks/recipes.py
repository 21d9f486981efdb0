"""The settings of training runs, composed from `conf/` as `scripts/train.py` does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from flows.training.settings import plain_settings

CONF = Path(__file__).resolve().parents[1] / "conf"


def settings(*overrides: str) -> dict[str, Any]:
    """The settings that `train.py` uses with these overrides."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return plain_settings(compose("train", overrides=list(overrides)))


def recipe(data: str) -> dict[str, Any]:
    """The settings of `experiment=<data>` if there is one, otherwise of `data=<data>`."""
    experiment = [f"experiment={data}"] if (CONF / "experiment" / f"{data}.yaml").exists() else []
    return settings(f"data={data}", *experiment)
