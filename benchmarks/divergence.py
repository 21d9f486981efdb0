"""The cost of divergence estimators, in bare evaluations of the field."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import probing_noise, workloads
from benchmarks.devices import add_device, machine
from flows.compare.timing import alternating_medians
from flows.divergence import DivergenceEstimator, FieldSample
from flows.fields import bind

BARE, LOOP = "bare field", "plain loop"
PARTS = ("mlp", "bottleneck", "structured", "conv", "noise")
EVALUATIONS = 6  # as in one step of dopri5; they share what an estimator computes once per solve


@dataclass(frozen=True)
class Cost:
    """The cost of one evaluation with an estimator, on one field and batch."""

    name: str
    products: int | None  # None for the two baselines
    exact: bool | None
    forward: float  # seconds per evaluation, without gradients
    training: float  # seconds per evaluation, forward and backward


def add_command(benchmarks: Any) -> None:
    """Add `divergence` to the commands."""
    description = "The cost of each estimator in bare evaluations of the field, beside a plain reverse-mode loop."
    part = benchmarks.add_parser("divergence", help=description, description=description)
    part.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    part.add_argument(
        "--dimensions", type=int, nargs="+", default=list(workloads.HIDDEN_WIDTHS), help="of the MLPs (%(default)s)"
    )
    part.add_argument("--seconds", type=float, default=1.0, help="at least, for each case (%(default)s)")
    add_device(part)
    part.set_defaults(run=_print_report)


def _print_report(arguments: argparse.Namespace) -> None:
    device = arguments.device
    print(f"{machine(device)}; cost of one evaluation in bare evaluations of the field (median of")
    print(f"alternating runs of {EVALUATIONS}), and how many times cheaper than the loop")
    groups = {
        "mlp": lambda: [workloads.perceptron(dimension) for dimension in arguments.dimensions],
        "bottleneck": lambda: [workloads.bottleneck()],
        "structured": workloads.structured,
        "conv": workloads.convolutional,
    }
    for workload in (workload for part in arguments.parts if part in groups for workload in groups[part]()):
        torch.manual_seed(0)
        rows = measure(
            workload.build(workload.event_shape),
            workload.event_shape,
            workload.estimators,
            *workload.batches,
            arguments.seconds,
            device,
            loop=workload.loop,
            progress=workload.title.split(",")[0],
        )
        print(f"\n{workload.title}; batch {workload.batches[0]} forward, {workload.batches[1]} with backward")
        print("\n".join(table(rows)), flush=True)
    if "noise" in arguments.parts:
        flow, digits = probing_noise.trained_on_digits(device=device)
        print("\nstandard deviations with equally many products, on a ConvNet trained on 8 × 8 digits")
        print("\n".join(probing_noise.table(probing_noise.measure_noise(flow, digits[:128]))))


def measure(
    field: nn.Module,
    event_shape: Sequence[int],
    estimators: Mapping[str, DivergenceEstimator],
    forward_batch: int = 1024,
    training_batch: int = 256,
    seconds_each: float = 1.0,
    device: torch.device | str = "cpu",
    loop: bool = True,
    progress: str | None = None,
) -> list[Cost]:
    """Time each estimator in turns; times are per evaluation.

    The first cost is that of the bare field. With `loop`, the second is that of the usual loop with one reverse-mode
    pass per coordinate. Estimators with more than 16 products run a single evaluation instead of `EVALUATIONS`.
    """
    field = field.to(device)
    shape = tuple(event_shape)
    bound = {name: estimator.bind(bind(field, event_shape=shape)) for name, estimator in estimators.items()}
    timings = []
    for batch, training in ((forward_batch, False), (training_batch, True)):
        x = torch.randn(batch, *shape, device=device)
        runs = {BARE: (_Bare(), EVALUATIONS)} | ({LOOP: (_Loop(), 1)} if loop else {})
        for name, estimator in estimators.items():
            runs[name] = estimator, EVALUATIONS if bound[name].cost <= 16 else 1
        cases = {name: _repeated(estimator, count, field, x, training) for name, (estimator, count) in runs.items()}
        label = f"{progress}, {'forward + backward' if training else 'forward'}"
        medians = alternating_medians(cases, seconds_each, progress=label if progress else None)
        timings.append({name: medians[name] / count for name, (_, count) in runs.items()})
    forward, backward = timings
    return [
        Cost(
            name,
            bound[name].cost if name in bound else None,
            bound[name].is_exact if name in bound else None,
            forward[name],
            backward[name],
        )
        for name in forward
    ]


def table(costs: Sequence[Cost]) -> Iterator[str]:
    """One line per estimator: its cost in bare evaluations, and how many times cheaper than the loop it is."""
    bare = costs[0]
    loop = next((cost for cost in costs if cost.name == LOOP), None)
    headings = f"{'forward':>9}{'loop/it':>9}{'fwd+bwd':>9}{'loop/it':>9}" if loop else f"{'forward':>9}{'fwd+bwd':>9}"
    yield f"{'':26}{'products':>9}{'exact':>7}{headings}"
    for cost in costs:
        products = "" if cost.products is None else str(cost.products)
        exact = "" if cost.exact is None else ("yes" if cost.exact else "no")
        line = f"{cost.name:26}{products:>9}{exact:>7}"
        for name in ("forward", "training"):
            seconds = getattr(cost, name)
            line += f"{seconds / getattr(bare, name):9.2f}"
            line += f"{getattr(loop, name) / seconds:9.1f}" if loop else ""
        yield line


def _repeated(
    estimator: DivergenceEstimator, evaluations: int, field: nn.Module, x: Tensor, training: bool
) -> Callable[[], None]:
    """A case that evaluates at several times and, when training, runs one backward pass."""
    probes = estimator.bind(bind(field, event_shape=x.shape[1:])).draw_probes(x)
    times = torch.linspace(0, 1, evaluations, device=x.device)

    def case() -> None:
        with torch.set_grad_enabled(training):
            bound = estimator.bind(bind(field, event_shape=x.shape[1:]))
            points = x.clone().requires_grad_(training)
            loss = torch.zeros((), device=x.device)
            for t in times:
                sample = bound(t, points, probes)
                if training:
                    loss = loss + sample.value.sum() + sample.divergence.sum()
            if training:
                loss.backward()
                field.zero_grad()

    return case


class _Bare(DivergenceEstimator):
    """The field alone, with the interface of an estimator."""

    def __call__(self, t: Tensor, x: Tensor, probes: Tensor | None = None) -> FieldSample:
        return FieldSample(self.field(t, x), torch.zeros(1, 1, device=x.device))


class _Loop(DivergenceEstimator):
    """Σ_i ∂v_i/∂x_i by one reverse-mode pass per coordinate, as it is usually written."""

    def __call__(self, t: Tensor, x: Tensor, probes: Tensor | None = None) -> FieldSample:
        training = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if training else x.detach().requires_grad_()
            value = self.field(t, x)
            flat = value.flatten(1)
            trace = torch.zeros(len(x), device=x.device)
            for i in range(flat.shape[1]):
                (row,) = torch.autograd.grad(flat[:, i].sum(), x, create_graph=training, retain_graph=True)
                trace = trace + row.flatten(1)[:, i]
        return FieldSample(value, trace.unsqueeze(0))
