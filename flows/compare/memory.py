"""The peak memory of a piece of work."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that tensors hold at once during `run()`, beyond what they held before.

    On a GPU this is the peak of the caching allocator. On the CPU it is the peak of the running sum of all allocations
    and releases in the trace of torch's profiler, temporaries inside kernels included.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _stderr_silenced():  # some versions of torch's profiler announce themselves there
        profiler.__enter__()
    try:
        run()
    finally:
        with _stderr_silenced():
            profiler.__exit__(None, None, None)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        records = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    now = peak = 0
    for record in sorted(records, key=lambda event: event["ts"]):
        now += record["args"]["Bytes"]
        peak = max(peak, now)
    return peak


@contextlib.contextmanager
def _stderr_silenced() -> Iterator[None]:
    """Discard what native code writes to stderr."""
    sys.stderr.flush()
    with open(os.devnull, "w") as nothing:
        kept = os.dup(2)
        os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
