"""The same command starts a run, continues it, or says that all is done; and so does a sweep."""

import csv
import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from test_scripts import ROOT, TINY, without_config

import flows
from flows.cli.sweeps import sweep_results, sweep_table
from flows.errors import FlowsError
from flows.naming import concrete_subclasses
from flows.training import OutputFolderError, Trainer, TrainingInterrupted, load_checkpoint
from flows.training.continuing import discard_unsaved

AUTO = [*TINY, "output_dir=run", "resume=auto"]
MORE = "objective.maximum_likelihood.steps=5"


@pytest.fixture
def killed(monkeypatch):
    """Let training die like a process that is killed, before or after it saves its state."""

    def kill(function):
        def die(trainer, *arguments):
            function(trainer, *arguments)
            raise SystemExit(137)

        return die

    return kill


def test_the_same_command_starts_continues_and_ends(run, tmp_path):
    assert run("train", *AUTO)[0] == 0
    summary = (tmp_path / "run/summary.json").read_text()
    code, out, err = run("train", *AUTO)
    assert (code, err) == (0, "")
    assert "all is done in run" in out
    assert f"{json.loads(summary)['test_nll']:.4f}" in out
    assert (tmp_path / "run/summary.json").read_text() == summary
    code, _, err = run("train", *AUTO, MORE)  # steps may change, and then there is something to do
    assert (code, err) == (0, "")
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 9


def test_a_run_that_was_killed_goes_on_like_one_that_was_not(run, tmp_path, monkeypatch, killed):
    for when in ("_open_folder", "_train"):  # before anything was saved, and after
        monkeypatch.setattr(Trainer, when, killed(getattr(Trainer, when)))
        assert run("train", *AUTO)[0] == 137
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        assert not (tmp_path / "run/summary.json").exists()
    code, out, err = run("train", *AUTO)
    assert code == 0, err
    assert "NLL" in out
    assert run("train", *TINY, "output_dir=straight")[0] == 0
    one, two = (load_checkpoint(tmp_path / name / "checkpoints/last.pt") for name in ("run", "straight"))
    assert without_config(one).keys() == without_config(two).keys()
    torch.testing.assert_close(one["ema"], two["ema"], rtol=0, atol=0)


def test_what_an_early_kill_leaves_is_dropped(run, tmp_path, monkeypatch, killed):
    monkeypatch.setattr(Trainer, "_open_folder", killed(Trainer._open_folder))
    assert run("train", *AUTO)[0] == 137
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    others = ("run/mine.txt", "run/events.out.tfevents.1.other", "run/.draft.tmp")
    (tmp_path / "run/metrics.jsonl").touch()
    (tmp_path / "run/events.out.tfevents.1.run").write_text("half")
    for name in others:
        (tmp_path / name).write_text("kept")
    code, _, err = run("train", *AUTO, "seed=1")
    assert code == 2
    assert "the run in run was started with other settings: seed was 0 and is now 1" in err
    assert run("train", *AUTO)[0] == 0
    assert not (tmp_path / "run/events.out.tfevents.1.run").exists()
    assert all((tmp_path / name).read_text() == "kept" for name in others)


def test_what_others_have_left_is_not_touched(run, tmp_path):
    assert run("train", *AUTO)[0] == 0
    for name in ("checkpoints/last.pt", "checkpoints/best.pt", "summary.json"):
        (tmp_path / "run" / name).rename(tmp_path / "run" / f"{name}.bak")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    code, _, err = run("train", *AUTO)
    assert code == 2
    assert "holds metrics.jsonl of a run but no checkpoints/last.pt" in err
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_settings_of_another_program_are_not_overwritten(tmp_path):
    (tmp_path / "config.yaml").write_text("model: theirs\n")
    with pytest.raises(OutputFolderError, match=r"holds a config.yaml that is not of such a run"):
        discard_unsaved(tmp_path, {"seed": 0})
    discard_unsaved(tmp_path, None)
    assert (tmp_path / "config.yaml").read_text() == "model: theirs\n"


def test_other_settings_are_refused_by_name(run, tmp_path):
    assert run("train", *AUTO)[0] == 0
    code, _, err = run("train", *AUTO, "field.hidden=[8,9]", "optimization.ema_decay=0.5")
    assert code == 2
    assert "field.hidden was [8, 8] and is now [8, 9]" in err
    assert "optimization.ema_decay was " in err
    code, _, err = run("train", *AUTO, "reporting.log_every=2", "hardware.devices=1")  # how it is watched
    assert (code, err) == (0, "")


