"""A model as settings: what builds it again, read off the model itself.

Modules of this package, and subclasses of its families, remember the arguments of their constructors
(`flows.arguments.Built`), so nothing has to be written down for a new class. Tensors among the arguments are kept
apart, and the settings refer to them as `{"_tensor_": name}`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, MixtureSameFamily

from flows.arguments import LEFT_OUT, Built
from flows.conditions import Conditions
from flows.errors import FlowsError, InvalidTypeError, InvalidValueError
from flows.expectations import public_path
from flows.models.cnf import CNF
from flows.models.neural_ode import NeuralODE
from flows.models.precision import working_dtype
from flows.training.settings import PARTIAL, TARGET
from flows.training.trusted import DISTRIBUTIONS

TENSOR = "_tensor_"  # refers to a tensor that is kept apart
PARTS = ("field", "divergence", "solver", "base", "transform", "encoder")
GIVEN_LATER = (Conditions,)  # arguments that whoever builds the model knows from elsewhere


# Parameters of which a distribution has one, however many of the others it has computed from it.
ONE_OF = (("covariance_matrix", "precision_matrix", "scale_tril"), ("probs", "logits"))
INSIDE: dict[Any, dict[str, str]] = {  # attributes that hold arguments of another name or none of the parameters
    Independent: {"base_dist": "base_distribution", "reinterpreted_batch_ndims": "reinterpreted_batch_ndims"},
    MixtureSameFamily: {
        "mixture_distribution": "mixture_distribution",
        "component_distribution": "component_distribution",
    },
}


class UndescribedError(InvalidTypeError):
    """A part of a model is an object of which nothing tells how to build it again."""


@dataclass
class Description:
    """What builds a model again, except for its weights."""

    settings: dict[str, Any] | None  # by part, as `flows.training.building.build_model` takes them; None: unknown
    data: dict[str, Any]  # of the points and contexts: shapes, names, conditions
    dtype: str
    arguments: dict[str, Tensor] = field(default_factory=dict)  # tensors that the settings refer to


def describe_model(model: nn.Module, settings: Mapping[str, Any] | None = None) -> Description:
    """Describe a model.

    Args:
        model: a `CNF` or a `NeuralODE`.
        settings: of the parts that cannot be described, by name, such as `{"field": {"_target_": "my_package.Net"}}`.

    Raises:
        UndescribedError: names the part, and says what to write.
        InvalidTypeError: the model is neither.
    """
    if not isinstance(model, CNF | NeuralODE):
        raise InvalidTypeError(
            f"a model to save is a flows.CNF or a flows.NeuralODE, got {type(model).__name__}; for another module save "
            "its state_dict()"
        )
    given = dict(settings or {})
    unknown = sorted(set(given) - {*PARTS, "model"})
    if unknown:
        raise InvalidValueError(
            f"settings has {unknown[0]!r}, which is no part of a model; there are {', '.join(PARTS)}"
        )
    writer = _Writer(model.state_dict())
    found: dict[str, Any] = {}
    for part in PARTS:
        if part in given:
            found[part] = given[part]
        elif getattr(model, part, None) is not None:
            found[part] = writer.value(getattr(model, part), part)
    found["model"] = given.get("model", writer.model(model))
    return Description(found, describe_data(model), dtype_name(model), writer.arguments)


def describe_data(model: CNF | NeuralODE) -> dict[str, Any]:
    """What a model knows of its points and contexts, as a data set describes itself."""
    conditions = getattr(getattr(model, "encoder", None), "conditions", None)
    names = model.names
    return {
        "name": names.name,
        "event_shape": list(model.event_shape),
        "context_shape": _context_shape(model),
        "num_classes": names.num_classes,
        **({} if conditions is None else {"conditions": conditions.as_dict()}),
        "num_levels": model.transform.num_levels,
        "columns": None if names.columns is None else list(names.columns),
        "class_names": None if names.class_names is None else list(names.class_names),
    }


def dtype_name(model: nn.Module) -> str:
    """The name of the dtype that a model computes in, such as float32."""
    return str(working_dtype(model)).removeprefix("torch.")


def describe_part(description: Description, name: str, value: Any) -> None:
    """Add a part of something that is more than a model.

    Raises:
        UndescribedError: `value` cannot be described.
    """
    writer = _Writer({})
    description.settings = {**(description.settings or {}), name: writer.value(value, name)}
    description.arguments |= writer.arguments


def with_tensors(settings: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Settings with the tensors that they refer to.

    Raises:
        InvalidValueError: there is no tensor of that name.
    """
    if isinstance(settings, Mapping):
        if TENSOR in settings:
            name = settings[TENSOR]
            if set(settings) != {TENSOR} or not isinstance(
                tensors.get(name) if isinstance(name, str) else None, Tensor
            ):
                raise InvalidValueError(f"they refer to the tensor {str(name)[:100]!r}, which is not there")
            return tensors[name]
        return {key: with_tensors(value, tensors) for key, value in settings.items()}
    return [with_tensors(value, tensors) for value in settings] if isinstance(settings, list) else settings


