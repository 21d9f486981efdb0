"""The three programs as a person runs them: files, figures, messages and exit codes."""

import contextlib
import csv
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from test_checkpoint import assert_same_state

import flows
from flows import errors
from flows.cli.errors import explain, readable_errors
from flows.cli.grammar import quoted_override
from flows.cli.help import help_text
from flows.cli.jobs import fixed_keys, job_name, swept_settings
from flows.cli.main import PROGRAMS
from flows.cli.sweeps import sweep_table
from flows.datasets.tables.readers import read_table
from flows.errors import DataWarning
from flows.training import (
    CheckpointError,
    NonFiniteLossError,
    load_checkpoint,
    load_flow,
    read_metrics,
    training_curves,
)

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "data=gaussian",
    "data.num_validation=30",
    "data.num_test=40",
    "field.hidden=[8,8]",
    "solver=rk4",
    "solver.step_size=0.5",
    "objective.flow_matching.steps=4",
    "objective.flow_matching.batch_size=16",
    "objective.flow_matching.warmup_steps=0",
    "objective.maximum_likelihood.steps=3",
    "objective.maximum_likelihood.batch_size=16",
    "objective.maximum_likelihood.warmup_steps=0",
    "hardware.accelerator=cpu",
    "reporting.plot_every=null",
    "reporting.log_every=1",
    "reporting.progress_bar=false",
]


def test_samples_of_a_class_by_its_name_go_into_any_format(run, tmp_path):
    quick = ["data=moons_by_class", *TINY[1:]]
    code, _, err = run("train", *quick, "output_dir=run")
    assert code == 0, err
    drawn = {}
    for ending, label in ((".npy", "lower"), (".csv", "1"), (".parquet", "lower")):
        code, out, err = run("sample", "checkpoint=run", "num_samples=20", f"class={label}", f"output=s{ending}")
        assert (code, "20 samples of shape (2,)" in out) == (0, True), err
        drawn[ending] = np.load("s.npy") if ending == ".npy" else read_table(f"s{ending}")[0]
    assert drawn[".csv"] == pytest.approx(drawn[".npy"], abs=1e-6)
    assert drawn[".parquet"] == pytest.approx(drawn[".npy"], abs=0)
    assert "samples: 100%" in err
    code, out, err = run("sample", "checkpoint=run", "output=only.png", "progress_bar=false")
    assert (tmp_path / "only.png").stat().st_size > 1000
    assert not list(tmp_path.glob("only.[!p]*"))
    assert "samples:" not in err
    code, _, err = run("sample", "checkpoint=run", "class=lowest")
    assert code == 2
    assert "class must be one of upper, lower, or a whole number from 0 to 1, got 'lowest'; did you mean lower?" in err
    code, _, err = run("sample", "checkpoint=run", "output=s.txt")
    assert "output must end in .npy, .csv, .parquet or .png, got 's.txt'" in err


def test_an_interrupted_sample_keeps_what_was_drawn(run, tmp_path, monkeypatch):
    run("train", *TINY, "output_dir=run")
    sample, solves = flows.CNF.sample, []

    def interrupted(self, *arguments, **named):
        solves.append(1)
        if len(solves) == 3:
            raise KeyboardInterrupt
        return sample(self, *arguments, **named)

    whole = ("sample", "checkpoint=run", "num_samples=25", "batch_size=10", "plot=false")
    run(*whole, "output=whole.npy")
    monkeypatch.setattr(flows.CNF, "sample", interrupted)
    code, out, _ = run(*whole, "output=part.npy")
    assert code == 128 + signal.SIGINT
    assert "20 of 25 samples of shape (2,) in part.npy" in out
    assert np.array_equal(np.load("part.npy"), np.load("whole.npy")[:20])
    solves[:] = [1, 1]
    code, out, _ = run(*whole, "output=none.npy")
    assert (code, (tmp_path / "none.npy").exists()) == (128 + signal.SIGINT, False)


