"""Systems with known equations: a spiral, Lotka-Volterra, pendulum, oscillator, Lorenz, two bodies."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from flows import equations
from flows.arguments import checked
from flows.checks import check_number
from flows.datasets.series.dynamical_system import DynamicalSystem


@checked
class Spiral(DynamicalSystem):
    """A cubic spiral: dx/dt = −0.1 x³ − 2 y³, dy/dt = 2 x³ − 0.1 y³.

    The demonstration of torchdiffeq, with many initial states instead of (2, 0) alone.
    [Chen et al. 2018, arXiv:1806.07366]

    Args:
        radius: initial states lie between half of this and this from the origin.
        num_series, num_times, span, beyond, noise, irregular, seed: see `DynamicalSystem`.
        validation_fraction, test_fraction, split_seed: see `Series`.

    Raises:
        InvalidTypeError, InvalidValueError: a setting is no number or out of range.

    Example:
        ```python
        import torch

        import flows

        data = flows.datasets.Spiral(num_series=10, num_times=20, noise=0.01)
        batch = data.train_stream(batch_size=4, generator=torch.Generator()).next()
        batch.x.shape, batch.times.shape  # (4, 20, *event), (4, 20)
        ```
    """

    name = "spiral"
    columns = ("x", "y")

    def __init__(
        self,
        radius: float = 2.0,
        num_series: int = 100,
        num_times: int = 50,
        span: float = 10.0,
        beyond: float = 5.0,
        noise: float = 0.0,
        irregular: bool = False,
        seed: int = 0,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
    ):
        check_number("radius", radius, above=0)
        self.radius = float(radius)
        settings = (num_series, num_times, span, beyond, noise, irregular, seed)
        super().__init__(*settings, validation_fraction, test_fraction, split_seed)

    def velocity(self, t: Tensor, x: Tensor) -> Tensor:
        return equations.spiral(t, x)

    def initial_states(self, n: int, generator: torch.Generator) -> Tensor:
        draws = torch.rand(n, 2, generator=generator, dtype=torch.float64)
        radius, angle = self.radius * (0.5 + 0.5 * draws[:, 0]), 2 * math.pi * draws[:, 1]
        return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


@checked
class LotkaVolterra(DynamicalSystem):
    """Prey u and predators v: du/dt = α u − β u v, dv/dt = δ u v − γ v.

    Conserved: δ u − γ log u + β v − α log v. Initial states are uniform in [0.5, 2.5]². [Lotka 1925; Volterra 1926]

    Args:
        alpha: growth of the prey, > 0.
        beta: loss of prey to predators, > 0.
        gamma: death of predators, > 0.
        delta: growth of predators from prey, > 0.
        num_series, num_times, span, beyond, noise, irregular, seed: see `DynamicalSystem`.
        validation_fraction, test_fraction, split_seed: see `Series`.

    Raises:
        InvalidTypeError, InvalidValueError: a setting is no number or out of range.

    Example:
        ```python
        import torch

        import flows

        data = flows.datasets.LotkaVolterra(num_series=10, num_times=20, noise=0.01)
        batch = data.train_stream(batch_size=4, generator=torch.Generator()).next()
        batch.x.shape, batch.times.shape  # (4, 20, *event), (4, 20)
        ```
    """

    name = "lotka_volterra"
    columns = ("prey", "predators")

    def __init__(
        self,
        alpha: float = 1.5,
        beta: float = 1.0,
        gamma: float = 3.0,
        delta: float = 1.0,
        num_series: int = 100,
        num_times: int = 50,
        span: float = 6.0,
        beyond: float = 6.0,
        noise: float = 0.0,
        irregular: bool = False,
        seed: int = 0,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
    ):
        for name, value in {"alpha": alpha, "beta": beta, "gamma": gamma, "delta": delta}.items():
            check_number(name, value, above=0)
        self.alpha, self.beta, self.gamma, self.delta = float(alpha), float(beta), float(gamma), float(delta)
        settings = (num_series, num_times, span, beyond, noise, irregular, seed)
        super().__init__(*settings, validation_fraction, test_fraction, split_seed)

    def velocity(self, t: Tensor, x: Tensor) -> Tensor:
        return equations.lotka_volterra(t, x, self.alpha, self.beta, self.gamma, self.delta)

    def initial_states(self, n: int, generator: torch.Generator) -> Tensor:
        return 0.5 + 2 * torch.rand(n, 2, generator=generator, dtype=torch.float64)

    def conserved(self, x: Tensor) -> Mapping[str, Tensor]:
        prey, predators = x.unbind(-1)
        of_prey, of_predators = (self.delta * prey - self.gamma * prey.log(), self.beta * predators)
        return {"invariant": of_prey + of_predators - self.alpha * predators.log()}


@checked
class Pendulum(DynamicalSystem):
    """A pendulum: dθ/dt = ω, dω/dt = −sin θ − friction · ω.

    Conserved without friction: the energy ω²/2 + 1 − cos θ. Initial states are uniform, the angle in [−π/2, π/2] and
    the speed in [−1/2, 1/2].

    Args:
        friction: >= 0.
        num_series, num_times, span, beyond, noise, irregular, seed: see `DynamicalSystem`.
        validation_fraction, test_fraction, split_seed: see `Series`.

    Raises:
        InvalidTypeError, InvalidValueError: a setting is no number or out of range.

    Example:
        ```python
        import torch

        import flows

        data = flows.datasets.Pendulum(num_series=10, num_times=20, noise=0.01)
        batch = data.train_stream(batch_size=4, generator=torch.Generator()).next()
        batch.x.shape, batch.times.shape  # (4, 20, *event), (4, 20)
        ```
    """

    name = "pendulum"
    columns = ("angle", "speed")

    def __init__(
        self,
        friction: float = 0.0,
        num_series: int = 100,
        num_times: int = 50,
        span: float = 10.0,
        beyond: float = 5.0,
        noise: float = 0.0,
        irregular: bool = False,
        seed: int = 0,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
    ):
        check_number("friction", friction, at_least=0)
        self.friction = float(friction)
        settings = (num_series, num_times, span, beyond, noise, irregular, seed)
        super().__init__(*settings, validation_fraction, test_fraction, split_seed)

    def velocity(self, t: Tensor, x: Tensor) -> Tensor:
        return equations.pendulum(t, x, friction=self.friction)

    def initial_states(self, n: int, generator: torch.Generator) -> Tensor:
        draws = torch.rand(n, 2, generator=generator, dtype=torch.float64)
        return torch.stack([math.pi * (draws[:, 0] - 0.5), draws[:, 1] - 0.5], 1)

    def conserved(self, x: Tensor) -> Mapping[str, Tensor]:
        angle, speed = x.unbind(-1)
        return {} if self.friction else {"energy": speed**2 / 2 + 1 - angle.cos()}


@checked
class Oscillator(DynamicalSystem):
    """An oscillator whose rates saturate: dx/dt = y/(1 + y), dy/dt = −x/(1 + x).

    Conserved: x − log(1 + x) + y − log(1 + y). Initial states are uniform in [−0.6, 1]². These are the data of the
    example `neural_ode` of diffrax. [Kidger 2021, arXiv:2202.02435]

    Args:
        num_series, num_times, span, beyond, noise, irregular, seed: see `DynamicalSystem`.
        validation_fraction, test_fraction, split_seed: see `Series`.

    Raises:
        InvalidTypeError, InvalidValueError: a setting is no number or out of range.

    Example:
        ```python
        import torch

        import flows

        data = flows.datasets.Oscillator(num_series=10, num_times=20, noise=0.01)
        batch = data.train_stream(batch_size=4, generator=torch.Generator()).next()
        batch.x.shape, batch.times.shape  # (4, 20, *event), (4, 20)
        ```
    """

    name = "oscillator"
    columns = ("x", "y")

    def __init__(
        self,
        num_series: int = 100,
        num_times: int = 50,
        span: float = 10.0,
        beyond: float = 5.0,
        noise: float = 0.0,
        irregular: bool = False,
        seed: int = 0,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
    ):
        settings = (num_series, num_times, span, beyond, noise, irregular, seed)
        super().__init__(*settings, validation_fraction, test_fraction, split_seed)

    def velocity(self, t: Tensor, x: Tensor) -> Tensor:
        return equations.oscillator(t, x)

    def initial_states(self, n: int, generator: torch.Generator) -> Tensor:
        return 1.6 * torch.rand(n, 2, generator=generator, dtype=torch.float64) - 0.6

    def conserved(self, x: Tensor) -> Mapping[str, Tensor]:
        return {"invariant": (x - x.log1p()).sum(-1)}


@checked
class Lorenz(DynamicalSystem):
    """A chaotic system: dx/dt = σ(y − x), dy/dt = x(ρ − z) − y, dz/dt = x y − β z.

    With the default parameters, errors grow e-fold in about 1.1 units of time. Initial states are normal around
    (0, 0, 25), with standard deviations 8, 8 and 5. [Lorenz 1963, Deterministic nonperiodic flow]

    Args:
        sigma, rho, beta: the parameters σ, ρ and β, > 0.
        num_series, num_times, span, beyond, noise, irregular, seed: see `DynamicalSystem`.
        validation_fraction, test_fraction, split_seed: see `Series`.

    Raises:
        InvalidTypeError, InvalidValueError: a setting is no number or out of range.

    Example:
        ```python
        import torch

        import flows

        data = flows.datasets.Lorenz(num_series=10, num_times=20, noise=0.01)
        batch = data.train_stream(batch_size=4, generator=torch.Generator()).next()
        batch.x.shape, batch.times.shape  # (4, 20, *event), (4, 20)
        ```
    """

    name = "lorenz"
    columns = ("x", "y", "z")

    def __init__(
        self,
        sigma: float = 10.0,
        rho: float = 28.0,
        beta: float = 8 / 3,
        num_series: int = 100,
        num_times: int = 50,
        span: float = 2.0,
        beyond: float = 1.0,
        noise: float = 0.0,
        irregular: bool = False,
        seed: int = 0,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
    ):
        for name, value in {"sigma": sigma, "rho": rho, "beta": beta}.items():
            check_number(name, value, above=0)
        self.sigma, self.rho, self.beta = float(sigma), float(rho), float(beta)
        settings = (num_series, num_times, span, beyond, noise, irregular, seed)
        super().__init__(*settings, validation_fraction, test_fraction, split_seed)

    def velocity(self, t: Tensor, x: Tensor) -> Tensor:
        return equations.lorenz(t, x, self.sigma, self.rho, self.beta)

    def initial_states(self, n: int, generator: torch.Generator) -> Tensor:
        normal = torch.randn(n, 3, generator=generator, dtype=torch.float64)
        return torch.tensor([0.0, 0.0, 25.0]) + normal * torch.tensor([8.0, 8.0, 5.0])


@checked
class TwoBody(DynamicalSystem):
    """A body around a fixed centre, in the plane: q″ = −q/‖q‖³. The state is (q, q′).

    Orbits are ellipses with semi-major axes from 0.8 to 1.2, in any direction; a period is about 2π. They start at the
    point nearest to the centre. Conserved: the energy ‖q′‖²/2 − 1/‖q‖ and the angular momentum q₁q₂′ − q₂q₁′.

    Args:
        eccentricity: the largest one; the others are uniform between 0 and this, < 1.
        num_series, num_times, span, beyond, noise, irregular, seed: see `DynamicalSystem`.
        validation_fraction, test_fraction, split_seed: see `Series`.

    Raises:
        InvalidTypeError, InvalidValueError: a setting is no number or out of range.

    Example:
        ```python
        import torch

        import flows

        data = flows.datasets.TwoBody(num_series=10, num_times=20, noise=0.01)
        batch = data.train_stream(batch_size=4, generator=torch.Generator()).next()
        batch.x.shape, batch.times.shape  # (4, 20, *event), (4, 20)
        ```
    """

    name = "two_body"
    columns = ("x", "y", "vx", "vy")

    def __init__(
        self,
        eccentricity: float = 0.5,
        num_series: int = 100,
        num_times: int = 50,
        span: float = 10.0,
        beyond: float = 5.0,
        noise: float = 0.0,
        irregular: bool = False,
        seed: int = 0,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
    ):
        check_number("eccentricity", eccentricity, at_least=0, below=1)
        self.eccentricity = float(eccentricity)
        settings = (num_series, num_times, span, beyond, noise, irregular, seed)
        super().__init__(*settings, validation_fraction, test_fraction, split_seed)

    def velocity(self, t: Tensor, x: Tensor) -> Tensor:
        return equations.two_body(t, x)

    def initial_states(self, n: int, generator: torch.Generator) -> Tensor:
        draws = torch.rand(n, 3, generator=generator, dtype=torch.float64)
        axis, eccentricity, angle = 0.8 + 0.4 * draws[:, 0], self.eccentricity * draws[:, 1], 2 * math.pi * draws[:, 2]
        distance = axis * (1 - eccentricity)  # at the nearest point
        speed = ((1 + eccentricity) / distance).sqrt()
        cos, sin = angle.cos(), angle.sin()
        return torch.stack([distance * cos, distance * sin, -speed * sin, speed * cos], 1)

    def conserved(self, x: Tensor) -> Mapping[str, Tensor]:
        position, speed = x[..., :2], x[..., 2:]
        energy = speed.square().sum(-1) / 2 - 1 / position.norm(dim=-1)
        return {
            "energy": energy,
            "angular_momentum": position[..., 0] * speed[..., 1] - position[..., 1] * speed[..., 0],
        }
