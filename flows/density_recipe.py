"""How a density estimator trains: its flow, its stages, and what it validates."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from flows.bases import Base
from flows.checks import whole_number
from flows.datasets import Table
from flows.divergence import DivergenceEstimator
from flows.encoders import Embedding
from flows.errors import InvalidTypeError
from flows.evaluation import DensityEvaluator, Report
from flows.fields import MLP
from flows.models.cnf import CNF
from flows.naming import by_name
from flows.objectives import FlowMatching, MaximumLikelihood
from flows.training import Stage
from flows.transforms import Standardise

WARMUP_STEPS = 10  # of the likelihood, at most


@dataclass(frozen=True)
class Recipe:
    """Settings of a run on a table, as a yaml of `conf/experiment` has them."""

    hidden: Sequence[int]
    steps: int
    polish: int
    batch_sizes: tuple[int, int]
    learning_rates: tuple[float, float]
    weight_decay: float
    validate_every: int

    def stages(self, patience: int | None) -> dict[str, Stage]:
        """Flow matching, and a few steps of the likelihood."""
        (size, last_size), (rate, last_rate) = self.batch_sizes, self.learning_rates
        stages = {
            "flow_matching": Stage(FlowMatching(), self.steps, batch_size=size, learning_rate=rate, patience=patience)
        }
        if self.polish:
            stages["maximum_likelihood"] = Stage(
                MaximumLikelihood(),
                self.polish,
                batch_size=last_size,
                learning_rate=last_rate,
                warmup_steps=min(WARMUP_STEPS, self.polish // 4),
            )
        return stages


TABLE = Recipe((64, 64), 3000, 50, (256, 256), (2e-3, 1e-3), 0.01, 200)
CONDITIONAL_TABLE = Recipe((32, 32), 2000, 400, (512, 256), (2e-3, 2e-3), 0.1, 50)


def untrained_flow(
    data: Table, hidden: Sequence[int], field: Any, base: Any, divergence: DivergenceEstimator | str | None
) -> CNF:
    """An untrained flow, fitted to the data at both ends.

    Args:
        hidden: widths of the network, where no `field` is given.
        field, base, divergence: see `DensityEstimator`.
    """
    encoder = None
    if data.context_shape is not None:
        encoder = Embedding(data.context_shape, conditions=data.conditions)
        encoder.fit(data.reference_contexts())  # type: ignore[arg-type]
    features = None if encoder is None else encoder.features_shape
    if field is None:
        field = MLP(data.event_shape, hidden, "silu", None, context_shape=features)
    elif isinstance(field, nn.Module):
        field = copy.deepcopy(field)
    elif callable(field):
        field = field(event_shape=data.event_shape, context_shape=features)
    else:
        raise InvalidTypeError(
            "field must be a module, or what makes one from event_shape and context_shape, such as "
            f"flows.fields.Planar, got {field!r}"
        )
    transform = Standardise(data.event_shape)
    base = copy.deepcopy(base)
    if isinstance(base, str):  # a base of contexts needs their shape
        contexts = {} if data.context_shape is None else {"context_shape": data.context_shape}
        base = by_name(Base, base, "base", event_shape=data.event_shape, **contexts)
    flow = CNF(
        field,
        divergence,
        None,
        base,
        transform,
        event_shape=data.event_shape,
        encoder=encoder,
    )
    return flow.fit_ends(data.reference(), data.reference_contexts())


@dataclass(frozen=True)
class FitEvaluator(DensityEvaluator):
    """Validates, and leaves the test to whoever holds rows out."""

    def test(self, model: nn.Module) -> Report:
        return Report({}, ())


def widths(hidden: Any) -> tuple[int, ...]:
    """Widths of hidden layers, checked."""
    if isinstance(hidden, str) or not isinstance(hidden, Sequence | np.ndarray) or not len(hidden):
        raise InvalidTypeError(f"hidden must be a list of widths, such as (64, 64), got {hidden!r}")
    return tuple(whole_number("hidden", width) for width in hidden)
