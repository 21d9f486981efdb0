"""Draw from a trained flow; see `python scripts/sample.py --help`."""

from __future__ import annotations

from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

from flows import plots
from flows.training.checkpoint import run_folder
from flows.training.conditioning import comparable_points, sampling_contexts
from flows.training.console import readable_errors
from flows.training.rebuild import build_dataset, load_run, place, with_changes
from flows.training.sampling import draw, save_samples
from flows.training.settings import instantiate, plain_settings

CONFIG = Path(__file__).resolve().parents[1] / "conf" / "sample.yaml"


@hydra.main(version_base="1.3", config_path=str(CONFIG.parent), config_name=CONFIG.stem)
def main(composed: DictConfig) -> None:
    with readable_errors():
        settings = plain_settings(composed)
        run = load_run(settings["checkpoint"], settings["trust"])
        config = with_changes(run.config, {"solver": settings.get("solver")})
        run.flow.solver = instantiate(config["solver"], "solver")
        flow = place(run.flow, settings["device"])
        if settings["guidance"] is not None:
            flow = flow.guided(settings["guidance"])
        generator = torch.Generator().manual_seed(settings["seed"])
        context = sampling_contexts(run, settings["num_samples"], settings["class"], settings["context"])
        samples = draw(flow, settings["num_samples"], settings["batch_size"], generator, context)
        dataset = build_dataset(config) if settings["plot"] else None
        dataset = dataset if dataset is not None and dataset.has_samples else None
        output = Path(settings["output"] or run_folder(run.checkpoint) / "samples.npy")
        columns = getattr(dataset, "columns", None)
        save_samples(output, samples, columns, flow.transform.num_levels)
        print(f"{len(samples):,} samples of shape {tuple(samples.shape[1:])} in {output}")
        if dataset is not None:
            picture = output.with_suffix(".png")
            plots.save_samples(picture, samples, comparable_points(dataset, context), columns)
            print(f"picture in {picture}")


if __name__ == "__main__":
    with readable_errors(CONFIG):
        main()
