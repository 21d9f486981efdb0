"""What a run still takes: stages to come, validation, pictures and the test are part of it."""

import io
import time

import pytest
import torch
from small_run import small_flow, small_gaussian
from test_trainer_contract import CPU, Lines, Slope, SquareError, assert_same, weights
from torch import nn

from flows.evaluation import DensityEvaluator, Evaluation
from flows.objectives import FlowMatching, MaximumLikelihood
from flows.training import Hardware, Reporting, Stage, Trainer, clock
from flows.training.clock import TooLongError, duration
from flows.training.loggers import ProgressBar

STEP, LOOK = 0.02, 0.05  # seconds


class Slow(SquareError):
    def __call__(self, model, batch, generator=None):
        time.sleep(STEP)
        return super().__call__(model, batch, generator)


class SlowSlope(Slope):
    def validate(self, model) -> Evaluation:
        time.sleep(LOOK)
        return super().validate(model)

    def test_size(self):
        return 10.0


def trainer(folder, hardware=CPU, evaluator=None, **reporting):
    torch.manual_seed(7)
    settings = {"log_every": 1, "validate_every": 10, "plot_every": None, "progress_bar": False, **reporting}
    stages = {"fast": Stage(SquareError(), 20), "slow": Stage(Slow(), 10)}
    return Trainer(
        nn.Linear(1, 1),
        Lines(),
        stages,
        evaluator=evaluator or SlowSlope(),
        output_dir=folder,
        hardware=hardware,
        reporting=Reporting(**settings),
    )


class Watch:
    """Notes what the clock says after each step."""

    def __init__(self):
        self.said = []

    def on_step_end(self, run):
        own = next(c for c in run.fabric._callbacks if isinstance(c, clock.Clock))
        self.said.append(own.remaining(run))


def test_all_that_is_left_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(clock, "FIRST_LOOK", 0.0)
    watch = Watch()
    trainer(tmp_path / "run", callbacks=[watch]).fit()
    first, middle, last = watch.said[0], watch.said[19], watch.said[-1]
    assert first >= 10 * STEP  # the stage to come; the time of a validation is not known yet
    assert middle >= 10 * STEP + 2 * LOOK + 10 * LOOK
    assert 10 * LOOK <= last < 20 * LOOK  # the test alone
    assert watch.said[-2] > last


def test_before_the_first_look_nothing_is_said(tmp_path):
    watch = Watch()
    trainer(tmp_path / "run", callbacks=[watch]).fit()
    assert set(watch.said) == {None}


def test_a_trial_changes_nothing(tmp_path, monkeypatch):
    trainer(tmp_path / "plain").fit()
    monkeypatch.setattr(clock, "FIRST_LOOK", 0.0)
    trainer(tmp_path / "tried").fit()
    assert_same(weights(tmp_path / "plain"), weights(tmp_path / "tried"))


def test_a_trial_of_a_flow_changes_nothing(tmp_path, monkeypatch):
    def run(folder):
        torch.manual_seed(0)
        stages = {"a": Stage(FlowMatching(), 3, batch_size=16), "b": Stage(MaximumLikelihood(), 2, batch_size=8)}
        reporting = Reporting(plot_every=None, progress_bar=False)
        data = small_gaussian()
        Trainer(small_flow(data), data, stages, output_dir=folder, hardware=CPU, reporting=reporting).fit()
        return weights(folder)

    plain = run(tmp_path / "plain")
    monkeypatch.setattr(clock, "FIRST_LOOK", 0.0)
    assert_same(plain, run(tmp_path / "tried"))


def test_a_long_run_says_so_with_ways_out(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(clock, "FIRST_LOOK", 0.0)
    monkeypatch.setattr(clock, "LONG", 0.1)
    trainer(tmp_path / "run").fit()
    (told,) = [record.message for record in caplog.records if "this run takes" in record.message]
    assert "slow 0 seconds for 10 steps" in told
    assert "Three ways out: a smaller network" in told
    assert "fewer steps, steps=" in told


def test_a_run_that_is_too_long_for_a_cpu_is_refused_unless_told_to_go_on(tmp_path):
    hardware = Hardware(accelerator="cpu", max_cpu_hours=1e-5)
    with pytest.raises(TooLongError, match=r"more than hardware\.max_cpu_hours=1e-05\. Three ways out: .*=null"):
        trainer(tmp_path / "run", hardware).fit()
    trainer(tmp_path / "long", Hardware(accelerator="cpu", max_cpu_hours=1.0)).fit()
    with pytest.raises(ValueError, match=r"max_cpu_hours must be .* > 0, got -1; null allows any"):
        Hardware(max_cpu_hours=-1)


def test_a_validation_is_estimated_from_few_points():
    dataset = small_gaussian()
    flow = small_flow(dataset)
    evaluator = DensityEvaluator(dataset)
    assert evaluator.trial_seconds(flow) > 0
    assert evaluator.test_size() > 0
    many = DensityEvaluator(dataset, num_draws=1, points=10)
    assert many.trial_seconds(flow) < 60


def test_the_bar_shows_what_is_left_of_all(monkeypatch):
    text = io.StringIO()
    monkeypatch.setattr("sys.stderr", text)
    for left, shown in ((5025.0, "<1:23:45,"), (None, "<?,")):
        bar = ProgressBar({"a": 10, "b": 5}, remaining=lambda left=left: left)
        bar.advance("a", 3, 0.2)
        bar._bar.refresh()
        bar.close()
        assert shown in text.getvalue()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(40, "40 seconds"), (600, "10 minutes"), (5400, "1.5 hours"), (86_400, "24 hours"), (3e6, "35 days")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words
