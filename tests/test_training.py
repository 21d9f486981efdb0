"""The training loop, its stages and average, and the likelihood of a set."""

import copy
import importlib
import itertools
import json
import math
import signal
import sys
import threading
import time
import types
from dataclasses import replace

import pytest
import torch
from small_run import STAGES, Memory, small_flow, small_gaussian, small_table, small_trainer, stopping_at
from torch.distributions import MultivariateNormal

import flows
from flows.datasets import Batch, Gaussian
from flows.evaluation import likelihood, part_batches
from flows.objectives import FlowMatching, LossOutput, MaximumLikelihood
from flows.training import (
    ExponentialMovingAverage,
    NonFiniteLossError,
    OutputFolderError,
    Stage,
    TrainingInterrupted,
    load_checkpoint,
)
from flows.training.fabric import Hardware, build_fabric
from flows.training.loggers import MetricMeans
from flows.training.loop import Loop
from flows.training.signals import StopSignals

FLOW_MATCHING = {"flow_matching": STAGES["flow_matching"]}


# Stages


class Scripted(flows.evaluation.Evaluator):
    """Gives the scores of a list, the last one for ever."""

    def __init__(self, *scores):
        self.scores = list(scores)

    def validate(self, model):
        score = self.scores.pop(0) if len(self.scores) > 1 else self.scores[0]
        return flows.evaluation.Evaluation(score, {})

    def test(self, model):
        return flows.evaluation.Report({}, ())


def test_a_stage_without_better_validations_ends_early(tmp_path):
    stages = {name: replace(stage, steps=20, patience=4) for name, stage in STAGES.items()}
    trainer = small_trainer(tmp_path, stages=stages, evaluator=Scripted(3.0, 2.0, 2.5, 2.5, 1.0, 5.0), validate_every=2)
    position = trainer.fit().position
    assert position.best_step == 10  # where it was 1.0, in the second stage
    assert position.stage_starts == [0, 8]  # the first stage was best at step 4, and had its patience until 8
    assert position.step == 14
    with pytest.raises(ValueError, match="patience must be a whole number >= 1, got 0; None never ends"):
        Stage(FlowMatching(), 10, patience=0)


def test_learning_rates_rise_linearly_and_fall_like_a_cosine():
    stage = Stage(FlowMatching(), steps=12, learning_rate=0.5, warmup_steps=2)
    used = [stage.learning_rate * stage.learning_rate_factor(k) for k in range(stage.steps)]
    expected = [0.5 / 3, 1.0 / 3] + [0.25 * (1 + math.cos(math.pi * k / 10)) for k in range(10)]
    assert used == pytest.approx(expected)
    constant = Stage(FlowMatching(), steps=5, schedule="constant")
    assert [constant.learning_rate_factor(k) for k in range(5)] == [1.0] * 5
    custom = Stage(FlowMatching(), steps=4, schedule=lambda done: 1 - done)
    assert [custom.learning_rate_factor(k) for k in range(4)] == [1, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be a whole number >= 1, got 0"),
        ({"steps": 10.0}, "steps must be a whole number or None, got 10.0; write 10"),
        ({"batch_size": -1}, "batch_size must be a whole number >= 1"),
        ({"learning_rate": 0}, "learning_rate must be a finite number > 0, got 0"),
        ({"learning_rate": math.nan}, "learning_rate must be a number or None and not NaN, got nan"),
        ({"learning_rate": "fast"}, "learning_rate must be a number or None, got 'fast'"),
        ({"warmup_steps": 10}, "warmup_steps must be smaller than steps=10"),
        ({"schedule": "linear"}, "schedule must be one of constant, cosine or a function, got 'linear'"),
    ],
)
def test_bad_stages_are_refused(settings, message):
    with pytest.raises(flows.FlowsError, match=message):
        Stage(**{"objective": FlowMatching(), "steps": 10, **settings})


