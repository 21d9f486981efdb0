"""Freed memory stays in the process, unless its environment has settings of its own."""

import platform
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, torch
from flows.freed_memory import keep_freed_memory
print(keep_freed_memory())
def work():
    for _ in range(20):
        kept = [torch.ones(1_000_000) for _ in range(4)]
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize("own", [False, True])
def test_pages_are_touched_once(own):
    environment = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"} if own else {}
    command = [sys.executable, "-c", COUNT_FAULTS]
    kept, faults = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.split()
    assert kept == str(not own)
    assert int(faults) > 50_000 if own else int(faults) < 500
