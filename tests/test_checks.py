"""Checks of numbers."""

import re

import numpy as np
import pytest

from flows.checks import check_number
from flows.errors import FlowsError, InvalidTypeError, InvalidValueError


@pytest.mark.parametrize("value", [1, 1.0, 0.5, np.float32(0.5), np.int64(1), 5e-324])
def test_numbers_within_the_bounds_pass(value):
    check_number("rate", value, above=0, at_most=1)


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (0, {"above": 0}, "rate must be a finite number > 0, got 0"),
        (-1, {"at_least": 0}, "rate must be a finite number >= 0, got -1"),
        (1, {"above": 0, "below": 1}, "rate must be a finite number > 0 and < 1, got 1"),
        (2, {"at_most": 1}, "rate must be a finite number <= 1, got 2"),
        (float("inf"), {"above": 0}, "rate must be a finite number > 0, got inf"),
        (float("nan"), {}, "rate must be a finite number, got nan"),
        (10**400, {"above": 0}, "rate must be a finite number > 0, got 1000"),
        (True, {"above": 0}, "rate must be a finite number > 0, got True"),
        ("0.1", {"above": 0}, "rate must be a finite number > 0, got '0.1'"),
        (None, {}, "rate must be a finite number, got None"),
        ([1.0], {}, "rate must be a finite number, got [1.0]"),
        (1j, {}, "rate must be a finite number, got 1j"),
        (1.5, {"whole": True, "at_least": 1}, "rate must be a whole number >= 1, got 1.5"),
        (1e20, {"whole": True, "at_least": 1}, "rate must be a whole number >= 1, got 1e+20"),
    ],
)
def test_all_others_are_refused(value, bounds, message):
    with pytest.raises(FlowsError, match=f"^{re.escape(message)}"):
        check_number("rate", value, **bounds)


def test_the_error_says_whether_the_type_or_the_value_is_wrong():
    for value, error in ((True, InvalidTypeError), ("1", InvalidTypeError), (-1, InvalidValueError)):
        with pytest.raises(error):
            check_number("rate", value, above=0)


def test_the_message_ends_with_the_hint():
    with pytest.raises(ValueError, match=r"got 0; use 0\.5$"):
        check_number("rate", 0, above=0, otherwise="use 0.5")
