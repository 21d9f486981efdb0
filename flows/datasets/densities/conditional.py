"""Densities that depend on a context: a class, or a vector of numbers."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from flows.arguments import checked
from flows.checks import check_number, whole_number
from flows.datasets.base import one_hot
from flows.datasets.batches import Batch
from flows.datasets.densities.curves import Moons
from flows.datasets.densities.density import Density, check_points, checked_shape


class ConditionalDensity(Density):
    """A density p(x | c) with a sampler for contexts c.

    A subclass sets `name` and `context_shape`, sets `num_classes` if the context is a class, and implements
    `sample_context` and `sample_given`. It sets `entropy`, which is H(x | c), and overrides `log_prob(x, context)` if
    they are known; without a context, `log_prob` returns log p(x).

    Example:
        ```python
        import torch

        import flows

        data: flows.datasets.ConditionalDensity = flows.datasets.GaussianMean()
        batch = data.train_stream(batch_size=16, generator=torch.Generator()).next()
        data.log_prob(batch.x, batch.context)  # (16,)
        ```
    """

    context_shape: tuple[int, ...]

    @abstractmethod
    def sample_context(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n contexts (n, *context)."""

    @abstractmethod
    def sample_given(self, context: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw one point for each context: (n, *context) → (n, *event)."""

    def draw(self, n: int, generator: torch.Generator | None = None) -> Batch:
        kind = type(self).__name__
        context = checked_shape(
            self.sample_context(n, generator), n, self.context_shape, f"{kind}.sample_context({n}, g)", "context_shape"
        )
        points = self.sample_given(context, generator)
        return Batch(checked_shape(points, n, self.event_shape, f"{kind}.sample_given(context, g)"), context)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return self.draw(n, generator).x


@checked
class MoonsByClass(ConditionalDensity):
    """The two half circles of `Moons`, each as a class.

    Class 0, "upper", is the upper one, class 1, "lower", the lower one. H(x | class) = 1.70257 nats, by quadrature. The
    entropy of `Moons` is larger by the information in the class, nearly log 2.

    Example:
        ```python
        import torch

        import flows

        data = flows.datasets.MoonsByClass()
        batch = data.train_stream(batch_size=16, generator=torch.Generator()).next()
        batch.context  # (16, 2), one-hot
        ```
    """

    name = "moons_by_class"
    num_classes = 2
    class_names = ("upper", "lower")
    context_shape = (2,)
    entropy = 1.70257

    def sample_context(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return one_hot(torch.randint(2, (n,), generator=generator), 2)

    def sample_given(self, context: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return Moons().sample_arc(context[:, 1] > 0.5, generator)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        moons = Moons()
        if context is None:
            return moons.log_prob(x)
        lower = check_points(context)[..., 1] > 0.5
        return torch.where(lower, moons.log_prob_of_arc(x, True), moons.log_prob_of_arc(x, False))


@checked
class GaussianMean(ConditionalDensity):
    """A Gaussian whose mean is the context.

    x | c ~ N(c, sd² I) with c ~ N(0, I). H(x | c) = d/2 log(2πe sd²) nats, and x alone is N(0, (1 + sd²) I).

    Args:
        dimension: d, the dimension of x and of the context.
        sd: standard deviation around the context.
        num_validation, num_test, num_reference: see `Density`.

    Raises:
        InvalidTypeError, InvalidValueError: a setting is no number, or out of range.

    Example:
        ```python
        import torch

        import flows

        data = flows.datasets.GaussianMean(dimension=2, sd=0.5)
        batch = data.train_stream(batch_size=16, generator=torch.Generator()).next()
        batch.x - batch.context  # noise of standard deviation 0.5
        ```
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
        dimension = whole_number("dimension", dimension)
        super().__init__(num_validation, num_test, num_reference, (dimension,))
        self.context_shape = (dimension,)
        check_number("sd", sd, above=0)
        self.sd = sd
        self.entropy = dimension / 2 * math.log(2 * math.pi * math.e) + dimension * math.log(sd)

    def sample_context(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.randn(n, *self.context_shape, generator=generator)

    def sample_given(self, context: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return context + self.sd * torch.randn(context.shape, generator=generator)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        (d,) = self.event_shape
        mean, variance = (0, 1 + self.sd**2) if context is None else (check_points(context, d), self.sd**2)
        squared = (check_points(x, d) - mean).square().sum(-1)
        return -(squared / variance + d * math.log(2 * math.pi * variance)) / 2
