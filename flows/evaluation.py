"""The likelihood of a set of points, with its error bars."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from flows.cnf import CNF
from flows.datasets import Batch, Dataset


@dataclass(frozen=True)
class Likelihood:
    """The mean negative log-likelihood of a set, in nats an example in data space."""

    nll: float
    standard_error: float  # sd / sqrt(n) over the points; NaN for a single point
    num_points: int
    probe_standard_error: float | None  # the part due to the probes; 0 if exact, None if one probe hides it
    solver_error: float | None  # |nll - nll at much tighter tolerances| on the points below; None if not asked
    solver_error_points: int  # the first points, on which the solver error was computed
    nfe: float  # evaluations of the field, the mean over the batches

    def table(self, entropy: float | None = None) -> list[tuple[str, str]]:
        """Names and values for a reader; with the gap to the ``entropy`` of the data where it is known."""
        error = "" if math.isnan(self.standard_error) else f" ± {self.standard_error:.4f}"
        rows = [("NLL", f"{self.nll:.4f}{error} nats ({self.num_points:,} points)")]
        if entropy is not None:
            rows += [("entropy", f"{entropy:.4f} nats"), ("gap", f"{self.nll - entropy:.4f}{error} nats")]
        if self.probe_standard_error is None:
            rows.append(("probe error", "unknown with one probe; take two or more"))
        elif self.probe_standard_error > 0:
            rows.append(("probe error", f"{self.probe_standard_error:.1e} nats"))
        if self.solver_error is not None:
            rows.append(("solver error", f"{self.solver_error:.1e} nats"))
        return [*rows, ("NFE", f"{self.nfe:.0f}")]


def part_batches(dataset: Dataset, part: str, batch_size: int) -> tuple[Iterable[Batch], int]:
    """The fixed batches of the part called ``"validation"`` or ``"test"``, and its number of points."""
    if part == "test":
        return dataset.test_batches(batch_size), dataset.num_test
    if part == "validation":
        return dataset.validation_batches(batch_size), dataset.num_validation
    raise ValueError(f"part must be test or validation, got {part!r}")


def likelihood(
    flow: CNF,
    batches: Iterable[Batch],
    generator: torch.Generator | None = None,  # of the probes
    solver_error_points: int = 0,
    progress: str | None = None,
    num_points: int | None = None,
) -> Likelihood:
    """Evaluate −mean log p over all points of ``batches``, the last and smaller batch included.

    Args:
        flow: as it is, in whichever mode; no gradients are recorded.
        batches: of any sizes, each on its own solve; they are moved to the device and dtype of the flow.
        generator: makes the probes of a stochastic estimator repeatable.
        solver_error_points: on at least this many points, in whole batches, solve again at much tighter
            tolerances, which costs more than the evaluation itself.
        progress: the title of a progress bar; no bar if None.
        num_points: the number of points to come, for the bar.

    Raises:
        ValueError: there is no point at all, a point is not finite, or its density is NaN or infinite.
    """
    values: list[Tensor] = []
    probe_variance = nfe = solver_bias = 0.0
    checked = 0
    with torch.no_grad(), tqdm(total=num_points, desc=progress, unit="pt", disable=progress is None) as bar:
        for batch in batches:
            x = batch.x.to(flow.base.zero)
            context = None if batch.context is None else batch.context.to(x)
            check = checked < solver_error_points
            estimate = flow.estimate_log_prob(x, context, generator, solver_error=check)
            values.append(estimate.value.double().cpu())
            probe_variance += float(estimate.standard_error.double().square().sum())
            nfe += estimate.nfe
            if check:
                solver_bias += float(estimate.solver_error.double().sum())
                checked += len(x)
            bar.update(len(x))
    if not values:
        raise ValueError("there is no point to evaluate: the batches are empty")
    nll = -torch.cat(values)
    bad = int((~nll.isfinite()).sum())
    if bad:
        raise ValueError(
            f"{bad} of {len(nll)} points have a log-density that is NaN or infinite, the first at index "
            f"{int((~nll.isfinite()).nonzero()[0])}; check that they lie where the transform is defined, and try "
            "tighter solver tolerances"
        )
    return Likelihood(
        nll=float(nll.mean()),
        standard_error=float(nll.std() / math.sqrt(len(nll))) if len(nll) > 1 else math.nan,
        num_points=len(nll),
        probe_standard_error=None if math.isnan(probe_variance) else math.sqrt(probe_variance) / len(nll),
        solver_error=solver_bias / checked if checked else None,
        solver_error_points=checked,
        nfe=nfe / len(values),
    )