def test_train_evaluate_and_sample(run, tmp_path, monkeypatch):
    code, out, _ = run("train", *TINY, "output_dir=run", "seed=3")
    assert code == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert f"{summary['test_nll']:.4f} ± {summary['test_nll_se']:.4f} nats (40 points)" in out
    assert summary["steps"] == 7
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"last.pt", "best.pt"}
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert config["field"]["hidden"] == [8, 8]
    assert (config["seed"], config["output_dir"], config["solver"]["step_size"]) == (3, "run", 0.5)
    assert "${" not in (tmp_path / "run/config.yaml").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]  # all that the run produces is in there

    code, out, _ = run("evaluate", "checkpoint=run", "output=again.json")
    assert "evaluated with Analytic" in out
    again = json.loads((tmp_path / "again.json").read_text())
    assert code == 0
    assert again["nll"] == pytest.approx(summary["test_nll"], abs=1e-6)
    assert again["gap"] == pytest.approx(summary["test_gap"], abs=1e-6)
    assert f"{again['nll']:.4f} ± {again['nll_se']:.4f} nats (40 points)" in out

    changes = ("divergence=hutchinson", "divergence.num_probes=16", "solver.step_size=0.1", "dtype=float64")
    code, out, _ = run("evaluate", "checkpoint=run/checkpoints/last.pt", "part=validation", *changes)
    (file,) = (tmp_path / "run/evaluations").iterdir()
    other = json.loads(file.read_text())
    assert code == 0
    assert other["divergence"]["num_probes"] == 16
    assert other["solver"] == {**config["solver"], "step_size": 0.1}
    assert (other["points"], other["nfe"], other["part"]) == (30, 40, "validation")
    assert other["probe_se"] > 0
    assert abs(other["nll"] - summary["validation_score"]) < 5 * other["probe_se"] + 1e-3
    assert "evaluated with Hutchinson, mean of 16" in out

    code, out, _ = run("sample", "checkpoint=run", "num_samples=25", "output=drawn/s.csv", "seed=1", "batch_size=10")
    rows = np.loadtxt(tmp_path / "drawn/s.csv", delimiter=",", skiprows=1)
    assert code == 0
    assert (tmp_path / "drawn/s.csv").read_text().startswith("x0,x1\n")
    assert (tmp_path / "drawn/s.png").stat().st_size > 1000
    run("sample", "checkpoint=run", "num_samples=25", "output=s.npy", "seed=1", "batch_size=10", "plot=false")
    samples = np.load(tmp_path / "s.npy")
    assert samples == pytest.approx(rows, abs=1e-6)
    assert samples.shape == (25, 2)
    assert not (tmp_path / "s.png").exists()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        again = load_flow("run").sample((10,), generator=generator)
    rounding = {"rtol": 0, "atol": 1e-6 if again.is_cuda else 0}
    torch.testing.assert_close(again.cpu(), torch.from_numpy(samples[:10]), **rounding)

    code, _, err = run("train", *TINY, "output_dir=run")
    assert code == 2
    assert "the output folder run holds another run already" in err
    code, _, err = run("train", "resume=run", "data=moons")
    assert code == 2
    assert "data cannot change, only the steps of a stage and how it is run and watched" in err
    for choice in ("optimization.ema_decay=0.9", "optimization.gradient_clip=1", "hardware.precision=64-true"):
        code, _, err = run("train", "resume=run", choice)
        assert code == 2
        assert f"{choice.partition('=')[0]} cannot change" in err
    monkeypatch.setattr(flows.CNF, "sample", None)  # nothing is drawn for it
    code, _, err = run("sample", "checkpoint=run", "output=samples.txt")
    assert code == 2
    assert "output must end in .npy, .csv, .parquet or .png" in err
    code, _, err = run("evaluate", "checkpoint=run", "part=train")
    assert code == 2
    assert "part must be test, validation or all, got 'train'" in err
    code, _, err = run("evaluate", "checkpoint=run", "dtype=double_trouble")
    assert code == 2
    assert "dtype must be a floating-point type" in err
    for choice, message in {
        "dtype=int64": "dtype must be a floating-point type",
        "seed=-1": "seed must be a whole number",
        "solver_error_points=abc": "solver_error_points must be a whole number, got 'abc'",
        "checkpoint=[1]": "checkpoint must be text or null, got [1]",
        "trust=mine": "trust must be a list of text, got 'mine'",
    }.items():
        code, _, err = run("evaluate", "checkpoint=run", choice)
        assert code == 2
        assert message in err
    code, _, err = run("evaluate", "checkpoint=run", "divergence=exact", "divergence.num_probes=4")  # it has none
    assert code == 2
    assert "num_probes" in err


