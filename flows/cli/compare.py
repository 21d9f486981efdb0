"""`flows compare`: every divergence estimator on one flow, with a recommendation."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor

from flows.checks import check_number, whole_number
from flows.cli.config import instances, plain_settings, run_with_hydra
from flows.cli.errors import readable_errors
from flows.cli.grammar import readable_arguments
from flows.compare import advise, as_dict, as_text, error_against_cost
from flows.compare import compare as compare_estimators
from flows.datasets import Dataset
from flows.errors import FlowsError, InvalidValueError
from flows.evaluation import part_batches
from flows.models.cnf import CNF
from flows.objectives.checks import check_contexts
from flows.training import TensorBoardLogger
from flows.training.annotations import SettingsError
from flows.training.building import build_dataset, build_flow, refuse_nulls
from flows.training.files import RUNS, check_place, new_folder, open_run_folder, run_folder
from flows.training.loading import load_run, place
from flows.training.trusted import may_download
from flows.writing import to_json, write_result

PARTS_OF_A_CHECKPOINT = ("field", "transform", "divergence", "solver")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; `arguments` are those of the command line by default."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with readable_errors("compare_estimators", arguments):
        arguments = readable_arguments(arguments)
        run_with_hydra(compare, "compare_estimators", arguments)


def compare(composed: DictConfig) -> None:
    """Compare with the composed settings."""
    with readable_errors():
        settings = plain_settings(composed)
        whole_number("points", settings["points"], 2)
        check_number("affordable", settings["affordable"], at_least=0)
        estimators = instances("divergence", settings["estimators"], settings["variants"])
        if settings["output_dir"] is not None:
            check_place(settings["output_dir"])
        compared = compared_flow(settings, HydraConfig.get().overrides.task)
        given = settings["output_dir"]
        folder = new_folder(compared.folder / "comparisons") if given is None else open_run_folder(given)
        try:
            points, context = compared.points(settings["part"], settings["points"])
            comparison = compare_estimators(
                compared.flow,
                points,
                estimators,
                context=context,
                seed=settings["seed"],
                progress=settings["progress_bar"],
                configured=compared.flow.divergence,
                **settings["measure"],
            )
        except FlowsError as error:
            with contextlib.suppress(OSError):
                folder.rmdir()  # unless there is something in it
            if str(error).partition(" ")[0] not in settings["measure"]:
                raise
            raise SettingsError(f"measure.{error}") from error
        advice = advise(comparison, settings["affordable"])
        text, figure = as_text(comparison, advice), error_against_cost(comparison)
        print(text)
        write_result(folder / "comparison.png", figure)
        content = {"checkpoint": compared.checkpoint and str(compared.checkpoint), "data": compared.dataset.name}
        write_result(folder / "comparison.json", to_json({**content, **as_dict(comparison, advice)}))
        logger = TensorBoardLogger(folder)
        table = "".join(f"    {line}\n" for line in text.splitlines())
        logger.log({"estimators/table": table, "estimators/error_against_cost": figure}, step=0)
        logger.close()
        print(f"\nFigures, picture and TensorBoard events in {folder}")


@dataclass(frozen=True)
class ComparedFlow:
    """A flow on its device, and its data."""

    flow: CNF
    dataset: Dataset
    checkpoint: Path | None  # None: untrained

    def points(self, part: str, number: int) -> tuple[Tensor, Tensor | None]:
        """The first points of a split with their contexts, on the flow's device."""
        batches, _ = part_batches(self.flow, self.dataset, part, number)
        batch, like = next(iter(batches)), next(iter([*self.flow.parameters(), *self.flow.buffers()]))
        x = batch.x.to(like.device, torch.promote_types(batch.x.dtype, like.dtype))
        return x, None if batch.context is None else batch.context.to(like.device)

    @property
    def folder(self) -> Path:
        """The folder of the run, or that of all runs on the data."""
        return RUNS / self.dataset.name if self.checkpoint is None else run_folder(self.checkpoint)


def compared_flow(settings: Mapping[str, Any], overrides: Sequence[str]) -> ComparedFlow:
    """The flow of a checkpoint with its own data, or the untrained flow of the settings.

    Args:
        settings: those of `conf/compare_estimators.yaml`.
        overrides: from the command line. With a checkpoint they may change the data alone.

    Raises:
        CheckpointError: there is no usable checkpoint.
        InvalidValueError: an override would change the model in the checkpoint.
    """
    if settings["checkpoint"] is None:
        torch.manual_seed(settings["seed"])
        dataset = build_dataset(settings)
        refuse_nulls(settings, dataset)
        flow = build_flow(settings, dataset.event_shape, dataset)
        return ComparedFlow(place(flow.eval(), settings["device"], settings["dtype"]), dataset, None)
    parts = {override.lstrip("+~").partition("=")[0].partition(".")[0] for override in overrides}
    changed = [part for part in PARTS_OF_A_CHECKPOINT if part in parts]
    if changed:
        raise InvalidValueError(
            f"{' and '.join(changed)} cannot be chosen with a checkpoint, which has its own; leave out "
            f"{changed[0]}=..., or leave out checkpoint=... for an untrained flow"
        )
    run = load_run(settings["checkpoint"], settings["trust"])
    chosen = settings if "data" in parts else None
    network = chosen is not None or may_download(None, settings["trust"])
    dataset = build_dataset(chosen or run.config, chosen is None, network, run.conditions)
    if dataset.event_shape != run.flow.event_shape:
        raise InvalidValueError(
            f"the points of {dataset.name!r} have the shape {dataset.event_shape}, and those of the flow "
            f"{run.flow.event_shape}; choose other data"
        )
    check_contexts(run.flow, dataset)
    return ComparedFlow(place(run.flow, settings["device"], settings["dtype"]), dataset, run.checkpoint)
