"""Checks of arguments; each message says what is valid and what came."""

from __future__ import annotations

import math
import os
import re
import stat
import sys
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flows.errors import FileError, InvalidTypeError, InvalidValueError

MAX_SEED = 2**63 - 1  # the largest that torch takes
MAX_SIZE = 2**63 - 1  # entries of a tensor
YEAR = 365.25 * 86400  # seconds
LONGEST = 10 * YEAR
FASTEST_STEP = 1e-4  # seconds that a training step, or a solve, takes at least
MEMORY_SHARE = 0.5  # of the machine's memory that one tensor may take: drawing and converting it needs a second copy


def check_number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    whole: bool = False,
    otherwise: str = "",
) -> None:
    """Require a finite number within bounds.

    Args:
        name: what the message calls the number.
        value: what was passed.
        above, at_least, below, at_most: the bounds. Default: no bound.
        whole: require an integer.
        otherwise: a hint that ends the message, such as "use None for no limit".

    Raises:
        InvalidTypeError: the value is a bool, a text or anything else that is no number.
        InvalidValueError: the number is NaN, infinite or out of bounds.
    """
    bounds = ((">", above), (">=", at_least), ("<", below), ("<=", at_most))
    allowed = " and ".join(f"{sign} {_text(bound)}" for sign, bound in bounds if bound is not None)
    kind = "a whole number" if whole else "a finite number"
    message = f"{name} must be {kind} {allowed}".rstrip() + f", got {value!r}{'; ' if otherwise else ''}{otherwise}"
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        raise InvalidTypeError(message)
    number: Any = int(value) if isinstance(value, Integral) else float(value)
    within = (
        (above is None or number > above)
        and (at_least is None or number >= at_least)
        and (below is None or number < below)
        and (at_most is None or number <= at_most)
    )
    if not within or not abs(number) <= sys.float_info.max:  # integers may be too large for a float
        raise InvalidValueError(message)


def whole_number(name: str, value: Any, at_least: int = 1, at_most: int | None = None, otherwise: str = "") -> int:
    """Return `value` as an int if it lies within the bounds; see `check_number`."""
    check_number(name, value, at_least=at_least, at_most=at_most, whole=True, otherwise=otherwise)
    return int(value)


def as_shape(name: str, value: Any, at_least: int = 1) -> tuple[int, ...]:
    """Return a shape as a tuple of ints; a whole number n stands for (n,).

    Args:
        name: the argument's name in the message.
        at_least: the smallest size. Default: 1; 0 for the number of samples.

    Raises:
        InvalidTypeError: it is neither a whole number nor a list of them.
        InvalidValueError: a size is too small, or too large for a tensor.
    """
    plain = type(value) is tuple and all(type(size) is int and size >= at_least for size in value)
    if plain and math.prod(value) <= MAX_SIZE:  # nearly always, and quickly
        return value
    if isinstance(value, Integral) and not isinstance(value, bool):
        value = (value,)
    expected = f"{name} must be a whole number or a list of whole numbers >= {at_least}, such as (2,)"
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise InvalidTypeError(f"{expected}, got {value if value is None else type(value).__name__}")
    if not all(isinstance(size, Integral) and not isinstance(size, bool) for size in value):
        raise InvalidTypeError(f"{expected}, got {value!r}")
    sizes = tuple(int(size) for size in value)
    if min(sizes, default=at_least) < at_least or math.prod(sizes) > MAX_SIZE:
        raise InvalidValueError(f"{expected} and < 2^63 in all, got {sizes}")
    return sizes


