"""The command `flows`: `flows train data=moons`."""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

from flows.cli.help import help_text

PROGRAMS = {
    "train": "train a model, test it, and leave everything in one folder",
    "evaluate": "test a trained flow, with error bars",
    "sample": "draw from a trained flow into a file",
    "predict": "states of a trained neural ODE at any times, with their errors",
    "compare": "compare the divergence estimators on a flow",
}
USAGE = "\n".join(
    [
        "Neural ODEs and continuous normalizing flows.",
        "",
        "usage: flows PROGRAM [setting=value ...]",
        "",
        *(f"    flows {name:<10}{text}" for name, text in PROGRAMS.items()),
        "",
        "    flows PROGRAM --help      choices and examples",
        "    flows PROGRAM --settings  all settings that the given ones lead to",
        "    flows --version",
    ]
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the programs; `arguments` are those of the command line by default."""
    arguments = sys.argv[1:] if arguments is None else arguments
    first = arguments[0] if arguments else "--help"
    if first in PROGRAMS:
        start(first, arguments[1:])
    elif first in ("--help", "-h"):
        print(USAGE)
    elif first in ("--version", "-V"):
        import flows

        print(f"flows {flows.__version__}")
    else:
        close = difflib.get_close_matches(first.lower(), PROGRAMS, n=1)
        meant = f" (did you mean {close[0]}?)" if close else f": write flows train {first}" if "=" in first else ""
        print(
            f"Error: there is no program {first!r}{meant}; flows has {', '.join(PROGRAMS)}; see flows --help",
            file=sys.stderr,
        )
        sys.exit(2)


def start(program: str, arguments: Sequence[str] | None = None) -> None:
    """Import one of the programs and run it; `arguments` are those of the command line by default.

    Ctrl-C during the import, which takes seconds, ends the process with one line. Matplotlib opens no window in a
    program, so it needs no backend, least of all one that `MPLBACKEND` names and that is not there.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given in (["--help"], ["-h"]):
        print(help_text(program))
        return
    os.environ["MPLBACKEND"] = "agg"
    _imported(program).main(arguments)


def _imported(program: str) -> Any:
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # under nohup it is ignored
    if usual and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _end)
        try:
            return importlib.import_module(f"flows.cli.{program}")
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    return importlib.import_module(f"flows.cli.{program}")


def _end(number: int, frame: FrameType | None) -> None:
    """End at once: an exception in the middle of an import may come out as another one."""
    os.write(2, b"\nInterrupted.\n")
    os._exit(128 + number)
