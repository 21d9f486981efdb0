"""Importance weights w = p̃(x)/q(x) of samples x of q, for an unnormalised p̃."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from flows.errors import InvalidTypeError, InvalidValueError


def log_density_of(target: Any) -> Callable[[Tensor], Tensor]:
    """log p̃ of an object with `log_density(x)` or `log_prob(x)`, or of a function.

    Raises:
        TypeError: neither.
    """
    for name in ("log_density", "log_prob"):
        if hasattr(target, name):
            return getattr(target, name)
    if callable(target):
        return cast(Callable[[Tensor], Tensor], target)
    raise InvalidTypeError(
        f"a target must have log_density(x) or log_prob(x), or be a function x -> log density, got "
        f"{type(target).__name__}"
    )


def log_weights(
    target: Any,
    x: Tensor,  # (B, *event), samples of q
    log_prob: Tensor,  # (B,), log q(x)
) -> Tensor:  # (B,)
    """log w.

    Raises:
        ValueError: the target does not return one number for each sample.
    """
    log_density = log_density_of(target)(x)
    if log_density.shape != log_prob.shape:
        raise InvalidValueError(
            f"the target must return one log-density a point, of shape {tuple(log_prob.shape)}, got "
            f"{tuple(log_density.shape)}"
        )
    return log_density - log_prob


def log_z(log_weight: Tensor) -> Tensor:  # 0-d
    """log mean w, which estimates log Z (low by about half its variance)."""
    return torch.logsumexp(log_weight, 0) - math.log(len(log_weight))


def effective_sample_size(log_weight: Tensor) -> Tensor:  # 0-d
    """Effective sample size (Σw)²/(n Σw²), between 1/n and 1."""
    doubled = 2 * torch.logsumexp(log_weight, 0) - torch.logsumexp(2 * log_weight, 0)
    return torch.exp(doubled - math.log(len(log_weight)))


@dataclass(frozen=True)
class WeightSums:
    """What importance weights sum up to, without the bias from the noise of probes."""

    log_z: float  # NaN if the noise leaves no positive sum
    log_z_se: float  # by the delta method, with a third of the correction
    effective_sample_size: float
    probe_bias: float | None  # by how much log mean w was lowered for log Z; 0 if exact, None where unknown

    @classmethod
    def of(
        cls,
        log_weight: Tensor,  # (n,)
        standard_error: Tensor,  # (n,), of each from its probes; 0 if exact, NaN where unknown
        num_estimates: int,  # K, of whose spread the standard errors are
    ) -> WeightSums:
        """Sum up weights whose logarithms have unbiased noise.

        If log w has Gaussian noise of variance s², then E[w] is too large by the factor exp(s²/2), E[w²] by exp(2 s²).
        Let ŝ be the standard error from the spread of K estimates. Then w ₀F₁((K−1)/2; −(K−1) ŝ²/4) is unbiased for w
        without noise, and w² ₀F₁((K−1)/2; −(K−1) ŝ²) for its square. With two estimates they are w cos ŝ and w² cos 2ŝ.
        The noise of random signs is skewed, which leaves up to about a third of the bias in log Z.
        [Finney 1941; Neyman & Scott 1960]
        """
        weight = (log_weight - log_weight.max()).exp()
        raw, raw_share = float(log_z(log_weight)), float(effective_sample_size(log_weight))
        noisy = bool((standard_error != 0).any())
        if not noisy or bool(standard_error.isnan().any()):
            error = math.sqrt(max(0.0, 1 / raw_share - 1) / len(weight))  # rounding may leave a share above 1
            return cls(raw, error, raw_share, None if noisy else 0.0)
        from scipy.special import hyp0f1  # slow to import

        freedom, square = num_estimates - 1, standard_error.double().square().cpu().numpy()
        first = weight * torch.from_numpy(hyp0f1(freedom / 2, -freedom * square / 4)).to(weight)
        second = weight.square() * torch.from_numpy(hyp0f1(freedom / 2, -freedom * square)).to(weight)
        mean, mean_square = float(first.mean()), float(second.mean())
        if mean <= 0 or mean_square <= 0:
            return cls(math.nan, math.nan, math.nan, math.inf)
        corrected = float(log_weight.max()) + math.log(mean)
        error = math.hypot(float(first.std()) / mean / math.sqrt(len(weight)), (raw - corrected) / 3)
        share = min(1.0, max(1 / len(weight), mean**2 / mean_square))
        return cls(corrected, error, share, raw - corrected)
