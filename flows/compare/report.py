"""A comparison as text and as plain values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from flows.arguments import checked
from flows.compare.advice import Advice
from flows.compare.measure import Comparison, Row


@checked
def as_text(comparison: Comparison, advice: Advice) -> str:
    """The table, the estimators that do not apply, and the advice."""
    return "\n".join([*_heading(comparison), "", *_table(comparison), *_left_out(comparison), "", *_advice(advice)])


@checked
def as_dict(comparison: Comparison, advice: Advice) -> dict[str, Any]:
    """All figures as plain values, `None` where unknown.

    Seconds are those of one evaluation, memory is in bytes per point."""
    truth = {key: value for key, value in asdict(comparison.truth).items() if key != "divergence"}
    rows = []
    for row in comparison.rows:
        plain = asdict(row)
        rows.append({**{key: plain[key] for key in plain if key != "accuracy"}, **plain["accuracy"]})
    return _finite(
        {
            "field": comparison.field,
            "event_shape": list(comparison.event_shape),
            "times": comparison.times,
            "points": comparison.points,
            "device": comparison.device,
            "dtype": comparison.dtype,
            "truth": truth,
            "estimators": rows,
            "not_applicable": comparison.not_applicable,
            "chosen": comparison.chosen,
            "configured": comparison.configured,
            "advice": asdict(advice),
        }
    )


def _finite(value: Any) -> Any:
    """Replace NaN and infinite numbers, which JSON lacks, by `None`."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _heading(comparison: Comparison) -> Iterator[str]:
    truth = comparison.truth
    times = ", ".join(f"{t:g}" for t in comparison.times)
    shape = " x ".join(map(str, comparison.event_shape))
    yield f"{comparison.field} on points of {shape}: {comparison.points} of them at t = {times}"
    between = f"div v has a standard deviation of {truth.spread:.3g} between points"
    yield f"on {comparison.device} in {comparison.dtype}; {between}"
    yield f"truth: {truth.by} in float64, within {truth.check:.0e} of Exact() on {truth.checked_points} points"


def _table(comparison: Comparison) -> Iterator[str]:
    width = max(len(row.label) for row in comparison.rows) + 2
    fewer = any(row.points < comparison.points for row in comparison.rows)
    yield f"{'':{width}}{'':9}{'mean error':>21}{'':10}{'stated/':>9}{'evaluations':>19}{'KiB a point':>15}"
    yield (
        f"{'':{width}}{'products':>9}{'(bias)':>21}{'sd':>10}{'measured':>9}"
        f"{'forward':>12}{'+bwd':>12}{'forward':>9}{'+bwd':>9}" + ("  points" if fewer else "")
    )
    for row in comparison.rows:
        points = f"{row.points:8}" if fewer else ""
        yield (
            f"{row.label:{width}}{row.products:9}{_bias(row):>21}{_sd(row):>10}{_or_dash(row.accuracy.stated, 9, 2)}"
            f"{_spread(row.ratio, row.ratio_spread)}{_spread(row.training_ratio, row.training_ratio_spread)}"
            f"{row.memory / 1024:9.1f}{_or_dash(row.training_memory and row.training_memory / 1024, 9)}{points}"
        )


def _spread(ratio: float | None, spread: float | None) -> str:
    """A ratio with how much it differs from turn to turn."""
    if ratio is None:
        return f"{'-':>12}"
    error = "" if spread is None else f" ± {spread:.1f}"
    return f"{f'{ratio:.1f}{error}':>12}"


def _bias(row: Row) -> str:
    found = row.accuracy
    if row.exact:
        return "exact"
    error = f" ± {found.bias_error:.1g}" if found.draws > 1 else ""
    return f"{found.bias:+.2g}{error}" + ("" if found.unbiased else " BIASED")


def _sd(row: Row) -> str:
    return "0" if row.exact else f"{row.accuracy.sd:.3g}"


def _or_dash(value: float | None, width: int, digits: int = 1) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def _left_out(comparison: Comparison) -> Iterator[str]:
    if comparison.chosen or comparison.configured:
        yield ""
    if comparison.configured:
        yield f"the flow itself has {comparison.configured}"
    if comparison.chosen:
        yield from (f"{name} is {label} here" for name, label in comparison.chosen.items())
    if comparison.not_applicable:
        yield ""
        yield "Not applicable:"
        for name, reason in comparison.not_applicable.items():
            yield f"  {name}: {reason.partition(';')[0]}"


def _advice(advice: Advice) -> Iterator[str]:
    yield f"For training    {advice.training}: {advice.training_reason}"
    yield f"For evaluation  {advice.evaluation}: {advice.evaluation_reason}"