def test_a_stage_needs_an_objective():
    with pytest.raises(TypeError, match=r"objective must be a flows.objectives.Objective"):
        Stage(3, steps=1)
    with pytest.raises(ValueError, match=r"unknown Objective 'maximum'; expected one of .*maximum_likelihood"):
        Stage("maximum", steps=1)


# The average


def test_the_average_follows_its_formula():
    model = torch.nn.Linear(3, 2)
    average = ExponentialMovingAverage(model, decay=0.5)
    expected = None
    for n in range(12):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        average.update_parameters(model)
        d = min(0.5, (1 + n) / (10 + n)) if n else 0.0
        new = model.weight.detach().clone()
        expected = new if expected is None else d * expected + (1 - d) * new
        assert torch.allclose(average.module.weight, expected, atol=1e-14)
    average.restart()
    average.update_parameters(model)
    assert torch.equal(average.module.weight, model.weight)
    assert not any(parameter.requires_grad for parameter in average.parameters())
    with pytest.raises(ValueError, match=r"ema_decay must be .* < 1, got 1"):
        ExponentialMovingAverage(model, 1)


def test_without_decay_the_average_is_the_weights(tmp_path):
    small_trainer(tmp_path, ema_decay=0.0).fit()
    content = load_checkpoint(tmp_path / "checkpoints/last.pt")
    assert all(torch.equal(content["model"][name], value) for name, value in content["ema"].items())


def test_a_later_stage_starts_from_the_average(tmp_path):
    """With a vanishing learning rate the second stage ends where it starts."""
    still = {**STAGES, "still": Stage(FlowMatching(), steps=1, batch_size=4, learning_rate=1e-30)}
    del still["maximum_likelihood"]
    small_trainer(tmp_path / "one", stages=FLOW_MATCHING).fit()
    small_trainer(tmp_path / "two", stages=still).fit()
    first, second = (load_checkpoint(tmp_path / name / "checkpoints/last.pt") for name in ("one", "two"))
    for name, value in first["ema"].items():
        assert torch.equal(second["model"][name], value)
        assert torch.equal(second["ema"][name], value)
    assert any(not torch.equal(first["model"][name], value) for name, value in first["ema"].items())


def test_the_average_starts_anew_in_a_later_stage(tmp_path):
    """Its first update copies the weights, so that a short stage is not averaged away."""
    stages = {**FLOW_MATCHING, "step": Stage(FlowMatching(), steps=1, batch_size=4, learning_rate=0.1)}
    small_trainer(tmp_path, stages=stages).fit()
    content = load_checkpoint(tmp_path / "checkpoints/last.pt")
    assert all(torch.equal(content["model"][name], value) for name, value in content["ema"].items())


# The loop


def last_weights(folder):
    return load_checkpoint(folder / "checkpoints/last.pt")["model"]


def assert_equal_weights(one, two):
    assert all(torch.equal(two[name], value) for name, value in one.items())


def test_each_stage_goes_through_its_own_learning_rates(tmp_path):
    memory = Memory()
    flow = small_flow(small_gaussian())
    before = torch.nn.utils.parameters_to_vector(flow.parameters()).detach()
    halting = {**STAGES, "halting": Stage(FlowMatching(), steps=2, batch_size=4, schedule=lambda done: 0.0)}
    small_trainer(tmp_path, flow=flow, stages=halting, loggers=[memory]).fit()
    expected = [
        stage.learning_rate * stage.learning_rate_factor(step)
        for stage in halting.values()
        for step in range(stage.steps)
    ]
    assert [rate for _, rate in memory.series("train/learning_rate")] == pytest.approx(expected)
    content = load_checkpoint(tmp_path / "checkpoints/last.pt")
    assert content["optimizer"]["param_groups"][0]["lr"] == 0
    assert not torch.equal(torch.nn.utils.parameters_to_vector(flow.parameters()).detach(), before)


class UsesGlobalRandomness(FlowMatching):
    def __call__(self, flow, batch, generator=None):
        output = super().__call__(flow, batch, generator)
        return LossOutput(output.loss * (1 + torch.rand(())), output.metrics)


