"""The Trainer knows objectives, evaluators and data alone; stages end by time; callbacks change nothing."""

import itertools
import time
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from matplotlib.figure import Figure
from small_run import STAGES, Memory, small_flow, small_gaussian, small_trainer, stopping_at
from torch import nn

import flows
from flows import plots
from flows.datasets import Batch, BatchStream
from flows.divergence import Auto, Exact, Hutchinson
from flows.evaluation import DensityEvaluator, Evaluation, Evaluator, Report
from flows.objectives import FlowMatching, LossOutput, MaximumLikelihood, Objective
from flows.training import Hardware, Optimization, Reporting, Stage, Trainer, TrainingInterrupted, load_checkpoint

CPU = Hardware(accelerator="cpu")


def weights(folder, name="last"):
    return load_checkpoint(folder / f"checkpoints/{name}.pt")["model"]


def assert_same(one, two):
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


# Any module


class Lines:
    """Data of the user's own, with what a training stream needs and nothing else: y = 3 x − 1 with noise."""

    name = "lines"

    def train_stream(self, batch_size, generator, device=None, dtype=None):
        return LineStream("lines", batch_size, generator, device, dtype)


class LineStream(BatchStream):
    def next(self):
        x = torch.rand(self.batch_size, 1, generator=self.generator, dtype=self.dtype)
        noise = torch.randn(x.shape, generator=self.generator, dtype=self.dtype)
        return Batch(x, 3 * x - 1 + 0.1 * noise)


class SquareError(Objective):
    recommended: ClassVar = {"batch_size": 32, "learning_rate": 0.1}

    def check(self, model, dataset):
        if not isinstance(model, nn.Linear):
            raise flows.FlowsError("a line is fitted by a Linear")

    def __call__(self, model, batch, generator=None):
        loss = (model(batch.x) - batch.context).square().mean()
        return LossOutput(loss, {"square_error": loss.detach()})


@dataclass
class Slope(Evaluator):
    checked: int = 0

    def check(self, model):
        self.checked += 1

    def validate(self, model):
        error = float((model.weight.detach() - 3).abs())
        return Evaluation(error, {"slope_error": error})

    def test(self, model):
        slope = float(model.weight.detach())
        return Report({"slope": slope, "slope_se": 0.0}, [("slope", f"{slope:.3f}")], ["slope"])

    def pictures(self, model):
        return {"line": Figure()}


def line_trainer(folder, dataset=None, **settings):
    torch.manual_seed(7)
    reporting = Reporting(log_every=1, validate_every=5, plot_every=100, checkpoint_every=4, progress_bar=False)
    given = {"steps": 150, "evaluator": Slope(), "hardware": CPU, "reporting": reporting, **settings}
    given["optimization"] = Optimization(ema_decay=0.5)
    return Trainer(nn.Linear(1, 1), dataset or Lines(), SquareError(), output_dir=folder, **given)


def test_any_module_with_an_objective_and_an_evaluator_trains(tmp_path):
    trainer = line_trainer(tmp_path / "run")
    assert trainer.evaluator.checked == 1
    assert list(trainer.stages) == ["square_error"]
    assert (trainer.stages["square_error"].batch_size, trainer.stages["square_error"].learning_rate) == (32, 0.1)
    summary = trainer.fit()
    assert abs(summary.metrics["slope"] - 3) < 0.5
    assert summary.headline() == {"slope": summary.metrics["slope"]}
    content = summary.as_dict()
    assert content["test_slope"] == float(trainer.model.weight.detach())
    assert content["validation_score"] == abs(content["test_slope"] - 3) == summary.position.best_score
    assert not [name for name in content if "nll" in name]
    assert (tmp_path / "run/plots/line.png").exists()
    assert (tmp_path / "run/plots/line_000100.png").exists()
    assert "slope  3." in str(summary) or "slope  2." in str(summary)


@pytest.mark.parametrize("stop", [3, 20])
def test_any_module_resumes_bit_for_bit(tmp_path, stop):
    line_trainer(tmp_path / "straight").fit()
    with pytest.raises(TrainingInterrupted):
        line_trainer(tmp_path / "run", stopping_at(Lines(), stop)).fit()
    torch.manual_seed(stop)
    line_trainer(None, resume=tmp_path / "run").fit()
    for name in ("last", "best"):
        assert_same(weights(tmp_path / "straight", name), weights(tmp_path / "run", name))


