"""Dequantisation: whole numbers become continuous by adding noise."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from flows.arguments import CheckedMethods, checked
from flows.checks import check_number, whole_number
from flows.errors import InvalidValueError
from flows.transforms.base import Transform

MAX_LEVELS = 2**24  # float32 holds all whole numbers up to here


class DequantisationNoise(CheckedMethods, nn.Module, ABC, checks=("sample", "log_prob")):
    """A density q(u | x) on the unit cube for the noise of an example x.

    To add one, subclass it and name it in a yaml of `conf/transform`.

    Example:
        ```python
        import torch

        from flows.transforms import Dequantise, TruncatedNormalNoise

        dequantise = Dequantise(num_levels=17, noise=TruncatedNormalNoise(sd=0.3))
        y, log_det = dequantise(torch.randint(17, (10, 64)).float())
        ```
    """

    def fit(
        self,
        points: Tensor,  # (n, *event), whole numbers
    ) -> DequantisationNoise:
        """Fit the noise to training data and return it. Default: nothing to fit."""
        return self

    @abstractmethod
    def sample(
        self,
        x: Tensor,  # (B, *event), whole numbers
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:  # (B, *event) and (B,)
        """Return u and log q(u | x), differentiable in the parameters of q."""

    @abstractmethod
    def log_prob(
        self,
        u: Tensor,  # (B, *event), in [0, 1]
        x: Tensor,  # (B, *event)
    ) -> Tensor:  # (B,)
        """Return log q(u | x) in nats."""


@checked
class UniformNoise(DequantisationNoise):
    """Uniform noise, q = 1.

    The bound then averages the flow's log-density over the cell of an image.

    Example:
        ```python
        from flows.transforms import Dequantise, UniformNoise

        dequantise = Dequantise(num_levels=17, noise=UniformNoise())
        ```
    """

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        return uniform_like(x, generator), x.new_zeros(x.shape[0])

    def log_prob(self, u: Tensor, x: Tensor) -> Tensor:
        return u.new_zeros(len(u))


@checked
class TruncatedNormalNoise(DequantisationNoise):
    """Normal noise around ½, truncated to the unit interval.

    For each entry, u − ½ ~ N(0, sd²) on [−½, ½]: log q(u) = −(u − ½)²/(2 sd²) − log(sd √(2π)) − log erf(1/(√8 sd)). The
    noise fades towards the edges of a cell, so the flow has a smooth density to learn. [Zheng et al. 2023,
    arXiv:2305.03935]

    Args:
        sd: standard deviation before truncation, above 0. A large one gives nearly uniform noise.

    Raises:
        InvalidTypeError, InvalidValueError: `sd` is no positive number.

    Example:
        ```python
        from flows.transforms import Dequantise, TruncatedNormalNoise

        dequantise = Dequantise(num_levels=17, noise=TruncatedNormalNoise(sd=0.3))
        ```
    """

    def __init__(self, sd: float = 0.3) -> None:
        super().__init__()
        check_number("sd", sd, above=0, otherwise="for uniform noise use UniformNoise()")
        self.sd = sd
        self._mass = math.erf(1 / (math.sqrt(8) * sd))

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        rank = (2 * uniform_like(x, generator) - 1) * self._mass
        u = (0.5 + math.sqrt(2) * self.sd * rank.erfinv()).clamp(0, 1)
        return u, self.log_prob(u, x)

    def log_prob(self, u: Tensor, x: Tensor) -> Tensor:
        constant = math.log(self.sd * math.sqrt(2 * math.pi) * self._mass)
        return (-(u - 0.5).square() / (2 * self.sd**2) - constant).flatten(1).sum(1)


@checked
class Dequantise(Transform):
    """Noise on whole numbers: y = x + u with u ~ q(u | x).

    x lies in {0, ..., L − 1} and u in the unit cube. P(x) = ∫ p(x + u) du = E_q[p(x + u)/q(u | x)], so
    log p(y) − log q(u | x) is a lower bound on log P(x) in expectation; log_det is its second term. The bound equals
    log P(x) − KL(q ‖ p(u | x)), where p(u | x) is the flow's density within the cell. [Theis et al. 2016,
    arXiv:1511.01844; Ho et al. 2019, arXiv:1902.00275]

    The inverse rounds down and clamps to the levels. It returns +log q of the rounded-off noise.

    Args:
        num_levels: L.
        noise: q. Default: `UniformNoise()`.

    Raises:
        InvalidTypeError, InvalidValueError: `num_levels` is no whole number from 2 to 2²⁴.

    Example:
        ```python
        import torch

        from flows.transforms import Compose, Dequantise, Logit, UnitInterval

        transform = Compose(dequantise=Dequantise(17), scale=UnitInterval(17), logit=Logit())
        y, log_det = transform(torch.randint(17, (10, 64)).float())  # (10, 64), (10,)
        ```
    """

    term = "dequantisation"
    num_levels: int

    def __init__(self, num_levels: int | None, noise: DequantisationNoise | None = None) -> None:
        super().__init__()
        self.num_levels = checked_levels(num_levels)
        self.noise = UniformNoise() if noise is None else noise

    def check(self, x: Tensor) -> None:
        wrong = (x != x.floor()) | (x < 0) | (x > self.num_levels - 1)
        if wrong.any():
            index = tuple(wrong.nonzero()[0].tolist())
            raise InvalidValueError(
                f"expected whole numbers from 0 to {self.num_levels - 1}, got {x[index].item():g} at index {index} "
                f"({int(wrong.sum())} such values); pass levels as stored, without scaling or noise"
            )

    def fit(self, points: Tensor) -> Dequantise:
        """Fit the noise to `points` (n, *event)."""
        self.noise.fit(points)
        return self

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        u, log_q = self.noise.sample(x, generator)
        # x + u may round up to the next level, which would be another image.
        return torch.minimum(x + u, torch.nextafter(x + 1, x)), -log_q

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x = y.detach().floor().clamp(0, self.num_levels - 1)
        return x, self.noise.log_prob((y - x).clamp(0, 1), x)

    def unrounded(self, y: Tensor) -> Tensor:
        """The level and its noise, x + u."""
        return y

    def from_unrounded(self, x: Tensor) -> Tensor:
        x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
        return x.clamp(0, self.num_levels * (1 - torch.finfo(x.dtype).eps))  # below L, which is no level's


def checked_levels(num_levels: int | None) -> int:
    """Return `num_levels`, or raise an error if it is no valid number of levels."""
    if num_levels is None:
        raise InvalidValueError("the data state no num_levels: they are continuous, and need no dequantisation")
    return whole_number("num_levels", num_levels, 2, MAX_LEVELS, "most pictures have 256")


def uniform_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw from U[0, 1) in the shape, dtype and device of `x`, on the generator's device."""
    device = x.device if generator is None else generator.device
    return torch.rand(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)