def test_digits_from_levels_to_levels(run, tmp_path):
    """Discrete data: bits per dimension that add up in every file, a bound of several draws, outliers, levels."""
    settings = [*TINY[3:], "data=digits", "data.test_fraction=0.03", "data.validation_fraction=0.03", "output_dir=run"]
    code, out, err = run("train", *settings)
    assert code == 0, err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    bits = summary["test_bits_per_dim"]
    assert bits == pytest.approx(summary["test_nll"] / (64 * np.log(2)), rel=1e-9)
    assert sum(summary["test_bits_per_dim_parts"].values()) == pytest.approx(bits, rel=1e-9)
    assert f"bits/dim  {bits:.4f} ± {summary['test_bits_per_dim_se']:.4f} = " in out
    curves = read_metrics(tmp_path / "run/metrics.jsonl")
    (step, value) = curves["validation/bits_per_dim"][-1]
    parts = [dict(curve)[step] for name, curve in curves.items() if name.startswith("bits_per_dim/")]
    assert len(parts) == 4
    assert sum(parts) == pytest.approx(value, rel=1e-9)
    assert value == pytest.approx(dict(curves["validation/nll"])[step] / (64 * np.log(2)), rel=1e-9)
    curves = training_curves(curves)
    trained = dict(curves["train/bits_per_dim"])
    assert trained[7] == pytest.approx(dict(curves["train/nll"])[7] / (64 * np.log(2)), rel=1e-6)

    code, out, err = run("evaluate", "checkpoint=run", "output=one.json")
    assert code == 0, err
    assert json.loads((tmp_path / "one.json").read_text())["bits_per_dim"] == pytest.approx(bits, abs=1e-6)
    code, out, err = run("evaluate", "checkpoint=run", "num_draws=3", "outliers=shuffled", "output=many.json")
    assert code == 0, err
    many = json.loads((tmp_path / "many.json").read_text())
    assert many["bits_per_dim"] < bits
    assert many["bits_per_dim_parts"]["importance_weighting"] < 0
    assert sum(many["bits_per_dim_parts"].values()) == pytest.approx(many["bits_per_dim"], rel=1e-9)
    assert many["draw_se"] > 0
    assert many["auroc_nll"] > 0.8
    assert f"{many['auroc_nll']:.4f} ± {many['auroc_nll_se']:.4f} by NLL" in out
    assert len((tmp_path / "many.csv").read_text().splitlines()) == 1 + 2 * many["points"]
    other = ["data@outliers=digits", "outliers.split_seed=1", "outliers.test_fraction=0.2", "output=same.json"]
    with pytest.warns(DataWarning, match=r"\d+ of 359 test points are training points of the run"):
        code, _, err = run("evaluate", "checkpoint=run", *other)
    assert code == 0, err
    assert 0.3 < json.loads((tmp_path / "same.json").read_text())["auroc_nll"] < 0.7  # digits like any others
    for mistake, message in (
        (["data@outliers=digits", "outliers.seeds=1"], "there is no setting outliers.seeds"),
        (["transform=identity"], "transform cannot be chosen"),
        (["evaluation=density"], "evaluation cannot be chosen"),
    ):
        code, _, err = run("evaluate", "checkpoint=run", *mistake)
        assert code == 2
        assert message in err
    code, _, err = run("evaluate", "checkpoint=run", "data@outliers=photo_patches")
    assert code == 2
    assert "outliers must be of the event_shape of the data 'digits', (1, 8, 8), got (3, 8, 8)" in err

    code, out, err = run("sample", "checkpoint=run", "num_samples=20", "output=s.npy", "plot=false")
    assert code == 0, err
    samples = np.load(tmp_path / "s.npy")
    assert samples.shape == (20, 1, 8, 8)
    assert set(np.unique(samples)) <= set(range(17))
    for name, message in (
        ("transform=standardise", "the data 'digits' are whole numbers from 0 to 16, on which a density can grow"),
        (
            "transform.dequantise.num_levels=256",
            "'digits' have 17 levels, and the transform was built for 256",
        ),
    ):
        code, _, err = run("train", *settings[:-1], name, "output_dir=other")
        assert code == 2
        assert message in err
    code, _, err = run("train", *TINY, "transform=dequantise_logit", "output_dir=other")
    assert code == 2
    assert "the data state no num_levels: they are continuous, and need no dequantisation" in err


