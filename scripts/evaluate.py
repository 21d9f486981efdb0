"""The likelihood of a trained flow, with error bars; see `python scripts/evaluate.py --help`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

from flows.datasets import Energy
from flows.evaluation import importance_weights, likelihood, outlier_scores, part_batches
from flows.training.checkpoint import run_folder
from flows.training.console import readable_errors
from flows.training.folder import write_result
from flows.training.overrides import PARTS, register_parts, with_changes
from flows.training.runs import build_dataset, load_run, place
from flows.training.settings import instantiate, plain_settings
from flows.training.state import seeded
from flows.training.summary import aligned, likelihood_dict, to_json

CONFIG = Path(__file__).resolve().parents[1] / "conf" / "evaluate.yaml"


@hydra.main(version_base="1.3", config_path=str(CONFIG.parent), config_name=CONFIG.stem)
def main(composed: DictConfig) -> float:
    with readable_errors():
        settings = plain_settings(composed)
        run = load_run(settings["checkpoint"], settings["trust"])
        config = with_changes(run.config, {part: settings.get(part) for part in PARTS})
        dataset = build_dataset(config)
        flow = place(run.flow, settings["device"], settings["dtype"])
        flow.divergence, flow.solver = (instantiate(config[name], name) for name in ("divergence", "solver"))
        part, draws, batch_size = settings["part"], settings["num_draws"], settings["batch_size"]
        generator = seeded(torch.Generator(), settings["seed"], part)
        rows, figures = [], {}
        if isinstance(dataset, Energy):
            number = dataset.num_test if part == "test" else dataset.num_validation
            result = importance_weights(flow, dataset, number, batch_size, generator, "samples")
            rows, figures = result.table(), {"importance_weights": result.as_dict()}
        if dataset.has_samples:
            batches, num_points = part_batches(flow, dataset, part, batch_size)
            result = likelihood(flow, batches, generator, settings["solver_error_points"], part, num_points, draws)
            rows, figures = rows + result.table(dataset.entropy), figures | likelihood_dict(result, dataset.entropy)
        content = {
            "checkpoint": str(run.checkpoint),
            "step": run.step,
            "part": part,
            **figures,
            **{part: config[part] for part in PARTS},
        }
        default = run_folder(run.checkpoint) / "evaluations" / f"{datetime.now():%Y-%m-%d_%H-%M-%S_%f}.json"
        output = Path(settings["output"] or default)
        if settings["outliers"] is not None:
            other = None if settings["outliers"] == "shuffled" else instantiate(settings["outliers"], "outliers")
            scores = outlier_scores(flow, dataset, result, part, other, batch_size, generator, draws)
            content |= scores.as_dict()
            rows += [*scores.table(), ("scores", str(write_result(output.with_suffix(".csv"), scores.csv())))]
        write_result(output, to_json(content))
        estimator = flow.divergence.description(flow.event_shape, flow.field)
        first = [("data", f"{dataset.name}, {part}"), ("with", f"{estimator}, {flow.solver.method}")]
        print(aligned([*first, *rows, ("file", str(output))]))
        return result.nll if dataset.has_samples else result.free_energy


if __name__ == "__main__":
    register_parts()
    with readable_errors(CONFIG):
        main()
