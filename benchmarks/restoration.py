"""Inverse problems of images: what do draws from p(x | y) get right?

The lower half of a picture is hidden, noise is added to it, or it is shown at half the resolution. The flow never saw
the test pictures, and is not told their class. A classifier, trained on the training pictures, reads the draws.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any, cast

import torch
from matplotlib.figure import Figure
from torch import Tensor

import flows
from benchmarks.image_judge import Judge
from benchmarks.recipes import settings
from flows.datasets import Images
from flows.errors import InvalidValueError
from flows.plots.images import shades, tiled
from flows.restoration import Denoising, Downsampling, Inpainting, Operator, Restoration, restore
from flows.training import build_dataset
from flows.training.loading import load_run
from flows.training.runs import build_trainer
from flows.writing import write_result

HEADER = ("task", "label kept", "± se", "RMSE", "of y alone", "log p, draws", "log p, truth", "unresolved", "seconds")

TASKS = ("inpainting", "denoising", "super-resolution")


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add `restoration` to the benchmarks."""
    parser = commands.add_parser("restoration", help="inpainting, denoising and super-resolution of images")
    parser.add_argument("--checkpoint", help="a run on images with classes; default: train experiment=digits")
    parser.add_argument("--settings", nargs="*", default=[], help="of that training")
    parser.add_argument("--pictures", type=int, default=100, help="test pictures (%(default)s)")
    parser.add_argument("--draws", type=int, default=4, help="draws for each picture (%(default)s)")
    parser.add_argument("--proposals", type=int, default=100, help="of each chain (%(default)s); 0: guided draws alone")
    parser.add_argument("--start", choices=("guided", "base"), default="guided", help="of each chain (%(default)s)")
    parser.add_argument("--leapfrogs", type=int, default=5, help="of each proposal (%(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="of the midpoint rule in a chain's solves (%(default)s)")
    parser.add_argument(
        "--noise", type=float, default=0.0, help="in levels, on what is seen of a picture (%(default)s)"
    )
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=TASKS, help="default: all")
    parser.add_argument("--picture", default="restoration.png", help="file of the pictures (%(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Restore test pictures and print a table."""
    flow, dataset = trained(arguments.checkpoint, arguments.settings)
    judge = Judge(dataset)
    x = dataset.held_out("test").x[: arguments.pictures].float()
    labels = cast("Tensor", dataset.labels("test"))[: len(x)]
    accuracy = (judge.classes(x) == labels).double().mean()
    print(f"{dataset.name}: the classifier is right on {accuracy:.1%} of these {len(x)} test pictures")
    known = torch.ones(flow.event_shape, dtype=torch.bool)
    known[:, flow.event_shape[1] // 2 :] = False
    if "inpainting" in arguments.tasks:
        print(f"an upper half leaves the label open: exact draws would keep {agreement(dataset, known)} of the labels")
    spread = float(dataset.reference().std())
    # Zeros stand for no class, for a flow that was trained with classes left out.
    context = None if flow.context_shape is None else torch.zeros(len(x), *flow.context_shape, dtype=flow.dtype)
    tasks: dict[str, tuple[Operator, float]] = {
        "inpainting": (Inpainting(known), arguments.noise),
        "denoising": (Denoising(), 0.5 * spread),
        "super-resolution": (Downsampling(2), arguments.noise),
    }
    tasks = {name: tasks[name] for name in arguments.tasks}
    solver = flows.ODESolver("midpoint", step_size=1 / arguments.steps)
    chain = {"num_draws": arguments.draws, "num_proposals": arguments.proposals, "num_leapfrogs": arguments.leapfrogs}
    panels = {}
    for row in (HEADER, ["---"] * len(HEADER)):
        print(f"| {' | '.join(row)} |", flush=True)
    for name, (operator, sd) in tasks.items():
        generator = torch.Generator().manual_seed(0)
        clean = operator(x)
        y = clean + sd * torch.randn(clean.shape, generator=generator)
        begun = time.process_time()
        found = restore(
            flow, y, operator, sd, **chain, context=context, solver=solver, generator=generator, start=arguments.start
        )
        seconds = time.process_time() - begun
        seen = shown(operator, y, x)
        row = row_of(name, flow, found, x, labels, context, judge, seen, seconds)
        print(f"| {' | '.join(row)} |", flush=True)
        panels[name] = (seen, found.x)
    write_result(arguments.picture, picture(x, panels))


def agreement(dataset: Images, known: Tensor) -> str:
    """E Σ_c p(c | known part)², the chance that two draws of the class agree, by a classifier of the known part."""
    test = dataset.held_out("test").x.float() * known
    judge = Judge(dataset, known=known)
    with torch.no_grad():
        chances = judge(test).softmax(1).square().sum(1).double()
    return f"{chances.mean():.1%} ± {chances.std() / len(chances) ** 0.5:.1%}"


def trained(checkpoint: str | None, chosen: list[str]) -> tuple[flows.CNF, Images]:
    """The flow and its data."""
    if checkpoint is not None:
        loaded = load_run(checkpoint)
        return loaded.flow, images_of(loaded.config)
    with tempfile.TemporaryDirectory() as folder:
        quiet = ["reporting.plot_every=null", "reporting.progress_bar=false", f"output_dir={folder}/run"]
        config = settings("data=digits", "experiment=digits", *quiet, *chosen)
        dataset = images_of(config)
        trainer = build_trainer(config, dataset=dataset)
        trainer.fit()
    return cast("flows.CNF", trainer.model).eval(), dataset


def images_of(config: dict[str, Any]) -> Images:
    """The data of a run, which must be images with classes."""
    dataset = build_dataset(config)
    if not isinstance(dataset, Images) or dataset.labels("train") is None:
        raise InvalidValueError(f"restoration needs images with classes, and {dataset.name!r} has none")
    return dataset


def row_of(
    name: str,
    flow: flows.CNF,
    found: Restoration,
    x: Tensor,
    labels: Tensor,
    context: Tensor | None,
    judge: Judge,
    seen: Tensor,
    seconds: float,
) -> list[str]:
    """A row of the table; the error of a label is over pictures, whose draws are not independent."""
    draws = found.x.flatten(0, 1).float()
    read = judge.classes(draws).view(found.x.shape[:2])
    num_draws = len(found.x)
    twice = None if context is None else context.repeat(num_draws, 1)
    kept = (read == labels).double().mean(0)
    with torch.no_grad():
        of_draws, of_truth = (
            flow.log_prob(points.to(flow.dtype), given, torch.Generator().manual_seed(0))
            for points, given in ((draws, twice), (x, context))
        )
    best = found.x.float().mean(0)
    return [
        name,
        f"{kept.mean():.1%}",
        f"{kept.std() / len(kept) ** 0.5:.1%}",
        f"{(best - x).square().mean().sqrt():.2f}",
        f"{(seen - x).square().mean().sqrt():.2f}",
        f"{of_draws.mean():.1f}",
        f"{of_truth.mean():.1f}",
        f"{found.unresolved.double().mean():.1%}",
        f"{seconds:.0f}",
    ]


def shown(operator: Operator, y: Tensor, x: Tensor) -> Tensor:
    """What is observed as pictures of full size; the mean shade stands for what is hidden."""
    if isinstance(operator, Inpainting):
        full = torch.full_like(x, float(x.mean()))
        full[:, operator.known] = y
        return full
    if isinstance(operator, Downsampling):
        return torch.nn.functional.interpolate(y, scale_factor=operator.factor, mode="bicubic")
    return y


def picture(x: Tensor, panels: dict[str, tuple[Tensor, Tensor]], columns: int = 12) -> Figure:
    """Truth, what was observed, and up to two draws, for each task."""
    figure = Figure(figsize=(columns * 0.62, len(panels) * 2.9), dpi=120, layout="compressed")
    for axes, (name, (seen, draws)) in zip(
        figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True
    ):
        rows = torch.stack([x[:columns], seen[:columns], *draws[:2, :columns].float()])
        axes.imshow(tiled(rows, *shades(x)))
        drawn = "two draws" if len(draws) > 1 else "a draw"
        axes.set_title(f"{name}: the picture, what is known of it, {drawn}", fontsize=10)
        axes.set_axis_off()
    return figure