def test_a_finished_run_can_be_made_longer(run, tmp_path):
    assert run("train", *TINY, "output_dir=run")[0] == 0
    code, _, err = run("train", "resume=run", "objective.maximum_likelihood.steps=5", "reporting.validate_every=1")
    assert (code, err) == (0, "")
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 9
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (config["objective"]["maximum_likelihood"]["steps"], config["reporting"]["validate_every"]) == (5, 1)
    code, out, err = run("train", "resume=run")
    assert code == 0
    assert "NLL" in out
    assert "at step 9, nothing is left to train" in err
    code, _, err = run("train", "resume=run", "output_dir=longer", "objective.maximum_likelihood.steps=6")
    assert (code, err) == (0, "")
    assert json.loads((tmp_path / "longer/summary.json").read_text())["steps"] == 10
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 9
    (tmp_path / "run/checkpoints/last.pt").rename(tmp_path / "stray.pt")
    code, _, err = run("train", "resume=stray.pt")
    assert code == 2
    assert "lies in no run's checkpoints folder; say with output_dir=... where to continue" in err


def test_a_sweep_gives_each_job_a_folder(run, tmp_path):
    code, out, err = run("train", "-m", *TINY, "divergence=exact,analytic")
    assert code == 0, err
    (sweep,) = (tmp_path / "runs/sweeps").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", sweep.name)
    found = {}
    for name in ("exact", "analytic"):
        job = sweep / f"divergence-{name}"
        summary = json.loads((job / "summary.json").read_text())
        config = yaml.safe_load((job / "config.yaml").read_text())
        assert summary["output_dir"] == config["output_dir"] == str(job)
        found[config["divergence"]["_target_"].rpartition(".")[2]] = summary["test_nll"]
    assert {path.name for path in sweep.iterdir() if path.is_dir()} == {
        "divergence-exact",
        "divergence-analytic",
    }
    assert found["Exact"] == pytest.approx(found["Analytic"], abs=1e-4)
    assert not (sweep / "sweep.png").exists()  # TINY has no pictures
    header, *rows = out.strip().splitlines()[-5:-2]
    assert header.split() == ["run", "NLL", "gap", "NFE", "steps", "seconds"]
    ranked = sorted(found, key=found.get)
    assert [row.split()[:2] for row in rows] == [
        [f"divergence-{name.lower()}", f"{found[name]:.4f}"] for name in ranked
    ]
    with (sweep / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["test_nll"]) for row in table] == [found[name] for name in ranked]
    assert [row["divergence"] for row in table] == [name.lower() for name in ranked]


