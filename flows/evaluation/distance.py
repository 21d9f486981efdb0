"""Evaluate a flow without a density by the distance of its samples from the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flows.arguments import checked
from flows.dynamics import StateDynamics
from flows.errors import InvalidValueError
from flows.evaluation.density import FlowEvaluator, as_flow
from flows.evaluation.evaluator import Evaluation, Report, known
from flows.evaluation.metrics import (
    Measurement,
    SampleMetric,
    SlicedWasserstein2,
    TwoSampleMetric,
    Wasserstein2,
    chosen_metrics,
)
from flows.evaluation.sampled import first_points, measured
from flows.models.cnf import CNF
from flows.models.inputs import features_of
from flows.models.resolution import solver_fault
from flows.path_costs import KineticEnergy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VALIDATION = SlicedWasserstein2(num_directions=100)
CHECKED_PATHS = 32  # that are solved again at tighter tolerances


@checked
@dataclass(frozen=True)
class DistanceEvaluator(FlowEvaluator):
    """Scores a flow by the sliced Wasserstein-2 distance of its samples from the data.

    It needs no density, so it suits flows from data to data (`flows.bases.Empirical`) and from a box
    (`flows.bases.Uniform`). The test adds exact distances, and how straight the paths are: their energy E ∫‖v‖² dt
    beside W₂² of source and data in flow space, below which no flow between the two can be
    [Benamou & Brenier 2000; Tong et al. 2024, arXiv:2302.00482].

    Args:
        metrics: figures of the test: metrics of `flows.evaluation.metrics`, or their lower-case names. The distance of
            two samples of the data from each other is beside each of two samples, for no flow can be nearer.
        paths: measure path energies and their solver error; off for distilled steps, which are no ODE.

    Example:
        ```python
        import flows
        from flows.evaluation import DistanceEvaluator

        data, flow = flows.datasets.Moons(num_test=100), flows.CNF(flows.fields.MLP((2,), hidden=(8,)))
        report = DistanceEvaluator(data, progress_bar=False).test(flow)
        report.metrics
        ```
    """

    metrics: Sequence[SampleMetric | str] = ("wasserstein2", "sliced_wasserstein2")
    paths: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "metrics", chosen_metrics(self.metrics))

    @checked
    def check(self, model: nn.Module) -> None:
        super().check(model)
        if not self.dataset.has_samples:
            raise InvalidValueError(
                f"evaluation=distance compares samples with data, and {self.dataset.name!r} is an energy without "
                "samples; use evaluation=energy"
            )

    @checked
    def validate(self, model: nn.Module) -> Evaluation:
        flow = as_flow(model)
        generator = self.generator(flow, "validation")
        found = measured(flow, self.dataset, [VALIDATION], "validation", generator, self.points)[VALIDATION.name]
        return Evaluation(found.value, {VALIDATION.name: found.value, f"{VALIDATION.name}_se": found.standard_error})

    @checked
    def test(self, model: nn.Module) -> Report:
        flow, chosen = as_flow(model), chosen_metrics(self.metrics)
        found = dict(measured(flow, self.dataset, chosen, self.part, self.generator(flow, "test"), self.points))
        floors = self._floors(chosen)
        energy = self.path_energy(flow) if self.paths else None
        figures: dict[str, Any] = {}
        for name, one in found.items():
            figures |= {name: one.value, f"{name}_se": known(one.standard_error)}
        figures |= floors | ({} if energy is None else energy.metrics())
        rows = []
        for name, one in found.items():
            floor = floors.get(f"{name}_of_data")
            beside = "" if floor is None else f"; {floor:.4f} between two samples of the data"
            rows.append((name.replace("_", " "), f"{one}{beside}"))
        fault = None
        if energy is not None:
            rows += energy.table()
            fault = solver_fault(energy.solver_error, energy.path_energy.standard_error, flow.solver)
        return Report(
            metrics=figures | {"unresolved": fault},
            rows=[*rows, *([] if fault is None else [("unresolved", fault)])],
            headline=(*found, *(("path_energy", "transport_cost", "nfe") if energy is not None else ())),
            unresolved=fault,
        )

    def _floors(self, chosen: Sequence[SampleMetric]) -> dict[str, float]:
        """Compare two halves of the data, by each metric of two samples."""
        found = {}
        for metric in chosen:
            if isinstance(metric, TwoSampleMetric) and self.dataset.context_shape is None:
                most = int(getattr(metric, "max_points", 1_000))
                batches = self.dataset.test_batches if self.part == "test" else self.dataset.validation_batches
                x = next(iter(batches(2 * most))).x
                half = len(x) // 2
                if half > 1:
                    found[f"{metric.name}_of_data"] = metric(x[half:], x[:half]).value
        return found

    @checked
    def path_energy(self, flow: CNF, num_paths: int = 2_000) -> PathEnergy:
        """Measure the energy of paths of the flow beside the least that any flow between both ends needs."""
        generator = self.generator(flow, "paths")
        data = first_points(flow, self.dataset, self.part, num_paths, self.points)
        with torch.no_grad():
            y = flow.to_flow_space(data.x, data.context, generator)
            z = flow.base.sample((len(y),), generator)
            energy, nfe = _energy(flow, z, data.context)
            few = slice(min(CHECKED_PATHS, len(z)))
            solver = flow.solver
            try:
                flow.solver = solver.tighter()
                context = None if data.context is None else data.context[few]
                tight, _ = _energy(flow, z[few], context)
            finally:
                flow.solver = solver
        wasserstein = Wasserstein2()(z, y)
        size = len(energy)
        return PathEnergy(
            path_energy=Measurement(float(energy.mean()), float(energy.std()) / size**0.5 if size > 1 else torch.nan),
            transport_cost=Measurement(wasserstein.value**2, 2 * wasserstein.value * wasserstein.standard_error),
            nfe=nfe,
            solver_error=float((tight - energy[few]).abs().mean()),
        )

    def pictures(self, model: nn.Module) -> Mapping[str, Figure]:
        from flows import plots  # slow to import

        flow = as_flow(model)
        return plots.figures(flow, self.dataset, self.generator(flow, "plots"))


@checked
@dataclass(frozen=True)
class PathEnergy:
    """E ∫‖v‖² dt over paths, beside the squared Wasserstein-2 distance of their ends, in flow space."""

    path_energy: Measurement
    transport_cost: Measurement  # W₂² of samples of source and data, which is a little above that of both
    nfe: float
    solver_error: float  # of the energy

    def metrics(self) -> dict[str, Any]:
        """Return plain values for JSON; `excess_energy` is path_energy/transport_cost − 1."""
        energy, cost = self.path_energy, self.transport_cost
        return {
            "path_energy": energy.value,
            "path_energy_se": known(energy.standard_error),
            "transport_cost": cost.value,
            "transport_cost_se": known(cost.standard_error),
            "excess_energy": energy.value / cost.value - 1 if cost.value else None,
            "solver_error": known(self.solver_error),
            "nfe": self.nfe,
        }

    def table(self) -> list[tuple[str, str]]:
        """Return names and values for a reader."""
        return [
            ("path energy", f"{self.path_energy} (flow space)"),
            ("least energy", f"{self.transport_cost} (exact transport of samples)"),
            ("NFE", f"{self.nfe:.0f}"),
        ]


def _energy(flow: CNF, z: Tensor, context: Tensor | None) -> tuple[Tensor, int]:  # (B,)
    """Integrate ‖v‖² along the paths from base points; also return the evaluations."""
    cost = KineticEnergy()
    dynamics = StateDynamics(flow.bind(features_of(flow, context, (len(z),))), [cost])
    solution = flow.solver.solve(dynamics, dynamics.initial_state(z), (0.0, 1.0))
    integrals = dynamics.path_costs(solution.end[1:])
    return integrals[cost.name].double().cpu(), solution.statistics.nfe_forward
