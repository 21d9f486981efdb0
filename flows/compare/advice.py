"""Which estimator to use, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flows.arguments import checked
from flows.compare.measure import Comparison, Row
from flows.errors import InvalidValueError


@dataclass(frozen=True)
class Advice:
    """The estimators to train and to evaluate with.

    Together they read as a sentence: `Analytic: exact at 1.1 field evaluations`."""

    training: str
    training_reason: str
    evaluation: str
    evaluation_reason: str


@checked
def advise(comparison: Comparison, affordable: float = 100.0) -> Advice:
    r"""Recommend estimators, among those without a bias.

    *Training*: the mean over a minibatch has the variance (s² + σ²)/B. Here s² is the variance of the divergence
    between points and σ² that of the estimator. In a given time, B is inversely proportional to the time τ of an
    evaluation, forward and backward. So the least τ(s² + σ²) is recommended: removing noise pays only while the noise
    is large beside the variation between points.

    *Evaluation*: the points are given, so noise is an error of the result. The cheapest exact estimator is recommended
    if it costs at most `affordable` bare evaluations of the field, otherwise the least noisy one within that cost.

    Times are uncertain, so figures within a quarter of each other count as equal. Then fewer products decide.

    Raises:
        ValueError: every estimator is biased.
    """
    rows = [row for row in comparison.rows if row.accuracy.unbiased]
    if not rows:
        raise InvalidValueError("every estimator measured is biased on this field; add Exact() to them")
    if comparison.truth.jacobian_norm == 0:
        nothing = "the Jacobian of this field is zero everywhere (untrained?), so every estimator is right"
        training, evaluation = _least(rows, _training_time), _least(rows, lambda row: row.ratio)
        return Advice(training.label, nothing, evaluation.label, nothing)
    spread = comparison.truth.spread**2
    training = _least(rows, lambda row: _training_time(row) * (spread + _variance(row)))
    within = [row for row in rows if row.ratio <= affordable] or [_least(rows, lambda row: row.ratio)]
    exact = [row for row in within if row.exact]
    evaluation = _least(exact, lambda row: row.ratio) if exact else min(within, key=_variance)
    return Advice(
        training.label,
        _reason(training, training.training_ratio, " forward and backward", comparison),
        evaluation.label,
        _reason(evaluation, evaluation.ratio, "", comparison),
    )


def _least(rows: Sequence[Row], figure: Callable[[Row], float]) -> Row:
    figures = [figure(row) for row in rows]
    return min(
        (row for row, value in zip(rows, figures, strict=True) if value <= 1.25 * min(figures)),
        key=lambda row: (row.products, figure(row)),
    )


def _reason(row: Row, ratio: float | None, where: str, comparison: Comparison) -> str:
    cost = f"{row.products} product{'s' * (row.products > 1)}, " if row.products else ""
    evaluations = f"{ratio:.1f} field evaluations{where}"
    if row.exact:
        return f"exact at {cost}{evaluations}"
    spread = comparison.truth.spread
    noise = f"a standard deviation of {row.accuracy.sd:.2g}, against {spread:.2g} between points"
    exact = [other for other in comparison.rows if other.exact]
    text = f"{noise}, at {cost}{evaluations}"
    if exact:
        cheapest = min(exact, key=lambda other: other.ratio if not where else _training_time(other))
        price = cheapest.ratio if not where else cheapest.training_ratio
        text += f"; {cheapest.label} is exact" + (f" at {price:.1f}" if price is not None else ", but too expensive")
    return text


def _training_time(row: Row) -> float:
    return float("inf") if row.training_ratio is None else row.training_ratio


def _variance(row: Row) -> float:
    return 0.0 if row.exact else row.accuracy.rmse**2
