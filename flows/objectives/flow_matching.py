"""Training by flow matching: regression on velocities, without a solve."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flows.bases import require_normal
from flows.datasets import Batch
from flows.divergence import Auto, DivergenceEstimator
from flows.errors import InvalidValueError
from flows.models.cnf import CNF
from flows.naming import by_name
from flows.objectives.base import LossOutput, Objective
from flows.objectives.contexts import drop_contexts, same_context
from flows.objectives.couplings import Coupling, Independent
from flows.objectives.paths import Linear, ProbabilityPath
from flows.objectives.posterior import posterior_moments
from flows.vector_field import checked_value

LOW_DIMENSION = 8  # up to which a batch of some hundred points covers a density
USUAL_WEIGHT = 0.1  # of the divergence's error
FEW_PRODUCTS = 4  # with the Jacobian that an evaluation may take to match the divergence unasked


@dataclass(frozen=True)
class FlowMatching(Objective):
    r"""E ‖v(t, x_t) − u‖² / d on a path x_t = a(t) x₁ + b(t) x₀ with t uniform, or late more often.

    x₁ is data in flow space and x₀ comes from the base. With ``target="sampled"``, u = a′(t) x₁ + b′(t) x₀. The
    minimiser is the marginal velocity E[u | x_t], whose flow carries the base to the data, but single targets
    scatter around it and the loss does not reach zero. [Lipman et al. 2023, arXiv:2210.02747]

    With ``target="marginal"``, u is the expectation over which point of the batch x_t came from,

        u = a′ m + b′ (x_t − a m)/b,   m = Σ_j w_j x_j,   w_j ∝ N(x_t; a x_j, b² I),

    a far less noisy target for one product of queries × batch. Since the query's own point is in the batch, this is
    E[a′x₁ + b′x₀ | x_t, batch], and so without bias for any size of the batch: the minimiser is the same. Its
    scatter, relative to the velocity, falls from 1.7 for sampled targets to 0.3 with 64 points and 0.1 with 512
    (three Gaussians in the plane). With contexts, w_j is zero for points of another context than the query's: an
    expectation over the class where contexts are classes, and the sampled target where no two are equal. For
    low-dimensional data, whose batches cover the density; where all points are far apart, it is the sampled target.
    [Xu, Tong & Jaakkola 2023, arXiv:2302.00670; Ryzhakov et al. 2024, arXiv:2402.03232]

    The log-density is an integral of div v, in which fine errors count more than in v. ``divergence_weight`` adds its
    square error λ E (b div v − b div u)² / d, where

        b div u = (a′b − ab′) a E[‖x₁ − m_v‖² | x_t] / b² + b′d,   m_v = (b v − b′x_t) / (a′b − ab′),

    comes from the same posterior around the mean that v implies, held fixed. Where v is right it is unbiased, and the
    gradient of the loss vanishes in expectation; elsewhere it is too large by a‖v − u‖²/(a′b − ab′). Single values
    scatter, so this error does not reach zero either. The cost is that of an exact divergence, and of one pass over
    queries × batch a dimension. [Lu et al. 2022, arXiv:2206.08265]

    Args:
        target: ``"sampled"``, ``"marginal"``, or ``"auto"``: marginal for events of up to 8 numbers and independent
            couplings, else sampled.
        num_queries: the number of points x_t at which the field is evaluated; by default one for each point of the
            batch. Fewer make the batch a larger pool for the marginal target, or for the coupling; where "auto"
            samples the target of an independent coupling, all points are queries.
        path: a :class:`ProbabilityPath` or its lower-case name, ``"linear"``, ``"cosine"`` or
            ``"variance_preserving"``.
        coupling: of x₀ and x₁ within the batch, a :class:`Coupling` or its lower-case name, ``"independent"``,
            ``"optimal_transport"`` or ``"sinkhorn"``; the marginal target takes independent ones only.
        context_dropout: the probability with which an example's context is replaced by the zero vector, which then
            stands for no context, as :meth:`flows.CNF.guided` needs. The marginal target of such a query is over
            all contexts. [Ho & Salimans 2022, arXiv:2207.12598]
        time_power: k > 0 of t = 1 − (1 − u)ᵏ with u uniform. Above 1, late times, at which detail forms, are drawn more
            often. The minimiser is the same, but a network too small to reach it spends its capacity there: the loss
            at t has the weight (1 − t)^(1/k − 1).
        divergence_weight: λ >= 0, by default 0; 0.1 is usual. It takes an independent coupling and an exact divergence:
            the flow's estimator if that is exact for its field, else ``Auto()``. ``"auto"``: 0.1 for marginal targets
            of up to 8 numbers whose exact divergence costs no more than 4 products, else 0.
    """

    solves: ClassVar[bool] = False
    target: Literal["auto", "sampled", "marginal"] = "auto"
    num_queries: int | None = None
    path: ProbabilityPath | str = Linear()  # noqa: RUF009 (frozen)
    coupling: Coupling | str = Independent()  # noqa: RUF009 (frozen)
    context_dropout: float = 0.0
    time_power: float = 1.0
    divergence_weight: float | Literal["auto"] = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", by_name(ProbabilityPath, self.path))
        object.__setattr__(self, "coupling", by_name(Coupling, self.coupling))
        if self.target not in ("auto", "sampled", "marginal"):
            raise InvalidValueError(f"target must be 'auto', 'sampled' or 'marginal', got {self.target!r}")
        independent = self.coupling.is_independent
        if self.target == "marginal" and not independent:
            raise InvalidValueError(
                f"target='marginal' supposes that noise and data are independent, and coupling "
                f"{type(self.coupling).__name__} is not; use target='sampled' with it"
            )
        if self.num_queries is not None and (self.num_queries < 1 or (self.target == "sampled" and independent)):
            raise InvalidValueError(
                f"num_queries must be >= 1 and goes with target='marginal' or a coupling, which use the rest of the "
                f"batch; got {self.num_queries} with target={self.target!r}; null takes each point of the batch"
            )
        if not 0 < self.time_power < math.inf:
            raise InvalidValueError(
                f"time_power must be > 0 and finite, 1 for times drawn uniformly, got {self.time_power}"
            )
        weight = self.divergence_weight
        if weight != "auto" and not (isinstance(weight, (int, float)) and 0 <= weight < math.inf):
            raise InvalidValueError(f"divergence_weight must be >= 0 and finite, or 'auto', got {weight!r}")
        if weight not in ("auto", 0) and not independent:
            raise InvalidValueError(
                f"divergence_weight={weight:g} supposes that noise and data are independent, and coupling "
                f"{type(self.coupling).__name__} is not; use divergence_weight=0 with it"
            )
        if not 0 <= self.context_dropout < 1:
            raise InvalidValueError(f"context_dropout must be a probability below 1, got {self.context_dropout}")

    def __call__(self, flow: CNF, batch: Batch, generator: torch.Generator | None = None) -> LossOutput:
        require_normal(flow.base, "FlowMatching")
        with torch.no_grad():  # noise that is learned is learned by the likelihood, whose bound it tightens
            data, _ = flow.transform(batch.x, generator)
        independent = self.coupling.is_independent
        marginal = self._is_marginal(flow)
        queries = slice(self.num_queries if marginal or not independent else None)
        ends = data[queries]
        if independent:
            noise = flow.base.sample((len(ends),), generator)
        else:
            noise = flow.base.sample((len(data),), generator)
            noise = self.coupling.couple(noise, data, batch.context, generator)[queries]
        device = data.device if generator is None else generator.device
        t = torch.rand(len(ends), generator=generator, dtype=data.dtype, device=device).to(data.device)
        t = (1 - ((1 - t) ** self.time_power).clamp_min(torch.finfo(t.dtype).eps)) * self.path.last_time
        a, b, a_rate, b_rate = self.path.coefficients(t.view(-1, *[1] * (data.ndim - 1)))
        position = a * ends + b * noise
        context, dropped = batch.context, None
        if context is not None:
            context = context[queries]
            if self.context_dropout:
                context, dropped = drop_contexts(context, self.context_dropout, generator)
        weight, estimator = self._matching(flow)
        velocity, divergence = _evaluate(flow, t, position, context, estimator, generator)
        mean, spread, centre = ends, None, None
        if estimator is not None:
            rate = a_rate * b - a * b_rate  # > 0
            offset = b * (velocity.detach() - a_rate * ends - b_rate * noise) / rate  # m_v − x₁
            spread, centre = offset.flatten(1).square().sum(1), (ends, offset)
        if marginal:
            possible = same_context(batch.context, len(ends))
            if dropped is not None:
                possible = possible | dropped.unsqueeze(1)
            mean, spread = posterior_moments(position, a, b, data, possible, centre)
            noise = noise + a * (ends - mean) / b  # (x_t − a m) / b, without the rounding of x_t
        loss = (velocity - (a_rate * mean + b_rate * noise)).square().mean()
        metrics = {"velocity_error": loss.detach()}
        if estimator is not None:
            a, b, b_rate, rate = (tensor.flatten() for tensor in (a, b, b_rate, rate))
            dimension = position[0].numel()
            error = (b * divergence - rate * a * spread / b**2 - b_rate * dimension).square().mean() / dimension
            loss = loss + weight * error
            metrics["divergence_error"] = error.detach()
        return LossOutput(loss, metrics)

    def divergence(self, flow: CNF) -> DivergenceEstimator | None:
        return self._matching(flow)[1]

    def _is_marginal(self, flow: CNF) -> bool:
        return self.target == "marginal" or (
            self.target == "auto" and self.coupling.is_independent and math.prod(flow.event_shape) <= LOW_DIMENSION
        )

    def _matching(self, flow: CNF) -> tuple[float, DivergenceEstimator | None]:
        """The weight of the divergence, and what takes it."""
        shape, weight = flow.event_shape, self.divergence_weight
        if weight == 0 or (weight == "auto" and not (self._is_marginal(flow) and math.prod(shape) <= LOW_DIMENSION)):
            return 0.0, None
        field = flow.bind()
        estimator = next((e for e in (flow.divergence, Auto()) if e.bind(field).is_exact), None)
        if weight == "auto":
            affordable = estimator is not None and estimator.bind(field).cost <= FEW_PRODUCTS
            return (USUAL_WEIGHT, estimator) if affordable else (0.0, None)
        if estimator is None:
            raise InvalidValueError(
                f"divergence_weight={weight:g} needs an exact divergence, which neither "
                f"{type(flow.divergence).__name__} nor Auto() has for {type(flow.field).__name__} at a reasonable "
                "price; choose divergence=exact, a field with a closed form, or divergence_weight=0"
            )
        return weight, estimator


def _evaluate(
    flow: CNF,
    t: Tensor,
    position: Tensor,
    context: Tensor | None,
    estimator: DivergenceEstimator | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor | None]:
    """v, and div v (B,) by the estimator if there is one."""
    if estimator is not None:
        bound = estimator.bind(flow.bind(context))
        sample = bound(t, position, bound.draw_probes(position, generator))  # some are exact by their probes
        return sample.value, sample.divergence
    return checked_value(flow.bind(context)(t, position), position), None
