"""Whether flow, data and objectives suit each other, and which contexts to sample under."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flows.datasets import Dataset, one_hot
from flows.errors import InvalidValueError
from flows.models.cnf import CNF
from flows.training.runs import LoadedRun, build_dataset
from flows.training.stage import Stage


def check_context_shape(flow: CNF, dataset: Dataset) -> None:
    """Raise ``ValueError`` unless the field of ``flow`` takes the contexts of ``dataset``, or both have none.

    A foreign field that does not state its ``context_shape`` passes if its ``forward`` has a third argument.
    """
    field, name, shape = flow.field, type(flow.field).__name__, dataset.context_shape
    if not hasattr(field, "context_shape"):
        parameters = inspect.signature(field.forward).parameters.values()
        takes_one = len(parameters) > 2 or any(p.kind == p.VAR_POSITIONAL for p in parameters)
        if shape is not None and not takes_one:
            raise InvalidValueError(
                f"the data {dataset.name!r} has contexts of shape {shape}, and the field {name} takes none: its "
                f"forward needs a third argument, forward(t, x, context)"
            )
    elif shape is not None and field.context_shape is None:
        raise InvalidValueError(
            f"the data {dataset.name!r} has contexts of shape {shape}, and the field {name} is unconditional; choose "
            f"a field that takes a context_shape, such as MLP"
        )
    elif shape is None and field.context_shape is not None:
        raise InvalidValueError(
            f"the field {name} needs contexts of shape {field.context_shape}, and the data {dataset.name!r} has none"
        )
    elif shape is not None and tuple(field.context_shape) != tuple(shape):
        raise InvalidValueError(
            f"the data {dataset.name!r} has contexts of shape {shape}, and the field {name} was built for contexts of "
            f"shape {tuple(field.context_shape)}"
        )


def check_samples(dataset: Dataset, stages: Mapping[str, Stage]) -> None:
    """Raise ``ValueError`` if a stage trains on points of data that has none, or without contexts that data has."""
    for name, stage in stages.items():
        uses_data = getattr(stage.objective, "uses_data", True)
        if not uses_data and dataset.context_shape is not None:
            raise InvalidValueError(
                f"the stage {name} draws its points from the flow, without contexts, and the data {dataset.name!r} "
                f"has contexts of shape {dataset.context_shape}; choose data without, or an objective that takes "
                "points from the data, such as objective=maximum_likelihood"
            )
        if uses_data and not dataset.has_samples:
            raise InvalidValueError(
                f"{dataset.name!r} is an energy without samples, which the stage {name} would train on; choose "
                "objective=reverse_kl"
            )


def guidance_caveat(config: Mapping[str, Any]) -> str | None:
    """What to tell who samples with guidance from a run with these settings; ``None``: nothing."""
    stages = config.get("objective", {})
    if any(stage.get("objective", {}).get("context_dropout") for stage in stages.values()):
        return None
    return (
        "no stage of this run left out contexts, so the field without one, which guidance leads away from, has not "
        "been trained; train with objective.flow_matching.objective.context_dropout=0.1"
    )


def chosen_context(
    context_shape: Sequence[int] | None,
    num_classes: int | None,
    label: int | None = None,
    values: float | Sequence[float] | None = None,
) -> Tensor | None:  # (*context), or None where neither is given
    """The context that a user asks for, by the number of a class or value by value.

    Raises:
        ValueError: the flow has no contexts, or the choice does not fit them.
    """
    if label is None and values is None:
        return None
    if context_shape is None:
        raise InvalidValueError("the flow is unconditional and takes neither a class nor a context")
    if label is not None and values is not None:
        raise InvalidValueError("give a class or a context, not both")
    if label is not None:
        if num_classes is None:
            raise InvalidValueError(
                f"the contexts of this flow are no classes but {tuple(context_shape)} numbers; give a context instead"
            )
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < num_classes:
            raise InvalidValueError(f"class must be a whole number from 0 to {num_classes - 1}, got {label!r}")
        return one_hot(torch.tensor(label), num_classes)
    try:
        context = torch.tensor(values, dtype=torch.get_default_dtype())
    except (TypeError, ValueError) as error:
        raise InvalidValueError(f"context must be a list of numbers, got {values!r}") from error
    if context.numel() != math.prod(context_shape):
        raise InvalidValueError(f"context must have {math.prod(context_shape)} numbers, got {context.numel()}")
    return context.reshape(tuple(context_shape))


def sampling_contexts(
    run: LoadedRun,
    dataset: Callable[[], Dataset],  # where contexts come from that are not chosen; asked only then
    num_samples: int,
    label: int | None = None,
    values: float | Sequence[float] | None = None,
) -> Tensor | None:  # (num_samples, *context)
    """The context of each sample of a trained flow: the chosen one, else those of the data."""
    chosen = chosen_context(run.context_shape, run.num_classes, label, values)
    if chosen is not None:
        return chosen.expand(num_samples, *chosen.shape)
    return None if run.context_shape is None else dataset().contexts(num_samples)


def readable_dataset(config: Mapping[str, Any], chosen: bool = False) -> tuple[Dataset | None, str]:
    """The data to compare samples with; where they have moved or have no points None, and why.

    Data that were ``chosen`` for this have no excuse.
    """
    try:
        dataset = build_dataset(config)
    except (ValueError, OSError) as error:
        if chosen:
            raise
        return None, f"the data cannot be read ({error})"
    return (dataset, "") if dataset.has_samples else (None, f"{dataset.name} has no samples")


def comparable_points(dataset: Dataset, context: Tensor | None) -> Tensor:  # (n, *event)
    """Points of the data to show beside samples under ``context`` (m, *context).

    Those of the same context where all samples share one and the data has it, else all of them.
    """
    if context is not None and bool((context == context[0]).all()):
        batch = next(iter(dataset.validation_batches(dataset.num_validation)))
        same = (batch.context == context[0].to(batch.context)).flatten(1).all(1)
        if same.any():
            return batch.x[same]
    return dataset.reference()
