"""What is reported of predicted time series: figures with standard errors, and a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flows.datasets import Dataset, DynamicalSystem
from flows.evaluation.evaluator import Report, known, set_apart
from flows.evaluation.metrics import EnergyScore, Measurement, PredictiveMetric
from flows.models.resolution import prediction_fault
from flows.predictions import Mean, Predictions

LEVELS = (0.5, 0.9)  # of predictive intervals
HORIZONS = 6  # intervals of time for which errors are listed
REGIONS = {"inside": "", "beyond": "_beyond"}  # endings of metrics
FIGURES = ("mse", "relative_error", "true_mse", "true_relative_error", "nll", "coverage_50", "coverage_90")


def report(found: Predictions, dataset: Dataset, stopped: str | None = None) -> Report:
    """Write up predictions.

    Args:
        stopped: why nothing could be predicted beyond the training span.
    """
    faults = {region: fault_of(found, region) for region in REGIONS}
    faults["beyond"] = faults["beyond"] or stopped
    metrics: dict[str, Any] = {"series": found.num_series, "values": int(found.counts("all").sum())}
    for region, ending in REGIONS.items():
        own = figures(found, region, ending)
        taken_back = [name + ending for name in FIGURES] if faults[region] is not None else []
        metrics |= set_apart(own, taken_back)
    drifts, horizons = _drifts(found, dataset), _horizons(found)
    metrics |= {name: value for drift in drifts for name, value in drift.metrics().items()}
    metrics |= {
        "training_span": found.span,
        "error_by_horizon": horizons,
        "nfe": found.nfe,
        "unresolved": faults["inside"],
        "unresolved_beyond": faults["beyond"],
    }
    return Report(
        metrics=metrics,
        rows=_table(found, metrics, horizons, drifts),
        headline=("mse", "relative_error", "relative_error_beyond", "nll", "nfe"),
        unresolved=faults["inside"],
    )


def score(found: Predictions) -> float:
    """The loss per value, as the field sees values: the mean square error, or the NLL if the model knows noise."""
    squares = found.scaled_error.square()
    if found.noise is None:
        return found.mean(squares, "all").value
    nll = 0.5 * squares / found.noise.square() + found.noise.log() + 0.5 * math.log(2 * math.pi)
    return found.mean(nll, "all").value


def fault_of(found: Predictions, region: str) -> str | None:
    """Say why the figures of a region are no result; None if nothing speaks against them."""
    error = found.mean(found.relative(found.error).square(), region).root()
    solver_error = found.mean(found.relative(found.solver_error).square(), region).root()
    return prediction_fault(solver_error.value, error.value, error.standard_error, found.solver)


def figures(found: Predictions, region: str, ending: str) -> dict[str, float | None]:
    """All figures of a region, with standard errors; None where unknown."""
    means = {
        "mse": found.mean(found.error.square(), region),
        "relative_error": found.mean(found.relative(found.error).square(), region).root(),
    }
    if found.truth is not None:
        squares = (found.states - found.truth).square()
        means["true_mse"] = found.mean(squares, region, of_truth=True)
        means["true_relative_error"] = found.mean(squares / found.scale.square(), region, of_truth=True).root()
    if found.sd is not None:
        means["nll"] = found.mean(found.nll(), region)
        for level in LEVELS:
            means[f"coverage_{round(100 * level)}"] = found.mean(found.covered(level), region)
    figures = {}
    for name, mean in means.items():
        figures[name + ending] = known(mean.value)
        figures[f"{name}{ending}_se"] = known(mean.standard_error)
    figures[f"solver_error{ending}"] = known(found.mean(found.solver_error.square(), region).root().value)
    return figures


def predictive_figures(
    found: Predictions, metrics: Sequence[PredictiveMetric], seed: int = 0
) -> dict[str, Measurement]:
    """Measure draws N(state, sd²) of a model with noise, inside the training span.

    Coverage and CRPS are means over observed values, the energy score is one over states of which all entries were
    observed. The first `max_points` of them count.
    """
    measured = {}
    for metric in metrics:
        assert found.sd is not None  # callers check
        joint = isinstance(metric, EnergyScore)
        counts = found.counts("inside")
        if joint:
            counts = counts.flatten(2).all(2)
        counts = counts & (counts.flatten().cumsum(0).view_as(counts) <= metric.max_points)
        x, states, sd = (part[counts] for part in (found.x, found.states, found.sd.expand_as(found.x)))
        generator = torch.Generator().manual_seed(seed)
        draws = states + sd * torch.randn(metric.num_draws, *x.shape, generator=generator, dtype=x.dtype)
        scores = torch.zeros(counts.shape, dtype=x.dtype)
        if len(x):
            scores[counts] = metric.scores(draws.reshape(len(draws), len(x), -1), x.reshape(len(x), -1))
        mean = Mean.of(scores, counts, found.series)
        measured[metric.name] = Measurement(mean.value, mean.standard_error)
    return measured


@dataclass(frozen=True)
class _Drift:
    """How far a conserved quantity moves away from its value at the start."""

    name: str
    size: Mean  # root mean square over times and series
    spread: float  # standard deviation of the quantity over series

    def metrics(self) -> dict[str, float | None]:
        key = f"drift_{self.name}"
        return {key: known(self.size.value), f"{key}_se": known(self.size.standard_error)}

    def __str__(self) -> str:
        if math.isnan(self.size.value):
            return f"{self.name} is undefined at some predicted states"
        return f"{self.name} {_pm(self.size)} (it differs by {self.spread:.3g} between series)"


def _drifts(found: Predictions, dataset: Dataset) -> list[_Drift]:
    if not isinstance(dataset, DynamicalSystem):
        return []
    counts = found.mask.clone()
    counts[:, 0] = False
    drifts = []
    for name, value in dataset.conserved(found.states).items():
        moved = (value - value[:, :1]).square()
        size = (
            Mean.of(moved, counts, found.series).root()
            if bool(moved[counts].isfinite().all())
            else Mean(math.nan, math.nan)
        )
        drifts.append(_Drift(name, size, float(value[:, 0].std(correction=0))))
    return drifts


def _horizons(found: Predictions) -> list[dict[str, float | None]]:
    """The error in intervals of the time since the start."""
    end = float(found.horizon.max())
    squares = found.relative(found.error).square()
    rows = []
    for low, high in ((end * k / HORIZONS, end * (k + 1) / HORIZONS) for k in range(HORIZONS)):
        within = (found.horizon > low) & (found.horizon <= high * (1 + 1e-9))
        counts = found.counts("all") & within.view(*within.shape, *[1] * (squares.ndim - 2))
        error = Mean.of(squares, counts, found.series).root()
        rows.append(
            {
                "from": low,
                "to": high,
                "relative_error": known(error.value),
                "relative_error_se": known(error.standard_error),
            }
        )
    return rows


def _table(
    found: Predictions,
    metrics: Mapping[str, Any],
    horizons: Sequence[Mapping[str, float | None]],
    drifts: Sequence[_Drift],
) -> list[tuple[str, str]]:
    """Names and values for a reader."""
    rows = []
    for region, ending in REGIONS.items():
        if not bool(found.counts(region).any()):
            continue
        where = f"{found.num_series:,} series, " + ("to" if region == "inside" else "beyond") + f" t = {found.span:.4g}"
        rows.append(("MSE" if not ending else "beyond", f"{_shown(metrics, 'mse', ending)} ({where})"))
        rows.append(
            ("relative error", f"{_shown(metrics, 'relative_error', ending, percent=True)} of the standard deviation")
        )
        if found.truth is not None:
            rows.append(
                (
                    "true error",
                    f"MSE {_shown(metrics, 'true_mse', ending)}, relative "
                    f"{_shown(metrics, 'true_relative_error', ending, percent=True)}, without noise",
                )
            )
        if found.sd is not None:
            rows.append(("NLL", f"{_shown(metrics, 'nll', ending)} nats a value"))
            for level in LEVELS:
                name = f"coverage_{round(100 * level)}"
                rows.append((f"{level:.0%} interval", f"covers {_shown(metrics, name, ending, percent=True)}"))
        error = metrics[f"solver_error{ending}"]
        rows.append(("solver error", "unknown" if error is None else f"{error:.1e}"))
        fault = metrics["unresolved" if not ending else "unresolved_beyond"]
        if fault is not None:
            rows.append(("unresolved", fault))
    if metrics["unresolved_beyond"] and not bool(found.counts("beyond").any()):
        rows.append(("beyond", f"unknown, the solve stopped: {metrics['unresolved_beyond']}"))
    shares = {f"t = {row['from']:.3g}–{row['to']:.3g}": row["relative_error"] for row in horizons}
    times = [f"{_percent(share)} in {span}" for span, share in shares.items() if share is not None]
    rows.append(("over time", f"relative error {', '.join(times)}"))
    rows += [("drift", str(drift)) for drift in drifts]
    return [*rows, ("NFE", f"{found.nfe:.0f}")]


def _shown(metrics: Mapping[str, Any], name: str, ending: str, percent: bool = False) -> str:
    value, error = metrics[name + ending], metrics[f"{name}{ending}_se"]
    if value is None:
        return "unresolved"
    factor, sign = (100.0, " %") if percent else (1.0, "")
    return _pm(Mean(factor * value, math.nan if error is None else factor * error)) + sign


def _pm(mean: Mean) -> str:
    """The value with two digits of its standard error."""
    value, error = mean.value, mean.standard_error
    if not error > 0 or not 1e-4 <= abs(value) < 1e6:
        return f"{value:.4g}" + (f" ± {error:.2g}" if error > 0 else "")
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"
