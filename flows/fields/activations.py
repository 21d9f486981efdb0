"""Activations that give their slope along with their value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from flows.arguments import checked


class Activation(nn.Module, ABC):
    """An elementwise function σ with its derivative σ′, which the closed-form divergences need.

    To add one: subclass it; fields take an instance or the lower-case class name.

    Example:
        ```python
        import flows


        class Arctangent(flows.fields.Activation):
            '''σ = arctan, σ′ = 1/(1 + z²).'''

            def forward(self, z):
                return z.arctan()

            def value_and_slope(self, z):
                return z.arctan(), 1 / (1 + z**2)


        field = flows.fields.MLP((2,), activation=Arctangent())
        ```
    """

    @abstractmethod
    def forward(self, z: Tensor) -> Tensor:
        """σ(z)."""

    @abstractmethod
    def value_and_slope(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(σ(z), σ′(z)), sharing what the two have in common."""

    def rescaled(self) -> Rescaled:
        """σ by a function that costs less, whose scales a perceptron moves into its weights.

        A subclass that changes σ must change this, too."""
        return Rescaled(self)


class Rescaled(NamedTuple):
    """σ(z) = scale · ρ(stretch · z) + offset.

    Example:
        ```python
        import torch

        import flows

        function, stretch, scale, offset = flows.fields.Tanh().rescaled()
        z = torch.randn(10)
        scale * function(stretch * z) + offset  # tanh z
        ```
    """

    function: Activation  # ρ
    stretch: float = 1.0
    scale: float = 1.0
    offset: float = 0.0


def tanh(z: Tensor) -> Tensor:
    """tanh(z) with an absolute error of at most 2e-7 in float32.

    PyTorch's own takes three times as long on a CPU. It resolves small values to the last digit, which layers do not
    need, because their biases round away as much.
    """
    if z.dtype != torch.float32 or not z.is_cpu:
        return z.tanh()
    traced = type(z) is not Tensor or torch.compiler.is_compiling()
    if traced and torch.is_grad_enabled():
        from torch._inductor import config

        # The patterns that torch 2.13 looks for in traced code replace the value by another in gradients of weights.
        return z.tanh() if config.pattern_matcher else 2 * torch.sigmoid(2 * z) - 1
    return (2 * z).sigmoid_().mul(2).sub_(1)


@checked
class Tanh(Activation):
    """σ = tanh, σ′ = 1 − σ².

    Example:
        ```python
        import flows

        field = flows.fields.MLP((2,), activation=flows.fields.Tanh())
        ```
    """

    def forward(self, z: Tensor) -> Tensor:
        return tanh(z)

    def value_and_slope(self, z: Tensor) -> tuple[Tensor, Tensor]:
        value = tanh(z)
        return value, 1 - value * value

    def rescaled(self) -> Rescaled:
        """tanh z = 2 s(2 z) − 1 with the logistic function s."""
        kind = type(self)
        if kind.forward is not Tanh.forward or kind.value_and_slope is not Tanh.value_and_slope:  # another function
            return Rescaled(self)
        return Rescaled(_LOGISTIC, stretch=2.0, scale=2.0, offset=-1.0)


@checked
class Logistic(Activation):
    """σ = s(z) = 1/(1 + e⁻ᶻ), σ′ = σ − σ².

    Example:
        ```python
        import flows

        field = flows.fields.MLP((2,), activation=flows.fields.Logistic())
        ```
    """

    def forward(self, z: Tensor) -> Tensor:
        return z.sigmoid()

    def value_and_slope(self, z: Tensor) -> tuple[Tensor, Tensor]:
        value = z.sigmoid()
        return value, torch.addcmul(value, value, value, value=-1)


_LOGISTIC = Logistic()  # the compiler does not follow the making of a module


@checked
class SiLU(Activation):
    """σ = z s(z) with the logistic function s; σ′ = s + σ (1 − s).

    Example:
        ```python
        import flows

        field = flows.fields.MLP((2,), activation=flows.fields.SiLU())
        ```
    """

    def forward(self, z: Tensor) -> Tensor:
        return functional.silu(z)

    def value_and_slope(self, z: Tensor) -> tuple[Tensor, Tensor]:
        logistic = z.sigmoid()
        value = z * logistic
        return value, logistic + value * (1 - logistic)


@checked
class Softplus(Activation):
    """σ = log(1 + eᶻ), σ′ = the logistic function.

    Example:
        ```python
        import flows

        field = flows.fields.MLP((2,), activation=flows.fields.Softplus())
        ```
    """

    def forward(self, z: Tensor) -> Tensor:
        return functional.softplus(z)

    def value_and_slope(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return functional.softplus(z), z.sigmoid()


@checked
class Sine(Activation):
    """σ = sin, σ′ = cos.

    Example:
        ```python
        import flows

        field = flows.fields.MLP((2,), activation=flows.fields.Sine())
        ```
    """

    def forward(self, z: Tensor) -> Tensor:
        return z.sin()

    def value_and_slope(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z.sin(), z.cos()


@checked
class Elementwise(Activation):
    """Any elementwise module, its slope taken by forward-mode differentiation.

    Args:
        module: such as `torch.nn.GELU()`; must map each entry on its own.

    Example:
        ```python
        import torch

        import flows

        field = flows.fields.MLP((2,), activation=flows.fields.Elementwise(torch.nn.GELU()))
        ```
    """

    def __init__(self, module: nn.Module = nn.GELU()) -> None:  # noqa: B008 (stateless)
        super().__init__()
        self.module = module

    def forward(self, z: Tensor) -> Tensor:
        return self.module(z)

    def value_and_slope(self, z: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = torch.func.jvp(self.module, (z,), (torch.ones_like(z),))[:2]
        return value, slope
