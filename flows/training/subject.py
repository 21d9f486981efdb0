"""A flow to examine: from a checkpoint, or untrained from settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flows.datasets import Dataset
from flows.errors import InvalidValueError
from flows.evaluation import part_batches
from flows.models.cnf import CNF
from flows.training.checkpoint import run_folder
from flows.training.folder import RUNS
from flows.training.runs import build_dataset, build_flow, load_run, place

MODEL = ("field", "transform", "solver")  # the parts of a flow beside its estimator


@dataclass(frozen=True)
class Subject:
    """A flow on its device, and its data."""

    flow: CNF
    dataset: Dataset
    checkpoint: Path | None  # None: untrained

    def points(self, part: str, number: int) -> tuple[Tensor, Tensor | None]:
        """The first points of the part called "test" or "validation" with their context, on the flow's device."""
        batches, _ = part_batches(self.flow, self.dataset, part, number)
        batch, like = next(iter(batches)), next(iter([*self.flow.parameters(), *self.flow.buffers()]))
        return batch.x.to(like), None if batch.context is None else batch.context.to(like.device)

    @property
    def folder(self) -> Path:
        """Where results about it belong: the folder of its run, or of the runs on its data."""
        return RUNS / self.dataset.name if self.checkpoint is None else run_folder(self.checkpoint)


def subject(settings: Mapping[str, Any], overrides: Sequence[str]) -> Subject:
    """The flow of ``settings["checkpoint"]`` with its own data, or else the untrained flow of the settings.

    Args:
        settings: ``checkpoint``, ``trust``, ``seed``, ``device``, ``dtype`` and the parts ``data``, ``transform``,
            ``field``, ``divergence`` and ``solver`` of ``conf/train.yaml``.
        overrides: from the command line. Of a checkpoint only the data may be others than in training.

    Raises:
        CheckpointError: there is no usable checkpoint.
        ValueError: an override would change the model in the checkpoint.
    """
    if settings["checkpoint"] is None:
        torch.manual_seed(settings["seed"])
        dataset = build_dataset(settings)
        flow = build_flow(settings, dataset.event_shape, dataset)
        return Subject(place(flow.eval(), settings["device"], settings["dtype"]), dataset, None)
    parts = {override.lstrip("+~").partition("=")[0].partition(".")[0] for override in overrides}
    changed = [part for part in MODEL if part in parts]
    if changed:
        raise InvalidValueError(
            f"{' and '.join(changed)} cannot be chosen with a checkpoint, which has its own; leave out "
            f"{changed[0]}=..., or leave out checkpoint=... for an untrained flow"
        )
    run = load_run(settings["checkpoint"], settings["trust"])
    dataset = build_dataset(settings if "data" in parts else run.config)
    return Subject(place(run.flow, settings["device"], settings["dtype"]), dataset, run.checkpoint)