def test_it_needs_a_folder_and_what_it_finds_there(run, tmp_path):
    for arguments in ([*TINY, "resume=auto"], ["-m", *TINY, "resume=auto", "seed=1,2"]):
        code, _, err = run("train", *arguments)
        assert code == 2
        assert "resume=auto starts a run" in err
        assert "give output_dir=..." in err
    assert not list(tmp_path.rglob("*.pt"))
    assert run("train", *AUTO)[0] == 0
    (tmp_path / "run/checkpoints/last.pt").unlink()
    code, _, err = run("train", *AUTO)
    assert code == 2
    assert "no checkpoints/last.pt to continue it from" in err
    assert "or continue from step 7 with resume=run/checkpoints/best.pt alone" in err
    assert run("train", "resume=run/checkpoints/best.pt")[0] == 0  # that works
    assert (tmp_path / "run/checkpoints/last.pt").is_file()


def test_a_damaged_checkpoint_names_a_whole_one(run, tmp_path):
    assert run("train", *AUTO)[0] == 0
    last, best = (tmp_path / "run/checkpoints" / name for name in ("last.pt", "best.pt"))
    last.write_bytes(last.read_bytes()[:-100])
    for arguments in (AUTO, ["resume=run"]):
        code, _, err = run("train", *arguments)
        assert code == 2
        assert "last.pt is truncated or damaged" in err
        assert "best.pt is whole, after step 7: continue from it in a new folder, resume=" in err
    assert run("train", "resume=run/checkpoints/best.pt", "output_dir=new")[0] == 0  # that works
    best.write_bytes(best.read_bytes()[:-100])
    assert "No other checkpoint beside it is whole" in run("train", *AUTO)[2]


def test_a_run_whose_summary_is_damaged_is_tested_again(run, tmp_path):
    assert run("train", *AUTO)[0] == 0
    before = json.loads((tmp_path / "run/summary.json").read_text())
    (tmp_path / "run/summary.json").write_text('{"test_nll": ')
    code, out, _ = run("train", *AUTO)
    assert code == 0
    assert "NLL" in out
    assert json.loads((tmp_path / "run/summary.json").read_text())["test_nll"] == before["test_nll"]


def test_an_interrupted_sweep_goes_on(run, tmp_path):
    sweep = ["-m", *TINY, "output_dir=sweep", "resume=auto", "seed=1,2,3"]
    assert run("train", *sweep)[0] == 0
    untouched = (tmp_path / "sweep/seed-1/summary.json").stat().st_mtime_ns
    (tmp_path / "sweep/seed-2/summary.json").unlink()  # it was killed during its test
    shutil.rmtree(tmp_path / "sweep/seed-3")  # it had not begun
    code, out, err = run("train", *sweep)
    assert code == 0, err
    assert (tmp_path / "sweep/seed-1/summary.json").stat().st_mtime_ns == untouched
    assert out.count("all is done in ") == 1
    with (tmp_path / "sweep/sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["run"], row["seed"], row["status"]) for row in rows} == {
        (f"seed-{seed}", str(seed), "done") for seed in (1, 2, 3)
    }


def test_a_table_ranks_what_has_no_result_last(tmp_path):
    def job(name, summary, **record):
        (tmp_path / name).mkdir()
        (tmp_path / name / "job.json").write_text(json.dumps({"status": "done", "swept": {"seed": name}, **record}))
        if summary is not None:
            (tmp_path / name / "summary.json").write_text(summary)

    job("a", json.dumps({"test_nll": None, "test_nll_unresolved": -60.8, "test_unresolved": "rtol", "data": "x"}))
    job("b", '{"test_nll": 3')
    job("c", None, status="failed", error="seed must be ...")
    job("d", json.dumps({"test_nll": 2.5, "test_unresolved": None, "data": "x"}))
    job("e", json.dumps({"test_nll": 1.5, "test_unresolved": None, "data": "x"}))
    job("f", None, status="stopped")
    (tmp_path / "g").mkdir()
    (tmp_path / "g/job.json").write_text("{")
    results = sweep_results(tmp_path)
    assert list(results)[:3] == ["e", "d", "a"]
    assert {name: result["status"] for name, result in results.items()} == {
        "e": "done",
        "d": "done",
        "a": "unresolved",
        "b": "damaged summary",
        "c": "failed",
        "f": "stopped",
        "g": "without summary",
    }
    table = sweep_table(results).splitlines()
    assert table[3].split() == ["a", "unresolved", "unresolved"]
    assert "60.8" not in "\n".join(table)
    assert results["c"]["error"] == "seed must be ..."


