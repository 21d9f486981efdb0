"""Out of memory: which errors mean it, and what to say."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from flows.errors import ComputationError, FlowsError

# torch tells by the text alone where the CPU, a library of CUDA or a driver had no memory.
TEXTS = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")


class MemoryLimitError(ComputationError):
    """There was not enough memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that there was not enough memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in TEXTS)


def memory_message(error: BaseException) -> str:
    """Return what an error that `is_out_of_memory` means, in one paragraph."""
    lines = str(error).strip().splitlines()
    reason = f" ({lines[0].strip()})" if lines else ""
    return f"there was not enough memory{reason}"


@contextlib.contextmanager
def memory_errors(what: str, cure: str = "") -> Iterator[None]:
    """While entered, say `what` needed more memory than there is.

    Args:
        what: the computation.
        cure: what to do, the end of the sentence.

    Raises:
        MemoryLimitError: in place of the errors of Python and torch.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, FlowsError) or not is_out_of_memory(error):
            raise
        raise MemoryLimitError(f"{memory_message(error)} for {what}{f'; {cure}' if cure else ''}") from error
