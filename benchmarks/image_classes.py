"""Whether a classifier recognises samples drawn under a class; it has seen real images only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flows.datasets import Dataset, one_hot
from flows.models.cnf import CNF
from flows.training.runs import build_trainer


@dataclass(frozen=True)
class Recognition:
    """How often a classifier assigns images their intended class."""

    real: float  # share of the test images
    samples: Tensor  # (classes,), share of the samples drawn under each class
    num_each: int  # samples per class

    @property
    def share(self) -> float:
        """Share of all samples."""
        return float(self.samples.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of the share, from the number of samples."""
        return float((self.samples * (1 - self.samples)).sum().sqrt() / len(self.samples) / math.sqrt(self.num_each))


def classify_samples(flow: CNF, dataset: Dataset, num_each: int, seed: int = 0) -> Recognition:
    """Train a support-vector classifier on the training images and apply it to samples of the flow."""
    from sklearn.svm import SVC

    generator = torch.Generator().manual_seed(seed)
    train, test = dataset.train_stream(10**6, generator).next(), next(iter(dataset.test_batches(10**6)))
    classifier = SVC(C=10.0).fit(train.x.flatten(1).numpy(), train.context.argmax(1).numpy())
    real = torch.from_numpy(classifier.predict(test.x.flatten(1).numpy())) == test.context.argmax(1)
    wanted = torch.arange(dataset.num_classes).repeat_interleave(num_each)
    with torch.no_grad():
        samples = flow.sample((), one_hot(wanted, dataset.num_classes).to(flow.device, flow.dtype), generator).cpu()
    correct = torch.from_numpy(classifier.predict(samples.flatten(1).numpy())) == wanted
    return Recognition(float(real.double().mean()), correct.double().view(-1, num_each).mean(1), num_each)


def report(config: Mapping[str, Any], num_each: int) -> Iterator[str]:
    """Train the conditional flow of `config` and report how its samples are classified."""
    trainer = build_trainer(config)
    summary = trainer.fit()
    result = classify_samples(trainer.model, trainer.dataset, num_each, config["seed"])
    yield f"A support-vector classifier trained on the training images is right on {result.real:.1%} of the test images"
    yield f"and on {result.share:.1%} ± {result.standard_error:.1%} of {num_each} samples per class:"
    yield "  " + "  ".join(f"{label}: {share:.1%}" for label, share in enumerate(result.samples.tolist()))
    yield f"trained in {summary.position.seconds:.0f} s; samples by class in {summary.output_dir}/plots/classes.png"