class NoisyValidation(Gaussian):
    def validation_batches(self, *args, **kwargs):
        torch.rand(1)
        return super().validation_batches(*args, **kwargs)


def noisy_gaussian():
    return NoisyValidation([1.0, -1.0], [[1.0, 0.8], [0.8, 2.0]], num_validation=40, num_test=50, num_reference=100)


def test_global_randomness_is_seeded_and_guarded_too(tmp_path):
    """A dropout in training, say, and a stray random number in validation."""
    stages = {"noisy": Stage(UsesGlobalRandomness(), steps=4, batch_size=8)}
    flow = small_flow(small_gaussian())
    torch.manual_seed(1)
    settings = {"dataset": noisy_gaussian(), "stages": stages}
    small_trainer(tmp_path / "one", flow=copy.deepcopy(flow), validate_every=0, **settings).fit()
    torch.manual_seed(2)
    small_trainer(tmp_path / "two", flow=copy.deepcopy(flow), validate_every=1, **settings).fit()
    assert_equal_weights(last_weights(tmp_path / "one"), last_weights(tmp_path / "two"))

    stopped = small_trainer(tmp_path / "run", stopping_at(noisy_gaussian(), 2), stages, flow=copy.deepcopy(flow))
    with pytest.raises(TrainingInterrupted):
        stopped.fit()
    torch.manual_seed(3)
    small_trainer(tmp_path / "run", flow=flow, resume=tmp_path / "run", **settings).fit()
    assert_equal_weights(last_weights(tmp_path / "one"), last_weights(tmp_path / "run"))


def test_a_seed_gives_the_same_numbers_and_another_seed_others(tmp_path):
    nll = []
    for name, seed in (("one", 5), ("two", 5), ("other", 6)):
        summary = small_trainer(tmp_path / name, seed=seed).fit()
        nll.append((summary.metrics["nll"], summary.validation_score))
    assert nll[0] == nll[1]
    assert nll[0] != nll[2]


def test_training_reaches_the_entropy_of_a_gaussian(tmp_path):
    dataset = Gaussian([1.0, -1.0], [[1.0, 0.8], [0.8, 2.0]], num_validation=500, num_test=2000)
    torch.manual_seed(0)
    flow = flows.CNF(
        flows.fields.MLP((2,), hidden=(32, 32)),
        solver=flows.ODESolver(method="rk4", step_size=0.1),
        transform=flows.transforms.Standardise((2,)).fit(dataset.reference()),
    )
    stages = {
        "flow_matching": Stage(FlowMatching(), steps=250, batch_size=256, learning_rate=1e-2),
        "maximum_likelihood": Stage(MaximumLikelihood(), steps=25, batch_size=256, learning_rate=3e-3),
    }
    before = likelihood(flow, dataset.test_batches(2000)).nll - dataset.entropy
    summary = small_trainer(tmp_path, dataset, flow=flow, stages=stages, log_every=50, validate_every=0).fit()
    assert before > 0.1
    assert abs(summary.metrics["gap"]) < 0.02 + 3 * summary.metrics["nll_se"]


def test_long_gradients_are_scaled_down_and_logged_as_they_were(tmp_path):
    stages = {"step": Stage(FlowMatching(), steps=1, batch_size=64, learning_rate=0.5)}
    flow, memory = small_flow(small_gaussian()), Memory()
    before = torch.nn.utils.parameters_to_vector(flow.parameters()).detach().clone()
    small_trainer(
        tmp_path, flow=flow, stages=stages, optimizer=torch.optim.SGD, gradient_clip=1e-3, loggers=[memory]
    ).fit()
    moved = torch.nn.utils.parameters_to_vector(flow.parameters()).detach() - before
    assert float(moved.norm()) == pytest.approx(0.5 * 1e-3, rel=1e-2)
    assert memory.series("train/gradient_norm")[0][1] > 0.01


