"""Fit the image baselines; every choice is made on the validation images."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.densities import (
    Gaussian,
    Mixture,
    NegativeLogLikelihood,
    NegativeLogLikelihoodScore,
    Spline,
    TransformedDensity,
    validation_nll,
)
from benchmarks.time_budget import train
from flows.datasets import Dataset
from flows.evaluation import Evaluation
from flows.training import Stage
from flows.transforms import Transform

FLOORS = (0.1, 0.03, 0.01, 1e-3)  # of a mixture's variances; whitened points have variance 1
COMPONENTS = (5, 10, 20, 40, 80)


@dataclass(frozen=True)
class Fitted:
    """A fitted baseline."""

    model: TransformedDensity
    setting: str
    validation_nll: float
    seconds: float


def fit_gaussian(dataset: Dataset, transform: Transform, seconds: float, seed: int) -> Fitted:
    """Fit a Gaussian to the training data in flow space."""
    started = time.perf_counter()
    model = Gaussian(transform, dataset.event_shape, flow_points(dataset, transform, seed))
    return Fitted(model, "full covariance", validation_nll(model, dataset), time.perf_counter() - started)


def fit_mixture(dataset: Dataset, transform: Transform, seconds: float, seed: int) -> Fitted:
    """Fit mixtures with more and more components and lower and lower floors; keep the best within `seconds`."""
    started = time.perf_counter()
    points = flow_points(dataset, transform, seed)
    best = None
    for floor in FLOORS:
        best_at_floor = math.inf
        for count in COMPONENTS:
            if best is not None and time.perf_counter() - started > seconds:
                break
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # EM may stop before it converges
                model = Mixture(transform, dataset.event_shape, points, count, floor, seed)
            nll = validation_nll(model, dataset)
            if best is None or nll < best.validation_nll:
                best = Fitted(model, f"{count} components, floor {floor:g}", nll, 0.0)
            if nll > best_at_floor:
                break
            best_at_floor = nll
        if best_at_floor > best.validation_nll:
            break
    return replace(best, seconds=time.perf_counter() - started)


class Plateau:
    """A schedule and callback: halves the learning rate when validation stalls, and ends the stage at the third time.

    Validation stalls when four in a row have not improved.
    """

    def __init__(self) -> None:
        self.halvings = 0
        self.steps = 0
        self._stalled = 0

    def __call__(self, done: float) -> float:
        return 0.5**self.halvings

    def on_validation_end(self, run: Any, evaluation: Evaluation | None, is_best: bool) -> None:
        self._stalled = 0 if is_best else self._stalled + 1
        if self._stalled == 4:
            self._stalled, self.halvings = 0, self.halvings + 1

    def on_step_end(self, run: Any) -> None:
        self.steps = run.position.step
        run.stage_is_over = run.stage_is_over or self.halvings == 3


def fit_spline(dataset: Dataset, transform: Transform, seconds: float, seed: int) -> Fitted:
    """Fit a spline flow by maximum likelihood until validation stops improving, for at most `seconds` of training.

    AdamW with averaged weights, on fresh dequantisation noise in each step.
    """
    started = time.perf_counter()
    torch.manual_seed(seed)
    model, plateau = Spline(transform, dataset.event_shape), Plateau()
    stage = Stage(
        NegativeLogLikelihood(),
        seconds=max(seconds, 1.0),
        batch_size=256,
        learning_rate=1e-3,
        schedule=plateau,
        optimizer=partial(torch.optim.AdamW, weight_decay=0.01),
    )
    train(
        model,
        dataset,
        {"likelihood": stage},
        evaluator=NegativeLogLikelihoodScore(dataset),
        ema_decay=0.98,
        validate_every=25,
        callbacks=[plateau],
        seed=seed,
    )
    model.eval()
    return Fitted(model, f"{plateau.steps} steps", validation_nll(model, dataset), time.perf_counter() - started)


Fit = Callable[[Dataset, Transform, float, int], Fitted]
BASELINES: dict[str, Fit] = {"nsf": fit_spline, "mixture": fit_mixture, "gaussian": fit_gaussian}
TITLES = {"nsf": "neural spline flow (zuko)", "mixture": "Gaussian mixture", "gaussian": "Gaussian"}


def flow_points(dataset: Dataset, transform: Transform, seed: int, least: int = 10_000) -> Tensor:  # (n, d)
    """Training points in flow space, repeated with fresh noise until there are at least `least`."""
    generator = torch.Generator().manual_seed(seed)
    stream = dataset.train_stream(least, generator)
    parts: list[Tensor] = []
    with torch.no_grad():
        while sum(map(len, parts)) < least:
            parts.append(transform(stream.next().x, generator)[0].flatten(1))
    return torch.cat(parts)
