"""The points at which estimators are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flows.errors import InvalidValueError
from flows.models.cnf import CNF
from flows.vector_field import BoundField, bind


@dataclass(frozen=True)
class Trajectory:
    """The same points at several times."""

    times: Tensor  # (T,)
    x: Tensor  # (T, n, *event), flow space
    context: Tensor | None = None  # (n, *context)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one point."""
        return tuple(self.x.shape[2:])

    def bind(self, field: Callable[..., Tensor]) -> BoundField:
        """The field at the contexts of these points."""
        return bind(field, self.context, self.event_shape)

    def first(self, num_points: int) -> Trajectory:
        """Its first `num_points` points."""
        context = None if self.context is None else self.context[:num_points]
        return replace(self, x=self.x[:, :num_points], context=context)

    def at(self, index: int) -> Trajectory:
        """One of its times."""
        return replace(self, times=self.times[index : index + 1], x=self.x[index : index + 1])

    def double(self) -> Trajectory:
        """In float64."""
        context = self.context
        if context is not None and context.is_floating_point():
            context = context.double()
        return Trajectory(self.times.double(), self.x.double(), context)


def trajectory_of(
    flow: CNF,
    x: Tensor,  # (n, *event), data space
    times: Sequence[float],
    context: Tensor | None = None,  # (n, *context)
    generator: torch.Generator | None = None,  # for the noise of a transform that dequantises
) -> Trajectory:
    """Carry points of the data back along the flow, to each of `times`.

    Raises:
        ValueError: no times, or times outside of [0, 1].
    """
    times = sorted({float(t) for t in times}, reverse=True)
    if not times or not 0 <= times[-1] <= times[0] <= 1:
        raise InvalidValueError(f"times must be one or more numbers from 0 (noise) to 1 (data), got {times}")
    with torch.no_grad():
        states = [flow.to_flow_space(x, context, generator)]
        for start, end in zip([1.0, *times], times, strict=False):
            here = states[-1]
            states.append(here if start == end else flow.transport(here, (start, end), context, log_density=False).x)
    return Trajectory(states[0].new_tensor(times), torch.stack(states[1:]), context)
