"""From settings to objects, also from the settings in a stranger's checkpoint, which are vetted first."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from flows.datasets import Dataset
from flows.errors import InvalidValueError
from flows.models.cnf import CNF
from flows.training.checkpoint import FLOW, CheckpointError, check_content, find_checkpoint, load_checkpoint
from flows.training.levels import check_levels
from flows.training.settings import instantiate, parameter_names
from flows.training.vetting import vet

MODEL = ("transform", "field", "divergence", "solver")  # the parts of a flow


@dataclass(frozen=True)
class LoadedRun:
    """A flow with its averaged weights, and the settings that it was trained with."""

    flow: CNF
    config: dict[str, Any]
    checkpoint: Path
    step: int
    context_shape: tuple[int, ...] | None  # of the data that it was trained on
    num_classes: int | None  # where those contexts are classes


def load_flow(
    path: str | os.PathLike[str],
    trust: Sequence[str] = (),
    flow: CNF | None = None,
) -> CNF:
    """The flow of a checkpoint, with its averaged weights, in evaluation mode on the CPU.

    ::

        flow = flows.training.load_flow("runs/8gaussians/2026-01-31_12-00-00")
        flow.sample((1000,))

    Args:
        path: the folder of a run (its best checkpoint is taken) or a checkpoint file.
        trust: packages, beside this one, whose classes the checkpoint's settings may call.
        flow: a flow of the same shape to fill, for a run that was started from Python without a config.

    Raises:
        CheckpointError: missing, damaged, or of another model.
        UntrustedConfigError: its settings call something else than this package's classes.
    """
    if flow is None:
        return load_run(path, trust).flow
    content = load_checkpoint(find_checkpoint(path))
    check_content(content, path, FLOW)
    _fill(flow, content, path)
    return flow.eval()


def load_run(path: str | os.PathLike[str], trust: Sequence[str] = ()) -> LoadedRun:
    """Like :func:`load_flow`, with the settings beside the flow."""
    file = find_checkpoint(path)
    content = load_checkpoint(file)
    config = checkpoint_config(content, file, trust)
    check_content(content, file, FLOW)
    try:
        shape = None if content.get("context_shape") is None else tuple(content["context_shape"])
        levels = content.get("num_levels")
        flow = build_flow(config, content["event_shape"], None, _dtype(content), context_shape=shape, num_levels=levels)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"no flow can be built from the settings in {file}: {error}") from error
    _fill(flow, content, file)
    return LoadedRun(flow.eval(), config, file, content["position"]["step"], shape, content.get("num_classes"))


def checkpoint_config(
    content: Mapping[str, Any], path: str | os.PathLike[str], trust: Sequence[str] = ()
) -> dict[str, Any]:
    """The vetted settings in a checkpoint.

    Raises:
        CheckpointError: there are none, or they describe no flow.
        UntrustedConfigError: see :func:`vet`.
    """
    if content.get("config") is None:
        raise CheckpointError(
            f"{path} holds no settings, since the run was started from Python without config=...; build the flow "
            "yourself and call load_flow(path, flow=flow)"
        )
    try:
        config = yaml.safe_load(content["config"])
        vet(config, trust)
    except (yaml.YAMLError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"the settings in {path} are not valid yaml: {error}") from error
    parts = config if isinstance(config, dict) else {}
    missing = [part for part in MODEL if not (isinstance(parts.get(part), dict) and "_target_" in parts[part])]
    if missing:
        raise CheckpointError(f"the settings in {path} do not describe a flow: they have no {', '.join(missing)}")
    return config


def build_dataset(config: Mapping[str, Any]) -> Dataset:
    """The data set that ``config["data"]`` describes."""
    return instantiate(config["data"], "data")


def build_flow(
    config: Mapping[str, Any],
    event_shape: Sequence[int],
    dataset: Dataset | None = None,
    dtype: torch.dtype | None = None,
    context_shape: Sequence[int] | None = None,
    num_levels: int | None = None,
) -> CNF:
    """The flow that the settings describe, untrained.

    Args:
        config: with ``field``, ``divergence``, ``solver`` and ``transform``, each an instantiable mapping.
        event_shape: of the data; handed to each part that takes it.
        dataset: what the transform is fitted to; ``None`` if its state will be loaded.
        dtype: of the parameters and of constants such as frequencies; torch's default if ``None``.
        context_shape: of the data's contexts, handed to a field that takes it; ``None``: as ``dataset`` says.
        num_levels: of discrete data, handed to each part of the transform that takes it; ``None``: as ``dataset`` says.
    """
    event_shape = tuple(event_shape)
    if dataset is not None:
        context_shape = dataset.context_shape if context_shape is None else context_shape
        num_levels = dataset.num_levels if num_levels is None else num_levels
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        known = {"event_shape": event_shape, "num_levels": num_levels}
        transform = instantiate(_complete(config["transform"], known), "transform")
        if dataset is not None:
            check_levels(transform, dataset)
            if dataset.has_samples:
                transform.fit(dataset.reference())
        return CNF(
            _with_shape(config["field"], "field", event_shape, context_shape),
            divergence=instantiate(config["divergence"], "divergence"),
            solver=instantiate(config["solver"], "solver"),
            transform=transform,
            event_shape=event_shape,
        )
    finally:
        torch.set_default_dtype(before)


def place(flow: CNF, device: str | None = None, dtype: str | None = None) -> CNF:
    """Move a flow; by default to a GPU where there is one, in the dtype that it has."""
    kind = getattr(torch, dtype, None) if dtype else None
    if dtype and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise InvalidValueError(f"dtype must be a floating-point type of torch such as float64, got {dtype!r}")
    try:
        return flow.to(device or ("cuda" if torch.cuda.is_available() else "cpu"), kind)
    except (RuntimeError, AssertionError) as error:
        raise InvalidValueError(
            f"the flow cannot be moved to device {device!r}: {str(error).splitlines()[0]}"
        ) from error


def _with_shape(
    config: Mapping[str, Any], part: str, event_shape: tuple[int, ...], context_shape: Sequence[int] | None = None
) -> Any:
    """Instantiate, with ``event_shape`` and ``context_shape`` where the target has such arguments."""
    shapes = {"event_shape": event_shape}
    if context_shape is not None:
        shapes["context_shape"] = tuple(context_shape)
    return instantiate(config, part, **_missing(config, shapes))


def _complete(config: Any, known: Mapping[str, Any]) -> Any:
    """Settings in which every target, however deep, has those of the ``known`` arguments that it takes."""
    if not isinstance(config, Mapping):
        return config
    inside = {key: _complete(value, known) for key, value in config.items()}
    return {**inside, **_missing(config, known)} if "_target_" in config else inside


def _missing(config: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The known arguments that the target of ``config`` takes and is not given."""
    parameters = parameter_names(config.get("_target_"))
    return {name: value for name, value in known.items() if name in parameters and name not in config}


def _fill(flow: CNF, content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    flow.to(_dtype(content))
    try:
        flow.load_state_dict(content["ema"])
    except RuntimeError as error:
        raise CheckpointError(f"the weights in {path} belong to another model: {error}") from error


def _dtype(content: Mapping[str, Any]) -> torch.dtype | None:
    return next((value.dtype for value in content["ema"].values() if value.is_floating_point()), None)
