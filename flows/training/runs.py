"""Trainers from the settings of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from flows.checks import check_seed
from flows.datasets import Dataset
from flows.objectives import MaximumLikelihood
from flows.objectives.checks import check_kind
from flows.training.amounts import check_batch, check_evaluation
from flows.training.annotations import SettingsError
from flows.training.building import DEFAULT_MODEL, accepted, build_dataset, build_model, part_of, refuse_nulls
from flows.training.files import check_place
from flows.training.settings import TARGET, complete, instantiate, parameter_names
from flows.training.stage import Stage
from flows.training.trusted import foreign_packages

if TYPE_CHECKING:
    from flows.training.trainer import Trainer


def build_trainer(
    config: Mapping[str, Any],
    resume: str | os.PathLike[str] | None = None,
    dataset: Dataset | None = None,
    network: bool = True,
) -> Trainer:
    """Build the trainer of a run from settings.

    Args:
        config: `data`, `model` with its parts (see `build_model`), `objective` (the stages by name), `optimizer`,
            `optimization`, `hardware`, `reporting`, `evaluation`, `seed` and `output_dir`, as plain values. `model` and
            the last six may be missing.
        resume: a checkpoint to continue from.
        dataset: data to use instead of `config["data"]`.
        network: whether the data may be downloaded.

    Raises:
        SettingsError: names the setting that does not fit.
    """
    from flows.training.trainer import Trainer  # imports this package's `trusted`, as this module does

    seed = config.get("seed", 0)
    check_seed(seed)
    check_place(config.get("output_dir"))
    stages = _checked_stages(part_of(config, "objective"))
    torch.manual_seed(seed)
    dataset = build_dataset(config, resume is not None, network) if dataset is None else dataset
    chosen = {} if "optimizer" not in config else {"optimizer": _build_optimizer(config["optimizer"])}
    optimization = instantiate(_options(config, "optimization", "Optimization"), "optimization", **chosen)
    hardware = instantiate(_options(config, "hardware", "Hardware"), "hardware")
    reporting = instantiate(_options(config, "reporting", "Reporting"), "reporting")
    double = str(hardware.precision).startswith("64")
    if resume is None:  # older runs may hold nulls, which were ignored
        refuse_nulls(config, dataset)
    model = build_model(config, dataset.event_shape, dataset, torch.float64 if double else None)
    if not foreign_packages(config):  # an objective of one's own may train anything on anything
        check_kind(model, dataset)
    evaluator = None
    if config.get("evaluation"):
        shared = {"dataset": dataset, "seed": seed, "progress_bar": reporting.progress_bar}
        evaluator = instantiate(config["evaluation"], "evaluation", **accepted(config["evaluation"], shared))
        check_evaluation(evaluator, model, dataset)
    built = {name: instantiate(stage, f"objective.{name}") for name, stage in stages.items()}
    for name, stage in built.items():
        solves = isinstance(stage.objective, MaximumLikelihood)
        copies = getattr(getattr(model, "divergence", None), "num_probes", 1) if solves else 1
        check_batch(f"objective.{name}.batch_size", stage.batch_size, dataset.event_shape, copies)
    return Trainer(
        model,
        dataset,
        built,
        evaluator=evaluator,
        optimization=optimization,
        hardware=hardware,
        reporting=reporting,
        output_dir=config.get("output_dir"),
        seed=seed,
        resume=resume,
        config=completed(config, built),
    )


def _within(stage: Mapping[str, Any], name: str) -> list[str]:
    """Where a stage has a setting: among its own, in its objective, or nowhere."""
    places = {"": stage, ".objective": stage.get("objective")}
    return [
        place
        for place, settings in places.items()
        if isinstance(settings, Mapping) and name in parameter_names(settings.get(TARGET))
    ]


def _checked_stages(objective: Any) -> Mapping[str, Any]:
    if not isinstance(objective, Mapping) or not objective:
        raise SettingsError(
            f"objective must be a mapping from the names of stages to their settings, got {objective!r}"
        )
    stages = [name for name, stage in objective.items() if isinstance(stage, Mapping) and TARGET in stage]
    for name, stage in objective.items():
        if not isinstance(stage, Mapping) and stages:
            places = [
                f"objective.{other}{within}.{name}" for other in stages for within in _within(objective[other], name)
            ]
            options = " or ".join(places or [f"objective.{other}.{name}" for other in stages])
            raise SettingsError(
                f"objective.{name} must be a stage, a mapping with a {TARGET}, got {stage!r}; for a setting of a stage "
                f"write {options}"
            )
        if isinstance(stage, Mapping) and TARGET not in stage:
            chosen = ", ".join(stages)
            raise SettingsError(
                f"objective.{name} has settings ({', '.join(stage)}) but is no stage of the chosen objective, which "
                f"has {chosen}. If an experiment or an override sets it, remove it with ~objective.{name}"
            )
    return objective


def _build_optimizer(config: Any) -> Callable[..., Any]:
    """The optimiser of a run as a function of parameters and learning rate, tried once to check its settings."""
    optimizer: Any = instantiate(config, "optimizer")
    if not callable(optimizer):
        raise SettingsError("optimizer must have _partial_: true, since every stage builds its own")
    optimizer([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    return optimizer


def completed(config: Mapping[str, Any], stages: Mapping[str, Stage] | None = None) -> dict[str, Any]:
    """All settings of a run, with what its objectives recommend for the stages.

    Args:
        stages: those of `config["objective"]`. Default: they are built.
    """
    if stages is None:
        chosen = _checked_stages(part_of(config, "objective"))
        stages = {name: instantiate(stage, f"objective.{name}") for name, stage in chosen.items()}
    full = complete({"model": DEFAULT_MODEL, **config})
    for name, stage in stages.items():
        settings = full["objective"][name]
        for key in ("batch_size", "learning_rate", "warmup_steps"):
            settings[key] = getattr(stage, key)
    return full


def _options(config: Mapping[str, Any], part: str, kind: str) -> dict[str, Any]:
    """The settings of one of the trainer's option classes."""
    given = config.get(part) or {}
    if not isinstance(given, Mapping):
        raise SettingsError(f"{part} must be a mapping of settings, got {given!r}")
    return {TARGET: f"flows.training.{kind}", **given}
