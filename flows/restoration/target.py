"""The density of latents given an observation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flows.errors import DataWarning, InvalidValueError, warn
from flows.models.cnf import CNF
from flows.restoration.operators import Operator
from flows.solvers import ODESolver
from flows.transforms.dequantise import uniform_like

LEVEL_VARIANCE = 1 / 12  # of the uniform noise that dequantises a whole number


def _check_levels(observation: Tensor, num_levels: int) -> None:
    """Warn of shades from 0 to 1 where levels are expected."""
    low, high = float(observation.min()), float(observation.max())
    if num_levels > 2 and low >= -0.5 and high <= 1.5 and bool((observation != observation.round()).any()):
        warn(
            f"the observations lie between {low:.2g} and {high:.2g}, and the flow knows levels from 0 to "
            f"{num_levels - 1}: pictures nearly black. For shades from 0 to 1, multiply by {num_levels - 1}, and "
            "noise_sd with them",
            DataWarning,
        )


class Target:
    """log p(z | y), up to a constant, for all chains at once."""

    def __init__(
        self,
        flow: CNF,
        operator: Operator,
        observation: Tensor,
        noise_sd: float,
        num_draws: int,
        context: Tensor | None,
        solver: ODESolver | None,
    ) -> None:
        shape = operator.observed_shape(flow.event_shape)
        if tuple(observation.shape[1:]) != shape or not len(observation):
            raise InvalidValueError(
                f"observation must hold one or more observations of shape {shape}, got {tuple(observation.shape)}"
            )
        if not observation.isfinite().all():
            raise InvalidValueError(
                f"observation holds NaN or infinite values in {int((~observation.isfinite()).flatten(1).any(1).sum())} "
                f"of {len(observation)} rows; mark what is missing by Inpainting(known)"
            )
        if flow.transform.num_levels is not None:
            _check_levels(observation, flow.transform.num_levels)
        if context is not None:
            wanted = (len(observation), *(flow.context_shape or ()))
            if tuple(context.shape) != wanted:
                raise InvalidValueError(
                    f"context must have a row for each observation, of shape {wanted}, got {tuple(context.shape)}; "
                    "classes are one-hot: flows.datasets.one_hot(labels, num_classes), or given by name"
                )
            context = context.repeat(num_draws, *[1] * (context.ndim - 1))
        parts = (flow.base, flow.transform, flow.event_shape, flow.encoder)
        self.flow = flow if solver is None else CNF(flow.field, flow.divergence, solver, *parts)
        self.operator, self.context = operator, context
        self.observation = observation.to(flow.device, flow.dtype).repeat(num_draws, *[1] * len(shape))
        self.chains, self.size = len(self.observation), math.prod(shape)
        has_levels = flow.transform.num_levels is not None
        self.shift = 0.5 if has_levels else 0.0
        self.noise_variance = noise_sd**2
        self.level_variance = LEVEL_VARIANCE / operator.averaged if has_levels else 0.0
        self.sd = math.sqrt(self.noise_variance + self.level_variance)

    def points(self, z: Tensor) -> tuple[Tensor, int]:  # (chains, *event), flow space
        moved = self.flow.transport(z, (0.0, 1.0), self.context, log_density=False)
        return moved.x, moved.statistics.nfe_forward

    def latents(self, y: Tensor) -> Tensor:  # (chains, *event)
        """The inverse of `points`, up to the error of the solver."""
        return self.flow.transport(y, (1.0, 0.0), self.context, log_density=False).x

    def data(self, y: Tensor) -> Tensor:  # (chains, *event), what the operator sees
        return self.flow.to_data_space(y, self.context, rounded=False) - self.shift

    def flow_space(self, x: Tensor, generator: torch.Generator | None) -> Tensor:  # (chains, *event)
        """The inverse of `data`. Beyond the levels of a picture, the noise of the last one is drawn."""
        x, levels = x + self.shift, self.flow.transform.num_levels
        if levels is not None:
            inside = x.clamp(0, levels - 1)
            noisy = inside + uniform_like(x, generator)
            x = torch.where((x < 0) | (x >= levels), noisy, x)
        known = x.isfinite()  # tables of levels have no entry for NaN
        y = self.flow.to_flow_space(torch.where(known, x, 0.0), self.context, rounded=False)
        return torch.where(known, y, torch.nan)

    def dequantised(self, generator: torch.Generator | None) -> Tensor:  # (chains, *observed)
        """The observation with the noise of whole numbers, if there are any."""
        if not self.shift:
            return self.observation
        return self.observation + (uniform_like(self.observation, generator) - 0.5) / math.sqrt(self.operator.averaged)

    def misfit(self, y: Tensor) -> Tensor:  # (chains,), ‖y − A x‖²
        return (self.observation - self.operator(self.data(y))).square().flatten(1).sum(1)

    @torch.no_grad()
    def check_slope(self, z: Tensor) -> None:
        """Raise `InvalidValueError` if no small change of a point changes what is observed of it."""
        y = self.points(z)[0]
        with torch.enable_grad():
            y = y.requires_grad_()
            misfit = self.misfit(y)
            slope = _gradient(misfit, y)
        if bool((misfit > 0).any()) and not slope.any():
            parts = f"the transform {type(self.flow.transform).__name__} or the operator {type(self.operator).__name__}"
            raise InvalidValueError(
                f"y − A x has no slope at {len(z)} draws from the base, so nothing can follow the observation: {parts} "
                "rounds, or cuts the gradient. Let the transform define unrounded(y), which returns points before they "
                "are rounded, and the operator use differentiable functions of x"
            )

    def log_density(self, z: Tensor) -> Tensor:  # (chains,)
        """log p(z | y), up to a constant."""
        return self.flow.base.log_prob(z) - self.misfit(self.points(z)[0]) / (2 * self.sd**2)

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log p₀(z) and the misfit (chains,), and the gradients of both, stacked (2, chains, *event)."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            prior, misfit = self.flow.base.log_prob(z), self.misfit(self.points(z)[0])
            gradients = [_gradient(value, z) for value in (prior, misfit)]
        return prior.detach(), misfit.detach(), torch.stack(gradients)


def _gradient(value: Tensor, z: Tensor) -> Tensor:
    """That of the sum; zero where a value does not depend on z, as the density of a uniform base."""
    found = None
    if value.requires_grad:
        found = torch.autograd.grad(value.sum(), z, allow_unused=True)[0]
    return torch.zeros_like(z) if found is None else found
