"""Right-hand sides of known systems, with named parameters: the truth of data, and the known part of `Physics`.

Each is `f(t, x, name=value, ...)` with states in the last dimension of `x`. The attribute `divergence` of such a
function is div f in closed form, a function of the same arguments; `flows.fields.Physics` uses it where it is there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Equations = TypeVar("Equations", bound=Callable[..., Tensor])


def with_divergence(divergence: Callable[..., Tensor]) -> Callable[[Equations], Equations]:
    """Declare the divergence of a right-hand side, as its attribute `divergence`.

    Args:
        divergence: of the same arguments; returns a tensor (*batch), or one that broadcasts to it.

    Example:
        ```python
        from flows.equations import with_divergence

        @with_divergence(lambda t, x, rate: -rate * x.shape[-1])
        def decay(t, x, rate=1.0):
            return -rate * x
        ```
    """

    def declare(function: Equations) -> Equations:
        function.divergence = divergence  # pyright: ignore[reportFunctionMemberAccess]
        return function

    return declare


@with_divergence(lambda t, x, decay, turn: -3 * decay * x.square().sum(-1))
def spiral(
    t: Tensor,
    x: Tensor,  # (*batch, 2)
    decay: float | Tensor = 0.1,
    turn: float | Tensor = 2.0,
) -> Tensor:
    """A cubic spiral, x′ = −a x³ − b y³ and y′ = b x³ − a y³ with a = `decay` and b = `turn`.

    Example:
        ```python
        import torch

        from flows.equations import spiral

        spiral(torch.tensor(0.0), torch.ones(1, 2))  # (1, 2)
        ```
    """
    a, b = (x**3).unbind(-1)
    return torch.stack([-decay * a - turn * b, turn * a - decay * b], -1)


@with_divergence(
    lambda t, x, alpha, beta, gamma, delta: alpha - beta * x[..., 1] + delta * x[..., 0] - gamma,
)
def lotka_volterra(
    t: Tensor,
    x: Tensor,  # (*batch, 2)
    alpha: float | Tensor = 1.5,
    beta: float | Tensor = 1.0,
    gamma: float | Tensor = 3.0,
    delta: float | Tensor = 1.0,
) -> Tensor:
    """Prey u and predators v: u′ = α u − β u v, v′ = δ u v − γ v. [Lotka 1925; Volterra 1926]

    Example:
        ```python
        import torch

        from flows.equations import lotka_volterra

        lotka_volterra(torch.tensor(0.0), torch.ones(1, 2))  # (1, 2)
        ```
    """
    prey, predators = x.unbind(-1)
    meetings = prey * predators
    return torch.stack([alpha * prey - beta * meetings, delta * meetings - gamma * predators], -1)


@with_divergence(lambda t, x, stiffness, friction: -friction * torch.ones_like(x[..., 0]))
def pendulum(
    t: Tensor,
    x: Tensor,  # (*batch, 2)
    stiffness: float | Tensor = 1.0,
    friction: float | Tensor = 0.0,
) -> Tensor:
    """A pendulum: θ′ = ω, ω′ = −k sin θ − c ω with k = `stiffness`, gravity over length, and c = `friction`.

    Example:
        ```python
        import torch

        from flows.equations import pendulum

        pendulum(torch.tensor(0.0), torch.ones(1, 2))  # (1, 2)
        ```
    """
    angle, speed = x.unbind(-1)
    return torch.stack([speed, -stiffness * angle.sin() - friction * speed], -1)


@with_divergence(lambda t, x, frequency: torch.zeros_like(x[..., 0]))
def oscillator(
    t: Tensor,
    x: Tensor,  # (*batch, 2)
    frequency: float | Tensor = 1.0,
) -> Tensor:
    """An oscillator whose rates saturate: x′ = ω y/(1 + y), y′ = −ω x/(1 + x) with ω = `frequency`.

    Example:
        ```python
        import torch

        from flows.equations import oscillator

        oscillator(torch.tensor(0.0), torch.ones(1, 2))  # (1, 2)
        ```
    """
    a, b = (x / (1 + x)).unbind(-1)
    return torch.stack([frequency * b, -frequency * a], -1)


@with_divergence(lambda t, x, sigma, rho, beta: (-sigma - 1 - beta) * torch.ones_like(x[..., 0]))
def lorenz(
    t: Tensor,
    x: Tensor,  # (*batch, 3)
    sigma: float | Tensor = 10.0,
    rho: float | Tensor = 28.0,
    beta: float | Tensor = 8 / 3,
) -> Tensor:
    """The system x′ = σ(y − x), y′ = x(ρ − z) − y, z′ = x y − β z. [Lorenz 1963]

    Example:
        ```python
        import torch

        from flows.equations import lorenz

        lorenz(torch.tensor(0.0), torch.ones(1, 3))  # (1, 3): 0, 26, −5/3
        ```
    """
    a, b, c = x.unbind(-1)
    return torch.stack([sigma * (b - a), a * (rho - c) - b, a * b - beta * c], -1)


@with_divergence(lambda t, x, strength: torch.zeros_like(x[..., 0]))
def two_body(
    t: Tensor,
    x: Tensor,  # (*batch, 4)
    strength: float | Tensor = 1.0,
) -> Tensor:
    """A body around a fixed centre, in the plane: q″ = −k q/‖q‖³ with k = `strength`; the state is (q, q′).

    Example:
        ```python
        import torch

        from flows.equations import two_body

        two_body(torch.tensor(0.0), torch.tensor([[1.0, 0.0, 0.0, 1.0]]))  # (1, 4): a circle
        ```
    """
    position, speed = x[..., :2], x[..., 2:]
    return torch.cat([speed, -strength * position / position.square().sum(-1, keepdim=True) ** 1.5], -1)
