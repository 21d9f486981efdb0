"""Do a flow and its data suit each other?"""

from __future__ import annotations

import torch
from torch import nn

from flows.bases import NoDensityError
from flows.datasets import Dataset, Series
from flows.errors import DataWarning, InvalidTypeError, InvalidValueError, warn
from flows.fields import Field
from flows.models.cnf import CNF
from flows.models.neural_ode import NeuralODE
from flows.transforms import Transform

MAX_POINTS = 10_000  # of a table that are looked at
MAX_LOST = 0.02  # of the distinct values of a column; among 10,000 points float32 loses 0.0002 by chance


SERIES_RECIPE = "model=neural_ode and objective=trajectory_matching, as experiment=spiral does"
DENSITY_RECIPE = "model=cnf and an objective such as flow_matching, as experiment=moons does"


def check_kind(model: nn.Module, dataset: Dataset) -> None:
    """Raise `InvalidTypeError` unless time series meet a neural ODE, and other data another model."""
    is_series, kind, name = isinstance(dataset, Series), type(model).__name__, getattr(dataset, "name", "?")
    if is_series and not isinstance(model, NeuralODE):
        raise InvalidTypeError(
            f"the data {name!r} are time series, which a flows.NeuralODE is trained on, got {kind}; use {SERIES_RECIPE}"
        )
    if not is_series and isinstance(model, NeuralODE):
        raise InvalidTypeError(
            f"a {kind} is trained on time series, such as data=spiral, and the data {name!r} are single points; choose "
            f"time series, or use {DENSITY_RECIPE}"
        )


def check_flow(model: nn.Module, dataset: Dataset) -> CNF:
    """Return the model, or raise `InvalidTypeError` or `InvalidValueError` unless it is a flow for these data."""
    if not isinstance(model, CNF):
        instead = (
            f"use {SERIES_RECIPE}" if isinstance(model, NeuralODE) else "write a flows.objectives.Objective for it"
        )
        raise InvalidTypeError(f"this objective trains a flows.CNF, got {type(model).__name__}; {instead}")
    check_kind(model, dataset)
    check_contexts(model, dataset)
    check_levels(model.transform, dataset)
    check_digits(model, dataset)
    return model


def check_base(flow: CNF, user: str, instead: str) -> None:
    """Raise `InvalidTypeError` unless the density of the base is positive everywhere, as `user` supposes.

    Args:
        user: what supposes it, such as "MaximumLikelihood".
        instead: what to use with other bases.
    """
    base, name = flow.base, type(flow.base).__name__
    if not base.has_density:
        raise NoDensityError(f"{user} needs the density of the base, but {base.why_no_density()}")
    if not base.is_positive_everywhere:
        raise InvalidTypeError(
            f"{user} needs a base whose density is positive everywhere, and that of {name} is 0 outside of its "
            f"support: points that the flow leads there have an infinite NLL; {instead}, or choose another base, such "
            "as base=normal or base=student_t"
        )


def check_digits(flow: CNF, dataset: Dataset) -> None:
    """Warn about columns of a table whose distinct values the flow's dtype cannot tell apart."""
    if dataset.columns is None or not dataset.has_samples:
        return
    points = dataset.reference()[:MAX_POINTS]
    with torch.no_grad():
        y = flow.transform(points.to(flow.device))[0].to(flow.dtype).flatten(1).cpu()
    lost = []
    for name, before, after in zip(dataset.columns, points.flatten(1).T, y.T, strict=False):
        known, left = len(before.unique()), len(after.unique())
        if left < (1 - MAX_LOST) * known:
            lost.append(f"{name!r} ({left:,} of {known:,} distinct values are left)")
    if lost:
        warn(
            f"the data {dataset.name!r} lose digits in {flow.dtype} after the transform "
            f"{type(flow.transform).__name__}: column {', '.join(lost)}; use transform=standardise, remove "
            "outliers, or compute with hardware.precision=64-true",
            DataWarning,
        )


def check_contexts(model: CNF | NeuralODE, dataset: Dataset) -> None:
    """Raise `InvalidValueError` unless the field takes the contexts of the data, or both have none.

    What a field takes, `BoundField` says: by its `context_shape`, or by the third argument of its `forward`.
    """
    view, shape = model.bind(), dataset.context_shape
    name, has = type(model.field).__name__, f"the data {dataset.name!r} has contexts of shape {shape}"
    if shape is not None and not view.takes_context:
        raise InvalidValueError(
            f"{has}, and the field {name} takes none; choose a field with a context_shape, such as MLP, or give your "
            "own a third argument, forward(t, x, context)"
        )
    stated = getattr(model, "context_shape", view.context_shape)
    if stated is not None and shape is None:
        raise InvalidValueError(
            f"the field {name} needs contexts of shape {stated}, and the data {dataset.name!r} has none"
        )
    if shape is None or stated is None:
        return
    inputs = dataset.input_columns if isinstance(dataset, Series) else []
    if inputs and isinstance(model.field, Field) and not model.field.takes_inputs:
        raise InvalidValueError(
            f"the data {dataset.name!r} have inputs that change in time, {', '.join(inputs)}, and the "
            f"field {name} would read the whole table of them, the future too, as numbers that stay constant; use "
            "field=forced, which takes u(t) at each time, or leave data.input_columns out"
        )
    suits = tuple(stated) == tuple(shape) if isinstance(model, CNF) else view.suits_contexts(shape)
    if not suits:
        raise InvalidValueError(f"{has}, and the field {name} was built for contexts of shape {tuple(stated)}")


def check_levels(transform: Transform, dataset: Dataset) -> None:
    """Raise `InvalidValueError` unless the transform dequantises the levels of the data, or both have none.

    A density on whole numbers could grow without bound, and its likelihood would mean nothing.
    """
    kind, expected, found = type(transform).__name__, dataset.num_levels, transform.num_levels
    if expected is not None and found is None:
        raise InvalidValueError(
            f"the data {dataset.name!r} are whole numbers from 0 to {expected - 1}, on which a density can grow "
            f"without bound, and the transform {kind} leaves them so; choose one that begins with Dequantise, such as "
            "transform=dequantise_logit"
        )
    if expected is None and found is not None:
        raise InvalidValueError(
            f"the transform {kind} dequantises whole numbers, and the data {dataset.name!r} are continuous; choose "
            "another one, such as transform=standardise"
        )
    if expected != found:
        raise InvalidValueError(
            f"the data {dataset.name!r} have {expected} levels, and the transform was built for {found}; build it with "
            f"num_levels={expected}"
        )


def check_samples(dataset: Dataset) -> None:
    """Raise `InvalidValueError` if the data has no points to train on."""
    if not getattr(dataset, "has_samples", True):  # data of the user's own need not say
        raise InvalidValueError(
            f"{dataset.name!r} is an energy without samples, which this objective would train on; choose "
            "objective=reverse_kl"
        )
