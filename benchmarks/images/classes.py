"""Whether samples drawn under a class look like it to a classifier that has seen real images only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flows.datasets import Dataset, one_hot
from flows.models.cnf import CNF
from flows.training.compose import build_trainer


@dataclass(frozen=True)
class Labelled:
    """How often a classifier gives images the class that they should have."""

    real: float  # share of unseen images of the data
    samples: Tensor  # (classes,), shares of the samples drawn under each class
    num_each: int

    @property
    def share(self) -> float:
        """Of all samples."""
        return float(self.samples.mean())

    @property
    def standard_error(self) -> float:
        """Of the share, from the number of samples."""
        return float((self.samples * (1 - self.samples)).sum().sqrt() / len(self.samples) / math.sqrt(self.num_each))


def labelled_samples(flow: CNF, dataset: Dataset, num_each: int, seed: int = 0) -> Labelled:
    """Train a support-vector classifier on the training part, and let it look at samples of the flow."""
    from sklearn.svm import SVC

    generator = torch.Generator().manual_seed(seed)
    train, test = dataset.train_stream(10**6, generator).next(), next(dataset.test_batches(10**6))
    classifier = SVC(C=10.0).fit(train.x.flatten(1).numpy(), train.context.argmax(1).numpy())
    real = torch.from_numpy(classifier.predict(test.x.flatten(1).numpy())) == test.context.argmax(1)
    wanted = torch.arange(dataset.num_classes).repeat_interleave(num_each)
    with torch.no_grad():
        drawn = flow.sample((), one_hot(wanted, dataset.num_classes).to(flow.base.zero), generator).cpu()
    right = torch.from_numpy(classifier.predict(drawn.flatten(1).numpy())) == wanted
    return Labelled(float(real.double().mean()), right.double().view(-1, num_each).mean(1), num_each)


def report(config: Mapping[str, Any], num_each: int) -> Iterator[str]:
    """Train the conditional flow that ``config`` describes, and say what the classifier makes of its samples."""
    trainer = build_trainer(config)
    summary = trainer.fit()
    labelled = labelled_samples(trainer.flow, trainer.dataset, num_each, config["seed"])
    yield f"a support-vector classifier of the training images is right on {labelled.real:.1%} of the test images, and"
    yield (
        f"gives {labelled.share:.1%} ± {labelled.standard_error:.1%} of {num_each} samples a class the class that they "
        "were drawn under:"
    )
    yield "  " + "  ".join(f"{label}: {share:.1%}" for label, share in enumerate(labelled.samples.tolist()))
    yield f"trained in {summary.position.seconds:.0f} s; samples by class in {summary.output_dir}/plots/classes.png"
