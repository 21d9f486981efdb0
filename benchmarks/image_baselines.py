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
from benchmarks.recipes import settings
from benchmarks.time_budget import CpuBudget, train
from flows import bases
from flows.datasets import Dataset
from flows.evaluation import Evaluation
from flows.models.cnf import CNF
from flows.objectives import MaximumLikelihood
from flows.training import Stage
from flows.training.settings import instantiate
from flows.transforms import Transform

FLOORS = (0.1, 0.03, 0.01, 1e-3)  # of a mixture's variances; whitened points have variance 1
COMPONENTS = (5, 10, 20, 40, 80)
LARGE = 256  # numbers a point beyond which covariances are drawn towards that of all points instead
SHRINKAGES = (3_000.0, 10_000.0, 1_000.0)
MOST_STEPS = 1_000_000  # time ends training before
FEW_IMAGES = 100  # that the continuous flow is tested on: each takes a second


@dataclass(frozen=True)
class Fitted:
    """A fitted baseline."""

    model: TransformedDensity | CNF
    setting: str
    validation_nll: float
    seconds: float  # of the CPU
    most_images: int | None = None  # that a test can afford


def fit_gaussian(dataset: Dataset, transform: Transform, seconds: float, seed: int) -> Fitted:
    """Fit a Gaussian to the training data in flow space."""
    started = time.process_time()
    model = Gaussian(transform, dataset.event_shape, flow_points(dataset, transform, seed))
    return Fitted(model, "full covariance", validation_nll(model, dataset), time.process_time() - started)


def fit_mixture(dataset: Dataset, transform: Transform, seconds: float, seed: int) -> Fitted:
    """Fit mixtures with more and more components and less and less of a prior; keep the best within `seconds`."""
    started = time.process_time()
    points = flow_points(dataset, transform, seed)
    large = points.shape[1] > LARGE
    best = None
    for prior in SHRINKAGES if large else FLOORS:
        best_at_prior = math.inf
        for count in COMPONENTS:
            if best is not None and time.process_time() - started > seconds:
                break
            model: TransformedDensity
            if large:
                model = ShrunkMixture(transform, dataset.event_shape, points, count, prior, seed)
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # EM may stop before it converges
                    model = Mixture(transform, dataset.event_shape, points, count, prior, seed)
            nll = validation_nll(model, dataset)
            if best is None or nll < best.validation_nll:
                best = Fitted(model, f"{count} components, {'shrinkage' if large else 'floor'} {prior:g}", nll, 0.0)
            if nll > best_at_prior:
                break
            best_at_prior = nll
        assert best is not None, "there is at least one fit"
        if best_at_prior > best.validation_nll:
            break
    assert best is not None
    return replace(best, seconds=time.process_time() - started)


class ShrunkMixture(TransformedDensity):
    """The mixture that is a base of flows, as a density of its own."""

    def __init__(
        self,
        transform: Transform,
        event_shape: tuple[int, ...],
        points: Tensor,  # (n, d)
        num_components: int,
        shrinkage: float,
        seed: int = 0,
    ) -> None:
        super().__init__(transform, event_shape)
        self.mixture = bases.Mixture((points.shape[1],), num_components, shrinkage=shrinkage, seed=seed).fit(points)

    def log_density(self, y: Tensor) -> Tensor:
        return self.mixture.log_prob(y)

    @property
    def num_parameters(self) -> int:
        d = math.prod(self.event_shape)
        return self.mixture.num_components * (1 + d + d * (d + 1) // 2) - 1


class Plateau(CpuBudget):
    """A schedule and callback: halves the learning rate when validation stalls, and ends the stage at the third time.

    Validation stalls when four in a row have not improved. The stage also ends after `seconds` of CPU time.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.halvings = 0
        self._stalled = 0

    def __call__(self, done: float) -> float:
        return 0.5**self.halvings

    def on_validation_end(self, run: Any, evaluation: Evaluation | None, is_best: bool) -> None:
        super().on_validation_end(run, evaluation, is_best)
        self._stalled = 0 if is_best else self._stalled + 1
        if self._stalled == 4:
            self._stalled, self.halvings = 0, self.halvings + 1

    def on_optimizer_step(self, run: Any) -> None:
        super().on_optimizer_step(run)
        run.stage_is_over = run.stage_is_over or self.halvings == 3


def fit_spline(dataset: Dataset, transform: Transform, seconds: float, seed: int) -> Fitted:
    """Fit a spline flow by maximum likelihood until validation stops improving, for at most `seconds` of the CPU.

    AdamW with averaged weights, on fresh dequantisation noise in each step.
    """
    torch.manual_seed(seed)
    model, plateau = Spline(transform, dataset.event_shape), Plateau(max(seconds, 1.0))
    stage = Stage(
        NegativeLogLikelihood(),
        steps=MOST_STEPS,
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
    return Fitted(model, f"{plateau.steps} steps", validation_nll(model, dataset), plateau.used)


def fit_ffjord(dataset: Dataset, transform: Transform, seconds: float, seed: int) -> Fitted:
    """Train FFJORD's multiscale network as its code does images, but in batches of 32 instead of 200.

    Its settings: convolutions of 64, 64 and 64 channels at each scale, one Rademacher probe, dopri5 at 1e-5 with the
    adjoint, Adam at a constant 1e-3. It is tested with tolerances of 1e-3.
    """
    torch.manual_seed(seed)
    config = settings("experiment=ffjord", "field=multiscale", "field.field.hidden=[64,64,64]", "divergence=hutchinson")
    field = instantiate({**config["field"], "event_shape": dataset.event_shape})
    solver = instantiate(config["solver"])
    model = CNF(field, divergence=instantiate(config["divergence"]), solver=solver, transform=transform)
    budget = CpuBudget(max(seconds, 1.0))
    stage = Stage(
        MaximumLikelihood(), steps=MOST_STEPS, batch_size=32, learning_rate=1e-3, warmup_steps=0, schedule="constant"
    )
    train(model, dataset, {"likelihood": stage}, ema_decay=0.0, callbacks=[budget], seed=seed)
    model.solver = replace(solver, rtol=1e-3, atol=1e-3)
    model.eval()
    return Fitted(model, f"{budget.steps} steps of 32 images", math.nan, budget.used, FEW_IMAGES)


Fit = Callable[[Dataset, Transform, float, int], Fitted]
BASELINES: dict[str, Fit] = {"nsf": fit_spline, "mixture": fit_mixture, "gaussian": fit_gaussian, "ffjord": fit_ffjord}
TITLES = {"nsf": "neural spline flow (zuko)", "mixture": "Gaussian mixture", "gaussian": "Gaussian"} | {
    "ffjord": "FFJORD, multiscale"
}


def flow_points(dataset: Dataset, transform: Transform, seed: int, least: int | None = None) -> Tensor:  # (n, d)
    """Training points in flow space, repeated with fresh noise until there are at least `least`.

    By default as many as transforms and bases of flows are fitted to, and 10,000 of small data sets.
    """
    least = max(10_000, len(dataset.reference())) if least is None else least
    generator = torch.Generator().manual_seed(seed)
    stream = dataset.train_stream(least, generator)
    parts: list[Tensor] = []
    with torch.no_grad():
        while sum(map(len, parts)) < least:
            parts.append(transform(stream.next().x, generator)[0].flatten(1))
    return torch.cat(parts)