def test_model_objective_and_evaluator_are_checked_at_construction(tmp_path):
    with pytest.raises(flows.FlowsError, match="a line is fitted by a Linear"):
        Trainer(nn.Identity(), Lines(), SquareError(), steps=1, evaluator=Slope(), output_dir=tmp_path / "run")
    with pytest.raises(TypeError, match="no default evaluator for Linear: pass evaluator="):
        Trainer(nn.Linear(1, 1), Lines(), SquareError(), steps=1)
    with pytest.raises(TypeError, match=r"trains a flows.CNF, got Linear"):
        Trainer(nn.Linear(1, 1), small_gaussian(), FlowMatching(), steps=1, evaluator=Slope())
    with pytest.raises(ValueError, match="how long"):
        Trainer(nn.Linear(1, 1), Lines(), SquareError(), evaluator=Slope())
    with pytest.raises(ValueError, match="own steps: leave out steps"):
        Trainer(nn.Linear(1, 1), Lines(), {"a": Stage(SquareError(), 1)}, steps=3, evaluator=Slope())
    assert not (tmp_path / "run").exists()


class NoNumber(Slope):
    def validate(self, model):
        return Evaluation(float("nan"), {})


def test_a_score_must_be_a_number(tmp_path):
    with pytest.raises(ValueError, match=r"validation stopped at step 5 .*NoNumber found the score nan"):
        line_trainer(tmp_path / "run", evaluator=NoNumber()).fit()


# Callbacks


HOOKS = {"on_run_start", "on_optimizer_step", "on_validation_start", "on_validation_end", "on_step_end", "on_log",
         "on_test_start", "on_test_end", "on_summary", "on_run_end"}  # fmt: skip


class Meddler:
    """Draws from the global random numbers at every hook."""

    def __init__(self):
        self.heard = []

    def __getattr__(self, name):
        if name not in HOOKS:
            raise AttributeError(name)

        def hook(run, *arguments):
            torch.rand(3)
            self.heard.append(name)

        return hook


class NoisyObjective(FlowMatching):
    """Uses the global random numbers, as a dropout does."""

    def __call__(self, flow, batch, generator=None):
        output = super().__call__(flow, batch, generator)
        return LossOutput(output.loss * (1 + torch.rand(())), output.metrics)


def test_callbacks_and_pictures_change_no_weight(tmp_path):
    """Validation, pictures, logs and checkpoints at every few steps or none: the same weights."""
    stages = {"noisy": Stage(NoisyObjective(), steps=5, batch_size=16), "likelihood": STAGES["maximum_likelihood"]}
    blind = {"log_every": 0, "validate_every": 0, "checkpoint_every": 0}
    small_trainer(tmp_path / "blind", stages=stages, **blind).fit()
    meddler = Meddler()
    small_trainer(tmp_path / "watched", stages=stages, validate_every=1, plot_every=7, callbacks=[meddler]).fit()
    assert_same(weights(tmp_path / "blind"), weights(tmp_path / "watched"))
    assert len(list((tmp_path / "watched/plots").glob("density_*.png"))) == 2  # and the end of a stage
    assert set(meddler.heard) == HOOKS
    assert meddler.heard.count("on_optimizer_step") == meddler.heard.count("on_step_end") == 10


class Counter:
    def __init__(self):
        self.count = 0

    def on_step_end(self, run):
        self.count += 1

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_a_callback_with_a_state_is_part_of_the_checkpoints(tmp_path):
    with pytest.raises(TrainingInterrupted):
        small_trainer(tmp_path, stopping_at(small_gaussian(), 4), callbacks=[Counter()]).fit()
    counter = Counter()
    small_trainer(None, resume=tmp_path, callbacks=[counter]).fit()
    assert counter.count == 11  # the checkpoint of step 4 was written before its step ended, which it does here


# Stages by time


class SlowError(SquareError):
    def __call__(self, model, batch, generator=None):
        time.sleep(0.02)
        return super().__call__(model, batch, generator)