@pytest.mark.parametrize("setting", ["output_dir", "hydra.sweep.dir"])
def test_a_sweep_goes_on_after_a_failed_job(run, tmp_path, setting):
    code, out, err = run("train", "-m", *TINY, f"{setting}=sweep", "solver.step_size=-1,0.5")
    assert code == 2
    assert "Error in solver.step_size--1: " in err
    assert re.search("step_size .*must be .*> 0, got -1", err)
    assert err.strip().endswith("Not all jobs of the sweep succeeded; see their errors above.")
    assert "Traceback" not in err
    assert "NLL" in out
    assert (tmp_path / "sweep/solver.step_size-0.5/summary.json").exists()
    assert out.strip().endswith("all figures in sweep/sweep.csv")
    assert out.count("all figures in") == 1


def test_a_conditional_flow_is_trained_evaluated_and_sampled_by_class(run, tmp_path):
    code, out, _ = run("train", *TINY, "data=moons_by_class", "output_dir=run")
    assert code == 0
    assert "moons_by_class" in out
    assert run("evaluate", "checkpoint=run")[0] == 0
    drawn, files = [], set()
    for choice in ("class=0", "class=1", "context=[0,1]", "seed=0"):
        code, out, err = run("sample", "checkpoint=run", "num_samples=30", "plot=false", choice)
        assert code == 0, err
        (file,) = set((tmp_path / "run/samples").glob("*.npy")) - files  # a new one each time
        files.add(file)
        drawn.append(np.load(file))
        assert drawn[-1].shape == (30, 2)
    upper, lower, the_same, mixed = drawn
    assert np.array_equal(lower, the_same)
    assert not np.allclose(upper, lower)
    assert np.all(np.isclose(mixed, upper, atol=1e-5) | np.isclose(mixed, lower, atol=1e-5))
    assert run("sample", "checkpoint=run", "class=2")[0] == 2


def test_sampling_with_guidance(run, tmp_path):
    """A weight of 1 changes nothing, one of 0 forgets the class, and 2 overstates it."""
    classes = (*TINY, "data=moons_by_class")
    assert run("train", *classes, "objective.flow_matching.objective.context_dropout=0.2", "output_dir=run")[0] == 0
    drawn = {}
    for choices in ("class=0", "class=0 guidance=1", "class=0 guidance=0", "class=1 guidance=0", "class=0 guidance=2"):
        base = ("sample", "checkpoint=run", "num_samples=20", "plot=false", "output=samples.npy")
        code, _, err = run(*base, *choices.split())
        assert code == 0, err
        drawn[choices] = np.load(tmp_path / "samples.npy")
    assert np.array_equal(drawn["class=0 guidance=1"], drawn["class=0"])
    np.testing.assert_allclose(drawn["class=0 guidance=0"], drawn["class=1 guidance=0"], atol=1e-5)
    assert abs(drawn["class=0 guidance=2"] - drawn["class=0"]).max() > 1e-3

    assert run("train", *classes, "output_dir=always")[0] == 0
    code, _, err = run("sample", "checkpoint=always", "class=0", "guidance=2", "plot=false")
    assert code == 2
    assert "no stage of this run left out contexts, so that flow has not been trained; train with" in err
    assert run("train", *TINY, "output_dir=unconditional")[0] == 0
    code, _, err = run("sample", "checkpoint=unconditional", "guidance=2")
    assert code == 2
    assert "guidance needs a field with a context_shape" in err


