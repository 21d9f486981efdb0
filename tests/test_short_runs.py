"""`steps=...` of the program: the steps of a whole run, shared among its stages."""

import json

import pytest
from small_run import STAGES, small_trainer

from flows.cli.config import as_on_the_command_line
from flows.cli.steps import share_steps
from flows.cli.sweeps import _note
from flows.errors import InvalidValueError
from flows.training.estimator_use import notice


def stages(**steps):
    return {name: {"steps": number, "warmup_steps": 10} for name, number in steps.items()}


@pytest.mark.parametrize(
    ("before", "total", "after"),
    [
        ({"a": 3500, "b": 40}, 200, {"a": 198, "b": 2}),
        ({"a": 3500, "b": 40}, 2, {"a": 1, "b": 1}),
        ({"a": 100, "b": 100, "c": 100}, 1000, {"a": 333, "b": 334, "c": 333}),
        ({"a": 500}, 7, {"a": 7}),
    ],
)
def test_steps_are_shared_in_proportion(before, total, after):
    config = {"objective": stages(**before), "steps": total}
    share_steps(config)
    assert {name: stage["steps"] for name, stage in config["objective"].items()} == after
    assert sum(after.values()) == total
    assert all(stage["warmup_steps"] < max(stage["steps"], 1) for stage in config["objective"].values())
    assert "steps" not in config


def test_without_steps_the_stages_keep_theirs():
    config = {"objective": stages(a=5), "steps": None}
    share_steps(config)
    assert config == {"objective": stages(a=5)}


def test_stages_that_end_by_time_take_no_part():
    with pytest.raises(InvalidValueError, match=r"objective\.b does not; set steps or seconds of each stage"):
        share_steps({"objective": {**stages(a=5), "b": {"seconds": 3}}, "steps": 9})


def test_advice_names_settings_in_full():
    text = "set columns=[a], data.columns=[b] or split_by=content; num_draws=1, name=x"
    assert as_on_the_command_line(text) == (
        "set data.columns=[a], data.columns=[b] or data.split_by=content; num_draws=1, name=x"
    )


@pytest.mark.parametrize(
    ("used", "said"),
    [(0, "plays no part in these figures"), (40, "took part in 40 of 3,540 steps alone"), (3540, None)],
)
def test_a_sweep_over_a_divergence_without_effect_says_so(used, said):
    note = _note({"run": {"divergence": "exact", "divergence_steps": used, "steps": 3540}})
    assert note is None if said is None else said in note
    assert _note({"run": {"seed": 1, "divergence_steps": used, "steps": 3540}}) is None


def test_a_run_says_in_which_steps_its_divergence_took_part(tmp_path):
    matching = {"flow_matching": STAGES["flow_matching"]}
    trainer = small_trainer(tmp_path / "a", stages=matching)
    text = notice(trainer.model, trainer.stages)
    assert "the divergence Hutchinson plays no part in what is trained: flow_matching takes none" in text
    summary = trainer.fit()
    assert "estimator  Hutchinson in none of 6 steps" in str(summary)
    assert json.loads((tmp_path / "a/summary.json").read_text())["divergence_steps"] == 0
    trainer = small_trainer(tmp_path / "b")
    assert notice(trainer.model, trainer.stages) is None
    summary = trainer.fit()
    assert "estimator  Hutchinson in 5 of 11 steps" in str(summary)
    summary = small_trainer(tmp_path / "c", stages={"maximum_likelihood": STAGES["maximum_likelihood"]}).fit()
    assert "estimator" not in str(summary)