class _Writer:
    """Turns objects into settings.

    Args:
        state: of the model; an argument that equals one of its tensors is not kept twice.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        self.arguments: dict[str, Tensor] = {}

    def model(self, model: nn.Module) -> dict[str, Any]:
        """The settings of the model without its parts."""
        built = self._built(model, "model")
        others = {name: value for name, value in built.arguments.items() if name not in (*PARTS, "event_shape")}
        return {TARGET: self._path(built.kind, "model")} | {
            name: self.value(value, f"model.{name}") for name, value in others.items()
        }

    def value(self, value: Any, where: str) -> Any:
        """A value as yaml can hold it."""
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        if isinstance(value, Tensor):
            return self._reference(value, where)
        if isinstance(value, Mapping):
            return {str(key): self.value(element, f"{where}.{key}") for key, element in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            return [self.value(element, f"{where}[{i}]") for i, element in enumerate(value)]
        if isinstance(value, CNF | NeuralODE):
            parts = {part: getattr(value, part, None) for part in PARTS}
            inside = {name: self.value(part, f"{where}.{name}") for name, part in parts.items() if part is not None}
            return {**self.model(value), **inside, "event_shape": list(value.event_shape)}
        if isinstance(value, nn.Module):
            return self._module(value, where)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {one.name: getattr(value, one.name) for one in dataclasses.fields(value) if one.init}
            return self._object(type(value), fields, where)
        if isinstance(value, Distribution):
            return self._distribution(value, where)
        if isinstance(value, functools.partial):
            if value.args:
                raise self._undescribed(f"{where} is a functools.partial with arguments by place", where)
            return {**self._object(value.func, value.keywords, where), PARTIAL: True}
        if inspect.isfunction(value) or inspect.isclass(value):
            return {TARGET: self._path(value, where), PARTIAL: True}
        raise self._undescribed(f"{where} is an object of class {type(value).__name__}", where)

    def _module(self, module: nn.Module, where: str) -> dict[str, Any]:
        if type(module).__module__.startswith("torch.nn.modules.activation"):  # keep their arguments as attributes
            names = inspect.signature(type(module).__init__).parameters
            kept = {name: getattr(module, name) for name in names if hasattr(module, name) and name != "inplace"}
            return {TARGET: f"torch.nn.{type(module).__name__}"} | kept
        built = self._built(module, where)
        own, arguments = built.kind.__module__.startswith("flows."), {}
        for name, value in built.arguments.items():
            current = getattr(module, name, None)
            if isinstance(value, nn.Module) and type(current) is type(value):
                value = current
            if isinstance(value, GIVEN_LATER):
                continue
            if value is LEFT_OUT and isinstance(current, Tensor):
                value = current
            if value is LEFT_OUT and not own:
                raise self._undescribed(f"{where}: the argument {name} of {built.kind.__name__} was not kept", where)
            if value is not LEFT_OUT:
                arguments[name] = value
        return self._object(built.kind, arguments, where)

    def _object(self, kind: Any, arguments: Mapping[str, Any], where: str) -> dict[str, Any]:
        inside = {name: self.value(value, f"{where}.{name}") for name, value in arguments.items()}
        return {TARGET: self._path(kind, where), **inside}

    def _distribution(self, value: Distribution, where: str) -> dict[str, Any]:
        kind = type(value)
        if kind not in DISTRIBUTIONS:
            raise self._undescribed(f"{where} is a distribution of class {kind.__name__}", where)
        names = INSIDE.get(kind) or {name: name for name in value.arg_constraints}
        for choice in ONE_OF:
            given = [name for name in choice if name in names and name in vars(value)]
            names = {name: to for name, to in names.items() if name not in choice or name in given[:1]}
        arguments = {argument: getattr(value, name) for name, argument in names.items()}
        return self._object(kind, arguments, where) | {TARGET: f"torch.distributions.{kind.__name__}"}

    def _reference(self, value: Tensor, where: str) -> dict[str, str]:
        value = value.detach()
        for name, tensor in self.state.items():
            alike = tensor.shape == value.shape and tensor.dtype == value.dtype and tensor.device == value.device
            if alike and torch.equal(tensor, value):
                return {TENSOR: name}
        self.arguments[where] = value
        return {TENSOR: where}

    def _built(self, module: nn.Module, where: str) -> Built:
        built = Built.of(module)
        if built is None:
            raise self._undescribed(
                f"{where} is a {type(module).__name__}, which does not remember the arguments of its constructor",
                where,
            )
        return built

    def _path(self, kind: Any, where: str) -> str:
        """The import path of a class or a function."""
        path = public_path(kind) if inspect.isclass(kind) else f"{kind.__module__}.{kind.__qualname__}"
        module, _, name = path.rpartition(".")
        found = getattr(sys.modules.get(module), name, None)
        if module == "__main__" or found is not kind:
            raise self._undescribed(
                f"{where} uses {getattr(kind, '__qualname__', kind)}, which no other program can import by its name "
                f"({path})",
                where,
            )
        return path

    def _undescribed(self, what: str, where: str) -> UndescribedError:
        part = where.partition(".")[0].partition("[")[0]
        return UndescribedError(
            f"{what}, so no file can say how to build it. Say it yourself, settings={{{part!r}: {{'_target_': "
            f"'my_package.MyClass', ...}}}} with the arguments of its constructor, and load with trust=['my_package']; "
            "or derive it from its family, such as flows.fields.Field, in a module of yours; or save "
            "weights_only=True, and load into a flow that you have built, flow=..."
        )


def _context_shape(model: CNF | NeuralODE) -> list[int] | None:
    shape = model.context_shape if isinstance(model, CNF) else model.bind().context_shape
    return None if shape is None else list(shape)


def try_to_describe(model: nn.Module) -> Description | None:
    """`describe_model`, or None where that is impossible."""
    try:
        return describe_model(model)
    except FlowsError:
        return None
