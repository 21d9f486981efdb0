"""The settings of training runs, composed from `conf/` as `flows train` does it."""

from __future__ import annotations

from typing import Any

from flows.cli.config import compose
from flows.cli.help import config_folder


def settings(*overrides: str) -> dict[str, Any]:
    """The settings that `flows train` uses with these overrides."""
    return compose("train", overrides)


def recipe(data: str) -> dict[str, Any]:
    """The settings of `experiment=<data>` if there is one, otherwise of `data=<data>`."""
    experiment = [f"experiment={data}"] if (config_folder() / "experiment" / f"{data}.yaml").exists() else []
    return settings(f"data={data}", *experiment)
