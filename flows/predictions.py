"""Predicted states of time series beside what was observed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flows.datasets.series.batches import SeriesBatch
from flows.datasets.series.dynamical_system import DynamicalSystem
from flows.datasets.series.series import Series
from flows.models.neural_ode import NeuralODE
from flows.progress import new_bar
from flows.shares import current_share
from flows.solvers import ODESolver, SolverStatistics


@dataclass(frozen=True)
class Mean:
    """The mean over all values of all series, with its standard error over series."""

    value: float  # NaN if there is no value
    standard_error: float  # NaN with fewer than two series

    @classmethod
    def of(
        cls,
        values: Tensor,  # (N, ...)
        counts: Tensor,  # (N, ...), bool: which values count
        series: Tensor | None = None,  # (N,), which series each row is a piece of
    ) -> Mean:
        """Divide the sum by the number; the standard error is that of a ratio of two means over series.

        Pieces of one series are not independent, so they count together. Where all are of the same, each counts.
        """
        sums = values.where(counts, 0.0).flatten(1).sum(1)
        numbers = counts.flatten(1).sum(1).double()
        labels, place = (None, None) if series is None else series.unique(return_inverse=True)
        if labels is not None and place is not None and len(labels) > 1:
            sums, numbers = (part.new_zeros(len(labels)).index_add(0, place, part) for part in (sums, numbers))
        sums, numbers = sums[numbers > 0], numbers[numbers > 0]
        if not len(sums):
            return cls(math.nan, math.nan)
        mean = sums.sum() / numbers.sum()
        if len(sums) < 2:
            return cls(float(mean), math.nan)
        spread = (sums - mean * numbers).square().sum() * len(sums) / (len(sums) - 1)
        return cls(float(mean), float(spread.sqrt() / numbers.sum()))

    def root(self) -> Mean:
        """The square root, for a mean of squares."""
        root = math.sqrt(self.value)
        return Mean(root, self.standard_error / (2 * root) if root > 0 else self.standard_error)


@dataclass(frozen=True)
class Predictions:
    """States that a model predicts from the first state of each series; in float64, on the CPU."""

    times: Tensor  # (N, T)
    x: Tensor  # (N, T, *event), observed
    observed: Tensor  # (N, T, *event), which values were
    mask: Tensor  # (N, T), which times belong to the series
    states: Tensor  # (N, T, *event), predicted
    scaled_error: Tensor  # (N, T, *event), predicted minus observed states as the field sees them
    solver_error: Tensor  # (M, T, *event), of the first M series; NaN where a tighter solve failed
    sd: Tensor | None  # (N, T, *event), of observations about the states; None: the model knows no noise
    noise: Tensor | None  # (*event), the same as the field sees it
    truth: Tensor | None  # (N, T, *event), the states without noise, if they are known and observations have it
    scale: Tensor  # (*event), standard deviation of the values of the training series
    series: Tensor  # (N,), which series of the dataset each row is a piece of
    span: float  # how long training series go on
    nfe: float  # evaluations of the field, the mean over the solves
    solver: ODESolver
    statistics: SolverStatistics = field(repr=False)  # of the largest solve

    @property
    def horizon(self) -> Tensor:  # (N, T)
        """The time since the start of each series."""
        return self.times - self.times[:, :1]

    def counts(self, region: str = "inside", of_truth: bool = False) -> Tensor:  # (N, T, *event), bool
        """Which values count: those observed after the first time.

        Args:
            region: `"inside"` or `"beyond"` the training span, or `"all"`.
            of_truth: count all states, also where nothing was observed.
        """
        times = self.mask.clone()
        times[:, 0] = False  # where predictions start
        within = self.horizon <= self.span * (1 + 1e-9)
        times = {"inside": times & within, "beyond": times & ~within, "all": times}[region]
        spread = times.view(*times.shape, *[1] * (self.states.ndim - 2)).expand(self.states.shape)
        return spread if of_truth else spread & self.observed

    @property
    def error(self) -> Tensor:  # (N, T, *event)
        """Predicted minus observed states."""
        return self.states - self.x

    def relative(self, error: Tensor) -> Tensor:
        """Errors in standard deviations of the values."""
        return error / self.scale

    @property
    def num_series(self) -> int:
        """The number of different series."""
        return len(self.series.unique())

    def mean(self, values: Tensor, region: str = "inside", of_truth: bool = False) -> Mean:
        """The mean of values (M, T, *event) of the first M series."""
        return Mean.of(values, self.counts(region, of_truth)[: len(values)], self.series[: len(values)])

    def nll(self) -> Tensor:  # (N, T, *event)
        """−log N(x; state, sd²) of each value, in nats."""
        assert self.sd is not None  # callers ask
        return 0.5 * (self.error / self.sd).square() + self.sd.log() + 0.5 * math.log(2 * math.pi)

    def covered(self, level: float) -> Tensor:  # (N, T, *event), 0 or 1
        """Whether each value lies in the central interval of that probability."""
        assert self.noise is not None  # callers ask
        width = float(torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)))
        return (self.scaled_error.abs() <= width * self.noise).double()


def model_device(model: nn.Module) -> torch.device:
    """Where the model computes."""
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def predictive_sd(
    model: NeuralODE,
    states: Tensor,  # (B, T, *event)
) -> Tensor | None:  # (B, T, *event)
    """The standard deviation of observations about states, in the units of the data; `None` without noise.

    It is half the width of what an interval of one standard deviation to each side becomes in data space.
    """
    if model.noise is None:
        return None
    with torch.no_grad():
        y = model.transform(states.flatten(0, 1))[0]
        high, low = (model.transform.inverse(y + sign * model.noise)[0] for sign in (1, -1))
    return ((high - low).abs() / 2).reshape(states.shape)


def predict(
    model: NeuralODE,
    dataset: Series,
    part: str,
    batch_size: int,
    max_series: int | None = None,
    checked: int = 0,
    until: float | None = None,
    progress: str | None = None,
    span: float | None = None,
) -> Predictions:
    """Predict the series of a part from their first states.

    Args:
        batch_size: series in one solve.
        max_series: the first series alone; None: all.
        checked: series whose solver error is computed, from the first on.
        until: leave out what comes later than so long after the start of each series.
        progress: title of a progress bar; None: none.
        span: how long the series go on that the model was trained on; None: those of the dataset.

    Raises:
        SolverError: a solve cannot go on.
    """
    batches, errors, paths, scaled, spreads, solves = [], [], [], [], [], []
    share = current_share()
    place = model_device(model)
    exact = model.dtype if place.type == "mps" else torch.float64
    total = dataset.num_test if part == "test" else dataset.num_validation
    total = total if max_series is None else min(total, max_series)
    done = 0
    with torch.no_grad(), new_bar(total=total, desc=progress, unit="series", disable=progress is None) as bar:
        for batch in _first(dataset, part, batch_size, total, place, exact):
            batch = batch if until is None else batch.until(until)
            for rows, check in _split(len(batch), checked - done):
                own = batch[rows]
                mine = None if share is None else share.rows(len(own))
                path = model.trajectory(own.x[:, 0], own.times, own.context, own.mask, check, rows=mine)
                states, error = path.states, path.solver_error
                if share is not None:
                    states = share.joined(states, len(own))
                    error = None if error is None else share.joined(error, len(own))
                batches.append(own)
                paths.append(states)
                solves.append((path.statistics, len(own)))
                scaled.append(_scaled(model, states) - _scaled(model, own.x))
                sd = predictive_sd(model, states)
                spreads += [] if sd is None else [sd]
                errors += [] if error is None else [error]
            done += len(batch)
            bar.update(len(batch))
    length = max(states.shape[1] for states in paths)
    states = _joined(paths, length)
    truth = dataset.true_states(part) if isinstance(dataset, DynamicalSystem) and dataset.noise > 0 else None
    scale = dataset.reference().double().std(0, correction=0)
    return Predictions(
        times=_joined([batch.times for batch in batches], length),
        x=_joined([batch.x for batch in batches], length),
        observed=_joined([batch.observed for batch in batches], length, end=False),
        mask=_joined([batch.mask for batch in batches], length, end=False),
        states=states,
        scaled_error=_joined(scaled, length),
        solver_error=_joined(errors, length) if errors else states[:0],
        sd=_joined(spreads, length) if spreads else None,
        noise=None if model.noise is None else model.noise.detach().double().cpu(),
        truth=None if truth is None else truth[:done, :length],
        scale=scale.where(scale > 0, 1.0),
        series=torch.tensor([dataset.examples[i].series for i in dataset.split[part][:done].tolist()]),
        span=dataset.training_span if span is None else span,
        nfe=sum(solve.nfe_forward * size for solve, size in solves) / done,
        solver=model.solver,
        statistics=max((solve for solve, _ in solves), key=lambda solve: solve.nfe_forward),
    )


def _first(
    dataset: Series, part: str, batch_size: int, total: int, device: torch.device, dtype: torch.dtype
) -> Iterator[SeriesBatch]:
    """The first series of a part, in batches."""
    stream = dataset.test_batches if part == "test" else dataset.validation_batches
    for batch in stream(batch_size, device, dtype):
        assert isinstance(batch, SeriesBatch)  # those of a `Series` are
        yield batch[:total]
        total -= len(batch)
        if total <= 0:
            return


def _split(size: int, checked: int) -> Iterator[tuple[slice, bool]]:
    """The rows of a batch that are solved with and without their solver error."""
    first = min(size, max(checked, 0))
    if first:
        yield slice(first), True
    if first < size:
        yield slice(first, None), False


def _scaled(model: NeuralODE, states: Tensor) -> Tensor:
    return model.transform(states.flatten(0, 1))[0].reshape(states.shape).double()


def _joined(tensors: list[Tensor], length: int, end: bool | None = None) -> Tensor:
    """Tables (B, T, ...) one after the other, each filled up to `length` with `end`, or with its last column."""
    longer = []
    for tensor in tensors:
        last = tensor[:, -1:] if end is None else torch.full_like(tensor[:, -1:], end)
        longer.append(torch.cat([tensor, last.expand(-1, length - tensor.shape[1], *tensor.shape[2:])], 1))
    joined = torch.cat(longer).cpu()
    return joined.double() if joined.is_floating_point() else joined
