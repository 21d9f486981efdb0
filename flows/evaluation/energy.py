"""Evaluate a flow as a sampler of an unnormalised density."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from flows.arguments import checked
from flows.datasets import Dataset, Energy
from flows.errors import FlowsError, InvalidTypeError, InvalidValueError
from flows.evaluation.density import DensityEvaluator, FlowEvaluator, as_flow
from flows.evaluation.evaluator import Evaluation, Report
from flows.models.cnf import CNF
from flows.models.importance import effective_sample_size, log_weights, log_z
from flows.solvers import SolverStatistics

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImportanceWeights:
    """The weights w = p̃(x)/q(x) of samples x of a flow q, summed up; nats.

    They say nothing about regions that the flow misses: a flow that has lost a mode of p looks good, with a log Z
    that is too low.
    """

    free_energy: float  # E_q[log q − log p̃] = KL(q ‖ p) − log Z
    free_energy_se: float
    log_z: float  # log mean w
    log_z_se: float  # by the delta method; too small where few samples carry most of the weight
    effective_sample_size: float  # (Σw)²/(n Σw²), from 1/n to 1
    num_samples: int
    known_log_z: float | None
    probe_error: float | None  # root mean square error of log w from the probes; 0 if exact, None if unknown
    nfe: float  # evaluations of the field, the mean over the solves
    statistics: SolverStatistics | None = field(default=None, repr=False, compare=False)  # of the largest solve

    @property
    def divergence(self) -> float | None:
        """KL(q ‖ p), where log Z is known."""
        return None if self.known_log_z is None else self.free_energy + self.known_log_z

    def metrics(self) -> dict[str, Any]:
        """Return plain values for JSON; None where unknown."""
        return {
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
            "sample_nfe": self.nfe,
        }

    def table(self) -> list[tuple[str, str]]:
        """Return names and values for a reader."""
        known = "" if self.known_log_z is None else f" (known: {self.known_log_z:.4f})"
        rows = [
            ("free energy", f"{self.free_energy:.4f} ± {self.free_energy_se:.4f} nats ({self.num_samples:,} samples)"),
            ("log Z", f"{self.log_z:.4f} ± {self.log_z_se:.4f}{known}"),
            ("ESS", f"{100 * self.effective_sample_size:.1f} % of the samples"),
        ]
        if self.divergence is not None:
            rows.append(("reverse KL", f"{self.divergence:.4f} ± {self.free_energy_se:.4f} nats"))
        if self.probe_error is None:
            rows.append(("probe error", "unknown with one probe; take two or more"))
        elif self.probe_error > 0:
            rows.append(("probe error", f"{self.probe_error:.1e} nats a sample, which raises log Z and lowers the ESS"))
        return [*rows, ("sample NFE", f"{self.nfe:.0f}")]


@checked
def importance_weights(
    flow: CNF,
    energy: Energy,
    num_samples: int,
    batch_size: int,
    generator: torch.Generator | None = None,
    progress: str | None = None,
) -> ImportanceWeights:
    """Draw samples from the flow and weigh them, without recording gradients.

    Args:
        num_samples: n.
        batch_size: samples in one solve.
        generator: of the base and the probes.
        progress: title of a progress bar; None: no bar.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    parts, solves, variance = [], [], 0.0
    with torch.no_grad(), tqdm(total=num_samples, desc=progress, unit="sample", disable=progress is None) as bar:
        for start in range(0, num_samples, batch_size):
            drawn = flow.draw((min(batch_size, num_samples - start),), generator=generator)
            parts.append(log_weights(energy, drawn.x, drawn.log_prob).double().cpu())
            variance += float(drawn.standard_error.double().square().sum())
            solves.append(drawn.statistics)
            bar.update(len(drawn.x))
    log_weight = torch.cat(parts)
    if not log_weight.isfinite().all():
        bad = int((~log_weight.isfinite()).sum())
        raise InvalidValueError(
            f"{bad} of {num_samples} importance weights of {energy.name!r} are NaN, zero or infinite"
        )
    share = float(effective_sample_size(log_weight))
    return ImportanceWeights(
        free_energy=-float(log_weight.mean()),
        free_energy_se=float(log_weight.std()) / math.sqrt(num_samples),
        log_z=float(log_z(log_weight)),
        log_z_se=math.sqrt((1 / share - 1) / num_samples),
        effective_sample_size=share,
        num_samples=num_samples,
        known_log_z=energy.log_z,
        probe_error=None if math.isnan(variance) else math.sqrt(variance / num_samples),
        nfe=sum(solve.nfe_forward for solve in solves) / len(solves),
        statistics=max(solves, key=lambda solve: solve.nfe_forward),
    )


@checked
class EnergyEvaluator(FlowEvaluator):
    """Scores a flow by its free energy, E_q[log q − log p̃] over samples of the flow.

    The test also takes the likelihood of the energy's own samples, if there are any. `points` limits the number of
    samples of either kind.
    """

    @checked
    def check(self, model: nn.Module) -> None:
        as_flow(model)
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
        return Evaluation(weights.free_energy, metrics, weights.statistics)

    @checked
    def test(self, model: nn.Module) -> Report:
        flow = as_flow(model)
        weights = self.importance_weights(flow)
        rows, metrics = weights.table(), weights.metrics()
        headline = ["free_energy", "log_z", "effective_sample_size", "sample_nfe"]
        if self.dataset.has_samples:
            try:
                found = self._density().test(flow)
                rows, metrics = [*rows, *found.rows[:-1]], {**metrics, **found.metrics}
                headline += ["nll", "gap"]
            except FlowsError as error:  # where the flow has never been, it may be stiff
                LOG.warning("the test on samples of the energy was left out: %s", error)
                rows.append(("NLL", f"left out, since {error}"))
        name = self.evaluated_with(flow)
        rows.append(("divergence", f"evaluated with {name}"))
        return Report(metrics, rows, headline, name)

    def _density(self) -> DensityEvaluator:
        return DensityEvaluator(**vars(self))


def _as_energy(dataset: Dataset) -> Energy:
    if not isinstance(dataset, Energy):
        raise InvalidTypeError(f"{type(dataset).__name__} is no energy")
    return dataset
