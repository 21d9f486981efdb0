"""Reverse KL: training on an unnormalised density, without samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from flows.arguments import checked
from flows.datasets import Batch, Dataset
from flows.errors import InvalidTypeError, InvalidValueError
from flows.models.cnf import CNF
from flows.models.importance import effective_sample_size, log_density_of, log_weights, log_z
from flows.models.steady import check_steady
from flows.objectives.base import LossOutput, Objective, active_costs, regularized
from flows.objectives.checks import check_base, check_flow
from flows.path_costs import PathCost
from flows.shares import current_share, mean_of_all, own_rows


@checked
@dataclass(frozen=True)
class ReverseKL(Objective):
    """The loss E_q[log q(x) − log p̃(x)] over samples x of the flow q.

    This is KL(q ‖ p) − log Z for p = p̃/Z, an upper bound of −log Z ("free energy"). Samples are drawn in one solve that
    is differentiated through. No data are used, only the size of the batch. The importance weights w = p̃/q of the batch
    give the metrics `log_z` = log mean w and `effective_sample_size` = (Σw)²/(n Σw²), in (0, 1]. Both look good for a q
    that misses whole modes of p, for which KL(q ‖ p) is small too. Compare with samples of p if there are any.

    A stochastic divergence gives log q an error of variance s² per sample. The loss stays unbiased, but weights are
    exponentials: log Z rises by about s²/2, and the effective sample size falls by the factor exp(−s²). Therefore
    `exact=True` refuses estimators that are not exact for the field.

    Args:
        target: log p̃: a `flows.datasets.Energy`, anything else with `log_density(x)` or `log_prob(x)`, or a function
            x (B, *event) -> (B,). It must be differentiable.
        exact: whether to require an exact estimator, by default `True`.
        regularizers: as in `MaximumLikelihood`.

    Raises:
        InvalidTypeError: `target` is none of these; from a call, if the density of the base is not positive everywhere,
            or draws of a trained base have no gradient, as those of `Mixture`.
        InvalidValueError: the estimator is not exact, or the target returns another shape.

    Sources: Noé et al. 2019, arXiv:1812.01729 (Boltzmann generators); Albergo et al. 2019, arXiv:1904.12072 (lattices).

    Example:
        ```python
        import torch

        import flows

        energy, flow = flows.datasets.DoubleWell(), flows.CNF(flows.fields.MLP((2,)))
        objective = flows.objectives.ReverseKL(energy)
        batch = energy.train_stream(batch_size=16, generator=torch.Generator()).next()
        objective(flow, batch).loss.backward()
        ```
    """

    uses_data: ClassVar[bool] = False
    recommended: ClassVar[Mapping[str, Any]] = {"batch_size": 512, "learning_rate": 2e-3, "warmup_steps": 50}
    shares: ClassVar[bool] = True
    target: Any
    exact: bool = True
    regularizers: Sequence[PathCost] | Mapping[str, PathCost] = ()

    def __post_init__(self) -> None:
        log_density_of(self.target)
        object.__setattr__(self, "regularizers", active_costs(self.regularizers))

    def check(self, model: nn.Module, dataset: Dataset) -> None:
        super().check(model, dataset)
        if dataset.context_shape is not None:
            raise InvalidValueError(
                f"ReverseKL draws its points from the flow, without contexts, and the data {dataset.name!r} has "
                f"contexts of shape {dataset.context_shape}; choose data without, or an objective that takes points "
                "from the data, such as objective=maximum_likelihood"
            )
        self._check_base(check_flow(model, dataset))
        check_steady(check_flow(model, dataset).field)  # before hours of another stage are spent

    def _check_base(self, flow: CNF) -> None:
        check_base(flow, "ReverseKL", "choose a base that covers space")
        name = type(flow.base).__name__
        if flow.base.is_trained and not flow.base.has_rsample:
            raise InvalidTypeError(
                f"ReverseKL differentiates through draws of the base, and those of a trained {name} "
                "have no gradient; set base.trainable=false, or use base=normal or base=student_t"
            )

    def __call__(self, flow: CNF, batch: Batch, generator: torch.Generator | None = None) -> LossOutput:
        self._check_base(flow)
        if self.exact and not flow.divergence.bind(flow.bind()).is_exact:
            raise InvalidValueError(
                f"{type(flow.divergence).__name__} is not exact for {type(flow.field).__name__} on events of shape "
                f"{flow.event_shape}, so its noise would bias the importance weights; choose an exact estimator "
                "(divergence=exact, or a field with a closed form) or set exact=False"
            )
        regularizers = active_costs(self.regularizers)
        rows, weight = own_rows(len(batch))
        drawn = flow.draw((len(batch),), generator=generator, path_costs=regularizers, rows=rows)
        log_weight = log_weights(self.target, drawn.x, drawn.log_prob)
        free_energy = -log_weight.mean()
        loss, costs = regularized(free_energy, regularizers, drawn.path_costs)
        every, share = log_weight.detach(), current_share()
        if share is not None:
            every = share.joined(every, len(batch))
        metrics = {
            "free_energy": free_energy.detach(),
            "log_z": log_z(every),
            "effective_sample_size": effective_sample_size(every),
            "divergence_standard_error": mean_of_all(drawn.standard_error.square().mean(), weight).sqrt(),
        }
        return LossOutput(loss, metrics | costs, drawn.statistics, weight)
