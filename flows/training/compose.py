"""A trainer from the settings of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from flows.datasets import Dataset
from flows.errors import InvalidValueError
from flows.training.rebuild import build_dataset, build_flow
from flows.training.settings import check_type, instantiate
from flows.training.trainer import Trainer


def build_trainer(
    config: Mapping[str, Any],
    resume: str | os.PathLike[str] | None = None,
    dataset: Dataset | None = None,
) -> Trainer:
    """The trainer that ``conf/train.yaml`` describes, ready to :meth:`~Trainer.fit`.

    Args:
        config: plain values: ``data``, ``transform``, ``field``, ``divergence``, ``solver``, ``objective`` (the
            stages by name), ``optimizer``, ``trainer``, ``seed`` and ``output_dir``.
        resume: a checkpoint to continue from.
        dataset: instead of ``config["data"]``.
    """
    check_type("seed", config["seed"], int)
    torch.manual_seed(config["seed"])
    dataset = build_dataset(config) if dataset is None else dataset
    stages = config["objective"]
    for name, stage in stages.items():
        if isinstance(stage, Mapping) and "_target_" not in stage:
            chosen = ", ".join(other for other, settings in stages.items() if "_target_" in settings)
            raise InvalidValueError(
                f"objective.{name} has settings ({', '.join(stage)}) but is no stage of the chosen objective, which "
                f"has {chosen}; an experiment or an override may have named it, ~objective.{name} takes it away"
            )
    double = str(config["trainer"].get("precision")).startswith("64")
    flow = build_flow(config, dataset.event_shape, dataset, torch.float64 if double else None)
    return instantiate(config["trainer"], "trainer", _partial_=True)(
        flow,
        dataset,
        stages={name: instantiate(stage, f"objective.{name}") for name, stage in stages.items()},
        optimizer=instantiate(config["optimizer"], "optimizer"),
        output_dir=config["output_dir"],
        seed=config["seed"],
        resume=resume,
        config=config,
    )
