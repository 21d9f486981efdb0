"""What can be said of samples of images: their class, their features, who tells them apart, and whom they resemble.

A small convolutional classifier is trained on the same real training images. It reads the class of a sample, and its
last hidden layer gives the features of a Fréchet distance, which compares with other figures of this judge alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from flows.datasets import Images

STEPS, BATCH, LEARNING_RATE = 1500, 64, 2e-3
LARGEST = 14  # pixels a side that boosting looks at
SHIFT = 0.07  # largest shift of training images, as a share of their side; none of small ones


class Judge(nn.Module):
    """A classifier of images with labels; `features` is its last hidden layer.

    Args:
        dataset: with labels; the classifier sees its training images alone.
        steps: of training, in batches of 64.
        known: (*event), true and false; the classifier sees black elsewhere.
    """

    def __init__(self, dataset: Images, steps: int = STEPS, seed: int = 0, known: Tensor | None = None) -> None:
        super().__init__()
        images, labels = dataset._parts["train"].images.float(), dataset.labels("train")
        if known is not None:
            images = images * known
        assert labels is not None, "the data of this benchmark have classes"
        assert dataset.num_levels is not None, "the images of this benchmark have levels"
        self.white = float(dataset.num_levels - 1)
        channels, height, width = dataset.event_shape
        pooled = math.ceil(height / 4) * math.ceil(width / 4)
        self.num_features = 64
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.hidden = nn.Sequential(
                *(nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)),
                *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)),
                *(nn.Flatten(), nn.Linear(32 * pooled, self.num_features), nn.ReLU()),
            )
            self.out = nn.Linear(self.num_features, int(labels.max()) + 1)
            self.float()._fit(images, labels, steps)
        self.eval()

    def _fit(self, images: Tensor, labels: Tensor, steps: int) -> None:
        optimizer = torch.optim.Adam(self.parameters(), lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        order = torch.cat([torch.randperm(len(images)) for _ in range(math.ceil(steps * BATCH / len(images)))])
        for rows in order[: steps * BATCH].split(BATCH):
            loss = nn.functional.cross_entropy(self(_shifted(images[rows])), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    def features(self, images: Tensor) -> Tensor:  # (n, 64)
        """The last hidden layer, from images in levels."""
        return self.hidden(images.float() / self.white - 0.5)

    def forward(self, images: Tensor) -> Tensor:  # (n, classes)
        """Logits."""
        return self.out(self.features(images))

    @torch.no_grad()
    def classes(self, images: Tensor) -> Tensor:  # (n,)
        """The most probable class of each image."""
        return torch.cat([self(part).argmax(1) for part in images.split(500)])

    @torch.no_grad()
    def frechet(self, images: Tensor, real: Tensor) -> float:
        """Fréchet distance of normal distributions fitted to the features: ‖m − m′‖² + tr(C + C′ − 2 √(C C′))."""
        ours, theirs = (torch.cat([self.features(part) for part in one.split(500)]).double() for one in (images, real))
        return frechet(ours, theirs)


def _shifted(images: Tensor) -> Tensor:
    """Images moved by some pixels, all of a batch by the same."""
    most = int(SHIFT * images.shape[-1])
    down, right = torch.randint(-most, most + 1, (2,)).tolist()
    padded = nn.functional.pad(images, (most, most, most, most))
    height, width = images.shape[2:]
    return padded[:, :, most - down : most - down + height, most - right : most - right + width]


def frechet(a: Tensor, b: Tensor) -> float:  # (n, k) and (m, k)
    """The squared Wasserstein-2 distance of two normal distributions with the moments of `a` and `b`."""
    means, covariances = [x.mean(0) for x in (a, b)], [x.T.cov() for x in (a, b)]
    values, vectors = torch.linalg.eigh(covariances[0])
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    traces = covariances[0].trace() + covariances[1].trace() - 2 * cross
    return float((means[0] - means[1]).square().sum() + traces)


@dataclass(frozen=True)
class Share:
    """A share with its standard error."""

    value: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.value:.1%} ± {self.standard_error:.1%}"


def told_apart(samples: Tensor, real: Tensor, folds: int = 5) -> Share:
    """Accuracy of gradient boosting on the pixels; 50 % means that it cannot tell samples from real images.

    Pixels of large images are means of blocks, so that at most about 14 × 14 are left.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    images = torch.cat([samples.float(), real.float()])
    block = max(1, round(images.shape[-1] / LARGEST))
    rows = nn.functional.avg_pool2d(images, block, ceil_mode=True).flatten(1).numpy()
    is_real = np.repeat([0, 1], [len(samples), len(real)])
    parts = StratifiedKFold(folds, shuffle=True, random_state=0)
    found = cross_val_score(HistGradientBoostingClassifier(random_state=0), rows, is_real, cv=parts)
    return Share(float(found.mean()), float(found.std() / math.sqrt(folds)))


def nearest(images: Tensor, training: Tensor) -> float:
    """Median distance to the nearest training image; far below that of unseen images, samples are copies."""
    rows = training.flatten(1).float()
    return float(torch.cat([torch.cdist(x.flatten(1).float(), rows).amin(1) for x in images.split(200)]).median())