def test_a_stage_may_have_an_optimiser_of_its_own_and_resumes_with_it(tmp_path):
    first, second = STAGES.values()
    stages = {"flow_matching": first, "maximum_likelihood": replace(second, optimizer=torch.optim.SGD)}
    whole = small_trainer(tmp_path / "whole", stages=stages)
    whole.fit()
    (group,) = load_checkpoint(tmp_path / "whole/checkpoints/last.pt")["optimizer"]["param_groups"]
    assert group.keys() >= {"momentum", "dampening"}  # SGD's, not Adam's
    with pytest.raises(TrainingInterrupted):
        small_trainer(tmp_path / "parts", stopping_at(small_gaussian(), 8), stages=stages).fit()
    parts = small_trainer(None, stages=stages, resume=tmp_path / "parts")
    parts.fit()
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    with pytest.raises(TypeError, match="optimizer must be a function, a text or None, got an object of class SGD"):
        replace(second, optimizer=torch.optim.SGD(whole.model.parameters(), lr=1.0))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_batches_whose_gradients_are_averaged_are_one_large_batch(tmp_path, optimizer):
    """Likelihood with an exact divergence and fixed steps: a mean over points, however they are split."""
    found = {}
    for size, number in ((12, 1), (4, 3)):
        dataset, memory = small_table(), Memory()
        flow = small_flow(dataset, flows.divergence.Exact())
        stages = {"likelihood": Stage(MaximumLikelihood(), steps=5, batch_size=size, learning_rate=1e-2)}
        trainer = small_trainer(
            tmp_path / str(size),
            dataset,
            stages,
            flow,
            optimizer=optimizer,
            accumulate_batches=number,
            loggers=[memory],
        )
        trainer.fit()
        found[size] = (torch.nn.utils.parameters_to_vector(flow.parameters()), memory.series("train/nll"))
    torch.testing.assert_close(found[4][0], found[12][0], rtol=0, atol=1e-9)
    for (step, split), (same, whole) in zip(found[4][1], found[12][1], strict=True):
        assert (step, split) == (same, pytest.approx(whole, abs=1e-9))
    with pytest.raises(ValueError, match="accumulate_batches must be a whole number >= 1, got 0"):
        small_trainer(tmp_path / "none", accumulate_batches=0)


class BreaksAt(FlowMatching):
    def __init__(self, step, how):
        object.__setattr__(self, "count", itertools.count(1))
        object.__setattr__(self, "step", step)
        object.__setattr__(self, "how", how)

    def __call__(self, flow, batch, generator=None):
        output = super().__call__(flow, batch, generator)
        return output if next(self.count) < self.step else self.how(output)


def gradient_breaks(output):
    loss = output.loss.clone()
    loss.register_hook(lambda gradient: gradient * math.inf)
    return LossOutput(loss, output.metrics)


def solver_breaks(output):
    raise flows.SolverError("the step size underflowed", 0.5, 1e-9)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        (
            lambda output: LossOutput(output.loss * math.nan, output.metrics),
            NonFiniteLossError,
            r"the loss is nan at step 3 \(step 3 of 6 in the stage flow_matching; the state to resume from is in "
            r".*last.pt\)\. In a new run, try a lower learning_rate \(now 0.01\)",
        ),
        (gradient_breaks, NonFiniteLossError, r"its gradient is not finite at step 3 "),
        (solver_breaks, flows.SolverError, r"training stopped at step 3 .*: the step size underflowed"),
    ],
    ids=["loss", "gradient", "solver"],
)
def test_a_breakdown_names_the_step_and_spares_the_weights(tmp_path, how, error, message):
    stages = {"flow_matching": Stage(BreaksAt(3, how), steps=6, batch_size=8, learning_rate=1e-2)}
    flow = small_flow(small_gaussian())
    with pytest.raises(error, match=message):
        small_trainer(tmp_path, flow=flow, stages=stages, checkpoint_every=0, validate_every=0).fit()
    content = load_checkpoint(tmp_path / "checkpoints/last.pt")
    assert content["position"]["step"] == 2
    assert_equal_weights(content["model"], flow.state_dict())


