"""Samples of images in 1 to 16 evaluations: their class, how well they are told apart, and whether they are copies."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from benchmarks.image_judge import Judge, Share, nearest, told_apart
from benchmarks.recipes import settings
from flows.datasets import Images, one_hot
from flows.errors import InvalidValueError
from flows.models.cnf import CNF
from flows.models.few_steps import fit_grid
from flows.training.building import build_dataset
from flows.training.loading import load_run
from flows.training.runs import build_trainer

EVALUATIONS = (1, 2, 4, 8, 16)
RECIPES = {"digits": "digits_by_class", "mnist": "mnist"}
HEADER = ("samples", "class asked for", "told apart", "Fréchet", "nearest")


@dataclass(frozen=True)
class Seen:
    """The real images, and what judges samples of them."""

    judge: Judge
    training: Tensor
    test: Tensor
    real: Tensor  # that samples are told apart from: all images of a small data set, else the test images
    labels: Tensor  # of these
    others: Tensor | None  # as many real images, or None where all are among `real`

    @classmethod
    def of(cls, dataset: Images, points: int | None) -> Seen:
        """Train the judge; without `points`, samples are as many as all images."""
        parts = {name: dataset._parts[name] for name in ("train", "validation", "test")}
        chosen = list(parts.values()) if points is None else [parts["test"][slice(points)]]
        real = torch.cat([part.images for part in chosen]).float()
        labels = torch.cat([cast("Tensor", part.labels) for part in chosen])
        training, test = parts["train"].images.float(), parts["test"].images.float()
        others = None if points is None else parts["validation"].images[: len(real)].float()
        return cls(Judge(dataset), training, test, real, labels, others)

    def row(self, name: str, samples: Tensor) -> tuple[str, ...]:
        """A line of the table."""
        right = (self.judge.classes(samples) == self.labels).double()
        agreement = Share(float(right.mean()), float(right.std() / math.sqrt(len(right))))
        return (
            name,
            str(agreement),
            str(told_apart(samples, self.real)),
            f"{self.judge.frechet(samples, self.real):.2f}",
            f"{nearest(samples, self.training):.2f}",
        )

    def yardstick(self) -> str:
        """What real images reach by the same measures."""
        label = cast("Tensor", self.judge.classes(self.real)) == self.labels
        first, second = torch.randperm(len(self.real), generator=torch.Generator().manual_seed(0)).chunk(2)
        if self.others is None:
            floor = f"of their halves {self.judge.frechet(self.real[first], self.real[second]):.2f}"
        else:
            floor = f"to {len(self.others):,} others {self.judge.frechet(self.real, self.others):.2f}"
        return (
            f"Real images: the judge, trained on {len(self.training):,} training images, is right on "
            f"{label.double().mean():.1%} of these {len(self.real):,}; Fréchet distance {floor}; median distance of "
            f"test images to the nearest training image {nearest(self.test, self.training):.2f}"
        )


def print_report(arguments: argparse.Namespace) -> None:
    """Load or train the flow, and print a table."""
    flow, dataset = flow_of(arguments)
    seen = Seen.of(dataset, None if arguments.data == "digits" else arguments.points)
    print(seen.yardstick())
    for row in (HEADER, ("---",) * len(HEADER)):
        print(f"| {' | '.join(row)} |", flush=True)
    for name, samples in every_sample(flow, seen.labels, arguments.weights, arguments.grid_points, arguments.fit):
        print(f"| {' | '.join(seen.row(name, samples))} |", flush=True)


def flow_of(arguments: argparse.Namespace) -> tuple[CNF, Images]:
    """The flow of a run, or of the recipe trained here, and its data."""
    if arguments.run_folder is not None:
        loaded = load_run(arguments.run_folder)
        dataset = images_with_classes(build_dataset(loaded.config))
        return loaded.flow, dataset
    with tempfile.TemporaryDirectory() as folder:
        quiet = ("reporting.plot_every=null", f"output_dir={folder}/run")
        config = settings(f"experiment={RECIPES[arguments.data]}", *quiet, *arguments.set)
        dataset = images_with_classes(build_dataset(config))
        trainer = build_trainer(config, dataset=dataset)
        trainer.fit()
    return cast("CNF", trainer.model).eval(), dataset


def images_with_classes(dataset: object) -> Images:
    """The data, which must be images whose flow takes the class."""
    if not isinstance(dataset, Images) or dataset.num_classes is None:
        raise InvalidValueError("few_steps draws images by class: give a run on images with data.conditional=true")
    return dataset


def every_sample(
    flow: CNF, labels: Tensor, weights: Sequence[float], grid_points: int, fit: int
) -> Iterator[tuple[str, Tensor]]:
    """Names and samples (n, C, H, W), all from the same base points under the same classes."""
    own = flow.solver
    context = one_hot(labels, int(cast("tuple[int, ...]", flow.context_shape)[0])).to(flow.dtype)
    few = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))[:grid_points]
    for weight in weights:
        chosen = flow if weight == 1 else flow.guided(weight)
        of_weight = "" if weight == 1 else f", guidance {weight:g}"
        for number in EVALUATIONS:
            generator = torch.Generator().manual_seed(1)
            chosen.solver = fit_grid(chosen, number, context=context[few], steps=fit, generator=generator)
            steps = len(chosen.solver.grid or ()) - 1
            name = f"{number} evaluations{of_weight} ({chosen.solver.method}, {steps} step{'s' * (steps > 1)})"
            yield name, drawn(chosen, context)
        chosen.solver = own
        end = chosen.transport(chosen.base.sample((2,)), (0.0, 1.0), context[:2], log_density=False)
        yield f"{own.method}, {end.statistics.nfe_forward} evaluations{of_weight}", drawn(chosen, context)


@torch.no_grad()
def drawn(flow: CNF, context: Tensor) -> Tensor:
    """Samples, of the same base points each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.cat([flow.sample((), part, generator).float() for part in context.split(500)])
