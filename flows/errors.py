"""Errors that a user can mend. Any other exception is a bug in this package.

Each class is also the built-in exception that fits, so `except ValueError` works as usual.
"""

from __future__ import annotations

import pickle
import sys
import warnings
from collections.abc import Mapping
from types import FrameType
from typing import Any

OTHERS = {"flows", "sklearn", "joblib", "lightning_fabric", "torch", "contextlib", "functools"}  # no user wrote these


class FlowsError(Exception):
    """Base class of all errors that this package raises on purpose; the message says what to do.

    Errors keep their attributes when they are sent to another process, as the jobs of a sweep send them.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return restored_error, (type(self), self.args, sendable(vars(self)))


class InvalidValueError(FlowsError, ValueError):
    """An argument, a setting or a tensor has a value that is not allowed."""


class InvalidTypeError(FlowsError, TypeError):
    """An argument or a setting has a type that is not allowed."""


class FileError(FlowsError, OSError):
    """A file or a folder cannot be read or written."""


class UnstatedError(FlowsError, AttributeError):
    """A class lacks an attribute that it must state."""


class ComputationError(FlowsError, RuntimeError):
    """A computation failed although its input was valid."""


class MissingPackageError(FlowsError, ImportError):
    """An optional package is not installed."""


class DataWarning(UserWarning):
    """Data were read, but not as their author may expect; the message names the column or the files."""


class FieldWarning(UserWarning):
    """A field has a property that makes some results less accurate than they look; the message names the cure."""


def restored_error(kind: type[BaseException], args: tuple[Any, ...], attributes: Mapping[str, Any]) -> BaseException:
    """An error as it was before pickling; its class may take other arguments than the message."""
    error = kind.__new__(kind, *args)
    BaseException.__init__(error, *args)
    error.args = args
    vars(error).update(attributes)
    return error


def sendable(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Those attributes that can be pickled."""

    def fits(value: Any) -> bool:
        try:
            pickle.dumps(value)
        except Exception:  # pickling raises almost anything
            return False
        return True

    return {name: value for name, value in attributes.items() if fits(value)}


def warn(message: str, kind: type[Warning] = UserWarning) -> None:
    """Warn at the line of the user's code that led here."""
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in OTHERS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, kind, stacklevel=level)