def timed(folder, dataset=None, seconds=0.5, **settings):
    memory = Memory()
    stages = {"timed": Stage(SlowError(), seconds=seconds)}
    reporting = Reporting(log_every=1, validate_every=3, plot_every=None, progress_bar=False, loggers=[memory])
    trainer = Trainer(nn.Linear(1, 1), dataset or Lines(), stages, evaluator=Slope(), hardware=CPU,
                      reporting=reporting, output_dir=folder, **settings)  # fmt: skip
    return trainer, memory


def test_the_schedule_of_a_stage_by_time_follows_the_share_of_the_time():
    stage = Stage(SquareError(), seconds=10.0, warmup_steps=2)
    factors = [stage.learning_rate_factor(step, seconds) for step, seconds in ((0, 0), (1, 0.1), (2, 5.0), (9, 10.0))]
    assert factors == pytest.approx([1 / 3, 2 / 3, 0.5, 0.0])
    assert [stage.done(3, seconds) for seconds in (0.0, 2.5, 10.0, 11.0)] == [0.0, 0.25, 1.0, 1.0]
    for settings in ({}, {"steps": 3, "seconds": 1.0}):
        with pytest.raises(ValueError, match="give either steps or seconds"):
            Stage(SquareError(), **settings)
    with pytest.raises(ValueError, match=r"seconds must be .* > 0"):
        Stage(SquareError(), seconds=0)


def test_a_stage_may_end_by_time(tmp_path):
    trainer, memory = timed(tmp_path / "run")
    summary = trainer.fit()
    assert 5 < summary.position.step < 26
    assert 0.5 <= summary.position.seconds_in_stage < 1.0
    rates = [rate for _, rate in memory.series("train/learning_rate")]
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates))
    assert rates[0] == pytest.approx(0.1)
    assert rates[-1] < 0.02
    assert memory.series("validation/score")[-1][0] == summary.position.step


class Pausing(Slope):
    def validate(self, model):
        time.sleep(0.2)
        return super().validate(model)


def test_validation_takes_nothing_from_the_time_of_a_stage(tmp_path):
    trainer, _ = timed(tmp_path / "run")
    trainer.evaluator = Pausing()
    assert trainer.fit().position.step > 9  # four validations would have used it up


def test_a_resumed_stage_goes_on_with_the_rest_of_its_time(tmp_path):
    stopped, _ = timed(tmp_path / "run", stopping_at(Lines(), 15), seconds=0.6)
    with pytest.raises(TrainingInterrupted):
        stopped.fit()
    spent = load_checkpoint(tmp_path / "run/checkpoints/last.pt")["position"]["seconds_in_stage"]
    assert 0.3 <= spent < 0.6
    resumed, _ = timed(None, seconds=0.6, resume=tmp_path / "run")
    position = resumed.fit().position
    assert position.seconds_in_stage < 0.8
    assert 15 < position.step < 31


# Devices


def test_another_kind_of_device_seeds_the_objective_anew(tmp_path):
    """Each checkpoint goes on with numbers of its own; without new seeds it would repeat those of the stage's start."""
    drawn = {}
    for stop in (4, 5):
        folder = tmp_path / str(stop)
        with pytest.raises(TrainingInterrupted):
            small_trainer(folder, stopping_at(small_gaussian(), stop)).fit()
        path = folder / "checkpoints/last.pt"
        content = torch.load(path)
        content["ranks"][0] |= {"objective": torch.zeros(16, dtype=torch.uint8), "cuda": torch.zeros(16)}
        torch.save(content, path)
        first = []

        def watched(flow, batch, generator, first=first):
            if not first:
                first.append(generator.get_state())
            return FlowMatching()(flow, batch, generator)

        stages = {**STAGES, "flow_matching": Stage(watched, steps=6, batch_size=16, learning_rate=1e-2)}
        with pytest.warns(UserWarning, match="another kind of device"):
            small_trainer(folder, stages=stages, resume=path).fit()
        drawn[stop] = first[0]
    begun = []

    def watched(flow, batch, generator):
        begun.append(generator.get_state())
        return FlowMatching()(flow, batch, generator)

    small_trainer(tmp_path / "new", stages={"flow_matching": Stage(watched, steps=1, batch_size=16)}).fit()
    states = [*drawn.values(), begun[0]]
    assert not any(torch.equal(one, two) for one, two in itertools.combinations(states, 2))


