"""The same likelihood in diffrax, compiled by JAX."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flows.fields import ConcatSquashMLP, Field


class Diffrax:
    """log p(x) with diffrax under `jax.jit`, with the exact trace by one forward-mode product a dimension.

    Args:
        field: a `ConcatSquashMLP`, whose weights are copied.
        tolerance: absolute and relative tolerance of dopri5.

    Raises:
        ImportError: diffrax is not installed.
    """

    name = "diffrax"

    def __init__(self, field: Field, tolerance: float = 1e-5) -> None:
        import diffrax
        import jax
        import jax.numpy as jnp

        assert isinstance(field, ConcatSquashMLP)
        self.asarray: Any = jnp.asarray
        self.block: Any = jax.block_until_ready
        self.weights = [
            {
                name: jnp.asarray(parameter.detach().cpu().numpy())
                for name, parameter in layer.named_parameters()  # linear.weight, linear.bias, gate.weight, ...
            }
            for layer in field.layers
        ]
        dimension = math.prod(field.event_shape)

        def velocity(weights: Any, t: Any, x: Any) -> Any:
            h, c = x, jnp.reshape(t, (1,))
            for i, layer in enumerate(weights):
                gate = jax.nn.sigmoid(layer["gate.weight"] @ c + layer["gate.bias"])
                h = (h @ layer["linear.weight"].T + layer["linear.bias"]) * gate + layer["shift.weight"] @ c
                h = jnp.tanh(h) if i < len(weights) - 1 else h
            return h

        def derivatives(t: Any, state: Any, weights: Any) -> Any:
            x = state[0]

            def at(y: Any) -> Any:
                return velocity(weights, t, y)

            divergence = 0.0
            for i in range(dimension):
                direction = jnp.zeros_like(x).at[:, i].set(1.0)
                value, product = jax.jvp(at, (x,), (direction,))
                divergence = divergence + product[:, i]
            return value, -divergence

        def log_prob(weights: Any, x: Any) -> Any:
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(derivatives),
                diffrax.Dopri5(),
                t0=1.0,
                t1=0.0,
                dt0=None,
                y0=(x, jnp.zeros(len(x))),
                args=weights,
                stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
                adjoint=diffrax.RecursiveCheckpointAdjoint(),
                max_steps=256,
            )
            z, change = (component[-1] for component in solution.ys)
            normal = -0.5 * (z**2).sum(1) - 0.5 * dimension * math.log(2 * math.pi)
            return normal - change, solution.stats["num_steps"]

        self._log_prob = jax.jit(log_prob)
        self._gradient = jax.jit(jax.grad(lambda weights, x: -log_prob(weights, x)[0].mean()))

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x)."""
        return torch.from_numpy(np.array(self.evaluate(self.asarray(x.numpy()))))

    def evaluate(self, x: Any) -> Any:
        """log p(x) of a JAX array."""
        return self.block(self._log_prob(self.weights, x)[0])

    def evaluations(self, x: Any) -> int:
        """Evaluations in one solve: six a step, and one at the start."""
        return 1 + 6 * int(self._log_prob(self.weights, x)[1])

    def step(self, x: Any) -> Any:
        """The gradient of the mean."""
        return self.block(self._gradient(self.weights, x))
