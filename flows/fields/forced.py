"""Fields that are driven by an input u(t), given as samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flows.arguments import checked
from flows.checks import as_shape, check_number
from flows.errors import InvalidValueError
from flows.fields.base import Field
from flows.vector_field import BoundField, bind

INTERPOLATIONS = ("linear", "cubic", "hold")
SLACK = 8  # roundings of a time by which inputs may end too early


@checked
class Forced(Field):
    r"""v(t, x; u(t)): a field driven by an input that is known from samples.

    The samples u_k at times t_k are interpolated:

    - `"linear"`: straight lines between them; the slope changes at the samples.
    - `"cubic"`: cubics with values u_k and slopes by the three-point formula (those of `numpy.gradient` with
      `edge_order=2`); continuously differentiable.
    - `"hold"`: u(t) = u_k from t_k until the next sample, where it jumps.

    The solver steps onto the samples where the input or a derivative of it jumps, because an error estimate across them
    cannot be trusted. A batch is solved in steps that all share, so series that are sampled at times of their own step
    onto the samples of all of them; with many such series, "cubic" and `stops=False` are faster.

    The inner field takes u(t), of shape (B, k), as its context: a network such as `MLP` joins it to x, and `Physics`
    hands it to its equations. The divergence is in closed form where that of the inner field is.

    Inputs of each series come in the context, (B, S, 1 + k): the times of the S samples in column 0 and the inputs in
    the others. Series with fewer samples repeat their last row. One signal for all can be given as `times` and
    `values` instead; a context is then passed on beside it. Gradients reach `values` and the context.

    Args:
        field: takes a context of shape (k,), or makes such a field from `event_shape` and `context_shape`, as a class
            or `functools.partial` does (`_partial_: true` in a yaml).
        interpolation: see above.
        times, values: (S,), increasing, and (S, k) or (S,): one signal for all samples.
        jumps: further times at which the field jumps.
        stops: whether solves step onto the samples where the input or a derivative of it jumps.
        extrapolate: whether the first and the last value hold beyond the samples. Otherwise a solve that goes beyond
            them is refused.
        event_shape: shape of a point, where `field` does not state it.
        context_shape: (S, 1 + k); with `times`, that of the context which is passed on, or `None`.

    Raises:
        InvalidValueError: the interpolation is unknown, or shapes do not fit.

    Example:
        ```python
        import torch

        import flows

        network = flows.fields.MLP(event_shape=(2,), context_shape=(1,))
        pump = flows.fields.Forced(network, "hold", times=[0.0, 1.0, 2.0], values=[0.0, 5.0, 0.0])
        flows.NeuralODE(pump).trajectory(torch.zeros(1, 2), [0.0, 0.5, 2.0]).states.shape  # (1, 3, 2)
        ```
    """

    signal: Tensor | None  # (S, 1 + k), one for all

    def __init__(
        self,
        field: Callable[..., Any],
        interpolation: Literal["linear", "cubic", "hold"] = "linear",
        times: Tensor | Sequence[float] | None = None,
        values: Tensor | Sequence[Any] | None = None,
        jumps: Sequence[float] = (),
        stops: bool = True,
        extrapolate: bool = False,
        event_shape: int | Sequence[int] | None = None,
        context_shape: int | Sequence[int] | None = None,
    ) -> None:
        if interpolation not in INTERPOLATIONS:
            raise InvalidValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}")
        if (times is None) != (values is None):
            raise InvalidValueError("times and values of a signal go together; give both, or the inputs as a context")
        shared = None if times is None or values is None else _table(times, values)
        inner = _context_of(field, shared, context_shape)
        made = field if isinstance(field, nn.Module) else field(event_shape=event_shape, context_shape=inner)
        super().__init__(bind(made, event_shape=event_shape).event_shape, context_shape)
        view = bind(made, event_shape=self.event_shape)
        if not view.takes_context or view.context_shape not in (None, inner):
            raise InvalidValueError(
                f"the inner field must take the {inner[0]} inputs as its context, with context_shape={inner}, got "
                f"{view.name} with {view.context_shape}"
            )
        self.field = made
        self.interpolation = interpolation
        self.stated_jumps = tuple(float(jump) for jump in jumps)
        for jump in self.stated_jumps:
            check_number("jumps", jump)
        self.stops = stops
        self.extrapolate = extrapolate
        self.register_buffer("signal", shared)
        if shared is not None and not torch.empty(()).is_meta:  # shapes alone are wanted there
            self.bind().check_times(None, None)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.bind(context)(t, x)

    def bind(self, context: Tensor | None = None) -> BoundField:
        return _BoundForced(self, context)

    @property
    def takes_inputs(self) -> bool:
        return self.signal is None

    @property
    def divergence_cost(self) -> int:
        return bind(self.field, event_shape=self.event_shape).divergence_cost


class _BoundForced(BoundField):
    """A forced field at work, with the signals of one batch."""

    def __init__(self, field: Forced, context: Tensor | None, inner: BoundField | None = None) -> None:
        super().__init__(field, context)
        self.forced = field
        self.inner = bind(field.field, None, self.event_shape) if inner is None else inner
        self.value_and_divergence = self._driven(self.inner.value_and_divergence)
        self.value_divergence_and_products = self._driven(self.inner.value_divergence_and_products)
        self.potential = self._driven(self.inner.potential)
        self.correction = self._driven(self.inner.correction)
        self.receptive_radius = self.inner.receptive_radius
        signal = field.signal
        table, self.static = (context, None) if signal is None else (signal[None], context)
        self.samples = None
        if table is not None:
            expected = "(B, S, 1 + k)" if field.context_shape is None else f"(B, S, {field.context_shape[-1]})"
            if table.ndim != 3 or (signal is None and table.shape[-1] != (field.context_shape or (0, 0))[-1]):
                raise InvalidValueError(
                    f"Forced takes the inputs as a context of shape {expected}, times in column 0 and inputs in the "
                    f"others, got {tuple(table.shape)}"
                )
            self.samples = Samples(table, field.interpolation, field.extrapolate)

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        if self._evaluation is None:
            return self._velocity(t, x)
        return self._evaluation(self._velocity, t, x)

    def in_units(self, transform: Any) -> BoundField:
        return _BoundForced(self.forced, self.context, self.inner.in_units(transform))

    def fresh(self) -> BoundField:
        renewed = _BoundForced(self.forced, self.context, self.inner.fresh())
        if self._evaluation is not None and renewed._evaluation is not None:
            renewed._evaluation.buffers = self._evaluation.buffers
        return renewed

    @property
    def jumps(self) -> Tensor:  # (J,) or (B, J)
        stated = [*self.forced.stated_jumps, *self.inner.jumps, *self.found_jumps]
        stated = torch.tensor(stated, dtype=torch.float64)
        if self.samples is None or not self.forced.stops:
            return stated
        own = self.samples.jumps()
        return torch.cat([own, stated.expand(len(own), -1)], 1)

    def suits_contexts(self, shape: Sequence[int]) -> bool:
        """Whether contexts have the columns that it was built for; the number of samples may be any."""
        if self.forced.signal is not None or self.context_shape is None:
            return super().suits_contexts(shape)
        return len(shape) == 2 and shape[1] == self.context_shape[1]

    def check_times(self, first: Tensor | float | None, last: Tensor | float | None) -> None:
        if self.samples is not None:
            self.samples.check(first, last)

    def _velocity(self, t: Tensor, x: Tensor) -> Tensor:
        return self.inner.at(t, x, self._inputs(t, x))

    def _inputs(self, t: Tensor, x: Tensor) -> Tensor:  # (B, k)
        if self.samples is None:
            raise InvalidValueError(
                "Forced needs its inputs: a context of shape (B, S, 1 + k), with the times of samples in column 0, or "
                "Forced(times=..., values=...)"
            )
        inputs = self.samples(t).expand(len(x), -1)
        return inputs if self.static is None else torch.cat([inputs, self.static.flatten(1).to(inputs)], 1)

    def _driven(self, function: Callable[..., Any] | None) -> Callable[..., Any] | None:
        """A closed form of the inner field, with the inputs at the time as its last argument."""
        if function is None:
            return None
        return lambda t, x, *more: function(t, x, *more, self._inputs(t, x))


class Samples:
    """Interpolation of signals u(t), one for all samples of a batch or one for each.

    Args:
        table: (R, S, 1 + k) with R = 1 or B; times in column 0. Rows at the end may repeat the last time.
        interpolation: see `Forced`.
        extrapolate: whether the end values hold beyond the samples.
    """

    def __init__(self, table: Tensor, interpolation: str, extrapolate: bool) -> None:
        self.table = table
        self.times = table[..., 0].detach().contiguous()
        self.interpolation = interpolation
        self.extrapolate = extrapolate
        self.last = (self.times < self.times[:, -1:]).sum(1, keepdim=True)  # (R, 1), where each row has its last time
        self._slopes: tuple[bool, Tensor] | None = None  # with the grad mode that they were computed in

    @property
    def values(self) -> Tensor:  # (R, S, k)
        """The inputs; sliced where they are used, so that autograd records it."""
        return self.table[..., 1:]

    def __call__(self, t: Tensor) -> Tensor:  # 0-d or (B,) -> (R or B, k)
        at = t.reshape(-1, 1).to(self.times.dtype)
        rows = max(len(at), len(self.times))
        at, times, last = at.expand(rows, 1), self.times.expand(rows, -1), self.last.expand(rows, 1)
        if self.extrapolate:
            at = torch.minimum(torch.maximum(at, times[:, :1]), times[:, -1:])
        if len(self.times) == 1:
            place = torch.searchsorted(self.times[0], at.detach().contiguous(), right=True) - 1
        else:
            place = torch.searchsorted(times, at.detach().contiguous(), right=True) - 1
        if self.interpolation == "hold":
            return self._pick(self.values, torch.minimum(place.clamp(min=0), last))
        place = torch.minimum(place.clamp(min=0), (last - 1).clamp(min=0))
        t0, t1 = times.gather(1, place), times.gather(1, place + 1)
        u0, u1 = self._pick(self.values, place), self._pick(self.values, place + 1)
        length = t1 - t0
        share = (at - t0) / length
        if self.interpolation == "linear":
            return torch.lerp(u0, u1, share)
        m0, m1 = (length * self._pick(self._all_slopes(), one) for one in (place, place + 1))
        rest = 1 - share
        return rest**2 * ((1 + 2 * share) * u0 + share * m0) + share**2 * ((3 - 2 * share) * u1 - rest * m1)

    def jumps(self) -> Tensor:  # (R, J), in float64
        """Where the signal or a derivative jumps; rows with fewer of them repeat their first time."""
        times = self.times.to("cpu", torch.float64)
        first = times[:, :1]
        values = self.values.detach().to("cpu", torch.float64)
        ends = first[:, :0]
        if self.interpolation == "hold":
            found = times[:, 1:].where((values.diff(dim=1) != 0).any(-1), first)
        elif self.interpolation == "linear":
            lengths = times.diff(dim=1)[..., None]
            secants = values.diff(dim=1) / lengths.where(lengths > 0, torch.ones_like(lengths))
            found = times[:, 1:-1].where((secants.diff(dim=1) != 0).any(-1), first)
        else:
            found = times[:, 1:-1]
        if self.extrapolate and self.interpolation != "hold":
            ends = torch.cat([first, times[:, -1:]], 1)
        return torch.cat([found[:, (found != first).any(0)], ends], 1)

    def check(self, first: Tensor | float | None, last: Tensor | float | None) -> None:
        """Refuse samples that do not increase, are not finite, or end before a solve from `first` to `last` does.

        Raises:
            InvalidValueError: names the row.
        """
        times = self.times.to("cpu", torch.float64)
        self._check_samples(times)
        if self.extrapolate or first is None or last is None:
            return
        slack = SLACK * torch.finfo(self.times.dtype).eps * times.abs().amax(1)
        start, end = (torch.as_tensor(time, dtype=torch.float64, device="cpu").reshape(-1) for time in (first, last))
        start, end = torch.minimum(start, end), torch.maximum(start, end)
        cure = (
            "bring samples for the whole solve, leave those times out, or set extrapolate=True, which holds the value"
        )
        for late, word, bound, wanted in (
            (times[:, 0] > start + slack, "begin at", times[:, 0], start),
            (times[:, -1] < end - slack, "end at", times[:, -1], end),
        ):
            if bool(late.any()):
                row = int(late.nonzero()[0])
                of_row = f" of row {row}" if len(times) > 1 else ""
                raise InvalidValueError(
                    f"the inputs{of_row} {word} t = {float(bound.expand(len(late))[row]):g}, and states are wanted "
                    f"{'from' if word == 'begin at' else 'until'} t = {float(wanted.expand(len(late))[row]):g}; {cure}"
                )

    def _check_samples(self, times: Tensor) -> None:
        place = torch.arange(times.shape[1])
        steps = times.diff(dim=1)
        wrong = (steps < 0) | ((steps == 0) & (place[1:] <= self.last.cpu()))
        few = self.last.cpu()[:, 0] < (0 if self.interpolation == "hold" else 1)
        infinite = ~(times.isfinite().all(1) & self.values.detach().isfinite().flatten(1).all(1).cpu())
        for bad, what in (
            (infinite, "hold NaN or infinite values; fill them in, or leave those samples out"),
            (wrong.any(1), "have times that do not increase; sort them, one sample for each time"),
            (few, f"are a single sample; {self.interpolation} interpolation needs two, interpolation='hold' one"),
        ):
            if bool(bad.any()):
                row = f" of row {int(bad.nonzero()[0])}" if len(times) > 1 else ""
                raise InvalidValueError(f"the inputs{row} {what}")

    def _pick(self, table: Tensor, place: Tensor) -> Tensor:  # (R, S, k) and (N, 1) -> (N, k)
        wide = table.expand(len(place), -1, -1)
        return wide.gather(1, place[..., None].expand(-1, 1, wide.shape[-1])).squeeze(1)

    def _all_slopes(self) -> Tensor:
        recording = torch.is_grad_enabled()
        if self._slopes is None or (recording and not self._slopes[0]):
            self._slopes = recording, self._three_point_slopes()
        return self._slopes[1]

    def _three_point_slopes(self) -> Tensor:  # (R, S, k)
        """Slopes at the samples by the three-point formula."""
        lengths = self.times.diff(dim=1)[..., None]
        lengths = lengths.where(lengths > 0, torch.ones_like(lengths))  # rows that repeat their last sample
        secants = self.values.diff(dim=1) / lengths
        if secants.shape[1] == 1:
            return secants.expand(-1, 2, -1)
        left, right = lengths[:, :-1], lengths[:, 1:]
        before, after = secants[:, :-1], secants[:, 1:]
        inner = (left * after + right * before) / (left + right)
        first = before[:, :1] + (before - after)[:, :1] * left[:, :1] / (left + right)[:, :1]
        ends = after + (after - before) * right / (left + right)  # if the samples ended there
        place = torch.arange(self.times.shape[1], device=self.times.device)[None, :, None]
        last = self.last[..., None]
        slopes = torch.cat([first, inner, ends[:, -1:]], 1)
        slopes = torch.cat([secants[:, :1], secants[:, :1], ends], 1).where(place == last, slopes)
        return slopes.where((last > 1) | (place > 0), secants[:, :1])


def _table(times: Tensor | Sequence[float], values: Tensor | Sequence[Any]) -> Tensor:  # (S, 1 + k)
    """The samples of one signal."""
    t, u = (given if isinstance(given, Tensor) else torch.tensor(given, device="cpu") for given in (times, values))
    u = u[:, None] if u.ndim == 1 else u
    if t.ndim != 1 or u.ndim != 2 or len(t) != len(u) or not len(t):
        raise InvalidValueError(
            f"a signal needs times of shape (S,) and values of shape (S, k), got {tuple(t.shape)} and {tuple(u.shape)}"
        )
    dtype = u.dtype if u.is_floating_point() else torch.get_default_dtype()
    return torch.cat([t.to(dtype)[:, None], u.to(dtype)], 1)


def _context_of(
    field: Callable[..., Any], shared: Tensor | None, context_shape: int | Sequence[int] | None
) -> tuple[int, ...]:
    """The shape of what the inner field takes."""
    stated = None if context_shape is None else as_shape("context_shape", context_shape)
    if shared is None:
        if stated is None or len(stated) != 2 or stated[1] < 2:
            raise InvalidValueError(
                "Forced takes the inputs of each sample as a context of shape (S, 1 + k): pass that as context_shape, "
                f"or one signal for all as times and values; got context_shape={stated}"
            )
        return (stated[1] - 1,)
    return (shared.shape[1] - 1 + (0 if stated is None else math.prod(stated)),)