def test_a_table_that_has_moved(run, tmp_path):
    """Sampling goes on without it, evaluation with its new path alone; column names with commas survive."""
    rows = np.random.default_rng(0).normal(size=(60, 3)).round(4)
    lines = ['"a, in m","b ""quoted""",c', *(",".join(map(str, row)) for row in rows)]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    tiny = [override for override in TINY if not override.startswith("data")]
    code, _, err = run("train", *tiny, "data=tabular", "data.path=table.csv", "divergence=hutchinson", "output_dir=run")
    assert code == 0, err
    drawing = ("checkpoint=run", "num_samples=20", "output=drawn.csv")
    code, out, err = run("sample", *drawing)
    assert (code, "of the samples alone" in out) == (0, False), err
    assert (
        read_table(tmp_path / "drawn.csv")[1] == read_table(tmp_path / "table.csv")[1] == ["a, in m", 'b "quoted"', "c"]
    )

    (tmp_path / "table.csv").rename(tmp_path / "moved.csv")
    drawn = (tmp_path / "drawn.csv").read_text().splitlines()
    (tmp_path / "drawn.png").unlink()
    code, out, err = run("sample", *drawing)
    assert code == 0, err
    assert "of the samples alone: the data cannot be read (data: " in out
    assert (tmp_path / "drawn.csv").read_text().splitlines()[1:] == drawn[1:]
    assert (tmp_path / "drawn.png").stat().st_size > 1000
    code, out, _ = run("sample", *drawing, "data.path=moved.csv")
    assert "of the samples alone" not in out
    assert (tmp_path / "drawn.csv").read_text().splitlines() == drawn

    code, _, err = run("sample", *drawing, "data.pth=moved.csv", "plot=false", "output=drawn.npy")
    assert code == 2
    assert "there is no setting data.pth" in err
    assert run("evaluate", "checkpoint=run")[0] == 2
    changes = ("data.path=moved.csv", "divergence.num_probes=3", "divergence.mode=forward", "solver.method=midpoint")
    code, _, err = run("evaluate", "checkpoint=run", *changes, "output=new.json")
    assert code == 0, err
    content = json.loads((tmp_path / "new.json").read_text())
    assert (content["divergence"]["num_probes"], content["divergence"]["mode"]) == (3, "forward")
    assert content["divergence"]["probes"] == "rademacher"
    assert (content["solver"]["method"], content["solver"]["step_size"]) == ("midpoint", 0.5)
    code, _, err = run("evaluate", "checkpoint=run", "data.path=moved.csv", "divergence.strid=3")
    assert code == 2
    assert "there is no setting divergence.strid; divergence has num_probes, probes, mode, chunk_size" in err


def test_jobs_are_named_after_what_is_swept():
    line = ["-m", "data=moons", "divergence=exact,analytic", "seed=range(3)", "field.hidden=[8,8],[4]", "+x.y=a/b,c"]
    overrides = ["data=moons", "divergence=exact", "seed=2", "field.hidden=[8,8]", "+x.y=a/b"]
    swept = swept_settings(overrides, fixed_keys(line))
    assert job_name(swept, 5) == "divergence-exact_seed-2_field.hidden-[8,8]_x.y-a-b"
    assert job_name(swept, 5, numbered=True) == "5_divergence-exact_seed-2_field.hidden-[8,8]_x.y-a-b"
    assert job_name({}, 5) == "5"  # nothing is swept
    long = job_name({"output_dir": "a" * 300}, 7)
    assert long.startswith("7_output_dir-aaa")
    assert len(long) < 110


