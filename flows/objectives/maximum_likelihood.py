"""Maximum likelihood: training through the solve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from flows.arguments import checked
from flows.checks import check_number, whole_number
from flows.datasets import Batch, Dataset
from flows.errors import InvalidValueError
from flows.models.cnf import CNF
from flows.models.steady import check_steady
from flows.objectives.base import LossOutput, Objective, active_costs, regularized
from flows.objectives.checks import check_base, check_flow
from flows.path_costs import PathCost
from flows.shares import mean_of_all, own_rows


@checked
@dataclass(frozen=True)
class MaximumLikelihood(Objective):
    """The loss −mean log p(x) + Σ weight · mean path cost.

    It is in nats per example, in data space. Each training step takes one solve. It also trains the transform and the
    base, where they have parameters. The density of the base must be positive everywhere.

    Args:
        regularizers: path costs, in a list or a mapping with any names, such as
            `[KineticEnergy(0.01), JacobianNorm(0.01)]`. Costs of weight 0 are left out. Their mean integrals are
            metrics, next to the `nll` without them.
        steer: b: training solves end at a base time drawn from U(−b, b) instead of 0, which keeps the dynamics from
            concentrating in a short time. Evaluation ends at 0. By default 0. [Ghosh et al. 2020, arXiv:2006.10711]
        importance_samples: K: draws of the dequantisation noise of each example of discrete data. The loss is then
            −mean log((1/K) Σ_k p(x + u_k)/q(u_k | x)), which falls towards −log P(x) as K grows and weighs draws by
            how well they explain the example; a step takes K times as long. More than one need an exact divergence,
            since the logarithm turns the noise of an estimate into a better bound than the true one. By default 1.
            [Burda et al. 2016, arXiv:1509.00519; Ho et al. 2019, arXiv:1902.00275]

    Raises:
        InvalidValueError: `steer` is not in [0, 1), `importance_samples` is below 1, or it is above 1 and the flow does
            not dequantise or its divergence is not exact.
        InvalidTypeError: from a call, if the base has no density or one that is 0 somewhere.

    Example:
        ```python
        import torch

        import flows
        from flows.path_costs import JacobianNorm, KineticEnergy

        data, flow = flows.datasets.Moons(), flows.CNF(flows.fields.MLP((2,)))
        objective = flows.objectives.MaximumLikelihood({"kinetic": KineticEnergy(0.01), "jacobian": JacobianNorm(0.01)})
        objective(flow, data.train_stream(16, torch.Generator()).next()).loss.backward()
        ```
    """

    recommended: ClassVar[Mapping[str, Any]] = {"batch_size": 512, "learning_rate": 2e-3, "warmup_steps": 50}
    shares: ClassVar[bool] = True
    regularizers: Sequence[PathCost] | Mapping[str, PathCost] = ()
    steer: float = 0.0
    importance_samples: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "regularizers", active_costs(self.regularizers))
        check_number("steer", self.steer, at_least=0, below=1)
        whole_number("importance_samples", self.importance_samples)

    def check(self, model: nn.Module, dataset: Dataset) -> None:
        super().check(model, dataset)
        self._check_noise(check_flow(model, dataset))
        check_base(check_flow(model, dataset), "MaximumLikelihood", "train it with objective=flow_matching")
        check_steady(check_flow(model, dataset).field)  # before hours of another stage are spent

    def __call__(self, flow: CNF, batch: Batch, generator: torch.Generator | None = None) -> LossOutput:
        check_base(flow, "MaximumLikelihood", "train it with objective=flow_matching")
        self._check_noise(flow)
        regularizers = active_costs(self.regularizers)
        base_time = 0.0
        if self.steer:
            device = None if generator is None else generator.device
            base_time = self.steer * (2 * torch.rand((), generator=generator, device=device).item() - 1)
        rows, weight = own_rows(len(batch))
        number, x, context = self.importance_samples, batch.x, batch.context
        if number > 1:  # the draws of an example stand side by side
            x = x.repeat_interleave(number, 0)
            context = None if context is None else context.repeat_interleave(number, 0)
            rows = None if rows is None else slice(number * rows.start, number * rows.stop)
        options = {"solver_error": False, "path_costs": regularizers, "base_time": base_time}
        estimate = flow.estimate_log_prob(x, context, generator, rows=rows, **options)
        bounds = estimate.value if number == 1 else estimate.value.view(-1, number).logsumexp(1) - math.log(number)
        nll = -bounds.mean()
        metrics = {
            "nll": nll.detach(),
            "divergence_standard_error": mean_of_all(estimate.standard_error.square().mean(), weight).sqrt(),
        }
        if flow.transform.num_levels is not None:
            metrics["bits_per_dim"] = nll.detach() / (math.prod(flow.event_shape) * math.log(2))
        loss, costs = regularized(nll, regularizers, estimate.path_costs)
        return LossOutput(loss, metrics | costs, estimate.statistics, weight)

    def _check_noise(self, flow: CNF) -> None:
        """Require noise to draw several times and an exact divergence, if there are several draws."""
        if self.importance_samples > 1 and flow.transform.num_levels is None:
            raise InvalidValueError(
                f"importance_samples={self.importance_samples} draws the dequantisation noise of each example so many "
                "times, and this flow has none: its data are continuous; leave importance_samples at 1"
            )
        if self.importance_samples > 1 and not flow.divergence.bind(flow.bind()).is_exact:
            raise InvalidValueError(
                f"{type(flow.divergence).__name__} is not exact for {type(flow.field).__name__} on events of shape "
                f"{flow.event_shape}, and importance_samples={self.importance_samples} would reward its noise; choose "
                "an exact estimator, such as divergence=exact, or leave importance_samples at 1"
            )
