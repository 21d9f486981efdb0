"""Derivative matching: fit a neural ODE to series without a solve."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flows.arguments import checked
from flows.bases import Normal
from flows.checks import whole_number
from flows.datasets import Batch, Dataset, Series
from flows.errors import InvalidValueError
from flows.models.examination import examine
from flows.models.neural_ode import NeuralODE
from flows.models.precision import suitable_context
from flows.objectives.base import LossOutput, Objective
from flows.objectives.trajectories import check_series, filled, in_field_space, like, series_of, smoothed
from flows.shares import own_part
from flows.vector_field import checked_value

# Gauss-Legendre nodes and weights on [0, 1]: exact for polynomials of degree five.
NODES = (0.5 - math.sqrt(0.15), 0.5, 0.5 + math.sqrt(0.15))
WEIGHTS = (5 / 18, 8 / 18, 5 / 18)
OWN_TIMES = "derivative matching takes the field at a time of its own for each state"


@checked
@dataclass(frozen=True)
class DerivativeMatching(Objective):
    """The distance of increments of the data to integrals of the field along the data.

    With y = transform(x) and ỹ a smooth curve through the observations, the loss is the mean over windows of

        ‖ (ỹ(t + w) − ỹ(t) − ∫ v(s, ỹ(s)) ds) / w ‖² / d,

    where the integral from t to t + w is a sum over three Gauss nodes in each interval. This is the weak form of the
    ODE with a constant test function: no derivative of the data is compared, so noise σ enters as σ√2 / w. It is to
    trajectory matching what flow matching is to maximum likelihood: a step costs three evaluations of the field at each
    observation and no solve, and its result is where trajectory matching starts from. What is left is a bias, because
    the field is taken at interpolated, noisy states. [Brunel 2008; Messenger & Bortz 2021, arXiv:2007.02848]

    The curve is cubic in each interval; at the observations it has the values and slopes of local parabolas. Missing
    values are first interpolated between the observed ones next to them. Windows of an entry of the state begin and end
    where it was observed, so that no interpolated value is a target. After the last observation of an entry the state
    is unknown, and windows do not go there. A series shorter than a window is one window.

    ```python
    import torch
    import flows

    ode = flows.NeuralODE(flows.fields.MLP((2,), num_frequencies=0))
    data = flows.datasets.Spiral(num_series=20)
    batch = next(data.train_stream(8, torch.Generator().manual_seed(0)))
    flows.objectives.DerivativeMatching()(ode, batch).loss.backward()
    ```

    Args:
        window: w, in intervals between observations; a window goes on until the next observed value. Longer windows
            average noise, and blur fast changes.
        smoothing: the number of neighbouring observations to which each parabola is fitted; 3 (default) goes through
            them, more average noise.

    Raises:
        InvalidValueError: a number is no whole number in its range; `check`: an entry is observed in no training series
            after its first state.
    """

    recommended: ClassVar[Mapping[str, Any]] = {"batch_size": 64, "learning_rate": 2e-3, "warmup_steps": 20}
    solves: ClassVar[bool] = False
    shares: ClassVar[bool] = True
    window: int = 3
    smoothing: int = 3

    def __post_init__(self) -> None:
        whole_number("window", self.window)
        whole_number("smoothing", self.smoothing, 3)

    def check(self, model: nn.Module, dataset: Dataset) -> None:
        super().check(model, dataset)
        check_series(model, dataset)
        assert isinstance(dataset, Series)  # as checked
        batch = dataset.part("train")
        if not bool(windows(batch.observed & like(batch.mask, batch.x), self.window)[1].any()):
            raise InvalidValueError(
                f"no training series of {dataset.name!r} has all entries of the state observed after its first time, "
                "so that derivative matching has nothing to compare; use objective=trajectory_matching"
            )

    def __call__(self, model: NeuralODE, batch: Batch, generator: torch.Generator | None = None) -> LossOutput:
        series = series_of(batch)
        ends, counts = windows(series.observed & like(series.mask, series.x), self.window)
        number = counts.sum().clamp(min=1)
        rows, factor = own_part(len(series))
        if rows is not None:  # the mean is over all windows of the batch
            series, ends, counts = series[rows], ends[rows], counts[rows]
        times, mask = series.times, series.mask
        with torch.no_grad():
            y = filled(in_field_space(model, series.x), times, series.observed)  # (B, T, *event)
            y, slopes = smoothed(y, times, mask, self.smoothing)
            steps = like(times.diff(dim=1), y).to(y)  # 0 in the padding
            states = torch.stack([_cubic(node, steps, y, slopes) for node in NODES])  # (3, B, T − 1, *event)
            moments = torch.stack([times[:, :-1] + node * times.diff(dim=1) for node in NODES]).to(y)
        values = _velocities(model, moments, states, series.context)
        weights = values.new_tensor(WEIGHTS).view(-1, *[1] * (values.ndim - 1))
        integral = torch.nn.functional.pad(
            (steps * (weights * values).sum(0)).cumsum(1), (0, 0) * (y.ndim - 2) + (1, 0)
        )  # from the first time to each
        t = like(times, y).expand(y.shape)
        span = (t.gather(1, ends) - t).where(counts, 1)
        path = y - integral  # constant along a solution
        squares = ((path.gather(1, ends) - path) / span.to(y)).square()
        loss = factor * squares.where(counts, 0).sum() / number
        return LossOutput(loss, {"derivative_error": loss.detach()})


def windows(
    observed: Tensor,  # (B, T, *event)
    width: int,  # in intervals
) -> tuple[Tensor, Tensor]:  # (B, T, *event) each
    """Where the window that begins at each value ends, and which values begin one.

    A window ends at the first observed value of the same entry at least `width` intervals later, and none goes beyond
    the last time to which all entries were observed. Where no window of an entry fits, its only one is the whole.
    """
    length = observed.shape[1]
    index = torch.arange(length, device=observed.device).view(1, -1, *[1] * (observed.ndim - 2)).expand_as(observed)
    known_until = index.where(observed, -1).amax(1, keepdim=True).flatten(2).amin(2)  # (B, 1)
    observed = observed & (index <= known_until.view(-1, *[1] * (observed.ndim - 1)))
    first = index.where(observed, length - 1).amin(1, keepdim=True)
    last = index.where(observed, 0).amax(1, keepdim=True)
    following = index.where(observed, length).flip(1).cummin(1).values.flip(1)
    none = torch.full_like(following[:, :width], length)
    ends = torch.cat([following[:, width:], none], 1)
    begins = observed & (ends < length)
    whole = ~begins.any(1, keepdim=True) & (index == first) & (last > first)
    return torch.where(whole, last, ends.where(begins, 0)), begins | whole


def _velocities(
    model: NeuralODE,
    t: Tensor,  # (K, B, T)
    states: Tensor,  # (K, B, T, *event), as the field sees them
    context: Tensor | None,  # (B, *context)
) -> Tensor:  # (K, B, T, *event)
    """The field at all states, in one evaluation."""
    if context is not None:
        shape = (*t.shape, *context.shape[1:])
        context = suitable_context(context, model.bind())[None, :, None].expand(shape).flatten(0, 2)
    field, x = model.bind(context), states.flatten(0, 2)
    examine(Normal(model.event_shape).to(x.device, x.dtype), field, x, matching=True, own_times=OWN_TIMES)
    return checked_value(field(t.flatten(), x), x).view_as(states)


def _cubic(
    share: float,
    length: Tensor,  # (B, T − 1, 1, ...)
    y: Tensor,  # (B, T, *event)
    slopes: Tensor,  # (B, T, *event)
) -> Tensor:  # (B, T − 1, *event)
    """The cubic with these values and slopes at both ends of each interval, at a share of each."""
    s = share
    ends = (1 + 2 * s) * (1 - s) ** 2 * y[:, :-1] + s**2 * (3 - 2 * s) * y[:, 1:]
    return ends + length * (s * (1 - s) ** 2 * slopes[:, :-1] - s**2 * (1 - s) * slopes[:, 1:])