def test_the_default_folder_is_named_after_data_and_time(run, tmp_path):
    assert run("train", *TINY)[0] == 0
    (folder,) = (tmp_path / "runs/gaussian").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", folder.name)
    assert (folder / "summary.json").exists()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "train",
            ["data=nope"],
            r"Could not find 'data/nope'; Available options in 'data': 2spirals, .*, moons.* your own .* --config-dir",
        ),
        ("train", ["data=moon"], r"Could not find 'data/moon'.*; did you mean data=moons\?"),
        ("train", ["divergence=nope"], r"Available options in 'divergence': .*, hutchinson"),
        (
            "train",
            ["divergence=hutchinson", "divergence.num_prbes=3"],
            r"no setting divergence.num_prbes \(did you mean num_probes\?\); divergence has num_probes, probes",
        ),
        (
            "train",
            ["experimnt=moons"],
            r"no setting experimnt \(did you mean experiment\?\); .*, encoder, .*experiment",
        ),
        ("train", ["datum=3"], r"no setting datum \(did you mean data\?\); the top level has data, model, transform, "),
        ("train", ["seeds=3", "data=moons"], r"no setting seeds \(did you mean seed\?\)"),
        ("train", ["hardware.bar=3"], r"no setting hardware.bar; hardware has .*accelerator, devices"),
        ("train", ["divergence=hutchinson", "divergence.num_probes=0"], r"num_probes must be >= 1, got 0"),
        ("train", ["objective.flow_matching.steps=0"], r"steps must be a whole number >= 1, got 0"),
        ("train", ["data=tabular"], r"data.path=... must be given, it has no default"),
        ("train", ["data=tabular", "data.path=no.csv"], r"no.csv"),
        ("train", ["hardware.precision=half"], r"this hardware cannot be used: Precision 'half' is invalid"),
        ("train", ["hardware.accelerator=abacus"], r"this hardware cannot be used"),
        ("train", ["field=mlp", "+field.depth=3"], r"there is no setting field.depth; field has hidden, "),
        ("train", ["resume=nowhere"], r"no checkpoint at nowhere; a relative path starts at"),
        ("train", ["output_dir=/dev/null/run"], r"/dev/null/run cannot be written"),
        ("train", ["x=["], r"no viable alternative at input '\['"),
        ("train", ["trainer.max_steps=3"], r"no setting trainer.*; the top level has data, model, transform, "),
        ("evaluate", [], r"checkpoint=... must be given"),
        ("evaluate", ["checkpoint=nowhere"], r"no checkpoint at nowhere"),
        (
            "sample",
            ["checkpoint=nowhere", "number=3"],
            r"no setting number \(did you mean num_samples\?\)|no setting number",
        ),
    ],
)
def test_mistakes_get_one_paragraph_and_exit_code_2(run, tmp_path, name, arguments, message):
    given = any(argument.startswith(("resume=", "output_dir=")) for argument in arguments)
    own = ["output_dir=o"] if name == "train" and not given else []
    code, _, err = run(name, *arguments, *own)
    assert code == 2, err
    assert re.search(message, err), err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) <= 3
    assert not list(tmp_path.rglob("*.pt"))


def test_a_truncated_checkpoint_gets_one_paragraph(run, tmp_path):
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 not much of a zip file")
    code, _, err = run("evaluate", "checkpoint=cut.pt")
    assert code == 2
    assert "cut.pt is truncated or damaged" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["train", "evaluate", "sample"])
def test_help_names_the_choices_and_examples(run, name):
    code, out, _ = run(name, "--help")
    assert code == 0
    assert out.count(f"flows {name}") >= 3
    assert f"python scripts/{name}.py" in out
    for choice in ("dopri5", *(("8gaussians", "hutchinson", "adamw") if name == "train" else ())):
        assert choice in out
    assert "$" not in out


@pytest.mark.parametrize("program", list(PROGRAMS))
def test_help_is_what_hydra_would_show(program, capsys):
    module = importlib.import_module(f"flows.cli.{program}")
    with contextlib.suppress(SystemExit):
        module.main(["--help"])
    assert capsys.readouterr().out.rstrip() == help_text(program).rstrip()


def test_help_comes_before_the_libraries_are_loaded():
    code = "import sys, flows.cli.main as m; m.start('train', ['--help']); print([*sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "checkerboard" in out
    assert not {"'torch'", "'hydra'", "'scipy'"} & set(out.splitlines()[-1].strip("[]").split(", "))


def test_all_settings_are_printed(run, tmp_path):
    code, out, err = run("train", "--settings", "data=moons", "solver.rtol=1e-3", "divergence=exact")
    assert (code, err) == (0, "")
    settings = yaml.safe_load(out)
    assert settings["solver"]["rtol"] == 1e-3
    assert settings["solver"]["max_steps"] == flows.ODESolver().max_steps  # in no yaml
    assert settings["divergence"]["mode"] == flows.divergence.Exact().mode
    assert "moons" in settings["data"]["_target_"].lower()
    assert not list(tmp_path.iterdir())


