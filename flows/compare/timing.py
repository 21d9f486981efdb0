"""Timing on a noisy machine: cases take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from flows.progress import new_bar


def alternating_medians(
    cases: Mapping[str, Callable[[], object]],
    seconds_each: float = 1.0,
    most: int = 50,
    progress: str | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each case, by `alternating_times`."""
    times = alternating_times(cases, seconds_each, most, progress, clock)
    return {name: statistics.median(values) for name, values in times.items()}


def alternating_times(
    cases: Mapping[str, Callable[[], object]],
    seconds_each: float = 1.0,
    most: int = 50,
    progress: str | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each call of each case; the cases take turns.

    Each case runs once beforehand, uncounted. It leaves the rounds once it has had `seconds_each` (but never
    before three runs) or `most` runs, so that slow cases do not decide how often fast ones are measured. A case
    that takes more than five times `seconds_each` is past what a first call costs extra: its first run counts,
    and one more is enough.

    Args:
        progress: label of a progress bar over the cases; `None`: no bar.
        clock: such as `time.process_time`, which other programs on the machine do not disturb.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    needed = {}
    with new_bar(total=len(cases), desc=progress, leave=False, disable=progress is None) as bar:
        for name, case in cases.items():
            first = _timed(case, clock)
            is_slow = first > 5 * seconds_each
            needed[name] = 2 if is_slow else 3
            times[name] += [first] if is_slow else []
        active = list(cases)
        while active:
            for name in tuple(active):
                times[name].append(_timed(cases[name], clock))
                enough = len(times[name]) >= needed[name] and sum(times[name]) >= seconds_each
                if enough or len(times[name]) >= most:
                    active.remove(name)
                    bar.update()
    return times


def _timed(case: Callable[[], object], clock: Callable[[], float]) -> float:
    synchronise()
    start = clock()
    case()
    synchronise()
    return clock() - start


def synchronise() -> None:
    """Wait until the GPU has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
