"""Errors that a user can mend. Any other exception is a bug in this package.

Each class is also the built-in exception that fits, so `except ValueError` works as usual.
"""

from __future__ import annotations


class FlowsError(Exception):
    """Base class of all errors that this package raises on purpose; the message says what to do."""


class InvalidValueError(FlowsError, ValueError):
    """An argument, a setting or a tensor has a value that is not allowed."""


class InvalidTypeError(FlowsError, TypeError):
    """An argument or a setting has a type that is not allowed."""


class FileError(FlowsError, OSError):
    """A file or a folder cannot be read or written."""


class ComputationError(FlowsError, RuntimeError):
    """A computation failed although its input was valid."""


class MissingPackageError(FlowsError, ImportError):
    """An optional package is not installed."""


class DataWarning(UserWarning):
    """Data were read, but not as their author may expect; the message names the column or the files."""
