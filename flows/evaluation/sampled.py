"""Metrics of draws, for a flow and a part of its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flows.datasets import Batch, Dataset
from flows.errors import InvalidValueError
from flows.evaluation.evaluator import Report, known
from flows.evaluation.likelihood import part_batches
from flows.evaluation.metrics import Measurement, PredictiveMetric, SampleMetric, TwoSampleMetric
from flows.models.cnf import CNF

DRAWS_AT_ONCE = 100_000  # in one solve


def measured(
    flow: CNF,
    dataset: Dataset,
    metrics: Sequence[SampleMetric],
    part: str,
    generator: torch.Generator,
    points: int | None = None,
) -> Mapping[str, Measurement]:
    """Measure draws of a flow against a part of the data.

    Two-sample metrics compare as many draws as points. With contexts they compare pairs of point and context: the
    draws take the contexts of one half of the part, the data are the other half. Predictive metrics draw for each
    point, given its context.

    Raises:
        InvalidValueError: a metric cannot be computed from these data.
    """
    if not metrics:
        return {}
    most = max(getattr(metric, "max_points", 1) for metric in metrics)
    batch = first_points(flow, dataset, part, 2 * most, points)
    found: dict[str, Measurement] = {}
    with torch.no_grad():
        two_sample = [metric for metric in metrics if isinstance(metric, TwoSampleMetric)]
        if two_sample:
            draws, data = _pairs(flow, batch, generator)
            found |= {metric.name: metric(draws, data) for metric in two_sample}
        for metric in metrics:
            if isinstance(metric, PredictiveMetric):
                chosen = batch[: metric.max_points]
                found[metric.name] = metric(ensemble(flow, chosen, metric.num_draws, generator), chosen.x)
    return {metric.name: found[metric.name] for metric in metrics}


def with_metrics(report: Report, found: Mapping[str, Measurement]) -> Report:
    """Add figures with their standard errors to a report."""
    figures = {name: known(one.value) for name, one in found.items()}
    errors = {f"{name}_se": known(one.standard_error) for name, one in found.items()}
    rows = [*report.rows, *((name.replace("_", " "), str(one)) for name, one in found.items())]
    return replace(report, metrics={**report.metrics, **figures, **errors}, rows=rows)


def first_points(flow: CNF, dataset: Dataset, part: str, count: int, points: int | None) -> Batch:
    """Return the first points of a part, on the device of the flow."""
    batches, _ = part_batches(flow, dataset, part, count, count if points is None else min(points, count))
    batch = next(iter(batches), None)
    if batch is None:
        raise InvalidValueError(f"the {part} part of {dataset.name!r} is empty, so its draws cannot be measured")
    return batch


def ensemble(flow: CNF, batch: Batch, num_draws: int, generator: torch.Generator) -> Tensor:  # (S, n, *event)
    """Return draws for each point, given its context."""
    size = max(1, DRAWS_AT_ONCE // len(batch))
    shape = (len(batch),) if batch.context is None else ()
    draws = [
        flow.sample((min(size, num_draws - start), *shape), batch.context, generator)
        for start in range(0, num_draws, size)
    ]
    return torch.cat(draws)


def _pairs(flow: CNF, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws and independent data, each beside its context."""
    if batch.context is None:
        half = max(len(batch) // 2, min(len(batch), 2))
        return flow.sample((half,), generator=generator), batch.x[:half]
    middle = len(batch) // 2
    given, data = batch.context[:middle], batch[middle:]
    assert data.context is not None  # as the batch has contexts
    draws = flow.sample((), given, generator)
    together = (_beside(draws, given), _beside(data.x, data.context))
    return together


def _beside(x: Tensor, context: Tensor) -> Tensor:
    return torch.cat([x.flatten(1).double(), context.flatten(1).double()], 1)
