"""Unnormalised densities exp(-U), which a flow is fitted to without samples: objective=reverse_kl."""

import math
from abc import abstractmethod

import numpy as np
import torch
from torch import Tensor

from flows.datasets.base import Batch, BatchStream
from flows.datasets.density import Density, check_points
from flows.errors import InvalidValueError


class Energy(Density):
    """p(x) = exp(log_density(x)) / Z, known up to Z.

    Subclasses set `name` and `event_shape` and implement `log_density`, differentiable in x. Where they are known they
    set `log_z`, which makes `log_prob` exact, and `entropy`; where there is an exact sampler they override `sample`.
    Without one there are no points to train or test on: `num_validation` and `num_test` are then, as they are for
    the importance weights of every energy, numbers of samples of the flow.
    """

    log_z: float | None = None

    @abstractmethod
    def log_density(self, x: Tensor) -> Tensor:
        """Return -U(x) = log p(x) + log Z, (*batch,), for x of (*batch, *event)."""

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        raise InvalidValueError(
            f"{self.name!r} is an energy without samples; train with objective=reverse_kl, which needs none"
        )

    def log_prob(self, x: Tensor) -> Tensor:
        if self.log_z is None:
            raise InvalidValueError(f"log Z of {self.name!r} is not known; use log_density, which is log_prob + log Z")
        return self.log_density(x) - self.log_z

    @property
    def has_samples(self) -> bool:
        return type(self).sample is not Energy.sample

    @property
    def has_log_prob(self) -> bool:
        return self.log_z is not None


class NoData(BatchStream):
    """Batches of no points, (batch_size, 0), for objectives that draw their own."""

    def next(self) -> Batch:
        return Batch(torch.empty(self.batch_size, 0, device=self.device, dtype=self.dtype))


class DoubleWell(Energy):
    """U(x) = x1^4 / 4 - 3 x1^2 + x1 + x2^2 / 2: two wells of unequal depth at x1 near -2.5 and 2.3.

    The lower one on the left holds 99 % of the mass. log Z and the entropy are quadratures, and sampling inverts a
    distribution function on a fine grid. [Noé et al. 2019, arXiv:1812.01729, with a = 1, b = 6, c = 1, d = 1]

    Args:
        tilt: of the wells against each other, from -10 to 10; 1 in the formula above.
        num_validation, num_test, num_reference: see `Density` and `Energy`.
    """

    name = "double_well"

    def __init__(
        self,
        tilt: float = 1.0,
        num_validation: int = 10_000,
        num_test: int = 100_000,
        num_reference: int = 10_000,
    ):
        super().__init__(num_validation, num_test, num_reference)
        if not -10 <= tilt <= 10:
            raise InvalidValueError(f"tilt must be between -10 and 10, got {tilt}")
        self.tilt = tilt
        self._nodes = np.linspace(-6, 6, 24_001)
        values = self._potential(self._nodes)
        weights = np.exp(-values)
        z = np.trapezoid(weights, self._nodes) if hasattr(np, "trapezoid") else np.trapz(weights, self._nodes)
        self._cumulative = np.concatenate([[0.0], np.cumsum((weights[1:] + weights[:-1]) / 2)])
        self._cumulative /= self._cumulative[-1]
        mean = float((weights * values).sum() / weights.sum())  # E[U] of the first coordinate
        self.log_z = math.log(z) + 0.5 * math.log(2 * math.pi)
        self.entropy = mean + 0.5 + self.log_z

    def _potential(self, x: Tensor | np.ndarray) -> Tensor | np.ndarray:
        return x**4 / 4 - 3 * x**2 + self.tilt * x

    def log_density(self, x: Tensor) -> Tensor:
        x1, x2 = check_points(x).unbind(-1)
        return -self._potential(x1) - x2.square() / 2

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        level = torch.rand(n, generator=generator, dtype=torch.float64).numpy()
        x1 = torch.from_numpy(np.interp(level, self._cumulative, self._nodes)).to(torch.get_default_dtype())
        return torch.stack([x1, torch.randn(n, generator=generator)], -1)


class Funnel(Energy):
    """x1 ~ N(0, 9) and the others N(0, exp(x1)) given x1: wide at one end, arbitrarily narrow at the other.

    Normalised, so that log Z = 0; entropy d/2 log(2 pi e) + log 3. [Neal 2003, Slice sampling]

    Args:
        dimension: d >= 2.
        num_validation, num_test, num_reference: see `Density` and `Energy`.
    """

    name = "funnel"
    log_z = 0.0

    def __init__(
        self,
        dimension: int = 10,
        num_validation: int = 10_000,
        num_test: int = 100_000,
        num_reference: int = 10_000,
    ):
        super().__init__(num_validation, num_test, num_reference)
        if isinstance(dimension, bool) or not isinstance(dimension, int) or dimension < 2:
            raise InvalidValueError(f"dimension must be a whole number >= 2, got {dimension!r}")
        self.event_shape = (dimension,)
        self.entropy = dimension / 2 * math.log(2 * math.pi * math.e) + math.log(3)

    def log_density(self, x: Tensor) -> Tensor:
        d = self.event_shape[0]
        first, others = check_points(x, d).split([1, d - 1], dim=-1)
        first = first.squeeze(-1)
        squares = first.square() / 9 + others.square().sum(-1) * torch.exp(-first) + (d - 1) * first
        return -(squares + d * math.log(2 * math.pi)) / 2 - math.log(3)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        z = torch.randn(n, *self.event_shape, generator=generator)
        first = 3 * z[:, :1]
        return torch.cat([first, torch.exp(first / 2) * z[:, 1:]], -1)