# Evaluation is apart from training


def test_what_is_reported_uses_the_cheapest_exact_estimator():
    dataset = small_gaussian()
    flow = small_flow(dataset, Hutchinson(num_probes=1))
    evaluator = DensityEvaluator(dataset, progress_bar=False)
    report = evaluator.test(flow)
    assert report.evaluated_with == "Analytic"
    assert report.metrics["probe_se"] == 0
    assert flow.divergence == Hutchinson(num_probes=1)
    points = torch.cat([batch.x for batch in dataset.test_batches(50)])
    flow.divergence = Exact()
    assert report.metrics["nll"] == pytest.approx(-float(flow.log_prob(points).detach().mean()), abs=1e-9)


def test_where_exactness_costs_too_much_the_training_estimator_gets_a_standard_error():
    field = TanhField()
    for training, expected, name in [
        (Hutchinson(num_probes=1), Hutchinson(num_probes=2), "Hutchinson, mean of 2"),
        (Hutchinson(num_probes=5), Hutchinson(num_probes=5), "Hutchinson, mean of 5"),
        (Exact(), Exact(), "Exact"),
        (Auto(), Auto(), "Hutchinson, mean of 2"),
    ]:
        flow = flows.CNF(field, divergence=training)
        evaluator = DensityEvaluator(small_gaussian())
        assert (evaluator.estimator(flow), evaluator.evaluated_with(flow)) == (expected, name)
        assert DensityEvaluator(small_gaussian(), divergence="exact").evaluated_with(flow) == "Exact"
        assert DensityEvaluator(small_gaussian(), divergence=Hutchinson()).evaluated_with(flow).endswith("one estimate")


class TanhField(nn.Module):
    event_shape = (40,)

    def forward(self, t, x):
        return torch.tanh(x)


def test_pictures_are_drawn_with_the_evaluation_estimator(monkeypatch):
    seen = {}

    def figures(flow, dataset, generator, **settings):
        seen.update(divergence=flow.divergence, **settings)
        return {}

    monkeypatch.setattr(plots, "figures", figures)
    flow = small_flow(small_gaussian(), Hutchinson())
    DensityEvaluator(small_gaussian()).pictures(flow)
    assert seen == {"divergence": Auto(), "evaluated_with": "Analytic"}
    assert flow.divergence == Hutchinson()


def test_a_failed_evaluation_puts_the_training_estimator_back():
    flow = small_flow(small_gaussian(), Hutchinson())
    evaluator = DensityEvaluator(small_gaussian())
    with pytest.raises(RuntimeError, match="stop"), evaluator.evaluating(flow):
        raise RuntimeError("stop")
    assert flow.divergence == Hutchinson()


def test_python_and_the_shell_share_what_an_objective_recommends():
    for objective, numbers in ((FlowMatching(), (1024, 4e-3, 0)), (MaximumLikelihood(), (512, 2e-3, 50))):
        stage = Stage(objective, steps=4000)
        assert (stage.batch_size, stage.learning_rate, stage.warmup_steps) == numbers
    assert Stage(MaximumLikelihood(), steps=40).warmup_steps == 4
    assert Stage(lambda *arguments: None, steps=1).batch_size == 512


def test_bad_options_are_refused():
    for build, message in [
        (lambda: Optimization(gradient_clip=0), "gradient_clip must be .* > 0, got 0"),
        (lambda: Optimization(accumulate_batches=0), "accumulate_batches must be a whole number >= 1, got 0"),
        (lambda: Reporting(plot_every=-1), "plot_every must be a whole number >= 0, got -1"),
        (lambda: DensityEvaluator(small_gaussian(), part="train"), "part must be test or validation"),
        (lambda: DensityEvaluator(small_gaussian(), points=0), "points must be a whole number >= 1"),
        (lambda: DensityEvaluator(small_gaussian(), divergence="best"), "unknown DivergenceEstimator 'best'"),
    ]:
        with pytest.raises(ValueError, match=message):
            build()
