"""Timing that survives a noisy machine: cases take turns, and the median of each counts."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from tqdm import tqdm


def alternating_medians(
    cases: Mapping[str, Callable[[], object]],
    seconds_each: float = 1.0,
    most: int = 50,
    progress: str | None = None,
) -> dict[str, float]:
    """Seconds a call of each case: the median of `alternating_times`."""
    times = alternating_times(cases, seconds_each, most, progress)
    return {name: statistics.median(values) for name, values in times.items()}


def alternating_times(
    cases: Mapping[str, Callable[[], object]],
    seconds_each: float = 1.0,
    most: int = 50,
    progress: str | None = None,
) -> dict[str, list[float]]:
    """Seconds of the calls of each case, over rounds in which every case runs in turn.

    Each case runs once beforehand, uncounted. It leaves the rounds once it has had `seconds_each` (but never
    before three runs) or `most` runs, so that slow cases do not decide how often fast ones are measured. A case
    that takes more than five times `seconds_each` is past what a first call costs extra: its first run counts,
    and one more is enough.

    Args:
        progress: what a progress bar over the cases is called; None: no bar.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    needed = {}
    with tqdm(total=len(cases), desc=progress, leave=False, disable=progress is None) as bar:
        for name, case in cases.items():
            first = _timed(case)
            is_slow = first > 5 * seconds_each
            needed[name] = 2 if is_slow else 3
            times[name] += [first] if is_slow else []
        active = list(cases)
        while active:
            for name in tuple(active):
                times[name].append(_timed(cases[name]))
                enough = len(times[name]) >= needed[name] and sum(times[name]) >= seconds_each
                if enough or len(times[name]) >= most:
                    active.remove(name)
                    bar.update()
    return times


def _timed(case: Callable[[], object]) -> float:
    synchronise()
    start = time.perf_counter()
    case()
    synchronise()
    return time.perf_counter() - start


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device`: a GPU where there is one."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=_device, default=default, help="cpu, cuda, cuda:1, ... (%(default)s)")


def _device(name: str) -> str:
    try:
        device = torch.empty(0, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # the one that is waited for
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch built without that kind
        raise argparse.ArgumentTypeError(f"{name!r} is no device of this machine ({error})") from error
    return name


def machine(device: str) -> str:
    """What a measurement ran on, in words."""
    threads = torch.get_num_threads()
    where = "1 thread" if threads == 1 else f"{threads} threads"
    if torch.device(device).type == "cuda":
        where = torch.cuda.get_device_name(device)
    return f"{where}, torch {torch.__version__}"


def synchronise() -> None:
    """Wait until what has been asked of a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
