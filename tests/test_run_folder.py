"""The folder of a run: claimed by one process, and holding what its summary speaks of."""

import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from small_run import small_flow, small_gaussian, small_trainer, stopping_at
from test_checkpoint import assert_same_state

import flows
from flows.evaluation import density, likelihood
from flows.training import OutputFolderError, TrainingInterrupted, load_checkpoint
from flows.training.files import claimed_folder, new_folder


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path):
    folders = [new_folder(tmp_path / "runs") for _ in range(4)]
    assert len(set(folders)) == 4
    assert all(folder.is_dir() for folder in folders)


def test_a_folder_is_claimed_by_one_run_and_set_free_by_a_kill(tmp_path):
    """The second trainer starts at the third step of the first, which then goes on undisturbed."""
    dataset = small_gaussian()
    stopped = stopping_at(dataset, 3)
    refused = []

    class Intruder:
        def log(self, metrics, step):
            if step == 3 and not refused:
                with pytest.raises(OutputFolderError, match="another process is training in the output folder"):
                    small_trainer(tmp_path / "run", resume=tmp_path / "run").fit()
                refused.append(step)

        def close(self):
            pass

    with pytest.raises(TrainingInterrupted):
        small_trainer(tmp_path / "run", stopped, loggers=[Intruder()]).fit()
    assert refused == [3]

    holds = "import os, sys, filelock; filelock.FileLock(sys.argv[1]).acquire(); os.kill(os.getpid(), 9)"
    killed = subprocess.run([sys.executable, "-c", holds, str(tmp_path / "run/.lock")])
    assert killed.returncode == -signal.SIGKILL
    with claimed_folder(tmp_path / "run", resuming=True) as folder:
        assert folder == tmp_path / "run"


def test_without_a_folder_one_is_made_and_written_into_the_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = small_trainer(None, stopping_at(small_gaussian(), 2), config={"output_dir": None, "a": 1})
    with pytest.raises(TrainingInterrupted) as stop:
        trainer.fit()
    folder = stop.value.checkpoint.parents[1]
    assert folder.parent.as_posix() == "runs/gaussian"
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {"output_dir": str(folder), "a": 1}
    small_trainer(None, resume=folder, config={"output_dir": str(folder), "a": 2}).fit()  # changed: watched otherwise
    assert yaml.safe_load((folder / "config.yaml").read_text())["a"] == 2
    assert len(list((tmp_path / "runs/gaussian").iterdir())) == 1


def test_a_failed_validation_loses_no_step(tmp_path, monkeypatch):
    def fails_at_the_second(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise flows.SolverError("the step size underflowed", 0.5, 1e-9)
        return likelihood(*args, **kwargs)

    calls = []
    monkeypatch.setattr(density, "likelihood", fails_at_the_second)
    with pytest.raises(
        flows.SolverError,
        match=r"validation stopped at step 6 .*resume from is in .*last.pt\): the step size underflowed",
    ):
        small_trainer(tmp_path / "run", checkpoint_every=0).fit()
    assert load_checkpoint(tmp_path / "run/checkpoints/last.pt")["position"]["step"] == 6
    small_trainer(tmp_path / "run", resume=tmp_path / "run", checkpoint_every=0).fit()
    small_trainer(tmp_path / "straight", checkpoint_every=0).fit()
    one, two = (load_checkpoint(tmp_path / name / "checkpoints/last.pt") for name in ("run", "straight"))
    assert all(torch.equal(one["model"][name], value) for name, value in two["model"].items())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_test_says_how_to_go_on(tmp_path, number):
    dataset = small_gaussian()
    test_batches = dataset.test_batches

    def interrupted(*args, **kwargs):
        signal.raise_signal(number)
        return test_batches(*args, **kwargs)

    dataset.test_batches = interrupted
    with pytest.raises(TrainingInterrupted, match=r"stopped after step 11 and saved in .*last.pt") as stop:
        small_trainer(tmp_path / "run", dataset).fit()
    assert stop.value.signal_number == number
    resumed = small_trainer(tmp_path / "run", resume=stop.value.checkpoint).fit()
    straight = small_trainer(tmp_path / "straight").fit()
    assert (resumed.metrics["nll"], resumed.validation_score) == (straight.metrics["nll"], straight.validation_score)
    assert_same_state(*(load_checkpoint(tmp_path / name / "checkpoints/best.pt") for name in ("run", "straight")))


def validation_score(flow, dataset):
    points = torch.cat([batch.x for batch in dataset.validation_batches(40)])
    return float(-flow.log_prob(points).detach().mean())


@pytest.mark.parametrize("lies", ["with the other run's", "astray", "under the other run's"])
def test_the_best_weights_are_those_of_this_run(tmp_path, lies):
    """The checkpoint to resume from comes without its best weights, and beside another run's, which seem better."""
    run, other, dataset = tmp_path / "run", tmp_path / "other", small_gaussian()
    small_trainer(other, seed=1).fit()
    with pytest.raises(TrainingInterrupted):
        small_trainer(run, stopping_at(small_gaussian(), 8)).fit()
    for file in [*(run / "checkpoints").iterdir(), *(other / "checkpoints").iterdir()]:
        content = torch.load(file)
        content["position"]["best_score"] = -1e9
        torch.save(content, file)
    last, best = run / "checkpoints/last.pt", other / "checkpoints/best.pt"
    resumed = {"with the other run's": best.with_name("last.pt"), "astray": other / "last.pt"}.get(lies, last)
    new = tmp_path / "new"
    if resumed != last:
        shutil.copyfile(last, resumed)
    else:  # in its own folder
        shutil.copyfile(best, run / "checkpoints/best.pt")
        new = run
    flow = small_flow(dataset, flows.divergence.Exact())
    summary = small_trainer(new, dataset, flow=flow, resume=resumed).fit()
    assert summary.position.best_step > 8
    assert summary.validation_score == pytest.approx(validation_score(flow, dataset), abs=1e-10)
    best = load_checkpoint(new / "checkpoints/best.pt")
    assert best["run"] == load_checkpoint(last)["run"]
    assert all(torch.equal(best["ema"][name], value) for name, value in flow.state_dict().items())
