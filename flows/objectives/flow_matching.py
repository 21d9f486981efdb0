"""Flow matching: training by regression on velocities, without a solve."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from flows.arguments import checked
from flows.bases import Base
from flows.checks import check_number
from flows.datasets import Batch, Dataset
from flows.divergence import Auto, DivergenceEstimator
from flows.dynamics import differentiable
from flows.errors import InvalidTypeError, InvalidValueError
from flows.models.cnf import CNF
from flows.models.examination import examine
from flows.naming import by_name
from flows.objectives.base import LossOutput, Objective
from flows.objectives.checks import check_flow
from flows.objectives.contexts import drop_contexts, same_context
from flows.objectives.couplings import Components, Coupling
from flows.objectives.paths import ProbabilityPath
from flows.objectives.posterior import base_posterior
from flows.shares import own_rows
from flows.vector_field import checked_value

WITHOUT_CONTEXTS = (
    "coupling=components takes noise from the component of each data point, and components differ between contexts, so "
    "that the noise would not be that of the base; train without contexts, or use coupling=independent"
)
OWN_TIMES = "flow matching draws one time per sample"
AUTO_MAX_DIMENSION = 8  # up to which a batch of some hundred points covers a density
AUTO_QUERIES = 512  # evaluations of the field in a batch whose other points serve as a pool
AUTO_DIVERGENCE_WEIGHT = 0.1
AUTO_MAX_PRODUCTS = 4  # Jacobian products per evaluation that "auto" may spend on matching the divergence


@checked
@dataclass(frozen=True)
class FlowMatching(Objective):
    """Regression on velocities along a path, E ‖v(t, x_t) − u‖² / d.

    Here x_t = a(t) x₁ + b(t) x₀, x₁ is data in flow space, x₀ comes from the base, and t is uniform unless `time_power`
    says otherwise. With `target="sampled"`, u = a′(t) x₁ + b′(t) x₀. The minimiser is the marginal velocity E[u | x_t],
    whose flow carries the base to the data. Single targets scatter around it, so the loss does not reach zero.
    [Lipman et al. 2023, arXiv:2210.02747]

    With `target="marginal"`, u averages over the points of the batch that x_t may have come from:

        u = a′ m + b′ (x_t − a m)/b,   m = Σ_j w_j x_j,   w_j ∝ p₀((x_t − a x_j)/b),

    with the density p₀ of the base. The base must have one in closed form, as all of `flows.bases` but `Empirical` and
    `FlowBase`; a mixture of K components costs about K times as much as N(0, I).

    This target is far less noisy and costs one product of queries × batch. It equals E[a′x₁ + b′x₀ | x_t, batch],
    because the query's own point is in the batch, so it is unbiased for any batch size and has the same minimiser. For
    three Gaussians in the plane, its scatter relative to the velocity is 0.3 with 64 points and 0.1 with 512, against
    1.7 for sampled targets. With contexts, points of another context than the query's have weight zero: if contexts are
    classes, the average is over the class; if no two are equal, the target is the sampled one. Use it for data of low
    dimension, whose batches cover the density. If all points are far apart, it equals the sampled target.
    [Xu, Tong & Jaakkola 2023, arXiv:2302.00670; Ryzhakov et al. 2024, arXiv:2402.03232]

    The log-density is an integral of div v, where fine errors count more than in v. `divergence_weight` adds the square
    error λ E (b div v − b div u)² / d, with

        b div u = (a′b − ab′) E[(x₁ − m_v)·(s(x₁) − s(m_v)) | x_t] + b′d,   m_v = (b v − b′x_t) / (a′b − ab′),

    and s(x₁) = ∇ log p₀((x_t − a x₁)/b) / b. For N(0, I) the expectation is a E[‖x₁ − m_v‖² | x_t] / b².

    The expectation uses the same posterior; m_v is the mean that v implies, held constant for the gradient. If v is
    right, this is unbiased and the gradient of the loss vanishes in expectation. Elsewhere it is too large by
    a‖v − u‖²/(a′b − ab′). Single values scatter, so this error does not reach zero either. It costs an exact divergence
    and one pass over queries × batch per dimension. [Lu et al. 2022, arXiv:2206.08265]

    Args:
        target: `"sampled"`, `"marginal"` or `"auto"`. "auto" is marginal for events of up to 8 numbers with an
            independent coupling, a base with a density in closed form, and no encoder of contexts (whose contexts are
            hardly ever equal); it is sampled otherwise.
        num_queries: the number of points x_t where the field is evaluated. Fewer leave a larger pool for the marginal
            target or the coupling. `"auto"` (default): 512 with either of them, otherwise each point of the batch.
            `None`: each point of the batch.
        path: a `ProbabilityPath` or its lower-case name: `"linear"`, `"cosine"` or `"variance_preserving"`.
        coupling: of x₀ and x₁ in the batch: a `Coupling` or its lower-case name, `"independent"`,
            `"optimal_transport"`, `"sinkhorn"`, `"unbalanced_transport"` or `"partial_transport"`. The marginal target
            needs an independent one.
        context_dropout: the probability of replacing an example's context by zeros, which then stand for "no context",
            as `flows.CNF.guided` needs. The marginal target of such a query averages over all contexts.
            [Ho & Salimans 2022, arXiv:2207.12598]
        time_power: k > 0 of t = 1 − (1 − u)ᵏ with uniform u. Above 1, late times, where detail forms, are drawn more
            often. This does not change the minimiser, but it gives the loss at t the weight (1 − t)^(1/k − 1), and a
            network that is too small to reach the minimiser fits those times better.
        time_weighting: `"uniform"` or `"likelihood"`. By the likelihood, times have a density in proportion to
            a / (b (a′b − ab′)), where b is above 0.02. From N(0, I) and without a coupling, d ∫ of this density times
            the excess of the loss over its minimum is the Kullback-Leibler divergence of the diffusion with this field
            from the data, up to a constant factor and the noise that is left. [Song et al. 2021, arXiv:2101.09258;
            Kingma et al. 2021, arXiv:2107.00630]
        divergence_weight: λ >= 0. It needs an independent coupling, a base with a density that is positive everywhere,
            and an exact divergence: the flow's estimator if it
            is exact for the field, otherwise `Auto()`. `"auto"` (default): 0.1 for marginal targets of up to 8 numbers
            whose exact divergence costs at most 4 Jacobian products, otherwise 0.

    Raises:
        InvalidValueError: a setting is unknown or out of range, or settings contradict each other.

    Example:
        ```python
        import torch

        import flows

        data, flow = flows.datasets.Moons(), flows.CNF(flows.fields.MLP((2,)))
        generator = torch.Generator().manual_seed(0)
        objective = flows.objectives.FlowMatching(coupling="optimal_transport")
        objective(flow, data.train_stream(64, generator).next(), generator).loss.backward()
        ```
    """

    solves: ClassVar[bool] = False
    shares: ClassVar[bool] = True
    recommended: ClassVar[Mapping[str, Any]] = {"batch_size": 1024, "learning_rate": 4e-3, "warmup_steps": 0}
    target: Literal["auto", "sampled", "marginal"] = "auto"
    num_queries: int | Literal["auto"] | None = "auto"
    path: ProbabilityPath | str = "linear"
    coupling: Coupling | str = "independent"
    context_dropout: float = 0.0
    time_power: float = 1.0
    time_weighting: Literal["uniform", "likelihood"] = "uniform"
    divergence_weight: float | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", by_name(ProbabilityPath, self.path, "path"))
        object.__setattr__(self, "coupling", by_name(Coupling, self.coupling, "coupling"))
        if self.target not in ("auto", "sampled", "marginal"):
            raise InvalidValueError(f"target must be 'auto', 'sampled' or 'marginal', got {self.target!r}")
        independent = self._coupling.is_independent
        if self.target == "marginal" and not independent:
            raise InvalidValueError(
                f"target='marginal' assumes independent noise and data, but the coupling "
                f"{type(self.coupling).__name__} pairs them; use target='sampled' with it"
            )
        chosen = self.num_queries not in (None, "auto")
        if chosen:
            check_number("num_queries", self.num_queries, whole=True, at_least=1, otherwise="or use 'auto' or None")
        if chosen and self.target == "sampled" and independent:
            raise InvalidValueError(
                f"num_queries needs target='marginal' or a coupling, which use the rest of the batch, got "
                f"{self.num_queries} with target={self.target!r}; use None to take each point of the batch"
            )
        check_number("time_power", self.time_power, above=0, otherwise="1 draws times uniformly")
        if self.time_weighting not in ("uniform", "likelihood"):
            raise InvalidValueError(f"time_weighting must be 'uniform' or 'likelihood', got {self.time_weighting!r}")
        if self.time_weighting == "likelihood" and self.time_power != 1:
            raise InvalidValueError(
                f"time_weighting='likelihood' sets how often each time is drawn, and so does time_power="
                f"{self.time_power:g}; leave one of them out"
            )
        weight = self.divergence_weight
        if not isinstance(weight, str):
            check_number("divergence_weight", weight, at_least=0, otherwise="or use 'auto'")
            if weight and not independent:
                raise InvalidValueError(
                    f"divergence_weight={weight:g} assumes independent noise and data, but the coupling "
                    f"{type(self.coupling).__name__} pairs them; use divergence_weight=0 with it"
                )
        elif weight != "auto":
            raise InvalidValueError(f"divergence_weight must be a number >= 0 or 'auto', got {weight!r}")
        check_number("context_dropout", self.context_dropout, at_least=0, below=1)

    def check(self, model: nn.Module, dataset: Dataset) -> None:
        super().check(model, dataset)
        self._check_base(check_flow(model, dataset).base)

    def __call__(self, flow: CNF, batch: Batch, generator: torch.Generator | None = None) -> LossOutput:
        base = flow.base
        self._check_base(base)
        coupling, path = self._coupling, by_name(ProbabilityPath, self.path)
        independent = coupling.is_independent
        marginal = self._is_marginal(flow)
        number = AUTO_QUERIES if self.num_queries == "auto" else self.num_queries
        componentwise = isinstance(coupling, Components)
        queries = slice(number if marginal or not (independent or componentwise) else None)
        context, centre = batch.context, None
        with torch.no_grad():  # learned noise and a trained base are trained by the likelihood
            data = flow._to_flow_space(batch.x, context, generator)  # tables come in float64
            ends = data if queries.stop is None else data[queries]
            if componentwise:
                if context is not None:
                    raise InvalidValueError(WITHOUT_CONTEXTS)
                noise, centre = base.companions(ends, generator)
            elif base.is_standard:
                noise = base.standard_normal((len(ends if independent else data),), generator)
            else:
                noise = base.sample((len(ends if independent else data),), generator)
        if not (independent or componentwise):
            chosen, own = coupling.pairs(noise, data, context, generator)
            noise, ends = noise[chosen[queries]], data[own[queries]]
            context = None if context is None else context[own]
        device = data.device if generator is None else generator.device
        t = torch.rand(len(ends), generator=generator, dtype=data.dtype, device=device).to(data.device)
        if self.time_weighting == "likelihood":
            t = path.likelihood_times(t)
        else:
            if self.time_power != 1:
                t = 1 - (1 - t) ** self.time_power
            t = t.clamp_max_(1 - torch.finfo(t.dtype).eps)
            t = t if path.last_time == 1 else t * path.last_time
        if centre is not None:
            ends, noise = ends - centre, noise - centre
        position, target = path.between(t.view(-1, *[1] * (data.ndim - 1)), noise, ends)
        if centre is not None:
            position = position + centre
        dropped = None
        if context is not None:
            context = flow.encode(context[queries])
            if self.context_dropout:
                context, dropped = drop_contexts(context, self.context_dropout, generator)
        factor, estimator = self._matching(flow)
        probes = None
        if estimator is not None:  # some estimators are exact thanks to their probes
            probes = estimator.bind(flow.bind()).draw_probes(position, generator)
        possible = same_context(batch.context, len(ends)) if marginal else None
        if dropped is not None and possible is not None:
            possible = possible | dropped.unsqueeze(1)
        rows, weight = own_rows(len(ends))
        if rows is not None:  # the pairs and the pool are those of the whole batch
            t, position, target, ends, noise = (tensor[rows] for tensor in (t, position, target, ends, noise))
            context, possible = (None if tensor is None else tensor[rows] for tensor in (context, possible))
            probes = None if probes is None else probes[:, rows]
        velocity, divergence = _evaluate(flow, t, position, context, estimator, probes)
        if not marginal and estimator is None:
            loss = (velocity - target).square().mean()
            return LossOutput(loss, {"velocity_error": loss.detach()}, weight=weight)
        a, b, a_rate, b_rate = path.coefficients(t.view(-1, *[1] * (data.ndim - 1)))
        rate, offset = a_rate * b - a * b_rate, None  # rate > 0
        if estimator is not None:
            offset = b * (velocity.detach() - target) / rate  # m_v − x₁
        pool = data if marginal else None
        mean, curvature = base_posterior(base, noise, ends, a, b, pool, possible, offset)
        if marginal:
            noise = noise + a * (ends - mean) / b  # (x_t − a m) / b, without the rounding of x_t
            target = a_rate * mean + b_rate * noise
        loss = (velocity - target).square().mean()
        metrics = {"velocity_error": loss.detach()}
        if divergence is not None and curvature is not None:
            b, b_rate, rate = (tensor.flatten() for tensor in (b, b_rate, rate))
            dimension = position[0].numel()
            error = (b * divergence - rate * curvature - b_rate * dimension).square().mean() / dimension
            loss = loss + factor * error
            metrics["divergence_error"] = error.detach()
        return LossOutput(loss, metrics, weight=weight)

    def divergence(self, flow: CNF) -> DivergenceEstimator | None:
        return self._matching(flow)[1]

    @property
    def _coupling(self) -> Coupling:
        return by_name(Coupling, self.coupling)

    def _is_marginal(self, flow: CNF) -> bool:
        if self.target == "auto":
            few = math.prod(flow.event_shape) <= AUTO_MAX_DIMENSION
            shared = flow.encoder is None  # others rarely share a context with another point
            return self._coupling.is_independent and few and shared and weighs_pairs(flow.base)
        return self.target == "marginal"

    def _check_base(self, base: Base) -> None:
        """Raise `InvalidTypeError` unless the base has what the settings ask for."""
        name, weight = type(base).__name__, self.divergence_weight
        if self.context_dropout and base.context_shape is not None:
            raise InvalidTypeError(
                f"context_dropout={self.context_dropout:g} trains the flow without contexts as well, and the base "
                f"{name} depends on them; use context_dropout=0 or another base, such as base=normal"
            )
        if self.target == "marginal" and not weighs_pairs(base):
            lack = "has none" if not base.has_density else "takes a solve for each value of its own"
            raise InvalidTypeError(
                f"target='marginal' weighs all pairs of a batch by the density of the base, and the base {name} "
                f"{lack}; use target='sampled' or 'auto', which suit every base"
            )
        if not isinstance(weight, str) and weight and not matches_divergence(base):
            lack = "is not positive everywhere" if weighs_pairs(base) else "has no density in closed form"
            raise InvalidTypeError(
                f"divergence_weight={weight:g} takes the score of the base, and the base {name} {lack}; use "
                "divergence_weight=0 or 'auto' with it"
            )

    def _matching(self, flow: CNF) -> tuple[float, DivergenceEstimator | None]:
        """The weight of the divergence error, and the estimator to use."""
        shape, weight = flow.event_shape, self.divergence_weight
        suits = self._is_marginal(flow) and matches_divergence(flow.base) and math.prod(shape) <= AUTO_MAX_DIMENSION
        if weight == 0 or (weight == "auto" and not suits):
            return 0.0, None
        field = flow.bind()
        estimator = next((e for e in (flow.divergence, Auto()) if e.bind(field).is_exact), None)
        if weight == "auto":
            affordable = estimator is not None and estimator.bind(field).cost <= AUTO_MAX_PRODUCTS
            return (AUTO_DIVERGENCE_WEIGHT, estimator) if affordable else (0.0, None)
        if estimator is None:
            raise InvalidValueError(
                f"divergence_weight={weight:g} needs an exact divergence, but neither {type(flow.divergence).__name__} "
                f"nor Auto() is exact for {type(flow.field).__name__}; choose divergence=exact, a field with a closed "
                "form, or divergence_weight=0"
            )
        return weight, estimator


def weighs_pairs(base: Base) -> bool:
    """Return whether the base can weigh all pairs of a batch: by a density in closed form."""
    return base.has_density and base.is_closed_form


def matches_divergence(base: Base) -> bool:
    """Return whether the score of the base is known everywhere."""
    return weighs_pairs(base) and base.is_positive_everywhere


def _evaluate(
    flow: CNF,
    t: Tensor,
    position: Tensor,
    context: Tensor | None,
    estimator: DivergenceEstimator | None,
    probes: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Return v, and div v (B,) if there is an estimator."""
    field = flow.bind(context)
    if estimator is None:
        examine(flow.base, field, position, matching=True, own_times=OWN_TIMES)
        return checked_value(field(t, position), position), None
    bound = estimator.bind(field)
    examine(flow.base, field, position, bound, matching=True, own_times=OWN_TIMES)
    sample = bound(t, position, probes)
    return sample.value, differentiable(sample.estimates, bound).mean(0)
