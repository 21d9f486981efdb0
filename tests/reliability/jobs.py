"""Starts `fork_server.py` and asks it to run jobs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path


class Server:
    """Runs jobs in processes that can be killed; see `fork_server.py`."""

    def __init__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGQUIT)],
        )
        assert self.process.stdout.readline() == "ready\n"

    def run(self, kind, folder, **harm):
        """Run a job and return how it ended: an exit code, or minus the number of the signal that killed it."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        print(json.dumps({"kind": kind, "folder": str(folder), "harm": harm}), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(20)


def log_of(folder):
    path = Path(f"{folder}.log")
    return path.read_text() if path.exists() else ""


def ops_of(folder):
    return Path(f"{folder}.ops").read_text().splitlines()