def as_on_a_gpu(monkeypatch):
    never = property(lambda loop: False, lambda loop, value: None)
    monkeypatch.setattr(Loop, "checks_every_step", never, raising=False)


def test_weights_that_broke_down_unseen_are_not_saved(tmp_path, monkeypatch):
    """On a GPU losses are not read at every step; they are before anything is saved, also for a Ctrl-C."""
    nan = BreaksAt(3, lambda output: LossOutput(output.loss * math.nan, output.metrics))
    stages = {"flow_matching": Stage(nan, steps=9, batch_size=8, learning_rate=1e-2)}
    rare = {"log_every": 0, "validate_every": 0, "checkpoint_every": 0}
    trainer = small_trainer(tmp_path, stopping_at(small_gaussian(), 5), stages=stages, **rare)
    as_on_a_gpu(monkeypatch)
    with pytest.raises(NonFiniteLossError, match=r"the loss is nan at or shortly before step 5"):
        trainer.fit()
    assert load_checkpoint(tmp_path / "checkpoints/last.pt")["position"]["step"] == 0


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_weights_that_broke_down_unseen_do_not_replace_saved_ones(tmp_path, monkeypatch, policy):
    """The solve of the step after is the first to notice, by an error that saves the weights otherwise."""
    calls = itertools.count(1)

    class BreaksOnce(MaximumLikelihood):
        def __call__(self, flow, batch, generator=None):
            output = super().__call__(flow, batch, generator)
            return LossOutput(output.loss * math.nan) if next(calls) == 5 else output

    stages = {"maximum_likelihood": Stage(BreaksOnce(), steps=9, batch_size=8, learning_rate=1e-2)}
    rare = {"log_every": 0, "validate_every": 0, "checkpoint_every": 3, "on_solver_error": policy}
    trainer = small_trainer(tmp_path, stages=stages, **rare)
    as_on_a_gpu(monkeypatch)
    with pytest.raises(NonFiniteLossError, match=r"the weights are not finite at or shortly before step 6 .*last\.pt"):
        trainer.fit()
    content = load_checkpoint(tmp_path / "checkpoints/last.pt")
    assert content["position"]["step"] == 3
    assert all(weights.isfinite().all() for weights in content["model"].values())


def test_the_best_weights_are_kept_tested_and_returned(tmp_path):
    """A second stage with an absurd learning rate ruins the flow; the first one's weights win."""
    stages = {
        **FLOW_MATCHING,
        "ruin": Stage(FlowMatching(), steps=3, batch_size=8, learning_rate=3.0, schedule="constant"),
    }
    dataset, memory = small_gaussian(), Memory()
    flow = small_flow(dataset, flows.divergence.Exact())
    summary = small_trainer(tmp_path, dataset, flow=flow, stages=stages, loggers=[memory], ema_decay=0.0).fit()
    validations = dict(memory.series("validation/nll"))
    assert summary.position.best_step == min(validations, key=validations.get) <= 6
    assert summary.validation_score == min(validations.values())
    assert f"of step {summary.position.best_step}, the best on the validation part" in str(summary)
    points = torch.cat([batch.x for batch in dataset.test_batches(7)])
    assert summary.metrics["nll"] == pytest.approx(float(-flow.log_prob(points).detach().mean()), abs=1e-10)
    validation = torch.cat([batch.x for batch in dataset.validation_batches(7)])
    assert summary.validation_score == pytest.approx(float(-flow.log_prob(validation).detach().mean()), abs=1e-10)


