"""The cost of divergence estimators in bare evaluations of the field."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flows.benchmarks.timing import alternating_medians
from flows.divergence import DivergenceEstimator
from flows.fields import bind

BARE, LOOP = "bare field", "plain loop"
EVALUATIONS = 6  # right-hand sides that share what is computed once a solve: one step of dopri5


@dataclass(frozen=True)
class Cost:
    """What one evaluation with an estimator costs, on one field and batch."""

    name: str
    products: int | None  # None for the two baselines
    exact: bool | None
    forward: float  # seconds an evaluation without gradients
    training: float  # seconds an evaluation forward and backward


def measure(
    field: nn.Module,
    event_shape: Sequence[int],
    estimators: Mapping[str, DivergenceEstimator],
    forward_batch: int = 1024,
    training_batch: int = 256,
    seconds_each: float = 1.0,
    device: torch.device | str = "cpu",
) -> list[Cost]:
    """Time ``EVALUATIONS`` right-hand sides with each estimator, in turns, per evaluation.

    The first two costs are those of the bare field, and of the loop that a practitioner would write: one
    reverse-mode pass a coordinate. Estimators with more than 16 products run a single evaluation.
    """
    field = field.to(device)
    timings = []
    for batch, training in ((forward_batch, False), (training_batch, True)):
        x = torch.randn(batch, *event_shape, device=device)
        cases = {BARE: _repeated(_Bare, EVALUATIONS, field, x, training), LOOP: _repeated(_Loop, 1, field, x, training)}
        counts = {BARE: EVALUATIONS, LOOP: 1}
        for name, estimator in estimators.items():
            counts[name] = EVALUATIONS if estimator.cost(tuple(event_shape), field) <= 16 else 1
            cases[name] = _repeated(estimator, counts[name], field, x, training)
        medians = alternating_medians(cases, seconds_each)
        timings.append({name: seconds / counts[name] for name, seconds in medians.items()})
    forward, backward = timings
    shape = tuple(event_shape)
    return [
        Cost(
            name,
            estimators[name].cost(shape, field) if name in estimators else None,
            estimators[name].is_exact(shape, field) if name in estimators else None,
            forward[name],
            backward[name],
        )
        for name in forward
    ]


def table(costs: Sequence[Cost]) -> Iterator[str]:
    """The costs in bare evaluations, and how many times cheaper than the plain loop; a line an estimator."""
    bare, loop = costs[0], costs[1]
    yield f"{'':26}{'products':>9}{'exact':>7}{'forward':>9}{'loop/it':>9}{'fwd+bwd':>9}{'loop/it':>9}"
    for cost in costs:
        products = "" if cost.products is None else str(cost.products)
        exact = "" if cost.exact is None else ("yes" if cost.exact else "no")
        yield (
            f"{cost.name:26}{products:>9}{exact:>7}"
            f"{cost.forward / bare.forward:9.2f}{loop.forward / cost.forward:9.1f}"
            f"{cost.training / bare.training:9.2f}{loop.training / cost.training:9.1f}"
        )


def _repeated(
    estimator: DivergenceEstimator | type, evaluations: int, field: nn.Module, x: Tensor, training: bool
) -> Callable[[], None]:
    """A case: so many evaluations at different times, and the backward pass of all of them when training."""
    if isinstance(estimator, type):
        estimator = estimator()
    probes = estimator.draw_probes(x, field=field)
    times = torch.linspace(0, 1, evaluations, device=x.device)

    def case() -> None:
        with torch.set_grad_enabled(training):
            bound = bind(field)
            points = x.clone().requires_grad_(training)
            loss = torch.zeros((), device=x.device)
            for t in times:
                sample = estimator(bound, t, points, probes)
                if training:
                    loss = loss + sample.value.sum() + sample.divergence.sum()
            if training:
                loss.backward()
                field.zero_grad()

    return case


class _Bare:
    """The field alone, in the form of an estimator."""

    def draw_probes(self, x: Tensor, generator: None = None, field: object | None = None) -> None:
        return None

    def __call__(self, field: Callable[[Tensor, Tensor], Tensor], t: Tensor, x: Tensor, probes: None) -> _Sample:
        return _Sample(field(t, x), torch.zeros((), device=x.device))


class _Loop(_Bare):
    """Σ_i ∂v_i/∂x_i by one reverse-mode pass a coordinate, as it is usually written."""

    def __call__(self, field: Callable[[Tensor, Tensor], Tensor], t: Tensor, x: Tensor, probes: None) -> _Sample:
        training = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if training else x.detach().requires_grad_()
            value = field(t, x)
            flat = value.flatten(1)
            trace = torch.zeros(len(x), device=x.device)
            for i in range(flat.shape[1]):
                (row,) = torch.autograd.grad(flat[:, i].sum(), x, create_graph=training, retain_graph=True)
                trace = trace + row.flatten(1)[:, i]
        return _Sample(value, trace)


@dataclass(frozen=True)
class _Sample:
    value: Tensor
    divergence: Tensor
