"""Where the states of a solve are wanted: at times that all samples share, or at times of their own."""

from __future__ import annotations

import bisect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from flows.solvers.problem import RowEnds, State, rows_of
from flows.solvers.runge_kutta import Step, interpolate, interpolate_rows
from flows.solvers.tableaux import RungeKutta


class Outputs(ABC):
    """The outputs of one solve after its start, in the order in which its steps pass them.

    The steps of a solve give *pieces*: the states of one or more outputs. `join` puts them in one tensor with one value
    per output, and `arrange` gives that the shape of the solution. Gradients are cut into those of steps in between.
    """

    start: float
    end: float
    stops: tuple[float, ...] = ()  # where fixed steps end; empty: anywhere, and they interpolate
    ends: RowEnds | None = None  # where each sample has its last output, if not at `end`
    size: int  # the number of times, the first included

    @abstractmethod
    def as_tensor(self) -> Tensor:
        """All times, (T,) or (B, T), in float64."""

    @property
    def span(self) -> tuple[float, float]:
        """The first and the last time of the solve."""
        return self.start, self.end

    @abstractmethod
    def count(self, t1: float, position: int) -> int:
        """The number of outputs from `position` on that a step to `t1` covers. The step's end counts."""

    @abstractmethod
    def indices(self, position: int, count: int) -> Sequence[slice]:
        """Where the pieces of `count` outputs from `position` on are among all that are joined."""

    @abstractmethod
    def within(self, method: RungeKutta, step: Step, position: int, count: int) -> Sequence[State]:
        """The pieces of `count` outputs from `position` on, which lie in the step."""

    @abstractmethod
    def grid(self) -> tuple[Sequence[float], Callable[[State], State]]:
        """Times that hold all outputs, and what takes the joined outputs from the states there, (times, *component)."""

    def join(self, pieces: Sequence[State]) -> State:
        """All pieces in order; each component (outputs, *component)."""
        return tuple(torch.cat(component) for component in zip(*pieces, strict=True))

    @abstractmethod
    def spread(self, gradients: Sequence[Tensor | None], like: State) -> list[Tensor]:
        """Gradients of the joined outputs as those of the solution, with 0 for states that are no outputs.

        Args:
            gradients: (outputs, *component) each.
            like: the states of the solution.
        """

    @abstractmethod
    def arrange(self, start: State, joined: State) -> State:
        """The states of the solution, the first included; each component (T, *component)."""


class SharedTimes(Outputs):
    """Outputs at the same times for all samples.

    Args:
        times: strictly monotonic.
    """

    def __init__(self, times: tuple[float, ...]) -> None:
        self.times = self.stops = times
        self.start, self.end, self.size = times[0], times[-1], len(times)
        self._sign = math.copysign(1.0, self.end - self.start)
        self._later: Tensor | None = None  # the times after the first, on the device of the state

    def as_tensor(self) -> Tensor:
        return torch.tensor(self.times, dtype=torch.float64)

    def count(self, t1: float, position: int) -> int:
        last = position
        while last + 1 < self.size and self._sign * (t1 - self.times[last + 1]) >= 0:
            last += 1
        return last - position

    def indices(self, position: int, count: int) -> Sequence[slice]:
        return [slice(position, position + count)] if count else []

    def within(self, method: RungeKutta, step: Step, position: int, count: int) -> Sequence[State]:
        if count <= 1:
            times = self.times[position + 1 : position + 1 + count]
            states = [step.end if t == step.t1 else interpolate(method, step, t) for t in times]
            return [tuple(component[None] for component in state) for state in states]
        if self._later is None:
            self._later = self.as_tensor()[1:].to(step.end[0].device)
        return [interpolate(method, step, self._later[position : position + count])]

    def grid(self) -> tuple[Sequence[float], Callable[[State], State]]:
        return self.times, lambda states: tuple(component[1:] for component in states)

    def arrange(self, start: State, joined: State) -> State:
        return tuple(torch.cat([first[None], later]) for first, later in zip(start, joined, strict=True))

    def spread(self, gradients: Sequence[Tensor | None], like: State) -> list[Tensor]:
        spread = [torch.zeros_like(states) for states in like]
        for total, gradient in zip(spread, gradients, strict=True):
            if gradient is not None:
                total[1:] = gradient
        return spread


