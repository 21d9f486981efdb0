"""Draws from p(x | y) with a flow as the prior, by Hamiltonian Monte Carlo on its latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flows.arguments import checked
from flows.checks import check_number, whole_number
from flows.datasets import one_hot
from flows.errors import DataWarning, InvalidValueError, warn
from flows.models.cnf import CNF
from flows.progress import new_bar
from flows.restoration.operators import Operator
from flows.samples import class_number
from flows.solvers import ODESolver

LEVEL_VARIANCE = 1 / 12  # of the uniform noise that dequantises a whole number
ACCEPTANCE = 0.65  # share of accepted proposals that the step sizes aim at
STEP_SIZES = (1e-5, 1.0)
RATE = 0.15  # at which the logarithm of a step size follows the acceptance
ANNEALED = 0.6  # share of the proposals during which the noise falls to its value; a further fifth only adapts
ADAPTED = 0.8
UNLIKELY = 6.0  # standard errors of a mean square that is 1 if the noise explains it


@dataclass(frozen=True)
class Restoration:
    """Draws of what observations were made of.

    Example:
        ```python
        import torch

        import flows
        from flows.restoration import Denoising, restore

        flow = flows.CNF(flows.fields.MLP((2,), hidden=(8,)))
        found = restore(flow, torch.zeros(3, 2), Denoising(), noise_sd=0.5, num_draws=2, num_proposals=10)
        found.x  # (2, 3, 2)
        found.residual, found.acceptance  # (2, 3) each
        ```
    """

    x: Tensor  # (num_draws, B, *event), data space
    residual: Tensor  # (num_draws, B), root mean square of y − A x over the noise's standard deviation; about 1
    acceptance: Tensor  # (num_draws, B), share of the proposals at the final noise that were accepted
    nfe: int  # evaluations of the field in one chain
    observed: int  # entries of one observation

    @property
    def unresolved(self) -> Tensor:  # (num_draws, B)
        """Draws that do not explain their observation; more proposals, or more noise, may help."""
        most = 1 + UNLIKELY * math.sqrt(2 / self.observed)
        return (self.residual.square() > most) | (self.acceptance == 0)


@checked(own=("operator",))
def restore(
    flow: CNF,
    observation: Tensor,  # (B, *observed), data units
    operator: Operator,
    noise_sd: float,
    num_draws: int = 1,
    num_proposals: int = 100,
    num_leapfrogs: int = 5,
    context: Tensor | Sequence[str | int] | str | int | None = None,  # (B, *context), or classes
    solver: ODESolver | None = None,
    generator: torch.Generator | None = None,
    progress_bar: bool = False,
) -> Restoration:
    """Draw points x from p(x | y) ∝ p(x) N(y; A x, s²), with the flow's density as p(x).

    A flow is a map x(z) of its base, so that p(z | y) ∝ p₀(z) exp(−‖y − A x(z)‖²/(2 s²)), which needs no divergence.
    Each draw is the end of a chain of its own: Hamiltonian Monte Carlo on z, whose noise falls from the spread of the
    data to s while the step size adapts, and stays there for the last part. A proposal is accepted by Metropolis' rule,
    so a chain leaves p(z | y) as it is, however coarse its steps. [Neal 2011, arXiv:1206.1901]

    Whole numbers, such as levels of images, are compared without rounding, half a level below the dequantised point;
    s² then includes the variance 1/12 of that noise.

    A chain costs `num_proposals · num_leapfrogs` solves with their gradients: give a `solver` with few steps, such as
    `flows.ODESolver("midpoint", step_size=0.125)`. The flow's own solver says afterwards how likely the draws are.

    Args:
        flow: the prior; its base needs a density.
        operator: what is observed of a point, such as `Inpainting(known)`.
        noise_sd: s, in data units; above 0, or from 0 on for whole numbers.
        num_draws: chains for each observation.
        num_proposals: of each chain, at least 5.
        num_leapfrogs: gradients for each proposal.
        context: one for each observation; for a flow of classes also their names or numbers, one for each observation
            or one for all.
        solver: of the chains. Default: the flow's own.
        progress_bar: show one.

    Raises:
        InvalidValueError: the observation has another shape, or holds NaN; a setting is out of its range; there is no
            such class.

    Warns:
        DataWarning: a flow of levels, such as 0 to 255, is given observations that look like shades from 0 to 1.
        NoDensityError: the base of the flow has no density.
        SolverError: a solve cannot go on.

    Example:
        ```python
        import torch

        import flows
        from flows.restoration import Inpainting, restore

        flow = flows.CNF(flows.fields.MLP((2,), hidden=(8,)))
        first = Inpainting(torch.tensor([True, False]))
        found = restore(flow, torch.tensor([[0.3]]), first, noise_sd=0.1, num_draws=4, num_proposals=10)
        found.x  # (4, 1, 2), whose first entries are near 0.3
        ```
    """
    for name, value in (("num_draws", num_draws), ("num_leapfrogs", num_leapfrogs)):
        whole_number(name, value, 1)
    whole_number("num_proposals", num_proposals, 5)
    has_levels = flow.transform.num_levels is not None
    check_number("noise_sd", noise_sd, at_least=0, above=None if has_levels else 0)
    flow.base.require_density()
    if not isinstance(context, Tensor | None):
        context = _classes(flow, context, len(observation))
    target = _Target(flow, operator, observation, noise_sd, num_draws, context, solver)
    z = flow.base.sample((target.chains,), generator)
    z, acceptance = _sample(target, z, num_proposals, num_leapfrogs, generator, progress_bar)
    with torch.no_grad():
        y, nfe = target.points(z)
        x = flow.to_data_space(y, target.context)
        residual = target.misfit(y).div(target.size).sqrt() / target.sd
    shape = (num_draws, len(observation))
    cost = num_proposals * num_leapfrogs * nfe
    return Restoration(x.unflatten(0, shape), residual.view(shape), acceptance.view(shape), cost, target.size)


def _classes(flow: CNF, given: Sequence[str | int] | str | int, count: int) -> Tensor:  # (count, classes)
    """One-hot contexts of classes by name or number."""
    names, shape = flow.names.class_names, flow.context_shape
    if shape is None or len(shape) != 1:
        raise InvalidValueError(f"context={given!r} names classes, and the flow takes contexts of shape {shape}")
    if names is None and flow.names.num_classes is None:
        raise InvalidValueError(
            f"context={given!r} names classes, and this flow does not say that its contexts are classes; give a row of "
            f"{shape[0]} numbers for each observation, such as flows.datasets.one_hot(labels, {shape[0]})"
        )
    labels = [given] * count if isinstance(given, str | int) else list(given)
    if len(labels) != count:
        raise InvalidValueError(f"context must name a class for each of {count} observations, got {len(labels)}")
    return one_hot(torch.tensor([class_number(label, shape[0], names) for label in labels]), shape[0]).to(flow.dtype)


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


class _Target:
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
        self.shift = 0.0
        variance = noise_sd**2
        if flow.transform.num_levels is not None:
            self.shift = 0.5
            variance += LEVEL_VARIANCE / operator.averaged
        self.sd = math.sqrt(variance)

    def points(self, z: Tensor) -> tuple[Tensor, int]:  # (chains, *event), flow space
        moved = self.flow.transport(z, (0.0, 1.0), self.context, log_density=False)
        return moved.x, moved.statistics.nfe_forward

    def misfit(self, y: Tensor) -> Tensor:  # (chains,), ‖y − A x‖²
        x = self.flow.to_data_space(y, self.context, rounded=False)
        return (self.observation - self.operator(x - self.shift)).square().flatten(1).sum(1)

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
        found = torch.autograd.grad(value.sum(), z, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(z) if found is None else found


def _sample(
    target: _Target,
    z: Tensor,
    num_proposals: int,
    num_leapfrogs: int,
    generator: torch.Generator | None,
    progress_bar: bool,
) -> tuple[Tensor, Tensor]:
    """The ends of the chains, and the share of their last proposals that were accepted."""
    prior, misfit, gradients = target(z)
    spread = (misfit / target.size).sqrt().clamp_min(target.sd)  # (chains,), what the noise falls from
    step = torch.full_like(prior, 0.1)
    accepted, last = torch.zeros_like(prior), 0
    adapted: list[Tensor] = []  # logarithms of step sizes at the final noise
    ones = [1] * (z.ndim - 1)
    for round_ in new_bar(range(num_proposals), desc="restoring", unit="proposal", disable=not progress_bar):
        share = min(1.0, (round_ + 1) / max(1.0, ANNEALED * num_proposals))
        precision = (spread ** (share - 1) * target.sd**-share).square()  # 1/s² of this round, (chains,)

        def slope(gradients: Tensor, precision: Tensor = precision) -> Tensor:
            return gradients[0] - 0.5 * precision.view(-1, *ones) * gradients[1]

        def energy(prior: Tensor, misfit: Tensor, momentum: Tensor, precision: Tensor = precision) -> Tensor:
            return 0.5 * momentum.square().flatten(1).sum(1) + 0.5 * precision * misfit - prior

        device = z.device if generator is None else generator.device
        start = torch.randn(z.shape, generator=generator, device=device, dtype=z.dtype).to(z.device)
        size = step.view(-1, *ones)
        moved, momentum, there = z, start + 0.5 * size * slope(gradients), (prior, misfit, gradients)
        for leap in range(num_leapfrogs):
            moved = moved + size * momentum
            there = target(moved)
            momentum = momentum + (1.0 if leap < num_leapfrogs - 1 else 0.5) * size * slope(there[2])
        change = energy(prior, misfit, start) - energy(there[0], there[1], momentum)
        probability = change.clamp(max=0).exp().nan_to_num(nan=0.0)
        chance = torch.rand(probability.shape, generator=generator, device=device, dtype=z.dtype).to(z.device)
        taken = chance < probability
        z = torch.where(taken.view(-1, *ones), moved, z)
        prior, misfit = torch.where(taken, there[0], prior), torch.where(taken, there[1], misfit)
        gradients = torch.where(taken.view(1, -1, *ones), there[2], gradients)
        if round_ < ADAPTED * num_proposals:
            step = (step * ((probability - ACCEPTANCE) * 2 * RATE).exp()).clamp(*STEP_SIZES)
            if share == 1:
                adapted.append(step.log())
        else:
            if adapted:  # a single step size has the noise of its last acceptances
                step = torch.stack(adapted).mean(0).exp()
                adapted.clear()
            accepted, last = accepted + taken, last + 1
    return z.detach(), accepted / max(1, last)
