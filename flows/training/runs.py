"""Builds models, data and trainers from settings, and loads trained models from checkpoints."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from flows.arguments import checked
from flows.checks import check_seed
from flows.conditions import Conditions
from flows.datasets import Dataset
from flows.datasets.images.hub import offline
from flows.encoders import Encoder
from flows.errors import FileError, InvalidTypeError, InvalidValueError
from flows.models.cnf import CNF
from flows.models.neural_ode import NeuralODE
from flows.models.precision import working_dtype
from flows.models.results import DataNames
from flows.objectives import MaximumLikelihood
from flows.objectives.checks import check_kind, check_levels
from flows.training import checkpoint as files
from flows.training.amounts import check_batch, check_evaluation, check_size, check_whole_numbers
from flows.training.annotations import SettingsError
from flows.training.blueprint import MisfitError, build_like
from flows.training.checkpoint import CheckpointError, check_content, find_checkpoint, load_checkpoint
from flows.training.described import with_tensors
from flows.training.files import check_place
from flows.training.fitting import dtype_named, load_weights
from flows.training.model_file import is_model_file, read_model
from flows.training.settings import GIVEN, TARGET, complete, instantiate, parameter_names
from flows.training.settings_text import read_settings
from flows.training.stage import Stage
from flows.training.trusted import check_trusted, foreign_packages
from flows.transforms import Standardise, Transform

if TYPE_CHECKING:
    from flows.training.trainer import Trainer

M = TypeVar("M", bound=nn.Module)
# Of models; each takes those that its signature names.
PARTS = ("transform", "field", "divergence", "solver", "base", "encoder")
OPTIONAL = ("base", "encoder")  # may be missing
DEFAULT_MODEL = {TARGET: "flows.CNF"}


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
    needed += [part for part in model_parts(parts) if parts.get(part) is not None or part not in OPTIONAL]
    missing = [part for part in needed if not (isinstance(parts.get(part), dict) and TARGET in parts[part])]
    if missing:
        raise CheckpointError(f"the settings in {path} do not describe a model: they have no {', '.join(missing)}")
    return config


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
    known = {} if conditions is None else _accepted(config.get("data"), {"conditions": conditions})
    try:
        with contextlib.nullcontext() if network else offline():
            return instantiate(_part(config, "data"), "data", **known)
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
    parts = {part: _part(config, part) for part in model_parts(config) if part in config or part not in OPTIONAL}
    if dataset is not None:
        _refuse_nulls(parts, known)
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
        given = _accepted(parts.get("field"), shapes | contexts)
        if dataset is not None:  # else its weights are there already
            _check_amounts(parts, given)
        if dataset is None and isinstance(parts.get("base"), Mapping):  # the points of its data are in the weights
            parts["base"] = {name: value for name, value in parts["base"].items() if name != "dataset"}
        if parts.get("base") is not None:
            built["base"] = _build_base(parts["base"], known, dataset)
        for part in parts:
            if part not in built and parts[part] is not None:
                built[part] = instantiate(parts[part], part, **_accepted(parts[part], shapes | contexts))
        found = instantiate(model, "model", **built, **_accepted(model, shapes))
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
    return instantiate(config, "base", **_accepted(config, known))


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
    encoder = instantiate(config, "encoder", **_accepted(config, contexts))
    known = None if dataset is None else dataset.reference_contexts()
    return encoder if known is None else encoder.fit(known)


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
    stages = _checked_stages(_part(config, "objective"))
    torch.manual_seed(seed)
    dataset = build_dataset(config, resume is not None, network) if dataset is None else dataset
    chosen = {} if "optimizer" not in config else {"optimizer": _build_optimizer(config["optimizer"])}
    optimization = instantiate(_options(config, "optimization", "Optimization"), "optimization", **chosen)
    hardware = instantiate(_options(config, "hardware", "Hardware"), "hardware")
    reporting = instantiate(_options(config, "reporting", "Reporting"), "reporting")
    double = str(hardware.precision).startswith("64")
    model = build_model(config, dataset.event_shape, dataset, torch.float64 if double else None)
    if not foreign_packages(config):  # an objective of one's own may train anything on anything
        check_kind(model, dataset)
    evaluator = None
    if config.get("evaluation"):
        shared = {"dataset": dataset, "seed": seed, "progress_bar": reporting.progress_bar}
        evaluator = instantiate(config["evaluation"], "evaluation", **_accepted(config["evaluation"], shared))
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


def _refuse_nulls(parts: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuse null for what the data give to a part, since it would change nothing."""
    for part in ("transform", "field", "encoder", "base"):
        settings = parts.get(part) if isinstance(parts.get(part), Mapping) else {}
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
        chosen = _checked_stages(_part(config, "objective"))
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


def _part(config: Mapping[str, Any], name: str) -> Any:
    if name not in config:
        cure = ", such as data=tabular data.path=FILE" if name == "data" else ""
        raise SettingsError(f"{name} must be given{cure}; the settings have {', '.join(map(str, config))}")
    return config[name]


def _with_arguments(config: Any, known: Mapping[str, Any]) -> Any:
    """Settings in which every target, however deep, has those of the `known` arguments that it takes."""
    if not isinstance(config, Mapping):
        return config
    inside = {key: _with_arguments(value, known) for key, value in config.items()}
    return {**inside, **_accepted(config, known)} if TARGET in config else inside


def _accepted(config: Any, known: Mapping[str, Any]) -> dict[str, Any]:
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


def _fill(model: nn.Module, content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    try:
        dtype = dtype_named(content["dtype"])
        if working_dtype(model) != dtype:
            model.to(dtype)
        load_weights(model, content["ema"], also=dtype)
    except InvalidValueError as error:
        raise CheckpointError(f"the weights in {path} belong to another model: {error}") from error
