"""Trained models from checkpoints and files, with the settings of their runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from flows.arguments import checked
from flows.conditions import Conditions
from flows.errors import InvalidTypeError, InvalidValueError
from flows.models.cnf import CNF
from flows.models.neural_ode import NeuralODE
from flows.models.precision import working_dtype
from flows.models.results import DataNames
from flows.training import checkpoint as files
from flows.training.blueprint import MisfitError, build_like
from flows.training.building import OPTIONAL, PARTS, build_model, model_parts
from flows.training.checkpoint import CheckpointError, check_content, find_checkpoint, load_checkpoint
from flows.training.described import with_tensors
from flows.training.fitting import dtype_named, load_weights
from flows.training.model_file import is_model_file, read_model
from flows.training.settings import TARGET
from flows.training.settings_text import read_settings
from flows.training.trusted import check_trusted, foreign_packages

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class LoadedRun:
    """A trained model with its averaged weights, and the settings of its run."""

    model: nn.Module
    config: dict[str, Any]
    checkpoint: Path
    step: int
    context_shape: tuple[int, ...] | None  # of the training data
    num_classes: int | None  # None: the contexts are no classes
    data: Mapping[str, Any]  # what identifies the training data, for `flows.datasets.recognition.comparison`
    extra: Mapping[str, Any] = field(default_factory=dict)  # of a file that holds more than a model

    @property
    def conditions(self) -> Conditions | None:
        """Names and categories of the entries of a context, if they come from columns of a table."""
        return Conditions.from_dict(self.data.get("conditions"))

    @property
    def flow(self) -> CNF:
        """The model, which has a density.

        Raises:
            InvalidTypeError: it has none, as a neural ODE.
        """
        if not isinstance(self.model, CNF):
            raise InvalidTypeError(
                f"{self.checkpoint} holds a {type(self.model).__name__}, and this needs a flows.CNF, which has a "
                "density to sample from; for states of a neural ODE there is flows predict, or trajectory(x0, times)"
            )
        return self.model


@checked
def load_flow(path: str | os.PathLike[str], trust: Sequence[str] = (), flow: CNF | NeuralODE | None = None) -> Any:
    """Load a trained model: a `flows.CNF`, or the `flows.NeuralODE` of a run on time series.

    It has its averaged weights, is in evaluation mode and lies on the CPU.

    ```python
    flow = flows.load("runs/8gaussians/2026-01-31_12-00-00")
    flow.sample((1000,))
    ```

    Args:
        path: the folder of a run, for its best checkpoint, or a checkpoint file.
        trust: names of packages whose classes the settings in the checkpoint may call, besides this package's.
        flow: a model of the same shape to fill. Needed for runs that were started from Python without settings.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or belongs to another model.
        UntrustedConfigError: the settings in the checkpoint call something else.
    """
    if flow is None:
        return load_run(path, trust).model
    file = find_checkpoint(path)
    content = load_content(file)
    check_content(content, file, files.MODEL)
    _fill(flow, content, file)
    flow.names = DataNames.of(content["data"])
    return flow.eval()


def load_content(file: Path) -> dict[str, Any]:
    """Read a checkpoint of a run, or the file of a model, which holds less."""
    return read_model(file) if is_model_file(file) else load_checkpoint(file)


def load_run(path: str | os.PathLike[str], trust: Sequence[str] = ()) -> LoadedRun:
    """Load a trained model like `load_flow`, with the settings of its run."""
    file = find_checkpoint(path)
    content = load_content(file)
    config = checkpoint_config(content, file, trust)
    check_content(content, file, files.MODEL)
    data = content["data"]
    shape = None if data.get("context_shape") is None else tuple(data["context_shape"])
    sources = content["ema"].get("base.points")
    sources = len(sources) if isinstance(sources, torch.Tensor) and sources.ndim else None
    try:
        dtype = dtype_named(content["dtype"])

        def build() -> nn.Module:
            known = {"num_levels": data.get("num_levels"), "conditions": Conditions.from_dict(data.get("conditions"))}
            return build_model(config, data["event_shape"], None, dtype, shape, num_points=sources, **known)

        with torch.random.fork_rng(devices=()):  # weights are drawn, to be replaced
            foreign = foreign_packages({part: config.get(part) for part in ("model", *PARTS)})
            model = build() if foreign else build_like(build, content["ema"])
    except MisfitError as error:
        raise CheckpointError(f"the weights in {file} belong to another model than its settings: {error}") from error
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"no model can be built from the settings in {file}: {error}") from error
    _fill(model, content, file)
    if isinstance(model, CNF | NeuralODE):
        model.names = DataNames.of(data)
    step, extra = content["position"]["step"], content.get("extra", {})
    return LoadedRun(model.eval(), config, file, step, shape, data.get("num_classes"), data, extra)


def checkpoint_config(
    content: Mapping[str, Any], path: str | os.PathLike[str], trust: Sequence[str] = (), of_run: bool = False
) -> dict[str, Any]:
    """The settings in a checkpoint, once they have proved harmless.

    Args:
        of_run: those of a whole run, not of its model alone.

    Raises:
        CheckpointError: there are none, or they describe no model.
        UntrustedConfigError: see `check_trusted`.
    """
    text = content.get("config")
    if text is None and of_run:
        raise CheckpointError(
            f"{path} holds no settings of a run, since the run was started from Python without config=...; continue it "
            "there: flows.Trainer(..., resume=path)"
        )
    text = content.get("described") if text is None else text
    if text is None:
        raise CheckpointError(
            f"{path} holds no settings, since its model has parts that none could describe; build the flow yourself "
            "and call flows.load(path, flow=flow)"
        )
    try:
        kept = [content.get(name) for name in ("ema", "arguments")]
        tensors = {name: t for one in kept if isinstance(one, dict) for name, t in one.items()}
        config = with_tensors(read_settings(text), tensors)
    except InvalidValueError as error:
        raise CheckpointError(f"the settings in {path} are not valid: {error}") from error
    check_trusted(config, trust)
    parts = config if isinstance(config, dict) else {}
    needed = [] if "model" not in parts else ["model"]
    needed += [part for part in model_parts(parts) if parts.get(part) or part not in OPTIONAL]
    missing = [part for part in needed if not (isinstance(parts.get(part), dict) and TARGET in parts[part])]
    if missing:
        raise CheckpointError(f"the settings in {path} do not describe a model: they have no {', '.join(missing)}")
    return config


def place(flow: M, device: str | None = None, dtype: str | None = None) -> M:
    """Move a model to a device, by default to a GPU where there is one, and to a dtype."""
    kind = getattr(torch, dtype, None) if dtype else None
    if dtype and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise InvalidValueError(f"dtype must be a floating-point type of torch such as float64, got {dtype!r}")
    try:
        return flow.to(device or ("cuda" if torch.cuda.is_available() else "cpu"), kind)
    except (RuntimeError, AssertionError) as error:
        raise InvalidValueError(
            f"the model cannot be moved to device {device!r}: {str(error).splitlines()[0]}"
        ) from error


def _fill(model: nn.Module, content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    try:
        dtype = dtype_named(content["dtype"])
        if working_dtype(model) != dtype:
            model.to(dtype)
        load_weights(model, content["ema"], also=dtype)
    except InvalidValueError as error:
        raise CheckpointError(f"the weights in {path} belong to another model: {error}") from error
