"""Evaluate a flow as a sampler of an unnormalised density."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flows.arguments import checked
from flows.datasets import Dataset, Energy
from flows.errors import FlowsError, InvalidTypeError, InvalidValueError
from flows.evaluation.density import DensityEvaluator, FlowEvaluator, as_flow
from flows.evaluation.evaluator import Evaluation, Report, set_apart
from flows.evaluation.metrics import SampleMetric, chosen_metrics
from flows.evaluation.sampled import with_metrics
from flows.models.cnf import CNF
from flows.models.importance import WeightSums, log_weights, log_z
from flows.models.resolution import CHECKED_POINTS, TOLERANCE, below_zero, bound_fault, remedy, solver_fault
from flows.objectives.checks import check_base
from flows.progress import new_bar
from flows.shares import current_share, sharing
from flows.solvers import ODESolver, SolverError, SolverStatistics

LOG = logging.getLogger(__name__)
MOST_NOISE = 1.0  # nats a sample, from the probes: the most that can be corrected
FIGURES = ("free_energy", "reverse_kl")  # those that a fault of the solve takes back, with these:
WEIGHT_FIGURES = ("log_z", "effective_sample_size")  # the noise of probes alone does so, too


@dataclass(frozen=True)
class ImportanceWeights:
    """The weights w = p̃(x)/q(x) of samples x of a flow q, summed up; nats.

    They say nothing about regions that the flow misses: a flow that has lost a mode of p looks good, with a log Z
    that is too low.

    Example:
        ```python
        import flows
        from flows.evaluation import importance_weights

        energy, flow = flows.datasets.DoubleWell(), flows.CNF(flows.fields.MLP((2,), hidden=(8,)))
        weights = importance_weights(flow, energy, num_samples=200, batch_size=100)
        weights.log_z, weights.log_z_se, weights.effective_sample_size
        ```
    """

    free_energy: float  # E_q[log q − log p̃] = KL(q ‖ p) − log Z
    free_energy_se: float
    log_z: float  # log mean w, corrected for the noise of probes; see `flows.models.importance.WeightSums`
    log_z_se: float  # by the delta method; too small where few samples carry most of the weight
    effective_sample_size: float  # (Σw)²/(n Σw²), from 1/n to 1, corrected likewise
    num_samples: int
    known_log_z: float | None
    probe_error: float | None  # root mean square error of log w from the probes; 0 if exact, None if unknown
    nfe: float  # evaluations of the field, the mean over the solves
    statistics: SolverStatistics | None = field(default=None, repr=False, compare=False)  # of the largest solve
    probe_bias: float | None = 0.0  # by how much log Z was lowered for the noise of probes; None where unknown
    solver_error: float | None = None  # mean |log w − log w of a much tighter solve|; NaN if that failed
    solver_error_points: int = 0  # the first samples, on which it was computed
    solver: ODESolver | None = field(default=None, repr=False)  # with which the samples were drawn

    @property
    def unresolved(self) -> str | None:
        """Why no figure is a result, and what to change; None if nothing speaks against them.

        The solver error may be as large as the standard error, or 0.05 nats. The reverse KL may be four standard errors
        below zero.
        """
        solver = self.solver or ODESolver()
        fault = solver_fault(self.solver_error, self.free_energy_se, solver)
        if fault is None and self.divergence is not None:
            exact = self.probe_error == 0
            fault = bound_fault("reverse KL", self.divergence, self.free_energy_se, self.num_samples, solver, exact)
        return fault

    @property
    def unresolved_weights(self) -> str | None:
        """The same for log Z and the effective sample size, which suffer from the noise of probes."""
        if self.unresolved is not None:
            return self.unresolved
        cure = "take an exact divergence (evaluation.divergence=exact), or more probes"
        if self.probe_bias is None:
            return f"the noise of a single probe raises log Z by an unknown amount; {cure}"
        noise = self.probe_error or 0.0
        bias = max(self.probe_bias, noise**2 / 2)
        if noise > MOST_NOISE or bias / 3 > max(TOLERANCE, self._log_z_spread):
            much = f"{bias:.2g} nats" if math.isfinite(bias) else "an unknown amount"
            return f"the noise of the probes raises log Z by {much}, too much to correct; {cure}"
        if self.known_log_z is not None:
            excess = self.log_z - self.known_log_z
            if below_zero(-excess, self.log_z_se, self.num_samples):
                solver = self.solver or ODESolver()
                finer = remedy(solver) if self.probe_error == 0 else f"{cure}, or {remedy(solver)}"
                above = f"{excess:.4f} ± {self.log_z_se:.4f} nats above the known one"
                return f"log Z is {above}, which is impossible; {finer}"
        return None

    @property
    def _log_z_spread(self) -> float:
        """The standard error of log Z without the share of the probes."""
        systematic = (self.probe_bias or 0.0) / 3
        return math.sqrt(max(0.0, self.log_z_se**2 - systematic**2)) if self.log_z_se >= systematic else 0.0

    @property
    def divergence(self) -> float | None:
        """KL(q ‖ p), where log Z is known."""
        return None if self.known_log_z is None else self.free_energy + self.known_log_z

    def metrics(self) -> dict[str, Any]:
        """Return plain values for JSON; None where unknown or unresolved."""
        metrics = {
            "free_energy": self.free_energy,
            "free_energy_se": self.free_energy_se,
            "log_z": self.log_z,
            "log_z_se": self.log_z_se,
            "known_log_z": self.known_log_z,
            "effective_sample_size": self.effective_sample_size,
            "samples": self.num_samples,
            "reverse_kl": self.divergence,
            "reverse_kl_se": None if self.divergence is None else self.free_energy_se,
            "weight_probe_se": self.probe_error,
            "log_z_probe_bias": _finite(self.probe_bias),
            "weight_solver_error": _finite(self.solver_error),
            "weight_solver_error_samples": self.solver_error_points,
            "sample_nfe": self.nfe,
            "unresolved": self.unresolved_weights,
        }
        if self.unresolved is not None:
            return set_apart(metrics, [*FIGURES, *WEIGHT_FIGURES])
        return metrics if self.unresolved_weights is None else set_apart(metrics, WEIGHT_FIGURES)

    def table(self) -> list[tuple[str, str]]:
        """Return names and values for a reader."""
        known = "" if self.known_log_z is None else f" (known: {self.known_log_z:.4f})"
        free_energy = f"{self.free_energy:.4f} ± {self.free_energy_se:.4f} nats"
        log_z = f"{self.log_z:.4f} ± {self.log_z_se:.4f}"
        share = f"{100 * self.effective_sample_size:.1f} % of the samples"
        reverse_kl = "" if self.divergence is None else f"{self.divergence:.4f} ± {self.free_energy_se:.4f} nats"
        if self.unresolved_weights is not None:
            log_z = share = "unresolved"
        if self.unresolved is not None:
            free_energy = reverse_kl = "unresolved"
        rows = [
            ("free energy", f"{free_energy} ({self.num_samples:,} samples)"),
            ("log Z", f"{log_z}{known}"),
            ("ESS", share),
        ]
        if self.divergence is not None:
            rows.append(("reverse KL", reverse_kl))
        if self.probe_error is None:
            rows.append(("probe error", "unknown with one probe; take two or more"))
        elif self.probe_error > 0:
            rows.append(("probe error", f"{self.probe_error:.1e} nats a sample"))
        if self.probe_bias and self.unresolved_weights is None:
            rows.append(("probe bias", f"log Z was lowered by {self.probe_bias:.1e} nats for the noise of the probes"))
        if self.solver_error is not None:
            rows.append(("sample error", f"{self.solver_error:.1e} nats from the solver"))
        if self.unresolved_weights is not None:
            rows.append(("unresolved", self.unresolved_weights))
        return [*rows, ("sample NFE", f"{self.nfe:.0f}")]


@checked
def importance_weights(
    flow: CNF,
    energy: Energy,
    num_samples: int,
    batch_size: int,
    generator: torch.Generator | None = None,
    progress: str | None = None,
    solver_error_points: int = CHECKED_POINTS,
) -> ImportanceWeights:
    """Draw samples from the flow and weigh them, without recording gradients.

    A stochastic divergence leaves the free energy unbiased and raises log Z, which is corrected.

    Args:
        num_samples: n.
        batch_size: samples in one solve.
        generator: of the base and the probes.
        progress: title of a progress bar; None: no bar.
        solver_error_points: samples that are drawn again at tighter tolerances, from the same base points and probes.

    Raises:
        ValueError: a weight is NaN or infinite.

    Example:
        ```python
        import flows
        from flows.evaluation import importance_weights

        energy, flow = flows.datasets.DoubleWell(), flows.CNF(flows.fields.MLP((2,), hidden=(8,)))
        weights = importance_weights(flow, energy, num_samples=200, batch_size=100)
        weights.log_z, weights.log_z_se, weights.effective_sample_size
        ```
    """
    if generator is None:
        generator = torch.Generator(flow.device).manual_seed(int(torch.randint(2**62, ())))
    parts, spread, differences, solves = [], [], [], []
    with torch.no_grad(), new_bar(total=num_samples, desc=progress, unit="sample", disable=progress is None) as bar:
        for size, again in _batches(num_samples, batch_size, solver_error_points):
            state = generator.get_state()
            share = current_share()
            rows = None if share is None else share.rows(size)
            drawn = flow.draw((size,), generator=generator, rows=rows)
            own = [log_weights(energy, drawn.x, drawn.log_prob).double().cpu(), drawn.standard_error.double().cpu()]
            solves.append(drawn.statistics)
            if again:
                after = generator.get_state()
                own.append(own[0] - _tight_log_weights(flow, energy, size, generator.set_state(state), rows))
                generator.set_state(after)
            found = own if share is None else [share.joined(values, size) for values in own]
            parts.append(found[0])
            spread.append(found[1])
            differences += found[2:]
            bar.update(size)
    log_weight = torch.cat(parts)
    if not log_weight.isfinite().all():
        bad = int((~log_weight.isfinite()).sum())
        raise InvalidValueError(
            f"{bad} of {num_samples} importance weights of {energy.name!r} are NaN, zero or infinite"
        )
    noise, difference = torch.cat(spread), torch.cat(differences) if differences else None
    variance = float(noise.square().mean())
    sums = WeightSums.of(log_weight, noise, flow.divergence.bind(flow.bind()).num_estimates)
    solver_error = None
    if difference is not None:
        shift = log_z(log_weight[: len(difference)]) - log_z(log_weight[: len(difference)] - difference)
        solver_error = float(torch.maximum(difference.abs().mean(), shift.abs()))  # NaN stays
    return ImportanceWeights(
        free_energy=-float(log_weight.mean()),
        free_energy_se=float(log_weight.std()) / math.sqrt(num_samples) if num_samples > 1 else math.nan,
        log_z=sums.log_z,
        log_z_se=sums.log_z_se,
        effective_sample_size=sums.effective_sample_size,
        num_samples=num_samples,
        known_log_z=energy.log_z,
        probe_error=None if math.isnan(variance) else math.sqrt(variance),
        nfe=sum(solve.nfe_forward for solve in solves) / len(solves),
        statistics=max(solves, key=lambda solve: solve.nfe_forward),
        probe_bias=sums.probe_bias,
        solver_error=solver_error,
        solver_error_points=0 if difference is None else len(difference),
        solver=flow.solver,
    )


def _batches(num_samples: int, batch_size: int, num_checked: int) -> Iterator[tuple[int, bool]]:
    """Yield the sizes of solves, and whether their samples are drawn again: the first `num_checked` ones are."""
    for number, again in ((min(num_checked, num_samples), True), (num_samples - min(num_checked, num_samples), False)):
        for start in range(0, number, batch_size):
            yield min(batch_size, number - start), again


def _tight_log_weights(
    flow: CNF, energy: Energy, size: int, generator: torch.Generator, rows: slice | None
) -> Tensor:  # (size,), or (rows,)
    """The log-weights of the samples that a much tighter solve draws; NaN if it fails."""
    solver, state = flow.solver, generator.get_state()
    try:
        for factor in (100.0, 10.0):
            flow.solver = solver.tighter(factor)
            with contextlib.suppress(SolverError):
                drawn = flow.draw((size,), generator=generator.set_state(state), rows=rows)
                return log_weights(energy, drawn.x, drawn.log_prob).double().cpu()
        number = size if rows is None else rows.stop - rows.start
        return torch.full((number,), torch.nan, dtype=torch.float64)
    finally:
        flow.solver = solver


@checked
@dataclass(frozen=True)
class EnergyEvaluator(FlowEvaluator):
    """Scores a flow by its free energy, E_q[log q − log p̃] over samples of the flow.

    The test also takes the likelihood of the energy's own samples, if there are any. `points` limits the number of
    samples of either kind.

    Args:
        metrics: figures of draws against the energy's own samples: metrics of `flows.evaluation.metrics`, or their
            lower-case names, such as `["wasserstein2"]`.

    Raises:
        InvalidValueError: there are metrics, and the energy has no samples.

    Example:
        ```python
        import flows
        from flows.evaluation import EnergyEvaluator

        energy, flow = flows.datasets.DoubleWell(num_test=100), flows.CNF(flows.fields.MLP((2,), hidden=(8,)))
        report = EnergyEvaluator(energy, progress_bar=False).test(flow)
        report.metrics
        ```
    """

    shares: ClassVar[bool] = True
    metrics: Sequence[SampleMetric | str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "metrics", chosen_metrics(self.metrics))
        if self.metrics and not self.dataset.has_samples:
            names = ", ".join(metric.name for metric in chosen_metrics(self.metrics))
            raise InvalidValueError(
                f"evaluation.metrics=[{names}] compares draws with samples of the data, and the energy "
                f"{self.dataset.name!r} has none; leave it out, importance weights judge the flow"
            )

    @checked
    def check(self, model: nn.Module) -> None:
        check_base(as_flow(model), "evaluation=energy", "an energy is judged by importance weights")
        if not isinstance(self.dataset, Energy):
            raise InvalidTypeError(
                f"EnergyEvaluator needs an energy, got {type(self.dataset).__name__}; use DensityEvaluator for data"
            )

    @checked
    def importance_weights(self, flow: CNF, part: str | None = None) -> ImportanceWeights:
        """Compute importance weights of samples of the flow, as many as a part asks for.

        None stands for the part that `test` looks at.
        """
        energy, tests = _as_energy(self.dataset), part is None
        part = self.part if part is None else part
        size = energy.num_test if part == "test" else energy.num_validation
        number = size if self.points is None else min(size, self.points)
        with self.evaluating(flow):
            return importance_weights(
                flow,
                energy,
                number,
                self.batch_size,
                self.generator(flow, part),
                self._progress(part) if tests else None,
                max(self.solver_error_points if tests else 0, CHECKED_POINTS),
            )

    @checked
    def validate(self, model: nn.Module) -> Evaluation:
        weights = self.importance_weights(as_flow(model), "validation")
        metrics = {
            "free_energy": weights.free_energy,
            "free_energy_se": weights.free_energy_se,
            "log_z": weights.log_z,
            "effective_sample_size": weights.effective_sample_size,
            "nfe": weights.nfe,
        }
        apart = [*FIGURES, *WEIGHT_FIGURES] if weights.unresolved is not None else WEIGHT_FIGURES
        if weights.unresolved_weights is not None:
            metrics = {f"{name}_unresolved" if name in apart else name: value for name, value in metrics.items()}
        return Evaluation(weights.free_energy, metrics, weights.statistics, weights.unresolved)

    @checked
    def test(self, model: nn.Module) -> Report:
        flow = as_flow(model)
        weights = self.importance_weights(flow)
        rows, metrics, faults = weights.table(), weights.metrics(), [weights.unresolved_weights]
        headline = ["free_energy", "log_z", "effective_sample_size", "sample_nfe"]
        if self.dataset.has_samples:
            entropy = self.dataset.entropy
            try:
                with sharing(None):  # what fails here does not end the run, so each process must see it
                    found = self._density().likelihood(flow)
                    drawn = with_metrics(
                        Report(found.metrics(entropy), found.table(entropy)), self._density().measured(flow)
                    )
                rows, metrics = [*rows, *drawn.rows], {**metrics, **drawn.metrics}
                faults.append(found.unresolved(entropy))
                headline += ["nll", "gap"]
            except FlowsError as error:  # where the flow has never been, it may be stiff
                LOG.warning("the test on samples of the energy was left out: %s", error)
                rows.append(("NLL", f"left out, since {error}"))
        name = self.evaluated_with(flow)
        rows.append(("divergence", f"evaluated with {name}"))
        unresolved = "; ".join(dict.fromkeys(fault for fault in faults if fault is not None)) or None
        return Report({**metrics, "unresolved": unresolved}, rows, headline, name, unresolved)

    def _density(self) -> DensityEvaluator:
        return DensityEvaluator(**vars(self))


def _as_energy(dataset: Dataset) -> Energy:
    if not isinstance(dataset, Energy):
        raise InvalidTypeError(f"{type(dataset).__name__} is no energy")
    return dataset


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
