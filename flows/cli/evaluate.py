"""`flows evaluate`: test a trained flow, with error bars."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import torch
from omegaconf import DictConfig

from flows.cli.config import OPEN_PARTS, plain_settings, run_with_hydra, with_changes
from flows.cli.errors import readable_errors
from flows.datasets import Energy
from flows.errors import InvalidValueError
from flows.evaluation import importance_weights, likelihood, outlier_scores, part_batches
from flows.training.checkpoint import run_folder
from flows.training.folder import write_result
from flows.training.runs import build_dataset, load_run, place
from flows.training.settings import instantiate
from flows.training.state import seeded
from flows.training.summary import aligned, likelihood_dict, to_json


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; `arguments` are those of the command line by default."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with readable_errors("evaluate", arguments):
        run_with_hydra(evaluate, "evaluate", arguments)


def evaluate(composed: DictConfig) -> float:
    """Evaluate with the composed settings; returns the NLL, or the free energy of an energy without samples."""
    with readable_errors():
        settings = plain_settings(composed)
        run = load_run(settings["checkpoint"], settings["trust"])
        config = with_changes(run.config, {part: settings.get(part) for part in OPEN_PARTS["evaluate"]})
        dataset = build_dataset(config)
        flow = place(run.flow, settings["device"], settings["dtype"])
        flow.divergence, flow.solver = (instantiate(config[name], name) for name in ("divergence", "solver"))
        part, draws, batch_size = settings["part"], settings["num_draws"], settings["batch_size"]
        generator = seeded(torch.Generator(), settings["seed"], part)
        rows, figures, weights, result = [], {}, None, None
        if isinstance(dataset, Energy):
            number = dataset.num_test if part == "test" else dataset.num_validation
            weights = importance_weights(flow, dataset, number, batch_size, generator, "samples")
            rows, figures = weights.table(), {"importance_weights": weights.as_dict()}
        if dataset.has_samples:
            batches, num_points = part_batches(flow, dataset, part, batch_size)
            result = likelihood(flow, batches, generator, settings["solver_error_points"], part, num_points, draws)
            rows, figures = rows + result.table(dataset.entropy), figures | likelihood_dict(result, dataset.entropy)
        content = {
            "checkpoint": str(run.checkpoint),
            "step": run.step,
            "part": part,
            **figures,
            **{part: config[part] for part in OPEN_PARTS["evaluate"]},
        }
        default = run_folder(run.checkpoint) / "evaluations" / f"{datetime.now():%Y-%m-%d_%H-%M-%S_%f}.json"
        output = Path(settings["output"] or default)
        if settings["outliers"] is not None:
            if result is None:
                raise InvalidValueError(f"outliers need the likelihood of data, and {dataset.name} has no samples")
            other = None if settings["outliers"] == "shuffled" else instantiate(settings["outliers"], "outliers")
            scores = outlier_scores(flow, dataset, result, part, other, batch_size, generator, draws)
            content |= scores.as_dict()
            rows += [*scores.table(), ("scores", str(write_result(output.with_suffix(".csv"), scores.csv())))]
        write_result(output, to_json(content))
        estimator = flow.divergence.bind(flow.bind()).description
        first = [("data", f"{dataset.name}, {part}"), ("with", f"{estimator}, {flow.solver.method}")]
        print(aligned([*first, *rows, ("file", str(output))]))
        if result is not None:
            return result.nll
        assert weights is not None
        return weights.free_energy
