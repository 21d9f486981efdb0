"""Draws from p(x | y) with a flow as the prior: guided draws, corrected by Hamiltonian Monte Carlo on their latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flows.arguments import checked
from flows.checks import check_number, whole_number
from flows.datasets import one_hot
from flows.errors import InvalidValueError
from flows.models.cnf import CNF
from flows.restoration.chains import likelier, sample
from flows.restoration.guidance import guided_cost, guided_latents
from flows.restoration.operators import Operator
from flows.restoration.target import Target
from flows.samples import class_number
from flows.solvers import ODESolver

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
    acceptance: Tensor  # (num_draws, B), share of the proposals at the final noise that were accepted; NaN without any
    nfe: int  # evaluations of the field for one draw
    observed: int  # entries of one observation

    @property
    def unresolved(self) -> Tensor:  # (num_draws, B)
        """Draws that do not explain their observation; more proposals, or more noise, may help.

        A resolved draw explains what was observed. Whether a chain went far enough to forget its start, this does not
        say.
        """
        most = 1 + UNLIKELY * math.sqrt(2 / self.observed)
        return (self.residual.square() > most) | (self.acceptance == 0)


@checked(own=("operator",))
@torch.inference_mode(False)  # chains take gradients
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
    start: Literal["guided", "base"] = "guided",
) -> Restoration:
    """Draw points x from p(x | y) ∝ p(x) N(y; A x, s²), with the flow's density as p(x).

    A flow is a map x(z) of its base, so that p(z | y) ∝ p₀(z) exp(−‖y − A x(z)‖²/(2 s²)), which needs no divergence.
    Each draw is the end of a chain of its own, in two parts:

    - The start: a guided draw, near p(x | y), and its latent. Along the path from the base, the observation corrects
      where the flow says that the path leads. [Pokle et al. 2024, arXiv:2310.04432; Wang et al. 2023,
      arXiv:2212.00490] A draw from the base takes its place where that one is likelier given y.
    - Hamiltonian Monte Carlo on z. Its noise falls from the misfit of the start to s while the step size adapts, and
      stays there for the last part. A proposal is accepted by Metropolis' rule, so the chain leaves p(z | y) as it is,
      however coarse its steps, and forgets its start. [Neal 2011, arXiv:1206.1901]

    With `num_proposals=0` the guided draws are returned as they are: an approximation, in seconds. Where s is far below
    the spread of the data, as for levels without noise, a chain takes small steps and hardly leaves its start.

    Whole numbers, such as levels of images, are compared without rounding, half a level below the dequantised point;
    s² then includes the variance 1/12 of that noise.

    A start costs about 300 evaluations of the field, and a chain `num_proposals · num_leapfrogs` solves with their
    gradients: give a `solver` with few steps, such as
    `flows.ODESolver("midpoint", step_size=0.125)`. The flow's own solver says afterwards how likely the draws are.

    Args:
        flow: the prior; its base needs a density.
        operator: what is observed of a point, such as `Inpainting(known)`.
        noise_sd: s, in data units; above 0, or from 0 on for whole numbers.
        num_draws: chains for each observation.
        num_proposals: of each chain, at least 5; or 0.
        num_leapfrogs: gradients for each proposal.
        context: one for each observation; for a flow of classes also their names or numbers, one for each observation
            or one for all.
        solver: of the chains. Default: the flow's own.
        progress_bar: show one.
        start: of each chain; `"base"` is a draw from the base, which ignores the observation.

    Raises:
        InvalidValueError: the observation has another shape, or holds NaN; a setting is out of its range; there is no
            such class; transform or operator have no slope, because they round.

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
    if num_proposals != 0:
        whole_number("num_proposals", num_proposals, 5, otherwise="or 0 for guided draws without a chain")
    elif start == "base":
        raise InvalidValueError(
            "num_proposals=0 returns where the chains start, and with start='base' that is a draw from the prior, "
            "which does not know the observation; use start='guided', or 5 proposals and more"
        )
    has_levels = flow.transform.num_levels is not None
    check_number("noise_sd", noise_sd, at_least=0, above=None if has_levels else 0)
    flow.base.require_density()
    if not isinstance(context, Tensor | None):
        context = _classes(flow, context, len(observation))
    target = Target(flow, operator, observation, noise_sd, num_draws, context, solver)
    z = flow.base.sample((target.chains,), generator)
    target.check_slope(z)
    if start == "guided":
        z = likelier(target, guided_latents(target, z, generator), z)
    acceptance = z.new_full((target.chains,), torch.nan)
    if num_proposals:
        z, acceptance = sample(target, z, num_proposals, num_leapfrogs, generator, progress_bar)
    with torch.no_grad():
        y, nfe = target.points(z)
        x = flow.to_data_space(y, target.context)
        residual = target.misfit(y).div(target.size).sqrt() / target.sd
    shape = (num_draws, len(observation))
    cost = num_proposals * num_leapfrogs * nfe + (guided_cost(nfe) if start == "guided" else 0)
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
