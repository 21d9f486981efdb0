"""Terminals that cannot show every sign, such as one of ASCII."""

from __future__ import annotations

import codecs
import io
import sys

PLAIN = {
    "±": "+-",
    "×": "x",
    "∇": "grad",
    "·": ".",
    "…": "...",
    "–": "-",
    "—": "-",
    "’": "'",
    "√": "sqrt",
    "≤": "<=",
    "≥": ">=",
}


def plain_signs(error: UnicodeError) -> tuple[str, int]:
    """Signs of plain text for those that an encoding lacks; a question mark where there is none."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(PLAIN.get(sign, "?") for sign in text), error.end


codecs.register_error("flows_plain", plain_signs)


def any_encoding() -> None:
    """Let the terminal show what it can, so that no sign ends a program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != "flows_plain":
            stream.reconfigure(errors="flows_plain")
