"""The most memory that a piece of work holds at once."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

import torch
from torch.autograd.profiler import profile


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that tensors take at once while `run` runs, beyond those that were there before.

    On a GPU, the peak of the caching allocator; on the CPU, the running sum of all allocations and releases that
    torch's profiler records, the temporaries inside kernels included.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    profiler = profile(profile_memory=True)
    with _stderr_silenced():  # the profiler of some versions of torch announces itself there
        profiler.__enter__()
    try:
        run()
    finally:
        with _stderr_silenced():
            profiler.__exit__(None, None, None)
    records = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for record in sorted(records, key=lambda event: event.start_ns()):
        now += record.nbytes()
        peak = max(peak, now)
    return peak


@contextlib.contextmanager
def _stderr_silenced() -> Iterator[None]:
    """Drop what native code writes to stderr."""
    sys.stderr.flush()
    with open(os.devnull, "w") as nothing:
        kept = os.dup(2)
        os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
