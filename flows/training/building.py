"""Data sets and untrained models from settings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from flows.arguments import checked
from flows.conditions import Conditions
from flows.datasets import Dataset
from flows.datasets.images.hub import offline
from flows.encoders import Encoder
from flows.errors import FileError, InvalidValueError
from flows.models.cnf import CNF
from flows.objectives.checks import check_levels
from flows.training.amounts import check_size, check_whole_numbers
from flows.training.annotations import SettingsError
from flows.training.settings import GIVEN, TARGET, instantiate, parameter_names
from flows.transforms import Standardise, Transform

# Of models; each takes those that its signature names.
PARTS = ("transform", "field", "divergence", "solver", "base", "encoder")
OPTIONAL = ("base", "encoder")  # may be missing or empty
DEFAULT_MODEL = {TARGET: "flows.CNF"}


def model_parts(config: Mapping[str, Any]) -> list[str]:
    """The parts of these settings that their model takes: those among `PARTS` that its signature names."""
    model = config.get("model", DEFAULT_MODEL)
    names = parameter_names(model.get(TARGET) if isinstance(model, Mapping) else None)
    return [part for part in PARTS if part in names]


def without_unused_parts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without the parts that their model does not take, such as the divergence of a neural ODE."""
    if "model" not in config:
        return dict(config)
    used = model_parts(config)
    return {name: value for name, value in config.items() if name not in PARTS or name in used or not used}


@checked
def build_dataset(
    config: Mapping[str, Any],
    of_run: bool = False,
    network: bool = True,
    conditions: Conditions | None = None,
) -> Dataset:
    """Build the data that `config["data"]` describes.

    Args:
        config: settings.
        of_run: whether they are those of a run from before, whose files may have moved. The error then says so.
        network: whether the data may be downloaded. Settings that come from a file should not.
        conditions: of the contexts that a trained model knows, for data that take them.

    Example:
        ```python
        import flows

        data = flows.training.build_dataset({"data": {"_target_": "flows.datasets.Moons", "num_test": 100}})
        ```
    """
    if of_run and config.get("data") is None:
        raise SettingsError(
            "the file holds a model and no data; choose some, such as data=moons, or data=tabular data.path=FILE"
        )
    known = {} if conditions is None else accepted(config.get("data"), {"conditions": conditions})
    try:
        with contextlib.nullcontext() if network else offline():
            return instantiate(part_of(config, "data"), "data", **known)
    except SettingsError as error:
        if of_run and isinstance(error.__cause__, FileError):
            raise SettingsError(f"{error}. If the data of the run have moved, say where: data.path=...") from error
        raise


@checked
def build_model(
    config: Mapping[str, Any],
    event_shape: Sequence[int],
    dataset: Dataset | None = None,
    dtype: torch.dtype | None = None,
    context_shape: Sequence[int] | None = None,
    num_levels: int | None = None,
    num_points: int | None = None,
    conditions: Conditions | None = None,
) -> nn.Module:
    """Build an untrained model from settings.

    Args:
        config: the settings of `model`, by default a `flows.CNF`, and of its parts: those of `transform`, `field`,
            `divergence`, `solver`, `base` and `encoder` that its signature names.
        event_shape: the shape of one data point or state. Every part that takes it gets it.
        dataset: the data to fit the transform to. `None` (default): its state is loaded later.
        dtype: of parameters and constants. `None` (default): torch's default dtype.
        context_shape: of the contexts, for a field that takes it. `None` (default): as in `dataset`.
        num_levels: of discrete data, for transforms that take it. `None` (default): as in `dataset`.
        num_points: that a base made of points will be loaded with.
        conditions: of contexts from columns of a table. With them the encoder is by default a
            `flows.encoders.Standardised`. `None` (default): as in `dataset`.

    Raises:
        SettingsError: names the setting that does not fit.
    """
    if dataset is not None:
        context_shape = dataset.context_shape if context_shape is None else context_shape
        num_levels = dataset.num_levels if num_levels is None else num_levels
        conditions = getattr(dataset, "conditions", None) if conditions is None else conditions
    shapes: dict[str, Any] = {"event_shape": tuple(event_shape)}
    contexts = {} if context_shape is None else {"context_shape": tuple(context_shape)}
    known = shapes | contexts | {"num_points": num_points} | ({} if conditions is None else {"conditions": conditions})
    model = config.get("model", DEFAULT_MODEL)
    parts = {part: part_of(config, part) for part in model_parts(config) if config.get(part) or part not in OPTIONAL}
    built: dict[str, Any] = {}
    with _default_dtype(dtype):
        if "transform" in parts:
            arguments = shapes | {"num_levels": num_levels, "bounds": getattr(dataset, "bounds", None)}
            built["transform"] = instantiate(_with_arguments(parts["transform"], arguments), "transform")
            if dataset is not None:
                check_levels(built["transform"], dataset)
                if dataset.has_samples:
                    _fit_transform(built["transform"], dataset)
        if conditions is not None and "encoder" in model_parts(config) and parts.get("encoder") is None:
            parts["encoder"] = {TARGET: "flows.encoders.Standardised"}
        if parts.get("encoder") is not None:
            given = contexts | ({} if conditions is None else {"conditions": conditions})
            built["encoder"] = _build_encoder(parts["encoder"], given, dataset)
            contexts = {"context_shape": built["encoder"].features_shape}
        given = accepted(parts.get("field"), shapes | contexts)
        if dataset is not None:  # else its weights are there already
            _check_amounts(parts, given)
        if dataset is None and isinstance(parts.get("base"), Mapping):  # the points of its data are in the weights
            parts["base"] = {name: value for name, value in parts["base"].items() if name != "dataset"}
        if parts.get("base") is not None:
            built["base"] = _build_base(parts["base"], known, dataset)
        for part in parts:
            if part not in built and parts[part] is not None:
                built[part] = instantiate(parts[part], part, **accepted(parts[part], shapes | contexts))
        found = instantiate(model, "model", **built, **accepted(model, shapes))
        if dataset is not None and isinstance(found, CNF) and found.base.needs_fit:
            _fit_base(found, dataset)
        return found


