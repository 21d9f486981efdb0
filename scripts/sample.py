"""Draw from a trained flow; see `python scripts/sample.py --help`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

from flows import plots
from flows.training.checkpoint import run_folder
from flows.training.conditioning import comparable_points, guidance_caveat, readable_dataset, sampling_contexts
from flows.training.console import readable_errors
from flows.training.overrides import register_parts, with_changes
from flows.training.runs import build_dataset, load_run, place
from flows.training.sampling import draw, samples_file, save_samples
from flows.training.settings import instantiate, plain_settings

CONFIG = Path(__file__).resolve().parents[1] / "conf" / "sample.yaml"


@hydra.main(version_base="1.3", config_path=str(CONFIG.parent), config_name=CONFIG.stem)
def main(composed: DictConfig) -> None:
    with readable_errors():
        settings = plain_settings(composed)
        output = None if settings["output"] is None else samples_file(settings["output"])
        run = load_run(settings["checkpoint"], settings["trust"])
        config = with_changes(run.config, {part: settings.get(part) for part in ("data", "solver")})
        run.flow.solver = instantiate(config["solver"], "solver")
        flow = place(run.flow, settings["device"])
        if settings["guidance"] is not None:
            flow = flow.guided(settings["guidance"])
            if caveat := guidance_caveat(run.config):
                print(f"Caution: {caveat}")
        generator = torch.Generator().manual_seed(settings["seed"])
        output = output or run_folder(run.checkpoint) / "samples" / f"{datetime.now():%Y-%m-%d_%H-%M-%S_%f}.npy"
        dataset, unknown = None, ""
        if settings["plot"] or output.suffix == ".csv" or settings.get("data"):
            dataset, unknown = readable_dataset(config, chosen=bool(settings.get("data")))
        context = sampling_contexts(
            run,
            lambda: build_dataset(config) if dataset is None else dataset,
            settings["num_samples"],
            settings["class"],
            settings["context"],
        )
        samples = draw(flow, settings["num_samples"], settings["batch_size"], generator, context)
        columns = getattr(dataset, "columns", None)
        save_samples(output, samples, columns, flow.transform.num_levels)
        print(f"{len(samples):,} samples of shape {tuple(samples.shape[1:])} in {output}")
        if settings["plot"]:
            picture = output.with_suffix(".png")
            points = None if dataset is None else comparable_points(dataset, context)
            plots.save_samples(picture, samples, points, columns)
            print(f"picture in {picture}" + (f", of the samples alone: {unknown}" if unknown else ""))


if __name__ == "__main__":
    register_parts()
    with readable_errors(CONFIG):
        main()
