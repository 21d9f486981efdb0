"""The likelihood of a trained flow, with error bars; see `python scripts/evaluate.py --help`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from flows.evaluation import likelihood, part_batches
from flows.training.checkpoint import run_folder
from flows.training.console import readable_errors
from flows.training.folder import write_result
from flows.training.rebuild import build_dataset, instantiate, load_run, place, with_changes
from flows.training.state import seeded
from flows.training.summary import aligned, likelihood_dict, to_json

CONFIG = Path(__file__).resolve().parents[1] / "conf" / "evaluate.yaml"


@hydra.main(version_base="1.3", config_path=str(CONFIG.parent), config_name=CONFIG.stem)
def main(composed: DictConfig) -> float:
    with readable_errors():
        settings = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        run = load_run(settings["checkpoint"], settings["trust"])
        config = with_changes(run.config, {part: settings.get(part) for part in ("data", "divergence", "solver")})
        dataset = build_dataset(config)
        flow = place(run.flow, settings["device"], settings["dtype"])
        flow.divergence, flow.solver = instantiate(config["divergence"]), instantiate(config["solver"])
        batches, num_points = part_batches(flow, dataset, settings["part"], settings["batch_size"])
        result = likelihood(
            flow,
            batches,
            seeded(torch.Generator(), settings["seed"], settings["part"]),
            settings["solver_error_points"],
            progress=settings["part"],
            num_points=num_points,
        )
        content = {
            "checkpoint": str(run.checkpoint),
            "step": run.step,
            "part": settings["part"],
            **likelihood_dict(result, dataset.entropy),
            **{part: config[part] for part in ("data", "divergence", "solver")},
        }
        default = run_folder(run.checkpoint) / "evaluations" / f"{datetime.now():%Y-%m-%d_%H-%M-%S_%f}.json"
        output = write_result(settings["output"] or default, to_json(content))
        estimator, method = type(flow.divergence).__name__, flow.solver.method
        rows = [("data", f"{dataset.name}, {settings['part']}"), ("with", f"{estimator}, {method}")]
        print(aligned([*rows, *result.table(dataset.entropy), ("file", str(output))]))
        return result.nll


if __name__ == "__main__":
    with readable_errors(CONFIG):
        main()