class OwnTimes(Outputs):
    """Outputs at times that each sample has for itself.

    All samples start together. A sample stays where it is after the step that covers its last time.

    Args:
        times: (B, T) in float64 on the CPU. The rows are strictly monotonic, all in the same direction, up to their
            last output; after it they repeat it.
        counts: (B,), the number of outputs of each row, the first included; at least one row of `whole` has two.
        device: of the state.
        whole: the outputs of all samples, where processes share them and these are the samples of one. The solve goes
            from the start to the end of all.
    """

    def __init__(self, times: Tensor, counts: Tensor, device: torch.device, whole: OwnTimes | None = None) -> None:
        self.times, self.counts = times, counts
        self.whole = self if whole is None else whole
        self.size = times.shape[1]
        table, last = times.numpy(), counts.numpy() - 1
        ends = table[:, -1]
        if whole is None:
            self.start = float(table[0, 0])
            self._sign = -1.0 if (ends < self.start).any() else 1.0
            self.end = float(ends[(self._sign * ends).argmax()])
        else:
            self.start, self.end, self._sign = whole.start, whole.end, whole._sign
        rows, columns = np.nonzero((np.arange(self.size) <= last[:, None]) & (np.arange(self.size) > 0))
        order = np.argsort(self._sign * table[rows, columns], kind="stable")
        rows, columns = rows[order], columns[order]
        self._values = (self._sign * table[rows, columns]).tolist()
        self._rows, self._columns = torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device)
        self._at = torch.from_numpy(table[rows, columns]).to(device)
        place = np.empty(table.shape, dtype=np.int64)  # of each entry in the starts of all samples, then the outputs
        place[:, 0] = np.arange(len(table))
        place[rows, columns] = len(table) + np.arange(len(rows))
        repeats = np.minimum(np.arange(self.size), last[:, None])
        self._place = torch.from_numpy(np.take_along_axis(place, repeats, 1).T.copy()).to(device)  # (T, B)
        if (ends != self.end).any():
            self.ends = RowEnds(times[:, -1].to(device), self._sign)

    def part(self, rows: slice) -> OwnTimes:
        """The outputs of some samples, in steps that serve all."""
        return OwnTimes(self.times[rows], self.counts[rows], self._at.device, self)

    def as_tensor(self) -> Tensor:
        return self.times

    def count(self, t1: float, position: int) -> int:
        return bisect.bisect_right(self._values, self._sign * t1, lo=position) - position

    def indices(self, position: int, count: int) -> Sequence[slice]:
        # Samples without an output give empty pieces, which keep the solve in the graph of their process.
        return [slice(position, position + count)] if count or not self._values else []

    def within(self, method: RungeKutta, step: Step, position: int, count: int) -> Sequence[State]:
        found = self.indices(position, count)
        return [interpolate_rows(method, step, self._rows[inside], self._at[inside]) for inside in found]

    def grid(self) -> tuple[Sequence[float], Callable[[State], State]]:
        times = torch.unique(self._sign * self.whole._at)
        index = torch.searchsorted(times, self._sign * self._at)

        def pick(states: State) -> State:
            later = [component[1:] for component in states]
            return tuple(
                component.movedim(1 if i == 0 else -1, 1)[index, self._rows] for i, component in enumerate(later)
            )

        return [self.start, *(self._sign * times).tolist()], pick

    def arrange(self, start: State, joined: State) -> State:
        first, *others = (
            torch.cat([begin, later])[self._place]
            for begin, later in zip(rows_of(start, self._place[0]), joined, strict=True)
        )
        return (first, *(component.movedim(1, -1) for component in others))

    def spread(self, gradients: Sequence[Tensor | None], like: State) -> list[Tensor]:
        spread = []
        for i, (gradient, states) in enumerate(zip(gradients, like, strict=True)):
            total = torch.zeros_like(states)
            if gradient is not None:
                rows_second = total if i == 0 else total.movedim(-1, 1)
                rows_second[self._columns, self._rows] = gradient
            spread.append(total)
        return spread
