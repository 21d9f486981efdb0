"""Timing that survives a noisy machine: cases take turns, and the median of each counts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def alternating_medians(
    cases: Mapping[str, Callable[[], object]],
    seconds_each: float = 1.0,
    most: int = 50,
) -> dict[str, float]:
    """Seconds a call of each case: the median over rounds in which every case runs in turn.

    A case leaves the rounds once it has had ``seconds_each`` (but never before three runs) or ``most`` runs, so
    that slow cases do not decide how often fast ones are measured. Each runs once beforehand, uncounted.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    for case in cases.values():
        _timed(case)
    active = set(cases)
    while active:
        for name in [name for name in cases if name in active]:
            times[name].append(_timed(cases[name]))
            enough = len(times[name]) >= 3 and sum(times[name]) >= seconds_each
            if enough or len(times[name]) >= most:
                active.discard(name)
    return {name: statistics.median(values) for name, values in times.items()}


def _timed(case: Callable[[], object]) -> float:
    _synchronise()
    start = time.perf_counter()
    case()
    _synchronise()
    return time.perf_counter() - start


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
