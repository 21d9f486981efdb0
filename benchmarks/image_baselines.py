"""Fit the image baselines; every choice is made on the validation images."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.densities import Gaussian, Mixture, Spline, TransformedDensity
from flows.datasets import Dataset
from flows.evaluation import likelihood, part_batches
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


def fit_spline(dataset: Dataset, transform: Transform, seconds: float, seed: int) -> Fitted:
    """A spline flow by maximum likelihood until the validation part gets no better, for so many seconds at most.

    AdamW with a moving average of the weights, on fresh dequantisation noise in each step. The learning rate is
    halved when four validations in a row have brought nothing, and the fit ends at the third time.
    """
    started = time.perf_counter()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Spline(transform, dataset.event_shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.98))
    stream = dataset.train_stream(256, generator)
    best, weights, stale, halvings, steps = math.inf, None, 0, 0, 0
    while weights is None or (halvings < 3 and time.perf_counter() - started < seconds):
        for _ in range(25):
            y, _ = transform(stream.next().x, generator)
            optimizer.zero_grad()
            (-model.log_density(y.flatten(1)).mean()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            average.update_parameters(model)
        steps += 25
        nll = validation_nll(average.module, dataset)
        stale = 0 if nll < best else stale + 1
        if nll < best:
            best, weights = nll, copy.deepcopy(average.module.state_dict())
        if stale == 4:
            stale, halvings = 0, halvings + 1
            for group in optimizer.param_groups:
                group["lr"] /= 2
    model.load_state_dict(weights)
    return Fitted(model.eval(), f"{steps} steps", best, time.perf_counter() - started)


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


def validation_nll(model: TransformedDensity, dataset: Dataset) -> float:
    """Validation NLL in nats, with the same noise at every call."""
    batches, _ = part_batches(model, dataset, "validation", 10_000)
    return likelihood(model, batches, torch.Generator().manual_seed(1)).nll