@pytest.mark.parametrize("step", [6, 11])
def test_a_run_that_dies_while_validating_validates_when_resumed(tmp_path, monkeypatch, step):
    whole = small_trainer(tmp_path / "whole", validate_every=0).fit()
    evaluate, memory = Loop._evaluate, Memory()

    def die(loop):
        if loop.state.position.step == step:
            raise KeyboardInterrupt
        return evaluate(loop)

    monkeypatch.setattr(Loop, "_evaluate", die)
    with pytest.raises(KeyboardInterrupt):
        small_trainer(tmp_path / "run", validate_every=0).fit()
    monkeypatch.undo()
    resumed = small_trainer(None, validate_every=0, resume=tmp_path / "run", loggers=[memory]).fit()
    assert [at for at, _ in memory.series("validation/nll")] == [6, 11][step == 11 :]
    assert (resumed.position.best_step, resumed.metrics["nll"]) == (whole.position.best_step, whole.metrics["nll"])
    again = Memory()
    small_trainer(None, validate_every=0, resume=tmp_path / "run", loggers=[again]).fit()
    assert again.series("validation/nll") == []


def test_the_summary_file_holds_the_figures(tmp_path):
    summary = small_trainer(tmp_path, seed=3, evaluation_batch_size=20).fit()
    content = json.loads((tmp_path / "summary.json").read_text())
    assert content == summary.as_dict()
    assert content["total_seconds"] >= content["seconds"] + content["evaluation_seconds"] > 0
    assert content["steps"] == 11
    assert content["test_points"] == 50
    assert content["test_gap"] == pytest.approx(content["test_nll"] - small_gaussian().entropy)
    assert content["test_nfe"] == 8
    assert content["seconds"] > 0
    assert content["test_solver_error"] < 1e-2
    assert (content["seed"], content["data"], content["output_dir"]) == (3, "gaussian", str(tmp_path))
    text = str(summary)
    for part in (
        f"{content['test_nll']:.4f} ± ",
        "50 points",
        "entropy",
        "evaluated with Analytic",
        "16",
        str(tmp_path),
    ):
        assert part in text


def test_unknown_figures_are_null(tmp_path):
    dataset = small_table()
    settings = {"solver_error_points": 0, "divergence": flows.divergence.Hutchinson()}
    summary = small_trainer(tmp_path, dataset, **settings).fit()
    content = json.loads((tmp_path / "summary.json").read_text())
    unknown = ("entropy", "gap", "bits_per_dim", "unresolved")
    assert [content[f"test_{name}"] for name in unknown] == [None] * 4
    assert content["test_solver_error_points"] == 10  # the least that is checked, here all
    assert "entropy" not in str(summary)


# Stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(tmp_path, number):
    before = signal.getsignal(number)
    trainer = small_trainer(tmp_path, stopping_at(small_gaussian(), 4, number), checkpoint_every=0)
    with pytest.raises(TrainingInterrupted, match=r"stopped after step 4 and saved in .*last.pt") as stop:
        trainer.fit()
    assert (stop.value.step, stop.value.signal_number) == (4, number)
    assert load_checkpoint(stop.value.checkpoint)["position"]["step_in_stage"] == 4
    assert signal.getsignal(number) is before
    assert isinstance(stop.value, KeyboardInterrupt)


def test_a_second_signal_does_not_wait():
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_an_interruption_that_python_swallows_comes_again(capfd):
    """As in the callback of an object that is deleted, where an exception has nobody to go to."""

    class Deleted:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def wait():
        thing = Deleted()
        del thing
        for _ in range(100):
            time.sleep(0.05)

    hook = sys.unraisablehook
    sys.unraisablehook = sys.__unraisablehook__
    try:
        with StopSignals() as stop, stop.at_once(), pytest.raises(KeyboardInterrupt):
            wait()
        assert sys.unraisablehook is sys.__unraisablehook__
    finally:
        sys.unraisablehook = hook
    assert capfd.readouterr().err == ""


def test_other_threads_train_without_signal_handlers(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(small_trainer(tmp_path, stages=FLOW_MATCHING).fit()))
    thread.start()
    thread.join()
    assert results[0].position.step == 6


# Folders and settings


