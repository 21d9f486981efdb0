"""Whether flow, data and objectives suit each other."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from flows.datasets import Dataset
from flows.errors import InvalidValueError
from flows.models.cnf import CNF
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