def check_points(
    name: str,
    x: Tensor,
    event_shape: Sequence[int] | None = None,
    *,
    at_least: int = 0,
    batched: bool = True,
    finite: bool = False,
) -> None:
    """Require points: a dense tensor of real floating-point numbers, (n, *event).

    Args:
        name: the argument's name in the message.
        event_shape: shape of one point. Default: any.
        at_least: the smallest n.
        batched: whether there is exactly one batch dimension; otherwise any number of them.
        finite: whether NaN and infinite values are refused, which waits for a GPU.

    Raises:
        InvalidValueError: it is something else.
    """
    if not x.is_floating_point():
        argument = name.split()[0]
        raise InvalidValueError(f"{name} must hold floating-point numbers, got {x.dtype}; write {argument}.double()")
    if x.is_meta or x.layout != torch.strided:
        raise InvalidValueError(f"{name} must be a dense tensor with numbers, got {x.layout} on the device {x.device}")
    event = None if event_shape is None else tuple(event_shape)
    own = tuple(x.shape[1:] if batched else x.shape[max(0, x.ndim - len(event or ())) :])
    if (batched and (x.ndim == 0 or x.shape[0] < at_least)) or (event is not None and own != event):
        shape = ", ".join(["n" if batched else "*batch", *(["*event"] if event is None else map(str, event))])
        least = f" with n >= {at_least}" if at_least else ""
        raise InvalidValueError(f"{name} must hold points of shape ({shape}){least}, got {tuple(x.shape)}")
    if finite and not bool(x.isfinite().all()):
        bad = (~x.isfinite()).reshape(len(x), -1).any(1).nonzero()
        raise InvalidValueError(
            f"{len(bad)} of {len(x)} {name} hold NaN or infinite values, the first at index {int(bad[0])}; remove or "
            "repair them"
        )


def check_seed(seed: Any) -> None:
    """Require a seed that torch takes; see `check_number`."""
    check_number("seed", seed, whole=True, at_least=0, at_most=MAX_SEED)


def fits_in_memory(what: str, num_bytes: int) -> None:
    """Raise `InvalidValueError` if `what` would take more than half of the machine's memory."""
    try:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not on this system; allocating then fails by itself
        return
    if num_bytes > MEMORY_SHARE * available:
        raise InvalidValueError(
            f"{what} would take {_size(num_bytes)}, more than half of this machine's {_size(available)} of memory; "
            "choose a smaller number"
        )


def can_be_finished(what: str, seconds: float) -> None:
    """Raise `InvalidValueError` if `what` would take more than `LONGEST` seconds."""
    if not seconds <= LONGEST:
        years = f"{seconds / YEAR:,.0f}" if seconds < 1e16 * YEAR else f"{seconds / YEAR:.0e}"
        raise InvalidValueError(f"{what} would take at least {years} years; choose a smaller number")


def existing_path(name: str, path: object, expected: str, folder: bool = False) -> Path:
    """Return `path` if it is a regular file, or a folder where allowed.

    Devices, pipes and sockets are refused: reading one may never end.

    Args:
        name: the argument's name in the message.
        expected: what the message calls the file, such as "picture".
        folder: allow a folder. Default: files only.

    Raises:
        InvalidTypeError: `path` is neither a text nor a path.
        FileError: there is no such file, or it is of another kind.
    """
    if not isinstance(path, str | os.PathLike):
        raise InvalidTypeError(f"{name} must be the path of a {expected}, got {path!r}")
    found = Path(path)
    if not str(path):
        raise FileError(f"{name} is empty; give the path of a {expected}")
    if "\0" in str(path):
        raise FileError(
            f"{name}: cannot open {str(path)!r}, which holds a null character; give the path of a {expected}"
        )
    try:
        if found.is_file() or (folder and found.is_dir()):
            return found
        exists, is_folder = found.exists(), found.is_dir()
        is_link = found.is_symlink()
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # a name too long, a null character, a folder that may not be entered
        raise FileError(f"{name}: cannot open {str(found)!r} ({error}); give the path of a {expected}") from error
    if is_folder:
        raise FileError(f"{found} is a folder; {name} must be the path of a {expected}")
    if exists:
        mode = found.stat().st_mode
        kind = "pipe" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"
        raise FileError(f"{found} is no regular file but a {kind}; {name} must be the path of a {expected}")
    if is_link:
        raise FileError(f"{found} is a broken link to {os.readlink(found)}; {name} must be the path of a {expected}")
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(path), re.IGNORECASE):
        raise FileError(f"{path} is an address, which is not opened; download the {expected}, and give its path")
    if str(path).startswith("~"):
        raise FileError(f"no {expected} at {found}: ~ is not replaced by a home folder here; write the whole path")
    raise FileError(f"no {expected} at {found}; a relative path starts at {Path.cwd()}")


def _text(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def _size(num_bytes: int) -> str:
    amount = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:,.0f} TB"
