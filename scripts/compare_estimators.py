"""Compare all divergence estimators on a flow; see `python scripts/compare_estimators.py --help`."""

from __future__ import annotations

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from flows.compare import advise, as_dict, as_text, compare, error_against_cost
from flows.training import TensorBoardLogger
from flows.training.choices import instances
from flows.training.console import readable_errors
from flows.training.folder import new_folder, open_run_folder, write_result
from flows.training.overrides import register_parts
from flows.training.settings import plain_settings
from flows.training.subject import subject
from flows.training.summary import to_json

CONFIG = Path(__file__).resolve().parents[1] / "conf" / "compare_estimators.yaml"


@hydra.main(version_base="1.3", config_path=str(CONFIG.parent), config_name=CONFIG.stem)
def main(composed: DictConfig) -> None:
    with readable_errors():
        settings = plain_settings(composed)
        estimators = instances("divergence", settings["estimators"], settings["variants"])
        chosen = subject(settings, HydraConfig.get().overrides.task)
        given = settings["output_dir"]
        folder = new_folder(chosen.folder / "comparisons") if given is None else open_run_folder(given)
        points, context = chosen.points(settings["part"], settings["points"])
        comparison = compare(
            chosen.flow,
            points,
            estimators,
            context=context,
            seed=settings["seed"],
            progress=settings["progress_bar"],
            **settings["measure"],
        )
        advice = advise(comparison, settings["affordable"])
        text, figure = as_text(comparison, advice), error_against_cost(comparison)
        print(text)
        figure.savefig(folder / "comparison.png")
        content = {"checkpoint": chosen.checkpoint and str(chosen.checkpoint), "data": chosen.dataset.name}
        write_result(folder / "comparison.json", to_json({**content, **as_dict(comparison, advice)}))
        logger = TensorBoardLogger(folder)
        table = "".join(f"    {line}\n" for line in text.splitlines())
        logger.log({"estimators/table": table, "estimators/error_against_cost": figure}, step=0)
        logger.close()
        print(f"\nFigures, picture and TensorBoard events in {folder}")


if __name__ == "__main__":
    register_parts()
    with readable_errors(CONFIG):
        main()
