"""Errors of divergence estimates."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from flows.compare.candidates import Candidate
from flows.compare.trajectory import Trajectory
from flows.divergence import DivergenceEstimator, Exact, linearise
from flows.divergence.probes import Rademacher
from flows.errors import InvalidValueError


@dataclass(frozen=True)
class Truth:
    """The exact divergence along a trajectory, and its scale."""

    divergence: Tensor  # (T, n), float64
    by: str  # the label of the estimator that computed it
    checked_points: int  # on which it was compared with Exact()
    check: float  # the largest difference found there
    jacobian_norm: float  # root mean square of ‖J‖_F over the points: the scale of rounding errors
    spread: float  # standard deviation of the divergence between points of one time, root mean square over times


@dataclass(frozen=True)
class Accuracy:
    """The errors of an estimator over points and probes."""

    bias: float  # the mean
    bias_error: float  # standard error of the bias, from the probes; 0 if deterministic
    sd: float  # standard deviation over probes, root mean square over points
    rmse: float  # root of the mean square over points and probes
    unbiased: bool  # neither the mean error nor the error that remains over probes differs significantly from zero
    draws: int  # of the probes at each point and time
    stated: float | None = None  # stated over measured standard error, root mean square; None: it states none


def truth(
    field: nn.Module,
    trajectory: Trajectory,
    candidates: Sequence[Candidate],
) -> Truth:
    """The exact divergence, by the cheapest exact candidate.

    It is checked against `Exact()`.

    The check covers as many points of the middle time as 2,048 products allow, two at least. Where it fails,
    `Exact()` itself is used.
    """
    double, moved = copy.deepcopy(field).double(), trajectory.double()
    dimension = math.prod(trajectory.event_shape)
    middle = moved.at(len(moved.times) // 2).first(max(2, 2048 // dimension))
    reference = evaluate(Exact(), double, middle)
    norm = _jacobian_norm(double, moved)
    bound = {one.label: one.estimator.bind(trajectory.bind(field)) for one in candidates}
    stated = [one for one in candidates if bound[one.label].is_exact and bound[one.label].cost < dimension]
    for candidate in [*sorted(stated, key=lambda one: bound[one.label].cost), Candidate("Exact", "Exact", Exact())]:
        found = evaluate(candidate.estimator, double, middle)
        check = float((found - reference).abs().max())
        if check <= 1e-9 * norm:
            values = evaluate(candidate.estimator, double, moved)
            spread = 0.0 if values.shape[1] < 2 else float(values.var(1).mean().sqrt())
            return Truth(values, candidate.label, reference.shape[1], check, norm, spread)
    raise InvalidValueError("the field is not deterministic: two exact evaluations at the same points differ")


def evaluate(
    estimator: DivergenceEstimator,
    field: nn.Module,
    trajectory: Trajectory,
    generator: torch.Generator | None = None,
) -> Tensor:  # (T, n), float64
    """Estimates of the divergence with new probes at each time."""
    return estimated(estimator, field, trajectory, generator)[0]


def estimated(
    estimator: DivergenceEstimator,
    field: nn.Module,
    trajectory: Trajectory,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:  # (T, n) each, float64
    """Estimates of the divergence with new probes at each time, and the standard errors that they state."""
    with torch.no_grad():
        bound = estimator.bind(trajectory.bind(field))
        found, errors = [], []
        for t, x in zip(trajectory.times, trajectory.x, strict=True):
            sample = bound(t, x, bound.draw_probes(x, generator))
            found.append(sample.divergence.double())
            errors.append(bound.standard_error(sample.estimates).double())
        return torch.stack(found), torch.stack(errors)


def accuracy(
    estimator: DivergenceEstimator,
    field: nn.Module,
    trajectory: Trajectory,
    exact: Tensor,  # (T, n), float64
    rounding: float,  # errors up to this size may be rounding
    draws: int,
    seconds: float,
    generator: torch.Generator,
) -> Accuracy:
    """Compare with the truth over several draws of the probes.

    There are `draws` draws, fewer (at least two) if they take more than `seconds`. An estimator without probes is
    evaluated once, one that states to be exact twice.
    """
    bound = estimator.bind(trajectory.bind(field))
    random = bound.draw_probes(trajectory.x[0], generator) is not None
    if bound.is_exact:
        draws = 2  # to confirm it
    started = time.perf_counter()
    errors, stated = [], []
    while not errors or (random and _goes_on(len(errors), draws, time.perf_counter() - started, seconds)):
        estimate, standard_error = estimated(estimator, field, trajectory, generator)
        errors.append(estimate - exact)
        stated.append(standard_error)
    found = summarise(torch.stack(errors), rounding)
    if bound.is_exact or not found.sd > rounding:
        return found
    squared = float(torch.stack(stated).square().mean())
    return replace(found, stated=None if math.isnan(squared) else math.sqrt(squared) / found.sd)


def summarise(
    errors: Tensor,  # (R, T, n): of R draws of the probes at each point, independent of each other
    rounding: float,
) -> Accuracy:
    """Split errors into bias and noise.

    With m the mean over draws at a point and s² their variance, m² − s²/R is unbiased for the square of the bias
    at that point. An estimator counts as biased if the mean of m, or that of m² − s²/R, exceeds four of its
    standard errors and what rounding may do: the second also finds biases that cancel over the points.
    """
    draws, cells = len(errors), errors[0].numel()
    mean = errors.mean(0).flatten()
    variance = (errors.var(0) if draws > 1 else torch.zeros_like(errors[0])).flatten()
    squared_bias = mean.square() - variance / draws
    bias, bias_error = float(mean.mean()), float((variance / draws).sum().sqrt() / cells)
    squared, squared_error = float(squared_bias.mean()), float(squared_bias.std() / cells**0.5) if cells > 1 else 0.0
    if draws == 1:
        squared_error = 0.0  # nothing is random
    unbiased = abs(bias) <= 4 * bias_error + rounding and squared <= 4 * squared_error + rounding**2
    return Accuracy(
        bias=bias,
        bias_error=bias_error,
        sd=float(variance.mean().sqrt()),
        rmse=float(errors.square().mean().sqrt()),
        unbiased=unbiased,
        draws=draws,
    )


def _goes_on(done: int, draws: int, elapsed: float, seconds: float) -> bool:
    return done < 2 or (done < draws and elapsed < seconds)


def _jacobian_norm(field: nn.Module, trajectory: Trajectory) -> float:
    """The root mean square of ‖J‖_F, estimated from ‖Jᵀε‖² for random signs ε."""
    with torch.no_grad():
        bound = trajectory.bind(field)
        total = 0.0
        for t, x in zip(trajectory.times, trajectory.x, strict=True):
            _, products = linearise(bound, t, x)
            total += float(products(Rademacher().draw(1, x)).square().sum()) / len(x)
    return math.sqrt(total / len(trajectory.times))
