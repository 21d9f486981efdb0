"""What starts the programs, before they import what takes seconds."""

import os
import signal
import subprocess
import sys

import pytest

IMPORTING = """
try:
    print("importing", flush=True)
    input()
except BaseException as error:  # as imports of extensions do
    raise ImportError from error
"""


@pytest.fixture
def start(tmp_path):
    """Start a program, the import of which runs `code`."""

    def started(code):
        (tmp_path / "slow.py").write_text(f"{code}\ndef main(arguments):\n    print('runs')\n")
        program = f"import flows.cli; flows.cli.__path__.append({str(tmp_path)!r}); import flows.cli.main as m"
        return subprocess.Popen(
            [sys.executable, "-c", f"{program}; m.start('slow')"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "MPLBACKEND": "nonsense"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    return started


def test_ctrl_c_during_the_imports_ends_with_one_line(start):
    process = start(IMPORTING)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "\nInterrupted.\n")
    assert process.returncode == 130


def test_no_backend_for_windows_is_looked_for(start):
    process = start("import os\nprint(os.environ['MPLBACKEND'])")
    assert process.communicate(timeout=30) == ("agg\nruns\n", "")
    assert process.returncode == 0
