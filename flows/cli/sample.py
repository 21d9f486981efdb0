"""`flows sample`: draw from a trained flow into a file, with a plot beside it."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from flows import plots
from flows.cli.arguments import KEPT, refuse
from flows.cli.config import check_output, is_given, plain_settings, run_with_hydra, with_changes
from flows.cli.errors import readable_errors
from flows.cli.grammar import readable_arguments
from flows.cli.jobs import read_json
from flows.datasets import Dataset
from flows.datasets.recognition.recognition import recognised, without_noise
from flows.errors import FlowsError, InvalidValueError
from flows.models.cnf import CNF
from flows.models.few_steps import fit_grid
from flows.objectives.checks import check_contexts
from flows.samples import (
    ENDINGS,
    SamplingInterrupted,
    chosen_context,
    comparable_points,
    draw_samples,
    save_samples,
)
from flows.solvers import ODESolver
from flows.training.building import build_dataset
from flows.training.files import run_folder
from flows.training.loading import LoadedRun, load_run, place
from flows.training.settings import instantiate
from flows.training.trusted import may_download
from flows.writing import to_json, write_text

TABLES = (".csv", ".parquet")
PICTURE = ".png"
FITTED_POINTS = 256  # that a grid of times is fitted to
GRIDS = "grids.json"  # of a run: the grids that were fitted to it


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; `arguments` are those of the command line by default."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with readable_errors("sample", arguments):
        arguments = readable_arguments(arguments)
        refuse(arguments, {**KEPT, "objective": "nothing is trained", "evaluation": "nothing is tested"})
        run_with_hydra(sample, "sample", arguments)


def sample(composed: DictConfig) -> None:
    """Sample with the composed settings."""
    with readable_errors():
        settings = plain_settings(composed)
        check_output(settings["output"], *ENDINGS, PICTURE)
        run = load_run(settings["checkpoint"], settings["trust"])
        config = with_changes(run.config, {part: settings.get(part) for part in ("data", "solver")})
        run.flow.solver = instantiate(config["solver"], "solver")
        flow = place(run.flow, settings["device"])
        if settings["guidance"] is not None:
            flow = guided(flow, settings["guidance"], run.config)
        generator = torch.Generator().manual_seed(settings["seed"])
        default = run_folder(run.checkpoint) / "samples" / f"{datetime.now():%Y-%m-%d_%H-%M-%S_%f}.npy"
        output = Path(settings["output"] or default)
        drawn_alone = output.suffix == PICTURE
        network = may_download(settings.get("data"), settings["trust"])
        dataset, unknown = None, ""
        if settings["plot"] or drawn_alone or output.suffix in TABLES or settings.get("data"):
            dataset, unknown = readable_dataset(config, run, network, bool(settings.get("data")))
        context = sampling_contexts(
            run,
            lambda: dataset or recognised(run.data, build_dataset(config, True, network, run.conditions))[0],
            settings["num_samples"],
            settings["class"],
            settings["context"],
            bool(settings.get("data")),
        )
        count = settings["num_samples"] if context is None else len(context)
        if settings["evaluations"] is not None:
            flow.solver = few_evaluations(flow, run, settings["evaluations"], context, settings)
        progress = "samples" if settings["progress_bar"] else None
        batch_size, stopped = settings["batch_size"] if is_given("batch_size") else None, False
        try:
            samples = draw_samples(flow, count, batch_size, generator, context, progress)
        except SamplingInterrupted as interruption:
            samples, stopped = interruption.samples, True
            if not len(samples):
                raise
            context = None if context is None else context[: len(samples)]
        samples, noisy = without_noise(run.data, samples)
        columns = run.data.get("columns") if dataset is None else dataset.columns
        given = None if run.conditions is None or context is None else run.conditions.decode(context)
        each = count // settings["num_samples"]
        if not drawn_alone:
            save_samples(output, samples, columns, flow.transform.num_levels, given, 1 if stopped else each)
            contexts = f", {settings['num_samples']:,} for each context" if each > 1 else ""
            asked = f" of {count:,}" if stopped else ""
            print(f"{len(samples):,}{asked} samples of shape {tuple(samples.shape[1:])} in {output}{contexts}")
        if noisy:
            print(f"rounded to the values of the data, since noise was added to them in training: {', '.join(noisy)}")
        if settings["plot"] or drawn_alone:
            picture = output.with_suffix(PICTURE)
            points = None if dataset is None else comparable_points(dataset, context)
            plots.save_samples(picture, samples, points, columns)
            print(f"picture in {picture}" + (f", of the samples alone: {unknown}" if unknown else ""))
        if stopped:
            raise KeyboardInterrupt


def few_evaluations(
    flow: CNF, run: LoadedRun, evaluations: int, context: Tensor | None, settings: Mapping[str, Any]
) -> ODESolver:
    """A solver with that many evaluations at times fitted to the flow.

    The grid lies in the folder of the run, and later samples take it again. Prints the settings that give it, too.
    """
    file = run_folder(run.checkpoint) / GRIDS
    weight = settings["guidance"]
    key = f"{run.checkpoint.name}, step {run.step}, {evaluations} evaluations"
    key += "" if weight in (None, 1) else f", guidance {weight:g}"
    if context is not None:  # a grid that is fitted to one class may not suit another
        rows = context.double().unique(dim=0).cpu().numpy()
        key += f", contexts {hashlib.sha256(rows.tobytes()).hexdigest()[:8]}"
    known = read_json(file) or {}
    try:
        solver, whence = ODESolver(known[key]["method"], grid=known[key]["grid"]), f" from {file}"
    except (LookupError, TypeError, FlowsError):  # none yet, or somebody wrote into the file
        generator = torch.Generator().manual_seed(settings["seed"])
        if context is not None:
            context = context[torch.randperm(len(context), generator=generator)[:FITTED_POINTS]]
        solver, whence = fit_grid(flow, evaluations, context=context, generator=generator), f", kept in {file}"
        entry = {"method": solver.method, "grid": list(solver.grid or ())}
        try:
            write_text(file, to_json({**known, key: entry}))
        except OSError:  # the run may belong to somebody else
            whence = ""
    grid = ",".join(f"{time:.4g}" for time in solver.grid or ())
    print(f"{evaluations} evaluations: solver={solver.method} solver.step_size=null solver.grid=[{grid}]{whence}")
    return solver


def guided(flow: CNF, weight: float, config: Mapping[str, Any]) -> CNF:
    """The flow under guidance of this weight; with 1, the flow itself.

    Raises:
        InvalidValueError: the flow takes no context, or no stage of its run trained it without one.
    """
    found = flow.guided(weight)
    if weight == 1:
        return flow
    stages = config.get("objective")  # none in a file that holds a model alone
    if stages and not any((stage.get("objective") or {}).get("context_dropout") for stage in stages.values()):
        raise InvalidValueError(
            f"guidance={weight:g} leads away from the flow without a context, and no stage of this run left out "
            "contexts, so that flow has not been trained; train with objective.flow_matching.objective.context_dropout="
            "0.1, or leave out guidance"
        )
    return found


def sampling_contexts(
    run: LoadedRun,
    dataset: Callable[[], Dataset],  # called only if the contexts come from the data
    num_samples: int,
    label: int | str | None = None,
    values: Any = None,
    chosen_data: bool = False,
) -> Tensor | None:  # (n, *context)
    """The context of each sample: the chosen one for all, or else contexts of the data.

    With several chosen contexts, `num_samples` of each.
    """
    names = run.data.get("class_names")
    chosen = chosen_context(run.context_shape, run.num_classes, label, values, run.conditions, names)
    if chosen is not None and chosen.ndim > len(run.context_shape or ()):
        return chosen.repeat_interleave(num_samples, 0)
    if chosen is not None:
        return chosen.expand(num_samples, *chosen.shape)
    if run.context_shape is None:
        return None
    if "data" not in run.config and not chosen_data:
        example = f"{run.conditions.example()}" if run.conditions else "[...]"
        given = "class=..." if run.num_classes else f"context={example}"
        raise InvalidValueError(
            f"the samples of this flow need contexts of shape {run.context_shape}, and {run.checkpoint} holds a model "
            f"and no data to take them from; give {given}, or choose data, such as data=tabular data.path=FILE"
        )
    return dataset().contexts(num_samples)


def readable_dataset(
    config: Mapping[str, Any], run: LoadedRun, network: bool = False, chosen: bool = False
) -> tuple[Dataset | None, str]:
    """The data to compare samples with, or `None` and the reason why they cannot be read.

    If the user has `chosen` them, errors are raised. Only with `network` may they be downloaded.
    """
    if not chosen and "data" not in run.config:
        return None, "the file holds no data to compare them with; data=... chooses some"
    try:
        dataset = build_dataset(config, True, network, run.conditions)
        if run.context_shape is not None:
            check_contexts(run.flow, dataset)
        dataset, _ = recognised(run.data, dataset)
    except FlowsError as error:
        if chosen:
            raise
        return None, f"the data cannot be read ({error})"
    return (dataset, "") if dataset.has_samples else (None, f"{dataset.name} has no samples")
