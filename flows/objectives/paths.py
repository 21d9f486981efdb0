"""Probability paths of flow matching, from noise at t = 0 to data at t = 1."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from flows.arguments import CheckedMethods, checked
from flows.checks import check_number

LEAST_NOISE = 0.02  # b(t) down to which times are drawn by the likelihood: its weight has no finite integral
GRID = 4_000  # intervals of time in which its weight is integrated


class Coefficients(NamedTuple):
    """The coefficients of a path and their time derivatives, each shaped like t."""

    data: Tensor  # a(t)
    noise: Tensor  # b(t)
    data_rate: Tensor  # a′(t)
    noise_rate: Tensor  # b′(t)


@checked
@dataclass(frozen=True)
class ProbabilityPath(CheckedMethods, ABC, checks=("coefficients",)):
    """A path x_t = a(t) x₁ + b(t) x₀ from noise x₀ to data x₁.

    Its velocity is a′(t) x₁ + b′(t) x₀. To add one, subclass this and implement `coefficients`. a/b must rise strictly
    from t = 0 on, that is, a′b − ab′ > 0. Settings may then name the path by its lower-case name.

    Example:
        ```python
        from flows.objectives import FlowMatching

        straight = FlowMatching(path="linear")
        curved = FlowMatching(path="cosine")
        ```
    """

    last_time: ClassVar[float] = 1.0  # training draws t from [0, last_time); below 1 if b′ is singular at 1

    @abstractmethod
    def coefficients(self, t: Tensor) -> Coefficients:
        """Return a, b, a′ and b′ at times t."""

    def between(
        self,
        t: Tensor,  # (B, 1, ...), of as many dimensions as the points
        noise: Tensor,  # (B, *event)
        data: Tensor,  # (B, *event)
    ) -> tuple[Tensor, Tensor]:
        """Return x_t and its velocity. A path may override this with fewer operations."""
        a, b, a_rate, b_rate = self.coefficients(t)
        return a * data + b * noise, a_rate * data + b_rate * noise

    def likelihood_times(
        self,
        u: Tensor,  # (B), uniform on [0, 1)
    ) -> Tensor:  # (B)
        """Return times with a density in proportion to w(t) = a / (b (a′b − ab′)), where b(t) is above 0.02."""
        integral = _likelihood_integral(self).to(u)
        rank = u * integral[-1, 1]
        upper = torch.searchsorted(integral[:, 1].contiguous(), rank, right=True).clamp(1, len(integral) - 1)
        (t, low), (end, high) = integral[upper - 1].unbind(1), integral[upper].unbind(1)
        return torch.lerp(t, end, ((rank - low) / (high - low)).clamp(0, 1))


@lru_cache(maxsize=16)
def _likelihood_integral(path: ProbabilityPath) -> Tensor:  # (n, 2), times and ∫₀ᵗ w
    times = torch.linspace(0, path.last_time, GRID + 1, dtype=torch.float64)
    a, b, a_rate, b_rate = path.coefficients(times)
    kept = b >= LEAST_NOISE
    weight = (a / (b * (a_rate * b - a * b_rate)))[kept]
    steps = times[kept].diff() * 0.5 * (weight[1:] + weight[:-1])
    return torch.stack([times[kept], torch.cat([steps.new_zeros(1), steps.cumsum(0)])], 1)


@checked
@dataclass(frozen=True)
class Linear(ProbabilityPath):
    """Straight lines: a = t, b = 1 − (1 − sigma_min) t.

    For a single data point this is the optimal transport path.

    [Lipman et al. 2023, arXiv:2210.02747; Liu et al. 2023, arXiv:2209.03003]

    Args:
        sigma_min: standard deviation around each data point at t = 1, in flow space.

    Raises:
        InvalidValueError: `sigma_min` is not in [0, 1).
    """

    sigma_min: float = 0.0

    def __post_init__(self) -> None:
        check_number("sigma_min", self.sigma_min, at_least=0, below=1)

    def coefficients(self, t: Tensor) -> Coefficients:
        rate = 1 - self.sigma_min
        return Coefficients(t, 1 - rate * t, torch.ones_like(t), torch.full_like(t, -rate))

    def between(self, t: Tensor, noise: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
        if type(self).coefficients is not Linear.coefficients:  # a subclass with others
            return super().between(t, noise, data)
        velocity = torch.sub(data, noise, alpha=1 - self.sigma_min)
        return torch.addcmul(noise, t, velocity), velocity


@checked
@dataclass(frozen=True)
class Cosine(ProbabilityPath):
    """The trigonometric interpolant: a = sin(πt/2), b = cos(πt/2), so a² + b² = 1.

    [Albergo & Vanden-Eijnden 2023, arXiv:2209.15571]
    """

    def coefficients(self, t: Tensor) -> Coefficients:
        half_turn = math.pi / 2
        sin, cos = torch.sin(half_turn * t), torch.cos(half_turn * t)
        return Coefficients(sin, cos, half_turn * cos, -half_turn * sin)


@checked
@dataclass(frozen=True)
class VariancePreserving(ProbabilityPath):
    """The path of a variance-preserving diffusion.

    a = exp(−½ T(1 − t)) and b = √(1 − a²), with T(s) = ∫₀ˢ β. The rate β rises linearly from `beta_min` at the data to
    `beta_max` at the noise. At t = 0, a is exp(−½ T(1)) instead of 0 (0.0066 by default), so x₀ is not quite reached.
    [Song et al. 2021, arXiv:2011.13456; as a path of flow matching: Lipman et al. 2023, arXiv:2210.02747]

    Args:
        beta_min, beta_max: rates per unit of time, 0 < beta_min <= beta_max.

    Raises:
        InvalidValueError: they are not in this order.
    """

    last_time: ClassVar[float] = 1 - 1e-5  # b′ grows like (1 − t)^(−1/2)
    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        check_number("beta_min", self.beta_min, above=0)
        check_number("beta_max", self.beta_max, at_least=self.beta_min)

    def coefficients(self, t: Tensor) -> Coefficients:
        s = 1 - t
        spread = self.beta_max - self.beta_min
        exponent = s * (self.beta_min + 0.5 * s * spread)  # T(s)
        data, noise = torch.exp(-0.5 * exponent), torch.sqrt(-torch.expm1(-exponent))
        data_rate = 0.5 * (self.beta_min + s * spread) * data
        return Coefficients(data, noise, data_rate, -data * data_rate / noise)
