"""Wrong settings of every kind get one paragraph that names the setting, and exit code 2."""

import importlib
import re
import sys

import pytest

from flows.training import Trainer

TOO_LONG = "x" * 300
MODEL = ["data=gaussian", "field.hidden=[4]"]
START = {
    "train": [*MODEL, "output_dir=o"],
    "evaluate": ["checkpoint=nowhere"],
    "sample": ["checkpoint=nowhere"],
    "compare": [*MODEL, "points=4", "measure.seconds=0.1", "progress_bar=false"],
}
BAD = [  # program, its arguments, words of the message
    # not the name of a choice
    ("train", "field=null", "field must be the name of a choice, got null; there are concat_squash"),
    ("train", "solver=-1", "solver must be the name of a choice, got -1"),
    ("train", "divergence=[]", "divergence"),
    ("train", "optimizer=3.5", "optimizer must be the name of a choice, got 3.5"),
    ("train", "objective={a: 1}", "objective"),
    ("train", "experiment={}", "experiment must be the name of a choice"),
    ("train", "data=möons", "möons"),
    ("evaluate", "divergence=0", "divergence must be the name of a choice, got 0"),
    ("sample", "solver=true", "solver must be the name of a choice, got True"),
    ("compare", "estimators=5", "5"),
    ("compare", "estimators=[[exact]]", "exact"),
    ("compare", "+variants.a=3", "variants"),
    # of no part, or of a part that the program ignores
    ("train", "+x=1", "there is no setting x"),
    ("train", "+x.y=1", "there is no setting x"),
    ("sample", "+nonsense.x=3", "there is no setting nonsense"),
    ("evaluate", "+field.hidden=[3]", "there is no setting field"),
    ("train", "evaluation.seed=3", "evaluation.seed cannot be set"),
    ("train", "optimizer.lr=1", "optimizer.lr cannot be set"),
    ("evaluate", "transform=identity", "transform cannot be chosen here"),
    ("evaluate", "evaluation.divergence=exact", "evaluation cannot be chosen here: use divergence"),
    ("compare", "measure.draws=0", "measure.draws must be"),
    ("compare", "points=0", "points must be a whole number >= 2"),
    ("compare", "affordable=-1", "affordable must be"),
    ("train", "optimizer.weight_decay=-1", "weight_decay"),
    ("train", "optimization.accumulate_batches=1e20", "optimization.accumulate_batches must be a whole number"),
    # of another type
    ("train", "seed=abc", "seed must be a whole number, got 'abc'"),
    ("train", "seed=1.5", "seed must be a whole number, got 1.5"),
    ("train", "seed=null", "seed must be a whole number, got null"),
    ("train", "output_dir=[]", "output_dir must be text or null"),
    ("train", "trust=mine", "trust must be a list of text, got 'mine'"),
    ("train", "field.hidden=null", "field.hidden must be a list of whole numbers"),
    ("train", "field.hidden=[4,x]", "field.hidden must be a list of whole numbers"),
    ("train", "solver.rtol=''", "solver.rtol must be a number, got ''"),
    ("train", "solver.max_steps=1e20", "solver.max_steps must be a whole number"),
    ("train", "objective.flow_matching.steps=true", "objective.flow_matching.steps must be a whole number"),
    ("train", "objective.flow_matching=3", "objective.flow_matching must be a stage"),
    ("train", "data._target_={}", "data._target_ must be an import path"),
    ("evaluate", "part=[test]", "part must be text"),
    ("evaluate", "batch_size=inf", "batch_size must be a whole number, got inf"),
    ("sample", "plot=maybe", "plot must be true or false, got 'maybe'"),
    ("compare", "progress_bar=3", "progress_bar must be true or false, got 3"),
    # out of bounds
    ("train", "seed=99999999999999999999", "seed must be .* got 99999999999999999999"),
    ("train", "seed=-1", "seed must be .* got -1"),
    ("sample", "seed=99999999999999999999", "seed must be .* got 99999999999999999999"),
    (
        "train",
        "data.num_test=1000000000000",
        "data.num_test: 1,000,000,000,000 points of shape .* choose a smaller number",
    ),
    ("train", "data.num_test=-1", "num_test must be .*, got -1"),
    ("train", "solver.rtol=nan", "solver.rtol must be .* got nan"),
    ("train", "solver.rtol=-inf", "solver.rtol must be .* got -inf"),
    ("train", "field.hidden=[0]", "hidden"),
    ("train", "objective.flow_matching.batch_size=0", "batch_size must be .* got 0"),
    ("train", "objective.flow_matching.learning_rate=-1", "learning_rate must be .*got -1"),
    # no such setting, group or file
    ("train", "sééd=3", "sééd"),
    ("train", "solver.rtoll=3", r"no setting solver.rtoll \(did you mean rtol\?\)"),
    ("train", "field._target_=flows.fields.Nothing", "field._target_: there is no flows.fields.Nothing"),
    ("train", "output_dir=" + TOO_LONG, "output_dir cannot be a path .*too long"),
    ("train", "resume=" + TOO_LONG, "resume cannot be a path .*too long"),
    ("evaluate", "checkpoint=" + TOO_LONG, "checkpoint cannot be a path .*too long"),
    ("sample", "output=samples.txt", "output must end in .npy or .csv"),
    # what Hydra cannot read
    ("train", "x=[", "x=.* cannot be read as setting=value"),
    ("train", "x=(", "x=.* cannot be read as setting=value"),
    ("train", "x={", "x=.* cannot be read as setting=value"),
    ("train", "output_dir='it", "output_dir='it cannot be read as setting=value; put a value .* in quotes"),
    ("train", "a=b=c", "there is no setting a"),
    ("train", "seed=3#4", "seed"),
    ("train", "seed=;", "seed"),
    ("train", "data", "data"),
    ("train", "seed=${nothing}", "seed: .*nothing"),
    ("train", "output_dir=${oc.env:NOTHING_OF_THE_KIND}", "output_dir: .*NOTHING_OF_THE_KIND"),
    ("train", "seed=1,2", "seed"),
]


@pytest.mark.parametrize(("program", "argument", "message"), BAD, ids=[f"{p} {a[:40]}" for p, a, _ in BAD])
def test_a_bad_setting_gets_one_paragraph(program, argument, message, monkeypatch, capsys, tmp_path):
    def fit(trainer):
        raise AssertionError("training starts")

    monkeypatch.setattr(Trainer, "fit", fit)
    monkeypatch.chdir(tmp_path)
    key = argument.partition("=")[0]
    arguments = [*(start for start in START[program] if start.partition("=")[0] != key), argument]
    monkeypatch.setattr(sys, "argv", ["flows", program, *arguments])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"flows.cli.{program}").main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2, error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) <= 5
    assert re.search(message, error), error
