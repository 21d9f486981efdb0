"""Checks of the numbers that users pass."""

from __future__ import annotations

import sys
from numbers import Integral, Real
from typing import Any

from flows.errors import InvalidValueError


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
        above, at_least, below, at_most: the bounds; `None` sets no bound.
        whole: require an integer.
        otherwise: a hint that the message ends with, such as "use None for no limit".

    Raises:
        InvalidValueError: the value is no such number. Text, booleans and NaN are no numbers.
    """
    bounds = ((">", above), (">=", at_least), ("<", below), ("<=", at_most))
    allowed = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        kind = "a whole number" if whole else "a number"
    else:
        number: Any = value
        within = (
            (above is None or number > above)
            and (at_least is None or number >= at_least)
            and (below is None or number < below)
            and (at_most is None or number <= at_most)
        )
        is_finite = abs(number) <= sys.float_info.max  # False for integers too large for a float
        if within and is_finite:
            return
        kind = "" if is_finite else "a finite number"
    expected = " ".join(part for part in (kind, allowed) if part)
    raise InvalidValueError(f"{name} must be {expected}, got {value!r}{'; ' if otherwise else ''}{otherwise}")
