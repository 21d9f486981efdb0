"""The figures that a run ends with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flows.evaluation import BitsPerDim, ImportanceWeights, Likelihood
from flows.training.state import Position


@dataclass(frozen=True)
class Summary:
    """The result of a run; likelihoods in nats an example in data space."""

    test: Likelihood | None  # None: there are no test points, or they could not be solved
    weights: ImportanceWeights | None  # of an energy; None for other data, or if they could not be solved
    entropy: float | None  # of the data, the lowest NLL possible; None: unknown
    position: Position  # at the end of training
    evaluation_seconds: float  # of the test
    total_seconds: float  # of training, test and all pictures
    parameters: int
    data: str
    device: str
    seed: int
    output_dir: str

    @property
    def test_nll(self) -> float | None:
        return None if self.test is None else self.test.nll

    @property
    def gap(self) -> float | None:
        """``test_nll - entropy``."""
        return None if self.entropy is None or self.test is None else self.test.nll - self.entropy

    @property
    def nfe(self) -> float | None:
        """Evaluations of the field in a solve of the test."""
        tested = self.test or self.weights
        return None if tested is None else tested.nfe

    @property
    def validation_nll(self) -> float | None:
        """Of the weights that were tested, the best on the validation part; of an energy, its free energy."""
        return self.position.best_nll

    def headline(self) -> dict[str, float | None]:
        """The few figures that runs are compared by."""
        bits = bits_dict(self.test and self.test.bits_per_dim)["bits_per_dim"]
        figures = {"nll": self.test_nll, "bits_per_dim": bits, "gap": self.gap, "nfe": self.nfe}
        return figures | (self.weights.metrics() if self.weights else {})

    def as_dict(self) -> dict[str, Any]:
        """What ``summary.json`` holds; None where unknown."""
        test = self.test
        error = math.nan if test is None else test.standard_error
        return {
            "test_nll": self.test_nll,
            "test_nll_se": None if math.isnan(error) else error,
            "test_points": 0 if test is None else test.num_points,
            **{f"test_{name}": value for name, value in bits_dict(test and test.bits_per_dim).items()},
            "probe_se": test and test.probe_standard_error,
            "solver_error": test and test.solver_error,
            "importance_weights": self.weights and self.weights.as_dict(),
            "entropy": self.entropy,
            "gap": self.gap,
            "validation_nll": self.validation_nll,
            "best_step": self.position.best_step,
            "nfe": self.nfe,
            "steps": self.position.step,
            "skipped_batches": self.position.skipped,
            "seconds": self.position.seconds,
            "evaluation_seconds": self.evaluation_seconds,
            "total_seconds": self.total_seconds,
            "parameters": self.parameters,
            "data": self.data,
            "device": self.device,
            "seed": self.seed,
            "output_dir": self.output_dir,
        }

    def __str__(self) -> str:
        training = f"{self.position.seconds:.1f} s for {self.position.step:,} steps"
        if self.position.skipped:
            training += f" ({self.position.skipped} batches skipped)"
        rows = [("data", self.data)]
        for result in (self.weights and self.weights.table(), self.test and self.test.table(self.entropy)):
            rows += result or []
        if self.position.best_step not in (None, self.position.step):
            rows.append(("weights", f"of step {self.position.best_step:,}, the best on the validation part"))
        time = f"{training}, {self.evaluation_seconds:.1f} s for the test, {self.total_seconds:.1f} s in all"
        return aligned([*rows, ("time", time), ("files", self.output_dir)])


def aligned(rows: list[tuple[str, str]]) -> str:
    """Names and values in two columns."""
    return "\n".join(f"{name:>12}  {value}" for name, value in rows)


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values within values as one level, with dotted names; a list stays one value."""
    level: dict[str, Any] = {}
    for name, value in nested.items():
        level |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return level


def to_json(content: dict[str, Any]) -> str:
    """A JSON file's text."""
    return json.dumps(content, indent=2) + "\n"


def bits_dict(bits: BitsPerDim | None) -> dict[str, Any]:
    """Bits per dimension as plain values; None where unknown, or where data are continuous."""
    if bits is None:
        return {"bits_per_dim": None, "bits_per_dim_se": None, "bits_per_dim_parts": None}
    error = None if math.isnan(bits.standard_error) else bits.standard_error
    return {"bits_per_dim": bits.value, "bits_per_dim_se": error, "bits_per_dim_parts": dict(bits.parts)}


def likelihood_dict(result: Likelihood, entropy: float | None) -> dict[str, Any]:
    """A likelihood as plain values, with the gap to the entropy; None where unknown."""
    plain = {
        **{name: value for name, value in vars(result).items() if name not in ("values", "statistics")},
        **bits_dict(result.bits_per_dim),
        "entropy": entropy,
        "gap": None if entropy is None else result.nll - entropy,
    }
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in plain.items()}