def test_a_folder_with_a_run_is_not_touched(tmp_path):
    small_trainer(tmp_path, stages=FLOW_MATCHING).fit()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(
        OutputFolderError, match=r"holds another run already \(checkpoints, metrics.jsonl, summary.json\)"
    ):
        small_trainer(tmp_path).fit()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_folder_that_cannot_be_written_is_explained(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputFolderError, match=r"cannot be written \(Not a directory\); choose another output_dir"):
        small_trainer(tmp_path / "file" / "run").fit()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": {}}, "must hold at least one Stage"),
        ({"seed": -1}, "seed must be a whole number >= 0 .*, got -1"),
        ({"gradient_clip": 0}, "gradient_clip must be .* > 0, got 0; None sets no limit"),
        ({"log_every": -5}, "log_every must be a whole number >= 0, got -5; 0: only at the end"),
        ({"ema_decay": 1.5}, "ema_decay must be .* < 1, got 1.5"),
        ({"precision": "16-mixed"}, "skips steps whose gradients overflow, .* use bf16-mixed"),
        ({"precision": "half"}, "this hardware cannot be used: Precision 'half' is invalid"),
        ({"accelerator": "abacus"}, "this hardware cannot be used: .*abacus"),
        ({"evaluation_batch_size": 0}, "batch_size must be a whole number >= 1, got 0"),
    ],
)
def test_bad_settings_leave_no_run_behind(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        small_trainer(tmp_path / "run", **settings).fit()
    assert not (tmp_path / "run" / "checkpoints").exists()
    small_trainer(tmp_path / "run", stages=FLOW_MATCHING).fit()  # the corrected command may use the same folder


def test_double_precision_reaches_data_and_weights(tmp_path):
    torch.set_default_dtype(torch.float32)
    dataset = small_gaussian()
    flow = small_flow(dataset)
    small_trainer(tmp_path, dataset, flow=flow, precision="64-true").fit()
    assert {parameter.dtype for parameter in flow.parameters()} == {torch.float64}


def test_mixed_precision_runs(tmp_path):
    torch.set_default_dtype(torch.float32)
    memory, seen = Memory(), []

    def recorded(flow, batch, generator):
        seen.append(batch.x)
        return MaximumLikelihood()(flow, batch, generator)

    stages = {"maximum_likelihood": Stage(recorded, steps=2, batch_size=8)}
    small_trainer(tmp_path, stages=stages, precision="bf16-mixed", loggers=[memory]).fit()
    assert memory.series("train/nfe_forward")[0][1] == 8
    assert all(x.dtype == torch.float32 and not torch.equal(x, x.bfloat16().float()) for x in seen)


def test_fabric_comes_from_either_package(monkeypatch):
    import flows.training.fabric as module

    original = module.Fabric
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    substitute = types.ModuleType("lightning.fabric")
    substitute.Fabric = object()
    monkeypatch.setitem(sys.modules, "lightning", types.ModuleType("lightning"))
    monkeypatch.setitem(sys.modules, "lightning.fabric", substitute)
    for part, name in (("accelerators.accelerator", "Accelerator"), ("strategies.strategy", "Strategy")):
        module_of_part = types.ModuleType(f"lightning.fabric.{part}")
        setattr(module_of_part, name, object())
        monkeypatch.setitem(sys.modules, module_of_part.__name__, module_of_part)
    assert importlib.reload(module).Fabric is substitute.Fabric
    monkeypatch.undo()
    assert importlib.reload(module).Fabric is original


# Metrics and evaluation


def test_means_are_over_the_steps_since_the_last_time():
    means = MetricMeans()
    means.add({"loss": torch.tensor(1.0), "nfe": 3})
    means.add({"loss": torch.tensor(3.0), "late": 7.0})
    copied = MetricMeans()
    copied.load_state_dict(means.state_dict())
    assert means.pop() == {"loss": 2.0, "nfe": 3.0, "late": 7.0} == copied.pop()
    assert means.pop() == {}


class ZeroField(torch.nn.Module):
    event_shape = (2,)

    def forward(self, t, x):
        return 0 * x


def test_the_likelihood_of_a_set_against_a_normal_distribution():
    """A field that is zero leaves the standardised data's normal density: a cross-entropy with a closed form."""
    dataset = small_gaussian()
    transform = flows.transforms.Standardise((2,)).fit(dataset.reference())
    result = likelihood(flows.CNF(ZeroField(), transform=transform), dataset.test_batches(8), solver_error_points=9)
    points = torch.cat([batch.x for batch in dataset.test_batches(50)])
    nll = -MultivariateNormal(transform.mean, torch.diag(transform.sd**2)).log_prob(points)
    assert result.num_points == 50
    assert result.nll == pytest.approx(float(nll.mean()), abs=1e-12)
    assert result.standard_error == pytest.approx(float(nll.std() / math.sqrt(50)), abs=1e-12)
    assert result.probe_standard_error == 0
    assert result.solver_error == pytest.approx(0, abs=1e-12)
    assert result.solver_error_points == 9  # no whole batches: the second is split


def test_the_probe_error_is_that_of_repeated_evaluations():
    dataset = small_gaussian()
    flow = small_flow(dataset, flows.divergence.Hutchinson(num_probes=8))
    flow.field.layers[0].weight.data *= 5
    results = [likelihood(flow, dataset.test_batches(50), torch.Generator().manual_seed(seed)) for seed in range(60)]
    spread = torch.tensor([result.nll for result in results]).std()
    claimed = torch.tensor([result.probe_standard_error for result in results]).mean()
    assert 0.7 < spread / claimed < 1.3
    assert len({result.nll for result in results}) == 60
    again = likelihood(flow, dataset.test_batches(50), torch.Generator().manual_seed(3))
    assert again == results[3]


def test_sets_without_a_likelihood_are_refused():
    dataset = small_gaussian()
    flow = small_flow(dataset)
    with pytest.raises(ValueError, match="there is no point to evaluate"):
        likelihood(flow, [])
    with pytest.raises(ValueError, match="1 of 2 points hold NaN"):
        likelihood(flow, [Batch(torch.tensor([[0.0, 0.0], [math.nan, 0.0]]))])
    with pytest.raises(
        ValueError, match="1 of 2 points have a log-density that is NaN or infinite, the first at index 1"
    ):
        likelihood(flows.CNF(ZeroField()), [Batch(torch.tensor([[0.0, 0.0], [1e200, 0.0]]))])
    with pytest.raises(ValueError, match="part must be test or validation, got 'train'"):
        part_batches(flow, dataset, "train", 5)


def test_a_single_point_has_no_standard_error():
    result = likelihood(flows.CNF(ZeroField()), [Batch(torch.zeros(1, 2))])
    assert math.isnan(result.standard_error)
    assert "±" not in str(result.table())


@pytest.mark.parametrize(("kind", "half", "expected"), [("cuda", True, "bf16-mixed"), ("cuda", False, "32-true")])
def test_precision_auto_is_what_the_gpu_computes_in(monkeypatch, kind, half, expected):
    class Recorded:
        def __init__(self, precision=None, **settings):
            self.precision = precision
            self.device = torch.device(kind)

    monkeypatch.setattr("flows.training.fabric.Fabric", Recorded)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: half)
    assert build_fabric(Hardware(precision="auto")).precision == expected
    assert build_fabric(Hardware(precision="64-true")).precision == "64-true"


@pytest.mark.parametrize("wanted", [True, False])
def test_deterministic_algorithms_last_as_long_as_the_training(tmp_path, wanted):
    seen = []

    class Watched(FlowMatching):
        def __call__(self, flow, batch, generator=None):
            seen.append(torch.are_deterministic_algorithms_enabled())
            return super().__call__(flow, batch, generator)

    small_trainer(tmp_path, stages={"watched": Stage(Watched(), steps=2)}, deterministic=wanted).fit()
    assert seen == [wanted] * 2
    assert not torch.are_deterministic_algorithms_enabled()


def test_precision_and_compilation_auto_on_a_cpu(tmp_path):
    trainer = small_trainer(tmp_path, precision="auto", compile="auto")
    assert trainer.fabric._precision.precision == "32-true"
    assert trainer._compiled == set()
