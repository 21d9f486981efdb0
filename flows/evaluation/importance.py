"""How well a flow matches an unnormalised density, from samples of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from flows.datasets import Energy
from flows.errors import InvalidValueError
from flows.models.cnf import CNF
from flows.models.importance import effective_sample_size, log_weights, log_z
from flows.solvers import SolverStatistics


@dataclass(frozen=True)
class ImportanceWeights:
    """What the weights w = p̃(x)/q(x) of samples x of a flow q say about it and about Z = ∫p̃; nats.

    They speak of what the flow covers: of a flow that has lost a mode of p they look good, with a log Z too low.
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

    def metrics(self) -> dict[str, float]:
        """What to log while training."""
        names = ("free_energy", "log_z", "effective_sample_size", "nfe")
        return {name: getattr(self, name) for name in names}

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        plain = {name: value for name, value in vars(self).items() if name != "statistics"}
        return {**plain, "reverse_kl": self.divergence}

    def table(self) -> list[tuple[str, str]]:
        """Names and values for a reader."""
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


def importance_weights(
    flow: CNF,
    energy: Energy,
    num_samples: int,
    batch_size: int,
    generator: torch.Generator | None = None,
    progress: str | None = None,
) -> ImportanceWeights:
    """Draw from ``flow`` and weigh the samples; no gradients are recorded.

    Args:
        num_samples: n.
        batch_size: samples a solve.
        generator: of the base and the probes.
        progress: the title of a progress bar; no bar if None.

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
