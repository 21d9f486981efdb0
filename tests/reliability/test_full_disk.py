"""A disk that fails under a run: one paragraph, whole files, and a run that goes on once the disk works again."""

import errno
import os
import shutil
import subprocess

import pytest
from figures import report_figure
from jobs import log_of
from kinds import differences, state

from flows.training import load_checkpoint

FAILURE = 1  # the exit code


@pytest.fixture(scope="module")
def counts():
    found = {"failures": 0, "tracebacks": 0}
    yield found
    report_figure(f"failures after the start: {found['failures']} runs, {found['tracebacks']} tracebacks")


def check(server, folder, code, words, undisturbed, counts, expected_code=FAILURE):
    """The run ended in one paragraph with these words; its checkpoints are whole, and it goes on to the same end."""
    log = log_of(folder)
    counts["failures"] += 1
    counts["tracebacks"] += "Traceback" in log
    assert code == expected_code, log
    assert "Traceback" not in log, log
    for word in words:
        assert word in log, (word, log)
    for path in folder.glob("checkpoints/*.pt"):
        load_checkpoint(path)
    if undisturbed is not None:
        assert server.run("staged", folder) == 0, log_of(folder)
        assert not differences(undisturbed, state(folder))


ERRORS = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO, errno.EMFILE, errno.ESTALE]
CASES = [
    pytest.param(number, only, marks=[] if (number, only) == (errno.ENOSPC, "") else [pytest.mark.slow])
    for number in ERRORS
    for only in ("", "checkpoints", "best.pt", "summary")
]


@pytest.mark.parametrize(("number", "only"), CASES, ids=lambda value: errno.errorcode.get(value, value or "all files"))
def test_what_must_be_saved_stops_the_run(server, undisturbed, counts, tmp_path, number, only):
    folder = tmp_path / "run"
    harm = {"error": number, "error_at": 60, "only": only}
    code = server.run("staged", folder, disk=harm)
    words = [os.strerror(number), "cannot be written", "last.pt", "resume="]
    check(server, folder, code, words, undisturbed, counts)


@pytest.mark.slow
@pytest.mark.parametrize("only", ["metrics.jsonl", "events", "plots"])
@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_what_only_tells_of_the_run_does_not(server, counts, tmp_path, number, only):
    folder = tmp_path / "run"
    code = server.run("staged", folder, disk={"error": number, "error_at": 60, "only": f"write {folder}/{only}"})
    check(server, folder, code, [], None, counts, expected_code=0)


@pytest.mark.slow
@pytest.mark.parametrize("at", range(1, 60, 7))
def test_a_disk_that_is_full_from_the_start(server, undisturbed, counts, tmp_path, at):
    folder = tmp_path / "run"
    code = server.run("staged", folder, disk={"error": errno.ENOSPC, "error_at": at})
    assert code in (1, 2)
    check(server, folder, code, [os.strerror(errno.ENOSPC)], undisturbed, counts, expected_code=code)


@pytest.mark.slow
@pytest.mark.parametrize("size", [4_000, 20_000, 60_000])
def test_a_limit_on_the_size_of_files(server, undisturbed, counts, tmp_path, size):
    folder = tmp_path / "run"
    code = server.run("staged", folder, file_size=size)
    if code:
        check(server, folder, code, [os.strerror(errno.EFBIG)], undisturbed, counts)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["step", "validation", "pictures", "test"])
def test_a_folder_that_is_removed(server, counts, tmp_path, phase):
    folder = tmp_path / "run"
    code = server.run("staged", folder, phase=phase, removed=str(folder))
    check(server, folder, code, ["folder", "is gone"], None, counts)
    assert not folder.exists()


@pytest.mark.slow
def test_checkpoints_that_are_removed(server, counts, tmp_path):
    folder = tmp_path / "run"
    code = server.run("staged", folder, phase="test", removed=str(folder / "checkpoints"))
    check(server, folder, code, [], None, counts, expected_code=code)


@pytest.mark.parametrize("phase", ["step", *(pytest.param(p, marks=pytest.mark.slow) for p in ("validation", "test"))])
def test_out_of_memory(server, counts, tmp_path, phase):
    folder = tmp_path / "run"
    code = server.run("staged", folder, phase=phase, memory=True)
    check(server, folder, code, ["not enough memory", "batch_size"], None, counts)
    assert (
        load_checkpoint(folder / "checkpoints/last.pt")["position"]["step"]
        == {"step": 3, "validation": 3, "test": 11}[phase]
    )
    assert server.run("staged", folder) == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, as root; another test does without."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"this process may not mount a file system: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)])


@pytest.mark.slow
def test_a_small_file_system(server, undisturbed, counts, small_disk, tmp_path):
    folder = small_disk / "run"
    assert server.run("staged", folder, phase="step", signals=["SIGTERM"]) == 143
    shutil.copyfile(f"{folder}.log", tmp_path / "log")
    with (small_disk / "ballast").open("wb") as ballast:  # all but 12 kB
        free = shutil.disk_usage(small_disk).free
        ballast.write(bytes(max(free - 12_000, 0)))
    code = server.run("staged", folder)
    check(server, folder, code, [os.strerror(errno.ENOSPC)], None, counts)
    (small_disk / "ballast").unlink()
    assert server.run("staged", folder) == 0
    assert not differences(undisturbed, state(folder))


@pytest.mark.slow
def test_a_file_system_that_becomes_read_only(server, undisturbed, counts, small_disk):
    folder = small_disk / "run"
    assert server.run("staged", folder, phase="step", signals=["SIGTERM"]) == 143
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    probe = subprocess.run(["touch", str(small_disk / "probe")], capture_output=True)
    assert probe.returncode
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert server.run("staged", folder) == 0
    assert not differences(undisturbed, state(folder))
