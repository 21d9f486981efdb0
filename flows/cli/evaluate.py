"""`flows evaluate`: test a trained flow, with error bars."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig

from flows.cli.arguments import KEPT, refuse
from flows.cli.config import check_output, is_given, plain_settings, run_with_hydra, with_changes
from flows.cli.errors import readable_errors
from flows.cli.grammar import readable_arguments
from flows.datasets import Dataset, Energy
from flows.datasets.recognition.recognition import caution_about_outliers, recognised
from flows.errors import DataWarning, InvalidValueError, warn
from flows.evaluation import (
    DensityEvaluator,
    DistanceEvaluator,
    EnergyEvaluator,
    Likelihood,
    OutlierScores,
    Report,
    RowScores,
    TrajectoryEvaluator,
    aligned,
)
from flows.evaluation.sampled import with_metrics
from flows.models.cnf import CNF
from flows.models.neural_ode import NeuralODE
from flows.objectives.checks import check_base, check_contexts, check_kind
from flows.training.amounts import check_evaluation
from flows.training.building import build_dataset
from flows.training.files import run_folder
from flows.training.loading import LoadedRun, load_run, place
from flows.training.scored import all_rows, is_another_file
from flows.training.settings import TARGET, instantiate
from flows.training.trusted import may_download
from flows.writing import to_json, write_result

MADE = ("shuffled", "plain")  # outliers that are made of the data
PARTS = ("data", "divergence", "solver")  # as in training unless the settings change them
SCORES = ("nll", "free_energy", "wasserstein2", "mse")  # the first of them in a report is what the program returns


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; `arguments` are those of the command line by default."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with readable_errors("evaluate", arguments):
        arguments = readable_arguments(arguments)
        refuse(
            arguments,
            {
                **KEPT,
                "objective": "nothing is trained",
                "evaluation": "use divergence=..., batch_size=..., num_draws=... or solver_error_points=...",
            },
        )
        run_with_hydra(evaluate, "evaluate", arguments)


def evaluate(composed: DictConfig) -> float | None:
    """Evaluate with the composed settings.

    Returns:
        The NLL, the free energy of an energy, a distance, or the mean square error of predicted time series.
    """
    with readable_errors():
        settings = plain_settings(composed)
        check_output(settings["output"], ".json")
        check_output(settings["rows"], ".csv", ".parquet", name="rows")
        run = load_run(settings["checkpoint"], settings["trust"])
        of_series = isinstance(run.model, NeuralODE)
        if of_series:
            _refuse_densities(settings)
        parts = [part for part in PARTS if part != "divergence" or not of_series]
        config = with_changes(run.config, {part: settings.get(part) for part in parts})
        dataset, part = _chosen_data(run, config, settings)
        settings["part"] = part
        check_kind(run.model, dataset)
        check_contexts(run.model if isinstance(run.model, NeuralODE) else run.flow, dataset)
        dataset, data = recognised(run.data, dataset, part)
        if of_series:
            model, report, scores, result = _tested_series(run, dataset, config, settings)
        else:
            model, report, scores, result = _tested_density(run, dataset, config, settings)
        rows, shown = list(report.rows), "all rows" if dataset.is_scored else part
        content = {
            "checkpoint": str(run.checkpoint),
            "step": run.step,
            "part": shown,
            **report.metrics,
            "evaluated_with": report.evaluated_with,
            **{name: config[name] for name in parts},
            "data_differ_from_run": list(data.differences),
        }
        if dataset.is_scored and not data.hashes:
            rows.append(("trained on", "unknown: the file of the model keeps no rows of its training data"))
        elif dataset.is_scored or (data.differences and data.hashes):
            content["points_trained_on"], _ = data.trained_on(part)
            words = data.trained_on_in_words(part) if content["points_trained_on"] else "see the warning"
            if dataset.is_scored:
                rows.append(("trained on", data.trained_on_in_words(part).replace("test points", "rows")))
            else:
                rows.append(("caution", f"other data or another split than in the run: {words}"))
        default = run_folder(run.checkpoint) / "evaluations" / f"{datetime.now():%Y-%m-%d_%H-%M-%S_%f}.json"
        output = Path(settings["output"] or default)
        if scores is not None:
            content |= scores.as_dict()
            rows += [*scores.table(), ("scores", str(write_result(output.with_suffix(".csv"), scores.csv())))]
            if scores.unresolved is None:
                from flows import plots  # slow to import

                figure = plots.outlier_scores(scores.scored(), scores.name)
                rows.append(("picture", str(write_result(output.with_suffix(".png"), figure))))
        if settings["rows"] is not None:
            if result is None:
                raise InvalidValueError("rows=... needs the likelihood of data, and there is none; leave it out")
            table = RowScores.of(result, dataset, part, data)
            rows.append(("rows", str(table.save(settings["rows"]))))
        write_result(output, to_json(content))
        source = f"{dataset.name}, {shown}" + (f" of {getattr(dataset, 'source', '')}" if dataset.is_scored else "")
        first = [("data", source), ("solver", model.solver.method)]
        print(aligned([*first, *rows, ("file", str(output))]))
        return next((report.metrics[name] for name in SCORES if name in report.metrics), None)


Tested = tuple[CNF | NeuralODE, Report, OutlierScores | None, Likelihood | None]


def _chosen_data(
    run: LoadedRun, config: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[Dataset, Literal["validation", "test"]]:
    """The data, and the part to evaluate on: without one, all rows of a file that is not that of the run."""
    part, network = settings["part"], may_download(settings.get("data"), settings["trust"])
    if part not in (None, "all", "test", "validation"):
        raise InvalidValueError(f"part must be test, validation or all, got {part!r}")
    if part == "all" or (part is None and is_another_file(run, config, settings.get("data"))):
        if settings["outliers"]:
            raise InvalidValueError(
                "outliers are told from the validation and test data of the run; leave out outliers, or evaluate on "
                "the data of the run"
            )
        return all_rows(run, config), "test"
    return build_dataset(config, True, network, run.conditions), part or "test"


def _tested_density(run: LoadedRun, dataset: Dataset, config: Mapping[str, Any], settings: Mapping[str, Any]) -> Tested:
    """The flow, its report, the scores of outliers if they were asked for, and the likelihood of each point."""
    outliers = settings["outliers"] or None
    flow = place(run.flow, settings["device"], settings["dtype"])
    flow.divergence, flow.solver = (instantiate(config[name], name) for name in ("divergence", "solver"))
    divergence = (config.get("evaluation") or {}).get("divergence", "auto")
    if isinstance(divergence, Mapping):
        divergence = instantiate(divergence, "evaluation.divergence")
    if settings["rows"] and not is_given("solver_error_points"):
        settings = {**settings, "solver_error_points": dataset.num_test + dataset.num_validation}
    options = {
        "divergence": flow.divergence if settings.get("divergence") else divergence,
        **{name: settings[name] for name in ("points", "batch_size", "solver_error_points", "part", "seed")},
    }
    has_likelihood = flow.base.is_positive_everywhere
    if outliers is not None:
        check_base(flow, "outliers", "leave out outliers")
    if outliers is not None and not dataset.has_samples:
        raise InvalidValueError(f"outliers need the likelihood of data, and {dataset.name} has no samples")
    if isinstance(outliers, str) and outliers not in MADE:
        raise InvalidValueError(
            f"outliers must be {' or '.join(MADE)}, or a data set: data@outliers=NAME, or for your own images "
            f"data@outliers=images outliers.path=FOLDER; got {outliers!r}"
        )
    if isinstance(outliers, Mapping) and TARGET not in outliers:
        name = next(iter(outliers))
        raise InvalidValueError(
            f"outliers.{name} is a setting of a data set, and none is chosen; choose one as well, such as "
            f"data@outliers=images outliers.{name}={outliers[name]}"
        )
    other = outliers if outliers is None or outliers in MADE else instantiate(outliers, "outliers")
    if isinstance(other, Dataset) and (message := caution_about_outliers(run.data, other, settings["part"])):
        warn(message, DataWarning)
    density = DensityEvaluator(dataset, num_draws=settings["num_draws"], metrics=_metrics(config), **options)
    check_evaluation(density, flow, dataset, part="")
    likelihood = None
    if isinstance(dataset, Energy):
        report = EnergyEvaluator(dataset, **options).test(flow)
        if settings["rows"] is not None:
            raise InvalidValueError(f"rows=... needs points of data, and {dataset.name} is an energy; leave it out")
        likelihood = density.likelihood(flow) if outliers is not None else None
    elif not has_likelihood:
        report, likelihood = DistanceEvaluator(dataset, **options).test(flow), None
    else:
        likelihood = density.likelihood(flow)
        report = with_metrics(density.report(likelihood, flow), density.measured(flow))
    scores = None
    if outliers is not None and likelihood is not None:
        scores = density.outliers(flow, likelihood, other)
    return flow, report, scores, likelihood


def _metrics(config: Mapping[str, Any]) -> list[Any] | None:
    """The metrics of draws that the run reports; None: those that suit the data."""
    chosen = config.get("evaluation") or {}
    given = chosen.get("metrics") if str(chosen.get("_target_")).endswith(".DensityEvaluator") else None
    if given is None:
        return None
    return [instantiate(one, "evaluation.metrics") if isinstance(one, Mapping) else one for one in given]


def _refuse_densities(settings: Mapping[str, Any]) -> None:
    """Refuse settings of densities for a run on time series."""
    given = [name for name in ("divergence", "outliers") if settings.get(name) or is_given(name)]
    given += ["rows"] if settings["rows"] is not None else []
    given += ["num_draws"] if settings["num_draws"] != 1 else []
    if given:
        raise InvalidValueError(f"{', '.join(given)} is for densities, and the model is a neural ODE; leave it out")


def _tested_series(run: LoadedRun, dataset: Dataset, config: Mapping[str, Any], settings: Mapping[str, Any]) -> Tested:
    """The neural ODE and its report; series count as points."""
    model = run.model
    assert isinstance(model, NeuralODE)  # callers ask
    model.solver = instantiate(config["solver"], "solver")
    place(model, settings["device"], settings["dtype"])
    evaluator = TrajectoryEvaluator(
        dataset,
        batch_size=settings["batch_size"],
        max_series=settings["points"],
        solver_error_series=settings["solver_error_points"],
        part=settings["part"],
        span=run.data.get("training_span"),  # the data may be others than those of the run
    )
    evaluator.check(model)
    return model, evaluator.test(model), None, None
