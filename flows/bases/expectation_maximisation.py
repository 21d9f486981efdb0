"""Mixtures of normal distributions, fitted by expectation maximisation (EM)."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from flows.errors import InvalidValueError

TOLERANCE = 1e-3  # nats a point: EM ends when the likelihood rises by less, or by a ten-thousandth of a nat a number
FLOOR = 1e-6  # least variance of a component, relative to that of all points
FEWEST = 1e-3  # points that a component is left with
BLOCK = 10_000  # points at once


@dataclass(frozen=True)
class FittedMixture:
    """K weights, means and Cholesky factors of covariances."""

    weights: Tensor  # (K,)
    means: Tensor  # (K, d)
    factors: Tensor  # (K, d, d)
    log_likelihood: float  # mean over the points, in nats


def fit_mixture(
    points: Tensor,  # (n, d)
    size: int,
    kind: str,  # full, diagonal or spherical
    shrinkage: float,
    seed: int,
    most_rounds: int = 200,
) -> FittedMixture:
    """Fit a mixture by EM from the clusters of k-means.

    With a shrinkage ν, a component of n_k points and covariance S_k gets (n_k S_k + ν C)/(n_k + ν), with the covariance
    C of all points: the most likely one under an inverse Wishart prior of about ν points.

    Raises:
        InvalidValueError: a covariance is not positive definite.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # equal points
        means = KMeans(size, n_init=2, max_iter=20, random_state=seed % 2**32)  # pyright: ignore[reportArgumentType]
        clusters = means.fit_predict(points.cpu().numpy())
    shares = torch.nn.functional.one_hot(torch.from_numpy(clusters).long(), size).to(points)  # (n, K), responsibilities
    whole = points.T.cov().reshape(points.shape[1], -1)
    floor = FLOOR * whole.diagonal().mean()
    found, before = None, -math.inf
    tolerance = max(TOLERANCE, TOLERANCE / 10 * points.shape[1])
    for _ in range(most_rounds):
        weights, means, factors = _maximise(points, shares, whole, floor, kind, shrinkage)
        log_joint = torch.cat([_log_joint(block, weights, means, factors) for block in points.split(BLOCK)])
        log_density = log_joint.logsumexp(1)
        value = float(log_density.double().mean())
        found = FittedMixture(weights, means, factors, value)
        if not value - before > tolerance:
            break
        before = value
        shares = (log_joint - log_density.unsqueeze(1)).exp()
    assert found is not None  # there is at least one round
    return found


def _maximise(
    points: Tensor, shares: Tensor, whole: Tensor, floor: Tensor, kind: str, shrinkage: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights, means and factors that suit the responsibilities best."""
    count = shares.sum(0).clamp(min=FEWEST)
    means = shares.T @ points / count.unsqueeze(1)
    identity = torch.eye(points.shape[1]).to(points)
    factors = []
    for share, number, mean in zip(shares.T, count, means, strict=True):
        centred = points - mean
        covariance = (share.unsqueeze(1) * centred).T @ centred
        covariance = (covariance + shrinkage * whole) / (number + shrinkage) + floor * identity
        if kind != "full":
            spread = covariance.diagonal()
            covariance = torch.diag(spread if kind == "diagonal" else spread.mean().expand_as(spread))
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if bool(failed):
            raise InvalidValueError(
                f"a mixture of {len(count)} components cannot be fitted to these data: a covariance is not positive "
                "definite; choose fewer num_components, a shrinkage, or covariance_type='diagonal'"
            )
        factors.append(factor)
    return count / count.sum(), means, torch.stack(factors)


def _log_joint(points: Tensor, weights: Tensor, means: Tensor, factors: Tensor) -> Tensor:  # (n, K)
    """Return log π_k N(x; μ_k, Σ_k), up to a constant of the dimension."""
    identity = torch.eye(points.shape[1]).to(points)
    columns = []
    for weight, mean, factor in zip(weights, means, factors, strict=True):
        whitening = torch.linalg.solve_triangular(factor, identity, upper=False)
        squares = ((points - mean) @ whitening.T).square().sum(1)
        columns.append(weight.log() - factor.diagonal().log().sum() - 0.5 * squares)
    constant = 0.5 * points.shape[1] * math.log(2 * math.pi)
    return torch.stack(columns, 1) - constant
