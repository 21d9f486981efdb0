"""The settings of estimators to measure on a field."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from flows.compare.trajectory import Trajectory
from flows.divergence import DivergenceEstimator
from flows.errors import InvalidValueError
from flows.vector_field import BoundField


@dataclass(frozen=True)
class Candidate:
    """One setting of an estimator, with its labels."""

    label: str  # Hutchinson(num_probes=4, probes=orthonormal)
    kind: str  # the same without its numbers: Hutchinson(probes=orthonormal)
    estimator: DivergenceEstimator


@dataclass(frozen=True)
class Candidates:
    """What to measure, and what not."""

    measured: list[Candidate]  # each setting once
    left_out: dict[str, str]  # by name, why an estimator cannot or need not be measured
    chosen: dict[str, str]  # by name, the label of the estimator that another chose
    configured: str | None = None  # the label of the setting that the flow itself has


def gather(
    estimators: Mapping[str, DivergenceEstimator],
    budgets: Sequence[int],
    field: nn.Module,
    trajectory: Trajectory,
    configured: DivergenceEstimator | None = None,
) -> Candidates:
    """The settings of the estimators that apply to the field, and the `configured` one as it is.

    Raises:
        ValueError: there is none.
    """
    view = trajectory.bind(field)
    found, left_out, chosen = [], {}, {}
    for name, given in estimators.items():
        estimator = given.bind(view)
        if type(estimator) is not type(given):
            chosen[name] = estimator
        reason = not_applicable(estimator, field, trajectory)
        worthwhile = [] if reason else settings(estimator, budgets, view)
        if not worthwhile:
            left_out[name] = reason or (
                f"costs {estimator.cost} products here, more than the {view.dimension} of Exact()"
            )
        found += worthwhile
    own = []
    if configured is not None and not not_applicable(configured.bind(view), field, trajectory):
        own = [configured.bind(view)]
    if not found:
        raise InvalidValueError(
            "none of the estimators applies: " + "; ".join(f"{n}: {r}" for n, r in left_out.items())
        )
    named = labelled([*found, *own, *chosen.values()])
    measured: dict[str, Candidate] = {}
    count = len(found) + len(own)
    for candidate in named[:count]:
        measured.setdefault(candidate.label, candidate)
    labels = (candidate.label for candidate in named[count:])
    configured_label = named[len(found)].label if own else None
    return Candidates(list(measured.values()), left_out, dict(zip(chosen, labels, strict=True)), configured_label)


def not_applicable(estimator: DivergenceEstimator, field: nn.Module, trajectory: Trajectory) -> str | None:
    """The estimator's own error on this field; `None` if it applies."""
    one_point = trajectory.first(1)
    x = one_point.x[0]
    try:
        bound = estimator.bind(one_point.bind(field))
        _ = bound.cost  # raises where the field lacks what the estimator needs
        with torch.no_grad():
            bound(one_point.times[0], x, bound.draw_probes(x))
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        return str(error)
    return None


def settings(estimator: DivergenceEstimator, budgets: Sequence[int], field: BoundField) -> list[DivergenceEstimator]:
    """The estimator as given, at each budget, and at its cheapest exact setting.

    Only settings of fewer than d products are kept.

    At d products `Exact()` serves; only an estimator that never takes fewer is kept at d.
    """
    found = [estimator, *(estimator.with_budget(budget, field) for budget in budgets)]
    limit = estimator.with_budget(field.dimension, field)
    if limit.bind(field).is_exact:
        found.append(limit)
    costs = [one.bind(field).cost for one in found]
    below = [(cost, one) for cost, one in zip(costs, found, strict=True) if cost < field.dimension]
    at = [one for cost, one in zip(costs, found, strict=True) if cost == field.dimension]
    return [one for _, one in sorted(below, key=lambda pair: pair[0])] or at[:1]


def labelled(estimators: Iterable[DivergenceEstimator]) -> list[Candidate]:
    """Label estimators so that different settings have different labels.

    A label shows the options that differ from the defaults of the class, and the numbers that vary in this list.
    """
    given = list(estimators)
    numbers: dict[type, dict[str, set[str]]] = {}
    for estimator in given:
        for name, value in _options(estimator).items():
            numbers.setdefault(type(estimator), {}).setdefault(name, set()).add(_text(value))
    found = []
    for estimator in given:
        kind, shown = [], []
        for option in _fields(estimator):
            value = getattr(estimator, option.name)
            number = isinstance(value, int) and not isinstance(value, bool)
            changed = _text(value) != _text(option.default)
            if changed or (number and len(numbers[type(estimator)][option.name]) > 1):
                shown.append(f"{option.name}={_text(value)}")
                kind += [] if number else shown[-1:]
        label = _call(estimator, shown)
        found.append(Candidate(label, _call(estimator, kind), estimator))
    return found


def _fields(estimator: DivergenceEstimator) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(estimator) if dataclasses.is_dataclass(estimator) else ()


def _options(estimator: DivergenceEstimator) -> dict[str, object]:
    return {option.name: getattr(estimator, option.name) for option in _fields(estimator)}


def _call(estimator: DivergenceEstimator, options: Sequence[str]) -> str:
    return type(estimator).__name__ + (f"({', '.join(options)})" if options else "")


def _text(value: object) -> str:
    """A value as a config would give it."""
    if isinstance(value, (bool, int, float, str)) or value is None:
        return str(value)
    return type(value).__name__.lower()
