"""Compares what a checkpoint holds with the model, the optimiser and the stages of a run."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from flows.errors import InvalidValueError
from flows.training.blueprint import check_shapes
from flows.training.checkpoint import EXTRA
from flows.training.unpickling import DTYPES, STORAGES

DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in (*STORAGES.values(), *DTYPES.values())}
LATER_OPTIONS = {  # that only some versions of torch have
    "capturable",
    "decoupled_weight_decay",
    "differentiable",
    "foreach",
    "fused",
    "maximize",
}
MUST_BE_FINITE = ("loss", "gradient_norm")
EXAMPLE = (2, 3, 5, 7, 11, 13)  # its first sizes are a shape by which to tell what an optimiser keeps for a parameter


def dtype_named(name: Any) -> torch.dtype:
    """The floating-point dtype with that name, such as float32.

    Raises:
        InvalidValueError: there is none.
    """
    dtype = DTYPE_NAMES.get(name) if isinstance(name, str) else None
    if dtype is None or not dtype.is_floating_point:
        raise InvalidValueError(f"its dtype must be a floating-point type such as float32, got {str(name)[:100]!r}")
    return dtype


def check_weights(
    weights: Mapping[str, Any],
    model: nn.Module,
    also: torch.dtype | None = None,
) -> None:
    """Require weights that the model has made, or might have.

    Args:
        weights: a state of the model.
        model: with finite weights.
        also: another dtype that a floating-point tensor may have.

    Raises:
        InvalidValueError: names the tensor that is missing, unexpected, of another shape or dtype, or not finite.
    """
    own = model.state_dict()
    check_shapes(weights, own)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, expected in own.items():
        weight = weights[name]
        if not isinstance(expected, Tensor):
            continue
        converted = also is not None and weight.dtype == also and expected.is_floating_point()
        if weight.dtype != expected.dtype and not converted:
            raise InvalidValueError(f"{name} is {_short(weight.dtype)}, and {_short(expected.dtype)} was expected")
        trained = name in parameters and parameters[name].requires_grad
        if trained or (weight.is_floating_point() and bool(expected.isfinite().all())):
            check_finite(name, weight)  # a frozen mask may hold -inf


def check_finite(name: str, value: Tensor) -> None:
    """Raise `InvalidValueError` if a number is NaN or infinite."""
    if (value.is_floating_point() or value.is_complex()) and not bool(value.isfinite().all()):
        wrong = int((~value.isfinite()).sum())
        raise InvalidValueError(f"{name} holds {wrong:,} NaN or infinite of its {value.numel():,} numbers")


def load_weights(model: nn.Module, weights: Mapping[str, Any], also: torch.dtype | None = None) -> None:
    """Load a state into a model, after `check_weights`.

    Raises:
        InvalidValueError: it does not fit, or a module refuses its extra state.
    """
    check_weights(weights, model, also)
    if also is not None:
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name in weights and tensor.is_floating_point() and weights[name].dtype != tensor.dtype:
                tensor.data = tensor.data.to(also)
    try:
        model.load_state_dict(weights)
    except Exception as error:
        if not any(name.endswith(EXTRA) for name in weights):
            raise InvalidValueError(str(error)) from error
        raise InvalidValueError(
            f"a module refuses its weights or its extra state ({type(error).__name__}: {str(error)[:300]}); its "
            "set_extra_state must take what its get_extra_state has returned"
        ) from error


def check_optimizer(
    state: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    build: Callable[..., torch.optim.Optimizer],
    rate: float,
    steps: int,
) -> None:
    """Require the state of an optimiser of this kind, for these parameters.

    Args:
        state: as in the checkpoint.
        optimizer: new, of the parameters of the run.
        build: what made it, called as `build(parameters, lr=rate)`.
        steps: that it has taken.

    Raises:
        InvalidValueError: names what does not fit.
    """
    own, kind = optimizer.state_dict(), type(optimizer).__name__
    groups, kept = state.get("param_groups"), state.get("state")
    if not isinstance(groups, list) or not isinstance(kept, dict) or len(groups) != len(own["param_groups"]):
        raise InvalidValueError(f"the optimiser's state is none of {kind} with {len(own['param_groups'])} group(s)")
    for i, (group, mine) in enumerate(zip(groups, own["param_groups"], strict=True)):
        if not isinstance(group, dict) or group.get("params") != mine["params"]:
            raise InvalidValueError(f"group {i} of the optimiser's state has other parameters than this model")
        missing, other = set(mine) - set(group) - LATER_OPTIONS, set(group) - set(mine) - LATER_OPTIONS
        if missing or other:
            names = ", ".join(sorted(map(str, missing | other)))[:200]
            raise InvalidValueError(f"the optimiser's state is none of {kind}: group {i} differs in {names}")
        for key in group.keys() & mine.keys():
            _check_option(f"{key} of group {i} of the optimiser's state", group[key], mine[key])
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    example_of = functools.cache(functools.partial(_example_state, build, rate))  # some factorise matrices alone
    if steps and not kept and example_of(2):
        raise InvalidValueError(f"the optimiser's state is empty after {steps:,} steps")
    for index, values in kept.items():
        if type(index) is not int or not 0 <= index < len(parameters) or not isinstance(values, dict):
            raise InvalidValueError(f"the optimiser's state has no parameter {index!r} to belong to")
        example = example_of(parameters[index].ndim)
        if example is not None and set(values) != set(example):
            raise InvalidValueError(
                f"the optimiser's state is none of {kind}: it keeps {', '.join(map(str, values))[:200] or 'nothing'} "
                f"for parameter {index}, and {', '.join(map(str, example)) or 'nothing'} was expected"
            )
        for key, value in values.items():
            _check_kept(
                f"the optimiser's {key} of parameter {index}", value, parameters[index], (example or {}).get(key)
            )


def _check_option(name: str, value: Any, mine: Any) -> None:
    numbers = all(type(option) in (int, float) for option in (value, mine))
    if not numbers and None not in (value, mine) and type(value) is not type(mine):
        raise InvalidValueError(f"{name} is {str(value)[:100]!r}, and a {type(mine).__name__} was expected")
    if numbers and not math.isfinite(value) and math.isfinite(mine):
        raise InvalidValueError(f"{name} is {value}")


def _check_kept(name: str, value: Any, parameter: Tensor, example: Any) -> None:
    if isinstance(example, Tensor) != isinstance(value, Tensor) and example is not None:
        raise InvalidValueError(f"{name} is a {type(value).__name__}, and a {type(example).__name__} was expected")
    if not isinstance(value, Tensor):
        return
    alike = () if parameter.ndim > len(EXAMPLE) else EXAMPLE[: parameter.ndim]
    if isinstance(example, Tensor) and tuple(example.shape) in (alike, ()):
        shape = parameter.shape if example.shape else example.shape
        if value.shape != shape:
            raise InvalidValueError(f"{name} has the shape {tuple(value.shape)}, and {tuple(shape)} was expected")
        dtype = parameter.dtype if example.shape else example.dtype
        if example.dtype == torch.float32 and value.dtype != dtype:
            raise InvalidValueError(f"{name} is {_short(value.dtype)}, and {_short(dtype)} was expected")
    if value.is_floating_point() and bool(value.isnan().any()):  # squares may overflow, and training goes on
        raise InvalidValueError(f"{name} holds {int(value.isnan().sum()):,} NaN of its {value.numel():,} numbers")


def _example_state(build: Callable[..., torch.optim.Optimizer], rate: float, ndim: int) -> Mapping[str, Any] | None:
    """What an optimiser keeps for a parameter of so many dimensions after a step; None if it cannot be told."""
    if ndim > len(EXAMPLE):
        return None
    parameter = nn.Parameter(torch.zeros(EXAMPLE[:ndim], dtype=torch.float32))
    parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer = build([parameter], lr=rate)
        optimizer.step()
        return optimizer.state_dict()["state"].get(0, {})
    except Exception:  # another package's may want more than that
        return None


def check_means(means: Mapping[str, Any]) -> None:
    """Require sums and counts of metrics; a NaN stands for a standard error that one probe cannot tell.

    Raises:
        InvalidValueError: names what does not fit.
    """
    sums, counts = means.get("sums"), means.get("counts")
    if not isinstance(sums, dict) or not isinstance(counts, dict) or sums.keys() != counts.keys():
        raise InvalidValueError("the metrics must have sums and counts of the same names")
    for name, total in sums.items():
        number = type(total) in (int, float) or (isinstance(total, Tensor) and total.numel() == 1)
        if not number or type(counts[name]) is not int or counts[name] < 1:
            raise InvalidValueError(
                f"the metric {name} has the sum {str(total)[:100]} of {str(counts[name])[:100]} steps"
            )
        if name in MUST_BE_FINITE and not math.isfinite(float(total)):
            raise InvalidValueError(f"the metric {name} has the sum {float(total)}")


def check_position(position: Any, kind: type) -> None:
    """Require the fields of a `Position`, with values that a run can have.

    Raises:
        InvalidValueError: names the field.
    """
    names = {field.name for field in fields(kind)}
    if not isinstance(position, Mapping) or position.keys() != names:
        raise InvalidValueError(f"its position must have {', '.join(sorted(names))}")
    if not isinstance(position["stage"], (str, type(None))):
        raise InvalidValueError(f"its position has stage={str(position['stage'])[:100]}, and a name was expected")
    counts = ("step", "step_in_stage", "skipped")
    optional = ("best_step", "validated")
    for name in (*counts, *optional):
        value = position[name]
        if not (type(value) is int and value >= 0) and not (name in optional and value is None):
            raise InvalidValueError(f"its position has {name}={value!r}, and a count was expected")
    for name in ("seconds", "seconds_in_stage", "best_score"):
        value = position[name]
        if not (type(value) in (int, float) and math.isfinite(value)) and not (name == "best_score" and value is None):
            raise InvalidValueError(f"its position has {name}={value!r}, and a finite number was expected")
    starts = position["stage_starts"]
    rises = isinstance(starts, list) and all(type(start) is int for start in starts) and starts == sorted(starts)
    if not rises or (starts and starts[-1] + position["step_in_stage"] != position["step"]):
        raise InvalidValueError(
            f"its position is at odds with itself: step {position['step']}, {position['step_in_stage']} of them in a "
            f"stage, and stages that start at {str(starts)[:100]}"
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
