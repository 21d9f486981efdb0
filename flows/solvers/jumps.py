"""Times at which the right-hand side of a solve jumps."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence

import torch

from flows.errors import InvalidValueError
from flows.solvers.problem import Dynamics

MARGIN = 8  # roundings of a time by which evaluations keep away from a jump


class Jumps:
    """Times that the steps of a solve end at, because the right-hand side jumps there.

    No step crosses a jump, and what is evaluated for a step lies strictly between its neighbouring jumps. So the end of
    one step sees the value before the jump, and the start of the next the value after it. Times that differ by less
    than the dtype resolves count as one.

    Args:
        times: in any order.
        margin: how far evaluations keep away from a jump.
    """

    def __init__(self, times: Sequence[float] = (), margin: float = 0.0) -> None:
        self.margin = margin
        self.times: list[float] = []
        for time in sorted(times):
            if not self.times or time - self.times[-1] > margin / 2:
                self.times.append(time)
        self._set = set(self.times)

    def __bool__(self) -> bool:
        return bool(self.times)

    def __contains__(self, time: float) -> bool:
        return time in self._set

    def between(self, start: float, end: float) -> list[float]:
        """The jumps between two times, in the direction from one to the other."""
        low, high = min(start, end) + self.margin / 2, max(start, end) - self.margin / 2
        found = self.times[bisect.bisect_right(self.times, low) : bisect.bisect_left(self.times, high)]
        return found if end >= start else found[::-1]

    def through(self, times: Sequence[float]) -> list[float]:
        """Monotonic times, with the jumps between them."""
        points = [times[0]]
        for start, end in itertools.pairwise(times):
            points += [*self.between(start, end), end]
        return points

    def around(self, t0: float, t1: float) -> tuple[float, float] | None:
        """Between which times a step may evaluate; `None`: anywhere."""
        if not self.times:
            return None
        i = bisect.bisect_right(self.times, (t0 + t1) / 2)
        low = self.times[i - 1] + self.margin if i else -math.inf
        high = self.times[i] - self.margin if i < len(self.times) else math.inf
        return (low, high) if low <= high else ((low + high) / 2, (low + high) / 2)


def jumps_of(dynamics: Dynamics, start: float, end: float, dtype: torch.dtype) -> Jumps:
    """The jumps that dynamics state as their attribute `jumps`, within a solve.

    Raises:
        InvalidValueError: a jump is NaN or infinite.
    """
    stated = getattr(dynamics, "jumps", ())
    times = torch.as_tensor(stated, dtype=torch.float64, device="cpu").flatten().tolist() if len(stated) else []
    if not times:
        return Jumps()
    if not all(map(math.isfinite, times)):
        raise InvalidValueError(f"jumps must be finite times, got {times}")
    scale = max(abs(start), abs(end), abs(getattr(dynamics, "time_offset", 0.0)))
    margin = MARGIN * torch.finfo(dtype).eps * scale
    low, high = min(start, end) - margin, max(start, end) + margin
    return Jumps([time for time in times if low <= time <= high], margin)
