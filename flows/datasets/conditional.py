"""Densities that depend on a context: a class, or a vector of numbers."""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from flows.datasets.base import Batch, one_hot
from flows.datasets.curves import Moons
from flows.datasets.density import Density, check_points, checked_shape
from flows.errors import InvalidValueError


class ConditionalDensity(Density):
    """p(x | c) of a known form, with contexts c that are drawn as well.

    Subclasses set `name`, `context_shape`, `num_classes` where the context is a class, and `entropy`, which is
    H(x | c), where known. They implement `sample_context` and `sample_given`, and override `log_prob`, which also
    takes the context, if they have one.
    """

    context_shape: tuple[int, ...]

    @abstractmethod
    def sample_context(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n contexts, (n, *context)."""

    @abstractmethod
    def sample_given(self, context: Tensor, generator: torch.Generator) -> Tensor:
        """Draw a point for each context: (n, *context) -> (n, *event)."""

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return log p(x | context) in nats, for contexts that broadcast to x; log p(x) without a context."""
        raise NotImplementedError(f"{type(self).__name__} has no log_prob; ask has_log_prob first")

    @property
    def has_log_prob(self) -> bool:
        return type(self).log_prob is not ConditionalDensity.log_prob

    def draw(self, n: int, generator: torch.Generator) -> Batch:
        kind = type(self).__name__
        context = checked_shape(
            self.sample_context(n, generator), n, self.context_shape, f"{kind}.sample_context({n}, g)", "context_shape"
        )
        points = self.sample_given(context, generator)
        return Batch(checked_shape(points, n, self.event_shape, f"{kind}.sample_given(context, g)"), context)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self.draw(n, generator).x


class MoonsByClass(ConditionalDensity):
    """The two half circles of `Moons`, each a class of its own: 0 the upper, 1 the lower.

    H(x | class) = 1.70257 nats, by quadrature; that of `Moons` is the information of the class, nearly log 2, more.
    """

    name = "moons_by_class"
    num_classes = 2
    context_shape = (2,)
    entropy = 1.70257

    def sample_context(self, n: int, generator: torch.Generator) -> Tensor:
        return one_hot(torch.randint(2, (n,), generator=generator), 2)

    def sample_given(self, context: Tensor, generator: torch.Generator) -> Tensor:
        return Moons().sample_arc(context[:, 1] > 0.5, generator)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        moons = Moons()
        if context is None:
            return moons.log_prob(x)
        lower = check_points(context)[..., 1] > 0.5
        return torch.where(lower, moons.log_prob_of_arc(x, True), moons.log_prob_of_arc(x, False))


class GaussianMean(ConditionalDensity):
    """x | c ~ N(c, sd² I) with c ~ N(0, I): a Gaussian whose mean is the context.

    H(x | c) = d/2 log(2πe sd²) nats, and x alone is N(0, (1 + sd²) I).

    Args:
        dimension: d, of x and of the context.
        sd: standard deviation around the context.
        num_validation, num_test, num_reference: see `Density`.
    """

    name = "gaussian_mean"

    def __init__(
        self,
        dimension: int = 2,
        sd: float = 0.5,
        num_validation: int = 10_000,
        num_test: int = 100_000,
        num_reference: int = 10_000,
    ):
        super().__init__(num_validation, num_test, num_reference)
        if isinstance(dimension, bool) or not isinstance(dimension, int) or dimension < 1:
            raise InvalidValueError(f"dimension must be a whole number >= 1, got {dimension!r}")
        if not 0 < sd < math.inf:
            raise InvalidValueError(f"sd must be a positive number, got {sd!r}")
        self.event_shape = self.context_shape = (dimension,)
        self.sd = sd
        self.entropy = dimension / 2 * math.log(2 * math.pi * math.e * sd**2)

    def sample_context(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, *self.context_shape, generator=generator)

    def sample_given(self, context: Tensor, generator: torch.Generator) -> Tensor:
        return context + self.sd * torch.randn(context.shape, generator=generator)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        d = self.event_shape[0]
        mean, variance = (0, 1 + self.sd**2) if context is None else (check_points(context, d), self.sd**2)
        squared = (check_points(x, d) - mean).square().sum(-1)
        return -(squared / variance + d * math.log(2 * math.pi * variance)) / 2
