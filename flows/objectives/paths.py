"""Probability paths of flow matching: how noise turns into data between t = 0 and t = 1."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from flows.errors import InvalidValueError


class Coefficients(NamedTuple):
    """a, b and their time derivatives, each shaped like t."""

    data: Tensor  # a(t)
    noise: Tensor  # b(t)
    data_rate: Tensor  # a′(t)
    noise_rate: Tensor  # b′(t)


@dataclass(frozen=True)
class ProbabilityPath(ABC):
    """x_t = a(t) x₁ + b(t) x₀ from noise x₀ at t = 0 to data x₁ at t = 1, with velocity a′(t) x₁ + b′(t) x₀.

    To add one: subclass it with :meth:`coefficients`, a/b rising strictly, that is a′b − ab′ > 0, from t = 0 on;
    settings may then give it by its lower-case name.
    """

    last_time: ClassVar[float] = 1.0  # training draws t from [0, last_time); less than 1 where b′ is singular at 1

    @abstractmethod
    def coefficients(self, t: Tensor) -> Coefficients:
        """a, b, a′ and b′ at times t."""


@dataclass(frozen=True)
class Linear(ProbabilityPath):
    """a = t, b = 1 − (1 − sigma_min) t: straight lines, the "OT" path of a single data point.

    [Lipman et al. 2023, arXiv:2210.02747; Liu et al. 2023, arXiv:2209.03003]

    Args:
        sigma_min: standard deviation that is left around a data point at t = 1, in flow space.
    """

    sigma_min: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.sigma_min < 1:
            raise InvalidValueError(f"sigma_min must be in [0, 1), got {self.sigma_min}")

    def coefficients(self, t: Tensor) -> Coefficients:
        rate = 1 - self.sigma_min
        return Coefficients(t, 1 - rate * t, torch.ones_like(t), torch.full_like(t, -rate))


@dataclass(frozen=True)
class Cosine(ProbabilityPath):
    """a = sin(πt/2), b = cos(πt/2), so that a² + b² = 1: the trigonometric interpolant.

    [Albergo & Vanden-Eijnden 2023, arXiv:2209.15571]
    """

    def coefficients(self, t: Tensor) -> Coefficients:
        half_turn = math.pi / 2
        sin, cos = torch.sin(half_turn * t), torch.cos(half_turn * t)
        return Coefficients(sin, cos, half_turn * cos, -half_turn * sin)


@dataclass(frozen=True)
class VariancePreserving(ProbabilityPath):
    r"""a = exp(−½ T(1 − t)), b = √(1 − a²) with T(s) = ∫₀ˢ β: the path of a variance-preserving diffusion.

    β rises linearly from ``beta_min`` at the data to ``beta_max`` at the noise. At t = 0, a is not zero but
    exp(−½ T(1)), 0.0066 by default: the base is reached that nearly.
    [Song et al. 2021, arXiv:2011.13456; as a path of flow matching: Lipman et al. 2023, arXiv:2210.02747]

    Args:
        beta_min, beta_max: 0 < beta_min <= beta_max, per unit of time.
    """

    last_time: ClassVar[float] = 1 - 1e-5  # b′ grows like (1 − t)^(−1/2)
    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max:
            raise InvalidValueError(f"expected 0 < beta_min <= beta_max, got {self.beta_min} and {self.beta_max}")

    def coefficients(self, t: Tensor) -> Coefficients:
        s = 1 - t
        spread = self.beta_max - self.beta_min
        exponent = s * (self.beta_min + 0.5 * s * spread)  # T(s)
        data, noise = torch.exp(-0.5 * exponent), torch.sqrt(-torch.expm1(-exponent))
        data_rate = 0.5 * (self.beta_min + s * spread) * data
        return Coefficients(data, noise, data_rate, -data * data_rate / noise)
