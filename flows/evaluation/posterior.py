"""Evaluate a flow as a posterior: likelihood, calibration, and reference posteriors where there are some."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from flows.arguments import checked
from flows.checks import whole_number
from flows.errors import FileError, InvalidValueError
from flows.evaluation.calibration import Calibration, calibration_rows
from flows.evaluation.density import DensityEvaluator, as_flow
from flows.evaluation.evaluator import Report
from flows.evaluation.metrics import C2ST, Measurement
from flows.evaluation.sampled import ensemble, first_points
from flows.models.cnf import CNF

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OBSERVATION = re.compile(r"(\d+)_observation\.csv")


@checked
@dataclass(frozen=True)
class PosteriorEvaluator(DensityEvaluator):
    """Adds the calibration of a posterior to its likelihood, and its C2ST against reference posteriors.

    Calibration: the ranks of true parameters among draws (`sbc_p`, the p-value of their uniformity) and the expected
    coverage of credible regions around random points (TARP: `coverage_90` at 90 %, `coverage_error` at any level); see
    `flows.evaluation.Calibration`.

    Args:
        calibration_points: pairs of the test part that calibration looks at; 0: none.
        calibration_draws: from the posterior of each of them.
        reference: a folder with `K_observation.csv` and `K_reference_posterior_samples.csv` (or `.csv.bz2`) for
            K = 1, 2, ..., as sbibm writes them. `reference_c2st` is the mean over the observations. Default: none.
        reference_points: draws from each posterior for C2ST, and of its reference.

    Example:
        ```python
        import flows
        from flows.evaluation import PosteriorEvaluator

        data = flows.datasets.TwoMoons(num_simulations=200, num_test=20)
        evaluator = PosteriorEvaluator(data, progress_bar=False)
        ```
    """

    calibration_points: int = 500
    calibration_draws: int = 100
    reference: str | os.PathLike[str] | None = None
    reference_points: int = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("calibration_points", self.calibration_points, 0, otherwise="0 looks at none")
        whole_number("calibration_draws", self.calibration_draws, 2)
        whole_number("reference_points", self.reference_points, 10)
        if self.reference is not None:
            references(self.reference)  # before hours of training

    @checked
    def check(self, model: nn.Module) -> None:
        super().check(model)
        if self.dataset.context_shape is None or len(self.dataset.event_shape) != 1:
            raise InvalidValueError(
                f"a posterior has parameters of shape (d,) and observations as contexts, and the data "
                f"{self.dataset.name!r} have points of shape {self.dataset.event_shape} and contexts of shape "
                f"{self.dataset.context_shape}; use evaluation=density"
            )

    def _mass(self, flow: CNF, part: str, thorough: bool) -> None:
        """Leave the mass out: each posterior is narrow beside the box of all parameters."""
        del flow, part, thorough

    @checked
    def calibration(self, flow: CNF) -> Calibration | None:
        """Draw from the posterior of each of the first test pairs; None for no pairs."""
        if min(self.calibration_points, self.dataset.num_test) < 2:
            return None
        batch = first_points(flow, self.dataset, self.part, self.calibration_points, self.points)
        with torch.no_grad():
            draws = ensemble(flow, batch, self.calibration_draws, self.generator(flow, "calibration"))
        return Calibration.of(draws, batch.x, torch.Generator().manual_seed(self.seed))

    @checked
    def reference_c2st(self, flow: CNF) -> list[Measurement]:
        """C2ST of each reference posterior."""
        found = []
        for number, (observation, reference) in enumerate(references(self.reference) if self.reference else ()):
            x, theta = read_numbers(observation)[0], read_numbers(reference)
            if tuple(x.shape) != self.dataset.context_shape or theta.shape[1:] != self.dataset.event_shape:
                raise InvalidValueError(
                    f"{observation} and {reference.name} hold an observation of shape {tuple(x.shape)} and parameters "
                    f"of shape {tuple(theta.shape[1:])}, and the data have {self.dataset.context_shape} and "
                    f"{self.dataset.event_shape}"
                )
            count = min(self.reference_points, len(theta))
            with torch.no_grad():
                draws = flow.sample((count,), x.to(flow.device), self.generator(flow, f"reference {number}"))
            found.append(C2ST(max_points=count)(draws, theta))
        return found

    @checked
    def test(self, model: nn.Module) -> Report:
        flow, report = as_flow(model), super().test(model)
        metrics, rows = dict(report.metrics), list(report.rows)
        calibration = self.calibration(flow)
        if calibration is not None:
            metrics |= {
                "sbc_p": calibration.p_value,
                "sbc_p_values": calibration.p_values,
                "coverage_90": float(calibration.expected_coverage(torch.tensor([0.9]))[0]),
                "coverage_90_se": calibration.coverage_se(0.9),
                "coverage_error": calibration.coverage_error,
            }
            rows += calibration_rows(calibration)
        found = [one.value for one in self.reference_c2st(flow)]
        headline = list(report.headline)
        if found:
            mean, error = (
                float(np.mean(found)),
                float(np.std(found, ddof=min(1, len(found) - 1)) / math.sqrt(len(found))),
            )
            metrics |= {"reference_c2st": mean, "reference_c2st_se": error, "reference_c2st_each": found}
            rows.append(("C2ST", f"{mean:.3f} ± {error:.3f} ({len(found)} reference posteriors)"))
            headline.insert(0, "reference_c2st")
        return replace(report, metrics=metrics, rows=rows, headline=headline)

    def pictures(self, model: nn.Module) -> Mapping[str, Figure]:
        from flows import plots  # slow to import

        calibration = self.calibration(as_flow(model))
        if calibration is None:
            return super().pictures(model)
        return {
            **super().pictures(model),
            "ranks": plots.ranks(calibration.ranks, calibration.num_draws),
            "coverage": plots.expected_coverage(calibration.closer),
        }


def references(folder: str | os.PathLike[str]) -> list[tuple[Path, Path]]:
    """Return the files of observations and of their reference posteriors, by their numbers.

    Raises:
        FileError: the folder holds none, or one is missing.
    """
    path = Path(folder)
    expected = "K_observation.csv and K_reference_posterior_samples.csv.bz2 for K = 1, 2, ..."
    if not path.is_dir():
        raise FileError(f"reference must be a folder with {expected}; there is none at {path}")
    numbers = sorted(int(match[1]) for file in path.iterdir() if (match := OBSERVATION.fullmatch(file.name)))
    if not numbers:
        raise FileError(f"the folder {path} holds no reference posteriors; expected {expected}")
    found = []
    for number in numbers:
        name = f"{number}_reference_posterior_samples.csv"
        files = [path / (name + ending) for ending in ("", ".bz2") if (path / (name + ending)).is_file()]
        if not files:
            raise FileError(f"{path} holds {number}_observation.csv without {name} or {name}.bz2")
        found.append((path / f"{number}_observation.csv", files[0]))
    return found


def read_numbers(path: Path) -> Tensor:  # (rows, columns)
    """Read a csv file with a line of names.

    Raises:
        FileError: it cannot be read.
    """
    try:
        rows = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)
    except (OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read as a table of numbers under a line of names: {error}") from error
    if rows.size == 0:
        raise FileError(f"{path} holds no numbers")
    return torch.from_numpy(rows).to(torch.get_default_dtype())