ERRORS = sorted({FlowsError, *concrete_subclasses(FlowsError)}, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_errors_survive_being_sent_to_another_process(kind):
    error = kind("seed", 0.5, 1e-9, "x", 3) if issubclass(kind, flows.SolverError) else kind("seed")
    error.add_note("a note") if hasattr(error, "add_note") else None
    error.more = lambda: None  # what cannot be pickled is left out
    sent = pickle.loads(pickle.dumps(error))
    assert type(sent) is kind
    assert (str(sent), sent.args) == (str(error), error.args)
    assert vars(sent) == {name: value for name, value in vars(error).items() if name != "more"}


def test_an_interruption_survives_it_too(tmp_path):
    stop = pickle.loads(pickle.dumps(TrainingInterrupted(tmp_path, 3, 15, ["mine"])))
    assert (stop.checkpoint, stop.step, stop.signal_number, stop.packages) == (tmp_path, 3, 15, ("mine",))


def start(*arguments, cwd):
    """Run `train` in a process of its own; returns its exit code and what it printed."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(ROOT / "scripts/train.py"), "-m", *arguments]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_failed_job_takes_no_other_with_it(launcher, tmp_path):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    steps = [setting for setting in TINY if not setting.startswith("solver.step_size")]
    sweep = [*steps, f"hydra/launcher={launcher}", "solver.step_size=-1,0.5", "output_dir=sweep"]
    code, out, err = start(*sweep, cwd=tmp_path)
    assert code == 2, err
    assert "Traceback" not in err
    assert "Error in solver.step_size--1: solver.step_size of method 'rk4' must be" in err
    assert " +- " in out  # of the good one
    results = sweep_results(tmp_path / "sweep")
    assert [(name, result["status"]) for name, result in results.items()] == [
        ("solver.step_size-0.5", "done"),
        ("solver.step_size--1", "failed"),
    ]
    assert "must be" in results["solver.step_size--1"]["error"]


@pytest.mark.slow
def test_a_failed_job_is_a_failed_trial_of_optuna(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    steps = [setting for setting in TINY if not setting.startswith("solver.step_size")]
    optuna = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1", "output_dir=sweep"]
    code, _, err = start(
        *steps, *optuna, "hydra.sweeper.sampler.seed=1", "solver.step_size=choice(0.5,-1)", cwd=tmp_path
    )
    assert code in (0, 2), err
    assert "Traceback" not in err
    results = sweep_results(tmp_path / "sweep")
    assert len(results) == 3
    good = {name: result["validation_score"] for name, result in results.items() if result["status"] == "done"}
    best = yaml.safe_load((tmp_path / "sweep/optimization_results.yaml").read_text())
    assert best["best_value"] == min(good.values())


def test_what_a_resumed_run_is_told_is_compared_with_its_own_settings(run, tmp_path):
    """The command that started it may be given again; what would make it another run is refused by name."""
    assert run("train", *TINY, "output_dir=run", "seed=3")[0] == 0
    code, _, err = run("train", *TINY, "resume=run", "seed=3", "solver=rk4", "field=mlp", "reporting=default")
    assert code == 0, err
    refused = {
        "seed=4": r"seed cannot change.*\(seed is 3\)",
        "data=moons": "data cannot change",
        "solver=dopri5": "solver cannot change",
        "field.hidden=[8]": r"field.hidden cannot change.*\(field.hidden is \[8, 8\]\)",
        "objective.ml.steps=9": "there is no setting objective.ml; objective has flow_matching, maximum_likelihood",
        "objective.flow_matching.step=9": r"objective.flow_matching.step \(did you mean .*steps",
        "field.widths=[8]": "there is no setting field.widths",
        "~reporting.plot_every": "removes nothing|cannot remove",
    }
    for override, message in refused.items():
        code, _, err = run("train", "resume=run", override)
        assert (code, bool(re.search(message, err))) == (2, True), err
    code, _, err = run("train", "resume=run", "steps=6")
    assert "steps=6 are fewer than the 7 that the run has taken" in err
    code, _, err = run("train", "resume=run", "steps=14")
    assert code == 0, err
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 14


def test_the_advice_of_a_run_works_as_printed(run, tmp_path, caplog):
    run("train", *TINY, "output_dir=run")
    _, _, err = run("train", "resume=run")
    advice = re.search(r"give it more: (resume=\S+ objective\.\S+)", err)[1]
    code, _, err = run("train", *advice.split())
    assert code == 0, err
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 10
