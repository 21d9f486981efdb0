"""Unnormalised densities exp(−U), to which a flow is fitted without samples.

The objective for them is `ReverseKL` (`objective=reverse_kl`).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from flows.arguments import checked
from flows.checks import check_number, whole_number
from flows.datasets.batches import Batch, BatchStream
from flows.datasets.densities.density import NUM_PROBES, SEEDS, Density, check_points
from flows.errors import InvalidValueError

Values = TypeVar("Values", Tensor, np.ndarray)


class Energy(Density):
    """A density p(x) = exp(log_density(x)) / Z whose Z may be unknown.

    A subclass sets `name` and `event_shape` and implements `log_density`, differentiable in x. It sets `log_z`, which
    makes `log_prob` exact, and `entropy` if they are known, and overrides `sample` if there is an exact sampler.

    Without a sampler there are no points to train or test on. `num_validation` and `num_test` are always numbers of
    flow samples for the importance weights.

    Example:
        ```python
        import flows


        class Ring(flows.datasets.Energy):
            '''p(x) ∝ exp(−8 (‖x‖ − 2)²).'''

            event_shape = (2,)

            def log_density(self, x):
                return -8 * (x.norm(dim=1) - 2) ** 2


        objective = flows.objectives.ReverseKL(Ring())
        ```
    """

    log_z: float | None = None

    @abstractmethod
    def log_density(self, x: Tensor) -> Tensor:
        """Return −U(x) = log p(x) + log Z: (*batch, *event) → (*batch,)."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        raise InvalidValueError(
            f"{self.name!r} is an energy without samples; train with objective=reverse_kl, which needs none"
        )

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if self.log_z is None:
            raise InvalidValueError(
                f"log Z of {self.name!r} is unknown; use log_density(x), which is log_prob(x) + log Z"
            )
        return self.log_density(x) - self.log_z

    def _probe(self) -> np.ndarray | None:
        """Return log densities of fixed points; None if they cannot be had on the CPU."""
        generator = torch.Generator().manual_seed(SEEDS["probe"])
        points = torch.randn(NUM_PROBES, *self.event_shape, generator=generator, dtype=torch.float64)
        try:
            with torch.no_grad():
                return self.log_density(points.to(torch.get_default_dtype())).double().cpu().numpy()
        except RuntimeError:
            return None

    @property
    def has_samples(self) -> bool:
        return type(self).sample is not Energy.sample

    @property
    def has_log_prob(self) -> bool:
        return self.log_z is not None


@checked
class NoData(BatchStream):
    """Empty batches (batch_size, 0), for objectives that draw their own points.

    Example:
        ```python
        import torch

        import flows

        energy = flows.datasets.DoubleWell()
        energy.train_stream(batch_size=16, generator=torch.Generator()).next().x  # (16, 0)
        ```
    """

    def next(self) -> Batch:
        return Batch(torch.empty(self.batch_size, 0, device=self.device, dtype=self.dtype))


@checked
class DoubleWell(Energy):
    """Two wells of different depth in the plane.

    U(x) = x1⁴/4 − 3 x1² + tilt · x1 + x2²/2. For tilt = 1 the wells lie at x1 ≈ −2.5 and 2.3, and the left, deeper one
    holds 99 % of the mass. log Z and the entropy are quadratures; sampling inverts a distribution function on a fine
    grid. [Noé et al. 2019, arXiv:1812.01729, with a = 1, b = 6, c = 1, d = 1]

    Args:
        tilt: from −10 to 10. At 0 both wells have the same depth.
        num_validation, num_test, num_reference: see `Density` and `Energy`.

    Raises:
        InvalidTypeError, InvalidValueError: a setting is no number, or out of range.

    Example:
        ```python
        import torch

        import flows

        data = flows.datasets.DoubleWell(tilt=1.0)
        data.log_density(torch.zeros(1, 2))  # without the constant log Z
        ```
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
        check_number("tilt", tilt, at_least=-10, at_most=10)
        self.tilt = tilt
        self._nodes = np.linspace(-6, 6, 24_001)
        values = self._potential(self._nodes)
        weights = np.exp(-values)
        between = (weights[1:] + weights[:-1]) / 2  # the trapezoidal rule
        z = between.sum() * (self._nodes[1] - self._nodes[0])
        self._cumulative = np.concatenate([[0.0], np.cumsum(between)])
        self._cumulative /= self._cumulative[-1]
        mean = float((weights * values).sum() / weights.sum())  # E[U] of the first coordinate
        self.log_z = math.log(z) + 0.5 * math.log(2 * math.pi)
        self.entropy = mean + 0.5 + self.log_z

    def _potential(self, x: Values) -> Values:
        return x**4 / 4 - 3 * x**2 + self.tilt * x

    def log_density(self, x: Tensor) -> Tensor:
        x1, x2 = check_points(x).unbind(-1)
        return -self._potential(x1) - x2.square() / 2

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        level = torch.rand(n, generator=generator, dtype=torch.float64).numpy()
        x1 = torch.from_numpy(np.interp(level, self._cumulative, self._nodes)).to(torch.get_default_dtype())
        return torch.stack([x1, torch.randn(n, generator=generator)], -1)


@checked
class Funnel(Energy):
    """A funnel: wide at one end, arbitrarily narrow at the other.

    x1 ~ N(0, 9); given x1, the other coordinates are N(0, exp(x1)). It is normalised, so log Z = 0. Entropy
    d/2 log(2πe) + log 3 nats. [Neal 2003, Slice sampling]

    Args:
        dimension: d, at least 2.
        num_validation, num_test, num_reference: see `Density` and `Energy`.

    Raises:
        InvalidTypeError, InvalidValueError: a setting is no whole number, or out of range.

    Example:
        ```python
        import flows

        data = flows.datasets.Funnel(dimension=3)
        data.log_prob(data.sample(100))  # (100,)
        ```
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
        dimension = whole_number("dimension", dimension, 2)
        super().__init__(num_validation, num_test, num_reference, (dimension,))
        self.entropy = dimension / 2 * math.log(2 * math.pi * math.e) + math.log(3)

    def log_density(self, x: Tensor) -> Tensor:
        (d,) = self.event_shape
        first, others = check_points(x, d).split([1, d - 1], dim=-1)
        first = first.squeeze(-1)
        squares = first.square() / 9 + others.square().sum(-1) * torch.exp(-first) + (d - 1) * first
        return -(squares + d * math.log(2 * math.pi)) / 2 - math.log(3)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        z = torch.randn(n, *self.event_shape, generator=generator)
        first = 3 * z[:, :1]
        return torch.cat([first, torch.exp(first / 2) * z[:, 1:]], -1)
