"""Trajectory matching: fit a neural ODE to series by solving it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from flows.arguments import checked
from flows.checks import check_number, whole_number
from flows.datasets import Batch, Dataset, SeriesBatch
from flows.errors import InvalidValueError
from flows.models.neural_ode import NeuralODE
from flows.models.steady import check_steady
from flows.objectives.base import LossOutput, Objective, active_costs, regularized
from flows.objectives.trajectories import (
    Segments,
    check_series,
    cut,
    filled,
    first_part,
    in_field_space,
    series_of,
    smoothed,
)
from flows.path_costs import PathCost
from flows.shares import own_part


@checked
@dataclass(frozen=True)
class TrajectoryMatching(Objective):
    """The distance of predicted states to observed ones.

    Each series is solved from its first state and compared at all of its later times. With y = transform(x), the loss
    is the mean over observed values of

    - `"mse"`: (y_predicted − y)²,
    - `"mae"`: |y_predicted − y|, which outliers move less, or
    - `"gaussian"`: −log N(y; y_predicted, σ²), where σ is the model's noise, which is fitted too.

    Missing values are left out. A training step takes one solve for the whole batch.

    The loss of long or chaotic series has many local minima, and two ways lead past them. A growing `horizon`, over
    several stages, fits the beginning of each series first. Multiple shooting (`segment_length`) cuts each series into
    pieces and solves each from a state of the data, so that errors cannot grow over the whole series; `continuity`
    pulls the end of each piece to the start of the next. Noise in the states where pieces start remains in the fit:
    `smoothing` averages it, and a last stage on whole series removes it.
    [Bock 1983; Turan & Jäschke 2021, arXiv:2109.06786]

    ```python
    import torch
    import flows

    ode = flows.NeuralODE(flows.fields.MLP((2,), num_frequencies=0))
    data = flows.datasets.Spiral(num_series=20)
    batch = next(data.train_stream(8, torch.Generator().manual_seed(0)))
    output = flows.objectives.TrajectoryMatching(segment_length=5, continuity=1.0)(ode, batch)
    output.loss, output.metrics["mse"]  # the second in the units of the data
    ```

    Args:
        loss: see above; "gaussian" needs a model with noise.
        horizon: the share of each series in time, from its start, that is predicted; 1.0 (default): the whole.
        segment_length: the number of intervals that pieces of a series have; `None` (default): whole series.
        continuity: λ >= 0 of λ × the mean square distance from the end of a piece to the start of the next, in y.
        smoothing: the number of neighbouring observations to which a parabola is fitted for the state where a piece
            starts; 1 (default): the observation itself. The first piece starts at the first observation.
        regularizers: path costs, as in `MaximumLikelihood`.

    Raises:
        InvalidValueError: a number is out of range, or a setting of segments is set without them.
    """

    shares: ClassVar[bool] = True
    recommended: ClassVar[Mapping[str, Any]] = {"batch_size": 64, "learning_rate": 2e-3, "warmup_steps": 20}
    loss: Literal["mse", "mae", "gaussian"] = "mse"
    horizon: float = 1.0
    segment_length: int | None = None
    continuity: float = 0.0
    smoothing: int = 1
    regularizers: Sequence[PathCost] | Mapping[str, PathCost] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "regularizers", active_costs(self.regularizers))
        check_number("horizon", self.horizon, above=0, at_most=1, otherwise="it is a share of each series")
        if self.segment_length is not None:
            whole_number("segment_length", self.segment_length, otherwise="None takes whole series")
        check_number("continuity", self.continuity, at_least=0)
        whole_number("smoothing", self.smoothing)
        if self.smoothing == 2:
            raise InvalidValueError("smoothing must be 1 (none) or >= 3, since two observations fit no parabola; got 2")
        for name, off in (("continuity", 0), ("smoothing", 1)):
            if self.segment_length is None and getattr(self, name) != off:
                raise InvalidValueError(f"{name} has no effect on whole series; set segment_length as well")

    def check(self, model: nn.Module, dataset: Dataset) -> None:
        super().check(model, dataset)
        ode = check_series(model, dataset)
        check_steady(ode.field)
        if self.loss == "gaussian" and ode.noise is None:
            raise InvalidValueError(
                "loss='gaussian' needs a model that knows noise: NeuralODE(..., noise=0.1), or model.noise=0.1"
            )

    def divergence(self, flow: Any) -> None:
        """None: no divergence is taken."""

    def __call__(self, model: NeuralODE, batch: Batch, generator: torch.Generator | None = None) -> LossOutput:
        series, segments = series_of(batch), None
        rows, factor = own_part(len(series))
        if self.horizon < 1:
            series = first_part(series, self.horizon)
        starts = series.x[:, 0]
        if self.segment_length is not None:
            starts, segments = self._segments(series, self.segment_length)
            series = segments.batch
            rows = None if rows is None else segments.of_series(rows)
        costs = active_costs(self.regularizers)
        path = model.trajectory(starts, series.times, series.context, series.mask, False, costs, generator, rows)
        predicted = in_field_space(model, path.states)
        counts = series.observed.clone()
        counts[:, 0] = False  # where predictions start
        number, size = counts.sum().clamp(min=1), len(series)
        if rows is not None:  # the means are over the whole batch
            series, counts, starts = series[rows], counts[rows], starts[rows]

        def mean(values: Tensor) -> Tensor:
            return factor * values.where(counts, 0).sum() / number

        value = mean(LOSSES[self.loss](predicted - in_field_space(model, series.x), model))
        metrics = {"mse": mean((path.states.detach() - series.x).square())}  # in the units of the data
        if self.loss == "gaussian" and model.noise is not None:
            metrics["noise"] = model.noise.detach().square().mean().sqrt()
        if segments is not None and self.continuity:
            jumps = _jumps(predicted, in_field_space(model, starts[:, None])[:, 0], segments.joins[rows or slice(None)])
            jump = factor * jumps.sum() / (segments.joins > 0).sum().clamp(min=1)
            metrics["continuity"] = jump.detach()
            value = value + self.continuity * jump
        integrals = path.path_costs
        if rows is not None:
            integrals = {name: factor * len(cost) / size * cost for name, cost in integrals.items()}
        value, regular = regularized(value, costs, integrals)
        return LossOutput(value, metrics | regular, path.statistics)

    def _segments(self, series: SeriesBatch, length: int) -> tuple[Tensor, Segments]:
        """The states where pieces start, (S, *event), and the pieces."""
        segments = cut(series, length)
        states = series.x
        if self.smoothing > 1:
            states = smoothed(
                filled(series.x, series.times, series.observed), series.times, series.mask, self.smoothing
            )[0]
        return states[segments.rows, segments.columns], segments


def _jumps(
    predicted: Tensor,  # (S, K, *event)
    starts: Tensor,  # (S, *event)
    joins: Tensor,  # (S,), as in `Segments`
) -> Tensor:  # (S,)
    """The mean square distance from the end of each piece to the start of the next, 0 where none follows."""
    pieces = torch.arange(len(starts), device=starts.device)
    ends = predicted[pieces, joins]
    squares = (ends - starts.roll(-1, 0)).square()  # pieces of a series follow each other
    return squares.flatten(1).mean(1).where(joins > 0, 0)


def _gaussian(error: Tensor, model: NeuralODE) -> Tensor:
    assert model.log_noise is not None
    return 0.5 * (error / model.log_noise.exp()).square() + model.log_noise + 0.5 * math.log(2 * math.pi)


LOSSES = {
    "mse": lambda error, model: error.square(),
    "mae": lambda error, model: error.abs(),
    "gaussian": _gaussian,
}
