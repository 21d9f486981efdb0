"""Six simulators whose posteriors are known from long runs of other methods.

The tasks of sbibm. [Lueckmann et al. 2021, Benchmarking simulation-based inference, arXiv:2101.04653]
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Binomial, Independent, LogNormal, MultivariateNormal

from flows.arguments import checked
from flows.datasets.simulators.priors import box
from flows.datasets.simulators.simulator import Simulator

STEP = 0.1  # days, of the solver of rate equations


class BenchmarkSimulator(Simulator):
    """A simulator with its prior.

    Args:
        num_simulations, num_test, validation_fraction, seed: see `Simulator`.

    Example:
        ```python
        import flows

        data: flows.datasets.BenchmarkSimulator = flows.datasets.TwoMoons(num_simulations=100, num_test=10)
        data.event_shape, data.context_shape  # of the parameters, of the observations
        ```
    """

    name: ClassVar[str]
    task: ClassVar[str]  # its name in sbibm

    def __init__(
        self, num_simulations: int = 10_000, num_test: int = 1_000, validation_fraction: float = 0.05, seed: int = 0
    ) -> None:
        sizes = (num_simulations, num_test, validation_fraction)
        super().__init__(self.observe, self.make_prior(), *sizes, vectorised=True, seed=seed, name=type(self).name)

    @abstractmethod
    def make_prior(self) -> torch.distributions.Distribution:
        """Return the prior."""

    @abstractmethod
    def observe(self, theta: Tensor) -> Tensor:
        """Simulate an observation for each row of parameters."""


@checked
class TwoMoons(BenchmarkSimulator):
    """A crescent that two sets of parameters explain: posteriors of two moons.

    θ ~ U(−1, 1)². x = (r cos a + ¼, r sin a) + (−|θ₁ + θ₂|, −θ₁ + θ₂)/√2 with a ~ U(−π/2, π/2), r ~ N(0.1, 0.01²).

    Args:
        num_simulations, num_test, validation_fraction, seed: see `Simulator`.

    Example:
        ```python
        import torch

        import flows

        data = flows.datasets.TwoMoons(num_simulations=100, num_test=10)
        batch = data.train_stream(batch_size=16, generator=torch.Generator()).next()
        batch.x, batch.context  # parameters, observations
        ```
    """

    name = "two_moons"
    task = "two_moons"

    def make_prior(self) -> Independent:
        return box([-1.0, -1.0], [1.0, 1.0])

    def observe(self, theta: Tensor) -> Tensor:
        angle = math.pi * (torch.rand(len(theta)) - 0.5)
        radius = 0.1 + 0.01 * torch.randn(len(theta))
        one, other = theta.unbind(1)
        x = radius * angle.cos() + 0.25 - (one + other).abs() / math.sqrt(2)
        return torch.stack([x, radius * angle.sin() + (other - one) / math.sqrt(2)], 1)


@checked
class SLCP(BenchmarkSimulator):
    """Simple likelihood, complex posterior: four draws of a Gaussian in the plane.

    θ ~ U(−3, 3)⁵. The mean is (θ₁, θ₂), the standard deviations are θ₃² and θ₄², the correlation is tanh θ₅; so the
    posterior has four modes, with edges.

    Args:
        num_simulations, num_test, validation_fraction, seed: see `Simulator`.

    Example:
        ```python
        import torch

        import flows

        data = flows.datasets.SLCP(num_simulations=100, num_test=10)
        batch = data.train_stream(batch_size=16, generator=torch.Generator()).next()
        batch.x, batch.context  # parameters, observations
        ```
    """

    name = "slcp"
    task = "slcp"

    def make_prior(self) -> Independent:
        return box([-3.0] * 5, [3.0] * 5)

    def observe(self, theta: Tensor) -> Tensor:
        mean, correlation = theta[:, None, :2], theta[:, 4:5].tanh()
        first, second = theta[:, 2:3].square(), theta[:, 3:4].square()
        z, w = torch.randn(2, len(theta), 4)
        drawn = torch.stack([first * z, second * (correlation * z + (1 - correlation.square()).sqrt() * w)], 2)
        return (mean + drawn).flatten(1)


@checked
class GaussianMixturePosterior(BenchmarkSimulator):
    """A point with noise of two scales: posteriors with a narrow peak on a wide one.

    θ ~ U(−10, 10)². x ~ ½ N(θ, I) + ½ N(θ, 0.1² I).

    Args:
        num_simulations, num_test, validation_fraction, seed: see `Simulator`.

    Example:
        ```python
        import torch

        import flows

        data = flows.datasets.GaussianMixturePosterior(num_simulations=100, num_test=10)
        batch = data.train_stream(batch_size=16, generator=torch.Generator()).next()
        batch.x, batch.context  # parameters, observations
        ```
    """

    name = "gaussian_mixture_posterior"
    task = "gaussian_mixture"

    def make_prior(self) -> Independent:
        return box([-10.0, -10.0], [10.0, 10.0])

    def observe(self, theta: Tensor) -> Tensor:
        scale = torch.where(torch.rand(len(theta), 1) < 0.5, 1.0, 0.1)
        return theta + scale * torch.randn(len(theta), 2)


@checked
class BernoulliGLM(BenchmarkSimulator):
    """A spiking neuron: offset and nine filter weights from a hundred bins of white-noise input.

    A spike comes with probability sigmoid(β + Σ_j f_j I_{t−j}). β ~ N(0, 2), and f is Gaussian with precision FᵀF,
    where F takes second differences plus √(j/9) on the diagonal. The observation holds the sufficient statistics: the
    number of spikes and the sums of the input j bins before them.

    Args:
        num_simulations, num_test, validation_fraction, seed: see `Simulator`.

    Example:
        ```python
        import torch

        import flows

        data = flows.datasets.BernoulliGLM(num_simulations=100, num_test=10)
        batch = data.train_stream(batch_size=16, generator=torch.Generator()).next()
        batch.x, batch.context  # parameters, observations
        ```
    """

    name = "bernoulli_glm"
    task = "bernoulli_glm"
    bins: ClassVar[int] = 100
    weights: ClassVar[int] = 9

    def make_prior(self) -> MultivariateNormal:
        size = self.weights
        difference = torch.eye(size) - torch.diag(torch.ones(size - 1), -1)
        rough = difference @ difference + torch.diag((torch.arange(size) / size).sqrt())
        precision = torch.zeros(size + 1, size + 1)
        precision[0, 0] = 0.5
        precision[1:, 1:] = rough.T @ rough
        return MultivariateNormal(torch.zeros(size + 1), precision_matrix=precision)

    def design(self) -> Tensor:  # (bins, 1 + weights)
        """Return ones, and the input j bins ago. The input is the one of the published observations."""
        noise = torch.from_numpy(np.random.RandomState(42).randn(self.bins)).to(torch.get_default_dtype())
        lagged = [torch.cat([noise.new_zeros(j), noise[: self.bins - j]]) for j in range(self.weights)]
        return torch.stack([torch.ones(self.bins), *lagged], 1)

    def observe(self, theta: Tensor) -> Tensor:
        design = self.design().to(theta)
        probability = (theta @ design.T).sigmoid()
        spikes = (torch.rand(len(theta), self.bins) < probability).to(theta)
        return spikes @ design


@checked
class SIR(BenchmarkSimulator):
    """An epidemic: contact and recovery rates from ten samples of a thousand people.

    dS/dt = −βSI/N, dI/dt = βSI/N − γI in a million people, one of them infected at first. Every 17 days
    x ~ Binomial(1000, I/N). β ~ LogNormal(log 0.4, 0.5), γ ~ LogNormal(log ⅛, 0.2), in 1/days.

    Args:
        num_simulations, num_test, validation_fraction, seed: see `Simulator`.

    Example:
        ```python
        import torch

        import flows

        data = flows.datasets.SIR(num_simulations=100, num_test=10)
        batch = data.train_stream(batch_size=16, generator=torch.Generator()).next()
        batch.x, batch.context  # parameters, observations
        ```
    """

    name = "sir"
    task = "sir"
    population: ClassVar[float] = 1e6

    def make_prior(self) -> Independent:
        return Independent(LogNormal(torch.tensor([math.log(0.4), math.log(1 / 8)]), torch.tensor([0.5, 0.2])), 1)

    def observe(self, theta: Tensor) -> Tensor:
        contact, recovery = theta.double().unbind(1)

        def rates(state: Tensor) -> Tensor:
            susceptible, infected = state
            new = contact * susceptible * infected / self.population
            return torch.stack([-new, new - recovery * infected])

        start = torch.tensor([[self.population - 1], [1.0]], dtype=torch.float64).expand(2, len(theta))
        infected = solved(rates, start, 10, 17.0)[:, 1].T
        return Binomial(1000, (infected / self.population).clamp(0, 1)).sample().to(theta)


@checked
class LotkaVolterraPosterior(BenchmarkSimulator):
    """Predators and prey: four rates from ten noisy counts of each.

    dX/dt = αX − βXY, dY/dt = −γY + δXY from (30, 1). Every 2.1 days both are seen with log-normal noise of scale 0.1.
    α, γ ~ LogNormal(−⅛, ½), β, δ ~ LogNormal(−3, ½), in 1/days.

    Args:
        num_simulations, num_test, validation_fraction, seed: see `Simulator`.

    Example:
        ```python
        import torch

        import flows

        data = flows.datasets.LotkaVolterraPosterior(num_simulations=100, num_test=10)
        batch = data.train_stream(batch_size=16, generator=torch.Generator()).next()
        batch.x, batch.context  # parameters, observations
        ```
    """

    name = "lotka_volterra_posterior"
    task = "lotka_volterra"

    def make_prior(self) -> Independent:
        return Independent(LogNormal(torch.tensor([-0.125, -3.0, -0.125, -3.0]), torch.full((4,), 0.5)), 1)

    def observe(self, theta: Tensor) -> Tensor:
        growth, eaten, death, gain = theta.double().unbind(1)

        def rates(state: Tensor) -> Tensor:  # of the logarithms, which stay in range
            prey, predators = state.exp()
            return torch.stack([growth - eaten * predators, gain * prey - death])

        start = torch.tensor([[30.0], [1.0]], dtype=torch.float64).log().expand(2, len(theta))
        counts = solved(rates, start, 10, 2.1, STEP / 5).clamp(math.log(1e-10), math.log(1e4))  # (10, 2, n)
        seen = (counts + 0.1 * torch.randn(counts.shape, dtype=counts.dtype)).exp()
        return seen.permute(2, 1, 0).flatten(1).to(theta)


def solved(
    rates: Callable[[Tensor], Tensor], state: Tensor, count: int, every: float, step: float = STEP
) -> Tensor:  # (count, *state)
    """Return `count` states, from the first one on, at distances `every` in time; by RK4."""
    steps = round(every / step)
    step = every / steps
    states = [state]
    for _ in range(count - 1):
        for _ in range(steps):
            one = rates(state)
            two = rates(state + step / 2 * one)
            three = rates(state + step / 2 * two)
            four = rates(state + step * three)
            state = state + step / 6 * (one + 2 * two + 2 * three + four)
        states.append(state)
    return torch.stack(states)
