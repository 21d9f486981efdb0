"""Hamiltonian Monte Carlo on latents, one chain for each draw."""

from __future__ import annotations

import torch
from torch import Tensor

from flows.progress import new_bar
from flows.restoration.target import Target

ACCEPTANCE = 0.65  # share of accepted proposals that the step sizes aim at
STEP_SIZES = (1e-5, 1.0)
RATE = 0.15  # at which the logarithm of a step size follows the acceptance
ANNEALED = 0.6  # share of the proposals during which the noise falls to its value; a further fifth only adapts
ADAPTED = 0.8


@torch.no_grad()
def likelier(target: Target, z: Tensor, other: Tensor) -> Tensor:  # (chains, *event)
    """Of two latents for each chain, the one with the higher density; `other` where `z` is not finite."""
    ones = [1] * (z.ndim - 1)
    z = torch.where(z.isfinite().flatten(1).all(1).view(-1, *ones), z, other)
    densities = [target.log_density(one) for one in (z, other)]
    better = densities[0] > densities[1]  # not if it is NaN
    return torch.where(better.view(-1, *ones), z, other)


def sample(
    target: Target,
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
