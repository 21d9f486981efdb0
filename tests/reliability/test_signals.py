"""Signals stop a run with its state saved, whatever it is doing; a terminal that goes away does not stop it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from figures import report_figure
from jobs import log_of
from kinds import differences, state

from flows.training import streams
from flows.training.streams import UnbreakableStream, unbreakable_streams

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGPWR")
PHASES = ("step", "saving", "validation", "pictures", "test")
QUICK = {("SIGHUP", "validation")}
FLAGS = [
    pytest.param(name, phase, marks=[] if (name, phase) in QUICK else [pytest.mark.slow], id=f"{name} in {phase}")
    for name in SIGNALS
    for phase in PHASES
]


@pytest.fixture(scope="module")
def counts():
    found = {"signals": 0, "lost": 0}
    yield found
    report_figure(f"signals: {found['signals']} runs stopped by a signal, {found['lost']} lost a step")


@pytest.mark.parametrize(("name", "phase"), FLAGS)
def test_a_signal_stops_the_run_and_loses_nothing(server, undisturbed, counts, tmp_path, name, phase):
    folder = tmp_path / "run"
    assert server.run("staged", folder, phase=phase, signals=[name]) == 128 + getattr(signal, name)
    assert "training was stopped after step" in log_of(folder)
    counts["signals"] += 1
    counts["lost"] += "lost" in log_of(folder)
    assert server.run("staged", folder) == 0
    assert not differences(undisturbed, state(folder))


@pytest.mark.slow
@pytest.mark.parametrize("names", [["SIGHUP", "SIGHUP"], ["SIGXCPU", "SIGXCPU"], ["SIGTERM", "SIGHUP"]], ids=str)
def test_signals_that_repeat_themselves_count_once(server, counts, tmp_path, names):
    folder = tmp_path / "run"
    assert server.run("staged", folder, phase="step", signals=names, apart=0.5) == 128 + getattr(signal, names[0])
    assert "stopped after step 4" in log_of(folder)
    counts["signals"] += 1


@pytest.mark.slow
@pytest.mark.parametrize("names", [["SIGTERM", "SIGTERM"], ["SIGINT", "SIGINT"], ["SIGUSR1", "SIGTERM"]], ids=str)
def test_a_second_signal_ends_the_run_at_once(server, undisturbed, tmp_path, names):
    """The steps since the last checkpoint are lost, and the rest is not."""
    folder = tmp_path / "run"
    rare = {"checkpoint_every": 0, "validate_every": 0, "plot_every": 0}
    code = server.run("staged", folder, phase="step", signals=names, apart=0.5, reporting=rare)
    assert code == 128 + getattr(signal, names[-1])
    assert "stopped after step 0" in log_of(folder)
    assert "later steps are lost" in log_of(folder)
    assert server.run("staged", folder) == 0
    assert not differences(undisturbed, state(folder))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT", "SIGTERM"])
def test_an_ignored_signal_stays_ignored(server, undisturbed, tmp_path, name):
    folder = tmp_path / "run"
    assert server.run("staged", folder, phase="step", signals=[name], ignored=[name]) == 0
    assert not differences(undisturbed, state(folder))


@pytest.mark.slow
@pytest.mark.parametrize("without", ["pipe", "terminal"])
def test_a_run_goes_on_without_anyone_who_reads(server, undisturbed, tmp_path, without):
    folder = tmp_path / "run"
    assert server.run("staged", folder, without=without, reporting={"progress_bar": True}) == 0, log_of(folder)
    assert not differences(undisturbed, state(folder))


def test_streams_drop_what_cannot_be_written(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, '{Path(streams.__file__).parent}'); import streams\n"  # without torch
        "with streams.unbreakable_streams(until_exit=True):\n"
        "    for _ in range(100_000): print('a line'); print('a line', file=sys.stderr)\n"
        "open(sys.argv[1], 'w').write('done')"
    )
    for arguments in ("| head -1", ">&-", "2>&-", ">&- 2>&-", "> /dev/full", "2> /dev/full"):
        done = tmp_path / "done"
        script = f'set -o pipefail; {sys.executable} -c "{code}" {done} {arguments}'
        ended = subprocess.run(["bash", "-c", script], capture_output=True)
        assert done.read_text() == "done", (arguments, ended.stderr[-300:])
        assert ended.returncode == 0, (arguments, ended.stderr[-300:])
        done.unlink()


def test_streams_show_what_a_terminal_can(tmp_path):
    with (tmp_path / "ascii").open("w", encoding="ascii") as file:
        stream = UnbreakableStream(file)
        print("0.5 ± 0.1", file=stream)
    assert (tmp_path / "ascii").read_text() == "0.5 ? 0.1\n"
    print("closed", file=stream)
    print("none", file=UnbreakableStream(None))
    before = sys.stdout
    with unbreakable_streams():
        assert UnbreakableStream(before) == sys.stdout  # tqdm asks, to print above its bars
    assert sys.stdout is before
