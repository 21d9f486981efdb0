"""From whole numbers to a continuous variable by adding noise."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from flows.errors import InvalidValueError
from flows.transforms.base import Transform


class DequantisationNoise(nn.Module, ABC):
    """A density q(u | x) on the unit cube, from which the noise of an example x is drawn.

    To add one: subclass it, and name it in a yaml of ``conf/transform``.
    """

    @abstractmethod
    def sample(
        self,
        x: Tensor,  # (B, *event), whole numbers
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:  # (B, *event) and (B,)
        """u and log q(u | x), differentiable in the parameters of q."""

    @abstractmethod
    def log_prob(
        self,
        u: Tensor,  # (B, *event), in [0, 1]
        x: Tensor,  # (B, *event)
    ) -> Tensor:  # (B,)
        """log q(u | x) in nats."""


class UniformNoise(DequantisationNoise):
    """q = 1: the bound says how likely the whole cell of an image is under the flow."""

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        return uniform_like(x, generator), x.new_zeros(len(x))

    def log_prob(self, u: Tensor, x: Tensor) -> Tensor:
        return u.new_zeros(len(u))


class TruncatedNormalNoise(DequantisationNoise):
    r"""u − ½ ~ N(0, sd²) kept to [−½, ½], entry by entry.

    log q(u) = −(u − ½)²/(2 sd²) − log(sd √(2π)) − log erf(1/(√8 sd)). The noise fades towards the edges of a cell, so
    the density that the flow has to learn is smooth. [Zheng et al. 2023, arXiv:2305.03935]

    Args:
        sd: before truncation; above 0. A large one is uniform noise.
    """

    def __init__(self, sd: float = 0.3) -> None:
        super().__init__()
        if not 0 < sd < math.inf:
            raise InvalidValueError(f"sd must be above 0, got {sd}; for uniform noise take UniformNoise()")
        self.sd = sd
        self._mass = math.erf(1 / (math.sqrt(8) * sd))

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        rank = (2 * uniform_like(x, generator) - 1) * self._mass
        u = (0.5 + math.sqrt(2) * self.sd * rank.erfinv()).clamp(0, 1)
        return u, self.log_prob(u, x)

    def log_prob(self, u: Tensor, x: Tensor) -> Tensor:
        constant = math.log(self.sd * math.sqrt(2 * math.pi) * self._mass)
        return (-(u - 0.5).square() / (2 * self.sd**2) - constant).flatten(1).sum(1)


class Dequantise(Transform):
    r"""y = x + u for whole numbers x in {0, ..., L − 1}, with noise u ~ q(u | x) from the unit cube.

    P(x) = ∫ p(x + u) du = E_q[p(x + u)/q(u | x)] over the unit cube, so that log p(y) − log q(u | x), whose second
    term is log_det here, bounds log P(x) from below in expectation. The bound is log P(x) − KL(q ‖ p(u | x)), where
    p(u | x) is what the flow makes of the cell. [Theis et al. 2016, arXiv:1511.01844; Ho et al. 2019,
    arXiv:1902.00275]

    The inverse rounds down and clamps to the levels. It returns +log q of the noise that was rounded away.

    Args:
        num_levels: L.
        noise: q, :class:`UniformNoise` by default.
    """

    term = "dequantisation"

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
                f"({int(wrong.sum())} such values); give levels as they are stored, neither scaled nor with noise"
            )

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        u, log_q = self.noise.sample(x, generator)
        # x + u may round up to the next level, which is another image
        return torch.minimum(x + u, torch.nextafter(x + 1, x)), -log_q

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x = y.detach().floor().clamp(0, self.num_levels - 1)
        return x, self.noise.log_prob((y - x).clamp(0, 1), x)


def checked_levels(num_levels: int | None) -> int:
    """Return ``num_levels``, or raise ``ValueError`` where there cannot be so many."""
    if num_levels is None:
        raise InvalidValueError("the data state no num_levels: they are continuous, and need no dequantisation")
    if isinstance(num_levels, bool) or not isinstance(num_levels, int) or num_levels < 2:
        raise InvalidValueError(f"num_levels must be a whole number >= 2, such as 256, got {num_levels!r}")
    return num_levels


def uniform_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform on [0, 1), of the shape, dtype and device of ``x``, drawn where the generator lives."""
    device = x.device if generator is None else generator.device
    return torch.rand(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)
