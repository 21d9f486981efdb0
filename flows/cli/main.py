"""The command `flows`: `flows train data=moons`."""

from __future__ import annotations

import difflib
import importlib
import signal
import sys
from collections.abc import Sequence

PROGRAMS = {
    "train": "train a model, test it, and leave everything in one folder",
    "evaluate": "test a trained flow, with error bars",
    "sample": "draw from a trained flow into a file",
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
        try:
            program = importlib.import_module(f"flows.cli.{first}")
        except KeyboardInterrupt:  # what it imports takes a while
            print("\nInterrupted.", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        program.main(arguments[1:])
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