def _fit_transform(transform: Transform, dataset: Dataset) -> None:
    """Fit a transform to all training points; one that needs more than their moments, to those of `reference()`."""
    moments = dataset.moments() if isinstance(transform, Standardise) and transform.per == "entry" else None
    if moments is not None:
        transform.fit_moments(*moments)  # type: ignore[attr-defined]
    else:
        transform.fit(dataset.reference())


def _build_base(config: Any, known: Mapping[str, Any], dataset: Dataset | None) -> Any:
    """The base that the settings describe, unfitted; it takes contexts in data units."""
    if isinstance(config, Mapping) and "context_shape" in set(parameter_names(config.get(TARGET))) - known.keys():
        name = "these data have" if dataset is None else f"the data {dataset.name!r} have"
        raise SettingsError(f"base: it depends on contexts, and {name} none; choose another one, such as base=normal")
    return instantiate(config, "base", **accepted(config, known))


def _fit_base(flow: CNF, dataset: Dataset) -> None:
    """Fit the base to the training data.

    Raises:
        SettingsError: there are none, or it cannot be fitted to them.
    """
    if not dataset.has_samples:
        raise SettingsError(
            f"base: {type(flow.base).__name__} is fitted to training data, and {dataset.name!r} is an energy without "
            "samples; choose base=normal or base=student_t"
        )
    try:
        flow.fit_base(dataset.reference(), dataset.reference_contexts())
    except InvalidValueError as error:
        raise SettingsError(f"base: {error}") from error


@checked
def build_flow(
    config: Mapping[str, Any],
    event_shape: Sequence[int],
    dataset: Dataset | None = None,
    dtype: torch.dtype | None = None,
    context_shape: Sequence[int] | None = None,
    num_levels: int | None = None,
) -> CNF:
    """Build an untrained flow, as `build_model` does.

    Raises:
        SettingsError: names the setting that does not fit.

    Example:
        ```python
        import flows

        parts = ("transforms.Identity", "fields.MLP", "divergence.Auto", "ODESolver", "bases.Normal")
        names = ("transform", "field", "divergence", "solver", "base")
        config = {name: {"_target_": f"flows.{part}"} for name, part in zip(names, parts, strict=True)}
        flow = flows.training.build_flow(config, event_shape=(2,))
        ```
    """
    model = build_model(config, event_shape, dataset, dtype, context_shape, num_levels)
    if not isinstance(model, CNF):
        raise SettingsError(f"model must be a flows.CNF here, got {type(model).__name__}; leave out model=...")
    return model


def _build_encoder(config: Any, contexts: Mapping[str, Any], dataset: Dataset | None) -> Encoder:
    """The encoder that the settings describe, fitted to the data."""
    if not contexts:
        name = "these data have" if dataset is None else f"the data {dataset.name!r} have"
        raise SettingsError(f"encoder is for contexts, and {name} none; leave it out with encoder=null")
    if isinstance(config, Mapping) and TARGET not in config:
        raise SettingsError(
            f"encoder has settings ({', '.join(map(str, config))}), and none is chosen; choose one as well, such as "
            "encoder=embedding"
        )
    encoder = instantiate(config, "encoder", **accepted(config, contexts))
    known = None if dataset is None else dataset.reference_contexts()
    return encoder if known is None else encoder.fit(known)


def refuse_nulls(config: Mapping[str, Any], dataset: Dataset) -> None:
    """Refuse null for what the data give to a part of a new model, since it would change nothing."""
    known = {"event_shape": dataset.event_shape, "context_shape": dataset.context_shape}
    known["conditions"] = getattr(dataset, "conditions", None)
    for part in ("transform", "field", "encoder", "base"):
        settings = config.get(part)
        if not isinstance(settings, Mapping):
            continue
        for name in GIVEN[part]:
            if settings.get(name, 0) is None and known.get(name) is not None:
                away = "" if name == "event_shape" else "; for a model without contexts, choose data without"
                raise SettingsError(
                    f"{part}.{name} cannot be null, since the data give it: leave out {part}.{name}=null{away}"
                )


def _check_amounts(parts: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse parts of a model that are larger than the machine; see `flows.training.amounts`."""
    for part, config in parts.items():
        check_whole_numbers(config, part)
    path = parts["field"].get(TARGET) if isinstance(parts.get("field"), Mapping) else None
    if str(path).startswith("flows."):  # others may do more than to make layers
        check_size(lambda: instantiate(parts["field"], "field", **given), "field")


def part_of(config: Mapping[str, Any], name: str) -> Any:
    if name not in config:
        cure = ", such as data=tabular data.path=FILE" if name == "data" else ""
        raise SettingsError(f"{name} must be given{cure}; the settings have {', '.join(map(str, config))}")
    return config[name]


def _with_arguments(config: Any, known: Mapping[str, Any]) -> Any:
    """Settings in which every target, however deep, has those of the `known` arguments that it takes."""
    if not isinstance(config, Mapping):
        return config
    inside = {key: _with_arguments(value, known) for key, value in config.items()}
    return {**inside, **accepted(config, known)} if TARGET in config else inside


def accepted(config: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    """The `known` arguments that the target of `config` takes and has no setting for."""
    if not isinstance(config, Mapping):
        return {}
    parameters = parameter_names(config.get(TARGET))
    return {name: value for name, value in known.items() if name in parameters and config.get(name) is None}


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