# What is a mistake, and what is a bug


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidValueError("seed"), 2),
        (errors.InvalidTypeError("seed"), 2),
        (errors.FileError("seed"), 2),
        (CheckpointError("seed"), 2),
        (errors.ComputationError("seed"), 1),
        (flows.SolverError("seed", 0.5, 1e-9), 1),
        (NonFiniteLossError("seed"), 1),
    ],
)
def test_mistakes_and_failures_are_told_apart_by_type(error, code):
    assert explain(error) == (str(error), code)


@pytest.mark.parametrize("bug", [ValueError("seed"), KeyError("seed"), AssertionError("seed"), RuntimeError("seed")])
def test_what_is_no_error_of_the_package_is_a_bug(bug):
    assert explain(bug)[0] is None


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), readable_errors():
        1 / 0  # noqa: B018 (the bug)


def test_the_environment_is_left_as_it_was(monkeypatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with readable_errors():
        assert os.environ["HYDRA_FULL_ERROR"] == "1"
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_an_early_interrupt_exits_with_130(capsys):
    with pytest.raises(SystemExit) as stop, readable_errors():
        raise KeyboardInterrupt
    assert stop.value.code == 130
    assert "Interrupted." in capsys.readouterr().err


@pytest.mark.parametrize(
    "value", ["runs/a", "a b", "x=1,y=[2]", "it's", "back\\slash", "end\\", "both\\'", "$HOME", "(1)", "ü"]
)
def test_resume_commands_survive_shell_and_hydra(value):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (argument,) = shlex.split(quoted_override("resume", value))
    assert OverridesParser.create().parse_override(argument).value() == value


# A real interruption


def start(*arguments, cwd):
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts/train.py"), *arguments]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_ctrl_c_saves_and_the_printed_command_goes_on(run, tmp_path):
    """A long run is interrupted; the command that it prints is taken at its word, made short by a step limit."""
    long = [*TINY, "objective.flow_matching.steps=100000", "objective.flow_matching.schedule=constant"]
    folder = tmp_path / "a run, stopped=1"
    process = start(*long, f"output_dir='{folder}'", cwd=tmp_path)
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size > 0):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    step = load_checkpoint(folder / "checkpoints/last.pt")["position"]["step"]
    assert f"Stopped after step {step}; everything is saved. Resume with" in err
    command = next(line.strip() for line in err.splitlines() if line.strip().startswith("python "))

    python, script, *arguments = shlex.split(command)
    assert (python, script) == ("python", str(ROOT / "scripts/train.py"))
    target = f"objective.flow_matching.steps={step + 2}"
    code, _, err = run("train", *arguments, target)
    assert (code, err) == (0, "")
    assert [row[0] for row in training_curves(read_metrics(metrics))["train/loss"]] == list(range(1, step + 6))
    straight = [*long, target, "output_dir=straight"]
    assert run("train", *straight)[0] == 0
    one, two = (load_checkpoint(path / "checkpoints/last.pt") for path in (folder, tmp_path / "straight"))
    assert_same_state(without_config(one), without_config(two))


def without_config(content):
    return {key: value for key, value in content.items() if key != "config"}


def test_a_table_of_runs_shows_what_they_have():
    energy = {"test_nfe": 20.0, "test_free_energy": -1.5, "test_free_energy_se": 0.25}
    density = {"test_nll": 2.0, "test_nll_se": None, "test_gap": 0.5, "steps": 4060}
    assert sweep_table({"a": energy, "run b": density}).splitlines() == [
        "run       NLL       free energy     gap  NFE  steps",
        "a              -1.5000 ± 0.2500           20       ",
        "run b  2.0000                    0.5000       4,060",
    ]
