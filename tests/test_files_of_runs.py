"""Files of a run: what is written over, what is told when that fails, and in which order they are."""

import errno
import os
import signal
import sys
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure
from small_run import small_gaussian, small_trainer, stopping_at

from flows import writing
from flows.cli.sweeps import _draw
from flows.errors import FileError
from flows.training import OutputFolderError, TensorBoardLogger, TrainingInterrupted
from flows.training.files import EVENTS_OF_RUNS
from flows.writing import atomic_write, write_result


def failing(error, first=None):
    def write(file):
        try:
            if first is not None:
                raise first
        finally:
            raise error

    return write


def test_only_failures_of_the_disk_are_told_as_such(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(OSError, match="full"):
        atomic_write(path, failing(RuntimeError("of torch"), OSError(errno.ENOSPC, "full")))
    with pytest.raises(ValueError, match="of its own"):
        atomic_write(path, failing(ValueError("of its own"), OSError(errno.ENOENT, "a font")))
    try:
        raise OSError(errno.ENOENT, "of the caller")
    except OSError:
        with pytest.raises(RuntimeError, match="of its own"):
            atomic_write(path, failing(RuntimeError("of its own")))
    assert not list(tmp_path.iterdir())


def test_permissions_and_links_stay(tmp_path):
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("old")
    real.chmod(0o664)
    link.symlink_to(real)
    write_result(link, "new")
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert real.stat().st_mode & 0o777 == 0o664


def test_nothing_is_sent_to_processes_on_windows(monkeypatch):
    sent = []
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "win32")
        patch.setattr(os, "kill", lambda *arguments: sent.append(arguments))
        assert writing._lives(os.getppid())
    assert not sent


def test_event_files_are_in_order_whatever_the_clock_says(tmp_path, monkeypatch):
    names = []
    for now in (2_000_000_000.0, 1_900_000_000.0, 1_800_000_000.0):
        monkeypatch.setattr("flows.training.events.time", SimpleNamespace(time=lambda now=now: now))
        logger = TensorBoardLogger(tmp_path, suffix=EVENTS_OF_RUNS)
        logger.close()
        names += {path.name for path in tmp_path.iterdir()} - set(names)
    assert len(names) == 3
    assert names == sorted(names)


def test_the_best_weights_do_not_overwrite_the_last(tmp_path):
    with pytest.raises(TrainingInterrupted):
        small_trainer(tmp_path / "run", stopping_at(small_gaussian(), 8)).fit()
    last, best = (tmp_path / "run/checkpoints" / name for name in ("last.pt", "best.pt"))
    before = last.read_bytes()
    with pytest.raises(OutputFolderError, match=r"would overwrite last.pt.*choose another output_dir"):
        small_trainer(tmp_path / "run", resume=best)
    assert last.read_bytes() == before
    small_trainer(tmp_path / "new", resume=best)


def test_a_step_that_was_not_done_is_not_lost(tmp_path):
    """Two signals come within the fifth step, and last.pt is of the start."""
    dataset = stopping_at(stopping_at(small_gaussian(), 5), 5)
    with pytest.raises(TrainingInterrupted, match="4 later steps are lost") as stop:
        small_trainer(tmp_path / "run", dataset, checkpoint_every=0, validate_every=0).fit()
    assert (stop.value.step, stop.value.lost, stop.value.signal_number) == (0, 4, signal.SIGINT)


def test_a_full_disk_is_not_told_as_a_damaged_picture(tmp_path, monkeypatch):
    (tmp_path / "0/plots").mkdir(parents=True)
    Figure(figsize=(1, 1)).savefig(tmp_path / "0/plots/density.png")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match=r"sweep.png cannot be written \(No space left"):
        _draw(tmp_path / "sweep.png", {"0": {}})
    assert not list(tmp_path.glob("*sweep*"))
