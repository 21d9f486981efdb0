"""A run that is killed anywhere, and started again until it is done, equals the run that was not."""

import random
import shutil
import signal

import pytest
from figures import report_figure
from jobs import ops_of
from kinds import KINDS, differences, state

KILLED = -signal.SIGKILL
AIMS = {  # what is cut short: the first operation on the disk with these words, in the first process or the second
    "half of the first checkpoint": ["write checkpoints/.last.pt"],
    "a checkpoint before its name": ["rename checkpoints/last.pt"],
    "half of the best weights": ["write checkpoints/.best.pt"],
    "the best weights before those to go on from": ["renamed checkpoints/best.pt"],
    "half a line of metrics": ["write metrics.jsonl"],
    "half an event": ["write events"],
    "half a picture": ["write plots/."],
    "a picture before its name": ["rename plots/"],
    "half of the summary": ["write .summary.json"],
    "half of the settings": ["write .config.yaml"],
    "a checkpoint, then the clean-up of the next start": ["write checkpoints/.last.pt", "unlink"],
    "a line, then the cut of the metrics": ["fsync metrics.jsonl", "truncate metrics.jsonl"],
    "a picture, then the cut of the events": ["rename plots/", "truncate events"],
    "a line, then half of the next settings": ["fsync metrics.jsonl", "write .config.yaml"],
}


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory):
    """The state and the operations of each kind of run, made when first asked for."""
    runs = {}

    def of(kind):
        if kind not in runs:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            assert server.run(kind, folder) == 0
            runs[kind] = state(folder), ops_of(folder)
        return runs[kind]

    return of


@pytest.fixture(scope="module")
def counts():
    found = {"kills": 0, "runs": 0, "differences": 0}
    yield found
    if found["runs"]:
        report_figure(
            f"kills: {found['kills']} in {found['runs']} runs of {len(KINDS)} kinds, {found['differences']} differences"
        )


def finish_and_compare(server, kind, folder, undisturbed, counts, kills):
    assert server.run(kind, folder) == 0, kills
    expected, _ = undisturbed(kind)
    found = differences(expected, state(folder))
    counts["kills"] += len(kills)
    counts["runs"] += 1
    counts["differences"] += bool(found)
    assert not found, f"{kind}, killed at {kills}: {found[:10]}"


def kill_at(server, kind, folder, number):
    """Kill the run at this operation; return which it was, None if the run ended before."""
    before = len(ops_of(folder)) if folder.with_name(f"{folder.name}.ops").exists() else 0
    code = server.run(kind, folder, disk={"kill_at": number})
    assert code in (0, KILLED)
    return ops_of(folder)[before:][-1] if code == KILLED else None


def aim(server, kind, folder, words, number):
    """Kill the run at its first operation with these words behind the `number`-th; return whether there was one."""
    probe = folder.with_name(f"{folder.name}-probe-{number}")  # a copy shows what the next process would do
    if folder.exists():
        shutil.copytree(folder, probe)
    server.run(kind, probe)
    places = [k for k, op in enumerate(ops_of(probe), 1) if words in op and k > number]
    return bool(places) and kill_at(server, kind, folder, places[0]) is not None


def cases():
    quick = {
        ("adaptive", "a picture, then the cut of the events"),
        ("table", "a line, then the cut of the metrics"),
    }
    for kind in KINDS:
        for name in AIMS:
            marks = [] if (kind, name) in quick else [pytest.mark.slow]
            yield pytest.param(kind, name, marks=marks, id=f"{kind}: {name}")


@pytest.mark.parametrize(("kind", "name"), list(cases()))
def test_aimed_kills(server, undisturbed, counts, tmp_path, kind, name):
    folder, middle = tmp_path / "run", 0
    if len(AIMS[name]) > 1:  # in the middle of the run, so that there is something to take back
        middle = len(undisturbed(kind)[1]) // 2
    # Of two kinds of clean-up not every process has something to do.
    kills = [words for words in AIMS[name] if aim(server, kind, folder, words, middle * (not folder.exists()))]
    assert kills
    finish_and_compare(server, kind, folder, undisturbed, counts, kills)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", KINDS)
def test_random_kills(server, undisturbed, counts, tmp_path, kind, seed):
    """Three processes are killed somewhere among their operations, the fourth by the clock."""
    number, folder, kills = random.Random(f"{kind}{seed}"), tmp_path / "run", []
    for _ in range(3):
        op = kill_at(server, kind, folder, number.randint(1, len(undisturbed(kind)[1])))
        if op is not None:
            kills.append(op)
    if server.run(kind, folder, kill_after=number.uniform(0.05, 2.0)) == KILLED:
        kills.append("by the clock")
    finish_and_compare(server, kind, folder, undisturbed, counts, kills)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(8))
def test_a_kill_at_every_operation(server, undisturbed, counts, tmp_path, start):
    """Of a run with two stages; one kill each."""
    for number in range(1 + start, 1 + len(undisturbed("staged")[1]), 8):
        folder = tmp_path / f"run-{number}"
        op = kill_at(server, "staged", folder, number)
        finish_and_compare(server, "staged", folder, undisturbed, counts, [f"{number}: {op}"])
