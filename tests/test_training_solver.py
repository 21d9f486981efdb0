"""Training and its solves: batches that cannot be solved, warnings, what is logged, and compiled evaluations."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from small_run import STAGES, Memory, small_flow, small_gaussian, small_table, small_trainer, stopping_at
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flows import CNF, ODESolver, plots
from flows.datasets import Batch
from flows.divergence import Analytic, Exact, Hutchinson
from flows.errors import InvalidValueError
from flows.evaluation import density, likelihood
from flows.fields import MLP
from flows.models.resolution import CHECKED_POINTS
from flows.objectives import FlowMatching, MaximumLikelihood
from flows.path_costs import JacobianNorm, KineticEnergy
from flows.solvers import Attempt, Compilations, SolverError, SolverStatistics
from flows.training import Optimization, Stage, TrainingInterrupted, load_checkpoint
from flows.training.compile import compiled, stages_to_compile
from flows.training.expensive_solves import WINDOW, EvaluationWatch
from flows.training.loggers import warnings_above_bars
from flows.training.loop import Loop

ADAPTIVE = ODESolver(rtol=1e-3, atol=1e-3)


class Unsolvable(FlowMatching):
    """Fails on batches of which the test says so, at once or in the backward pass, as an adjoint solve does."""

    def __init__(self, fails, backward=False):
        super().__init__()
        object.__setattr__(self, "fails", fails)
        object.__setattr__(self, "backward", backward)

    def __call__(self, flow, batch, generator=None):
        failure = SolverError("the solve underflowed", 0.25, 1e-9, "log_density", 7)
        first = FailsBackward.apply(flow.field.out.weight.sum(), failure)  # so it is the last of the backward pass
        output = super().__call__(flow, batch, generator)
        if not self.fails(batch):
            return output
        if not self.backward:
            raise failure
        return replace(output, loss=output.loss + first)


class FailsBackward(torch.autograd.Function):
    """The identity, without a gradient."""

    @staticmethod
    def forward(context, value, failure):
        context.failure = failure
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        raise context.failure


def stages(fails, steps=6, backward=False):
    return {"matching": Stage(Unsolvable(fails, backward), steps=steps, batch_size=16, learning_rate=1e-2)}


def on_calls(*numbers):
    """Fails at these calls, from 1."""
    count = itertools.count(1)
    return lambda batch: next(count) in numbers


def in_half_plane(batch):
    """A property of the batch alone, so that a resumed run meets the same failures."""
    return bool(batch.x.mean(0)[0] > 1.1)


def flow_of(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_skipped_batches_leave_the_number_of_steps_alone(tmp_path, caplog):
    memory = Memory()
    trainer = small_trainer(
        tmp_path, stages=stages(on_calls(2, 3, 6)), on_solver_error="skip", max_solver_errors=3, loggers=[memory]
    )
    summary = trainer.fit()
    assert (summary.position.step, summary.position.skipped) == (6, 3)
    warnings = memory.series("warnings")
    assert [step for step, _ in warnings] == [2, 2, 4]
    assert warnings[0][1].startswith("a batch was skipped, number 1 of this run: the solve underflowed")
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3
    assert load_checkpoint(tmp_path / "checkpoints/last.pt")["position"]["skipped"] == 3
    assert json.loads((tmp_path / "summary.json").read_text())["skipped_batches"] == 3
    assert "(3 batches skipped)" in str(summary)
    assert dict(memory.series("train/skipped")) == {2: 2, 3: 2, 4: 3, 5: 3, 6: 3}


def test_weights_whose_validation_fails_are_passed_over(tmp_path, monkeypatch):
    evaluate, memory = Loop._evaluate, Memory()

    def fail(loop):
        if loop.state.position.step == 3:
            raise SolverError("the solve underflowed", 0.25, 1e-9, "log_density", 7)
        return evaluate(loop)

    monkeypatch.setattr(Loop, "_evaluate", fail)
    with pytest.raises(SolverError, match="validation stopped at step 3"):
        small_trainer(tmp_path / "raise").fit()
    summary = small_trainer(tmp_path / "skip", on_solver_error="skip", loggers=[memory]).fit()
    assert summary.position.best_step in (6, 9, 11)
    (warning,) = memory.series("warnings")
    assert warning[0] == 3
    assert "these weights were not compared with the best: validation stopped at step 3" in warning[1]


@pytest.mark.parametrize("backward", [False, True])
def test_a_skipped_batch_leaves_no_trace_but_itself(tmp_path, backward):
    """The weights are those of a run that is never given the batch."""
    failing = stages(on_calls(3), backward=backward)
    skipped = small_trainer(tmp_path / "skipped", stages=failing, on_solver_error="skip")
    skipped.fit()
    dataset = small_gaussian()
    original = dataset.train_stream

    def without_third(*args, **kwargs):
        stream = original(*args, **kwargs)
        draw, count = stream.next, itertools.count(1)

        def following():
            batch = draw()
            if next(count) == 3:
                stage_generator["draws"](batch)
                batch = draw()
            return batch

        stream.next = following
        return stream

    dataset.train_stream = without_third
    trainer = small_trainer(tmp_path / "plain", dataset, stages=stages(lambda batch: False))
    # the objective of the skipped batch has drawn its noise as well
    stage_generator = {}
    new_state = trainer._new_state

    def state_with_generator():
        state = new_state()
        stage_generator["draws"] = lambda batch: FlowMatching()(trainer.model, batch, state.generator)
        return state

    trainer._new_state = state_with_generator
    trainer.fit()
    for name, value in flow_of(skipped).items():
        torch.testing.assert_close(value, flow_of(trainer)[name], rtol=0, atol=0)


def test_so_many_failures_in_a_row_end_the_run_with_its_state_saved(tmp_path):
    fails = on_calls(2, 4, 5, 6)
    trainer = small_trainer(tmp_path, stages=stages(fails), on_solver_error="skip", max_solver_errors=3,
                            checkpoint_every=0, validate_every=0)  # fmt: skip
    with pytest.raises(
        SolverError, match=r"training stopped at step 3 .*last.pt.*: 3 batches in a row could not be solved .*underfl"
    ) as e:
        trainer.fit()
    assert (e.value.t, e.value.dt, e.value.component, e.value.sample) == (0.25, 1e-9, "log_density", 7)
    position = load_checkpoint(tmp_path / "checkpoints/last.pt")["position"]
    assert (position["step"], position["step_in_stage"], position["skipped"]) == (2, 2, 4)
    resumed = small_trainer(None, stages=stages(lambda batch: False), resume=tmp_path)
    assert resumed.fit().position.step == 6


def test_a_resumed_run_skips_the_same_batches(tmp_path):
    def trainer(folder, dataset=None, **settings):
        settings = {"on_solver_error": "skip", **settings}
        return small_trainer(folder, dataset or small_gaussian(), stages=stages(in_half_plane, 12), **settings)

    whole = trainer(tmp_path / "whole")
    summary = whole.fit()
    assert summary.position.skipped > 1
    with pytest.raises(TrainingInterrupted):
        trainer(tmp_path / "parts", stopping_at(small_gaussian(), 7)).fit()
    parts = trainer(None, resume=tmp_path / "parts")
    assert parts.fit().position.skipped == summary.position.skipped
    for name, value in flow_of(whole).items():
        torch.testing.assert_close(value, flow_of(parts)[name], rtol=0, atol=0)


def test_without_the_policy_the_first_failure_raises_with_all_it_knows(tmp_path):
    with pytest.raises(SolverError, match=r"training stopped at step 2 .*the solve underflowed") as e:
        small_trainer(tmp_path, stages=stages(on_calls(2))).fit()
    assert (e.value.component, e.value.sample) == ("log_density", 7)


def test_bad_policies_are_refused(tmp_path):
    with pytest.raises(ValueError, match="on_solver_error must be 'raise' or 'skip', got 'ignore'"):
        small_trainer(tmp_path, on_solver_error="ignore")
    with pytest.raises(ValueError, match="max_solver_errors must be a whole number >= 1, got 0"):
        small_trainer(tmp_path, max_solver_errors=0)
    flow = small_flow(small_gaussian())
    flow.solver = ODESolver(gradient="adjoint")
    skipping = Optimization(on_solver_error="skip")
    for model in (flow, CNF(MLP((2,)), base=flow)):
        with pytest.raises(ValueError, match="on_solver_error='skip' with gradient='adjoint' works in one process"):
            skipping.check(model, world_size=2)
        skipping.check(model, world_size=1)


# Telemetry


def statistics_of(nfe, steps=()):
    return SolverStatistics(("state", "log_density"), nfe_forward=nfe, attempts=list(steps))


def test_the_watch_tells_early_which_sample_and_time_make_solves_dear():
    watch = EvaluationWatch()
    for i in range(WINDOW):
        assert watch(statistics_of(60 + i % 3)) is None
    assert watch(None) is None
    assert watch(statistics_of(150)) is None
    steps = [Attempt(0.1 * i, 0.1, True, 0.5, "state", 3) for i in range(8)]
    steps += [Attempt(0.8 + 0.001 * i, 0.001, i % 5 > 0, 2.0, "log_density", 11 if i % 9 else 2) for i in range(100)]
    told = watch(statistics_of(660, steps))
    assert told.startswith(
        "the solve took 660 evaluations, 10.8 times the usual 61: the field gets stiff around t = 0.8"
    )
    assert "the shortest step is 1.0e-03 and the log-density of sample 11 of the batch has the largest error" in told
    assert watch(statistics_of(660, steps)) is None  # told once, and again when it has doubled
    assert watch(statistics_of(1500, steps)) is not None


def test_the_watch_notices_a_slow_rise_too():
    watch = EvaluationWatch()
    told = [nfe for nfe in range(100, 900, 2) if watch(statistics_of(nfe))]
    assert told == [358, 714]  # three and six times the first median


def test_an_explosion_within_the_first_solves_of_a_run_is_told():
    watch = EvaluationWatch()
    told = [watch(statistics_of(nfe)) for nfe in (400, 50, 60, 61, 62, 300)]  # the first of all says nothing
    assert told[:5] == [None] * 5
    assert told[5].startswith("the solve took 300 evaluations, 4.9 times the usual 61")


def test_a_resumed_watch_goes_on_as_the_one_that_stopped():
    whole, first = EvaluationWatch(), EvaluationWatch()
    series = [60] * 25 + [70, 400, 500] + [900] * 25 + [1500]
    expected = [whole(statistics_of(nfe)) for nfe in series]
    assert sum(told is not None for told in expected) == 3
    for stop in (3, 10, 27, 40):
        first, second = EvaluationWatch(), EvaluationWatch()
        told = [first(statistics_of(nfe)) for nfe in series[:stop]]
        second.load_state_dict(first.state_dict())
        assert told + [second(statistics_of(nfe)) for nfe in series[stop:]] == expected


class Exploding(MaximumLikelihood):
    """Its solves say that they took far more evaluations from some call on."""

    def __init__(self, calls):
        super().__init__()
        object.__setattr__(self, "calls", itertools.chain(calls))

    def __call__(self, flow, batch, generator=None):
        output = super().__call__(flow, batch, generator)
        return replace(output, statistics=statistics_of(next(self.calls), output.statistics.attempts))


def test_a_run_resumed_after_an_explosion_does_not_take_it_as_usual(tmp_path):
    """Nor does a stage that begins with one."""

    def run(first, second, folder=tmp_path, **settings):
        memory = Memory()
        two = {
            name: Stage(Exploding(calls), steps=8, batch_size=16, learning_rate=1e-3)
            for name, calls in (("first", first), ("second", second))
        }
        return small_trainer(folder, stages=two, loggers=[memory], **settings), memory

    stopped, _ = run([60] * 8, [60, 60, 60], dataset=stopping_at(small_gaussian(), 11))
    with pytest.raises(TrainingInterrupted):
        stopped.fit()
    resumed, memory = run([], [900] * 5, None, resume=tmp_path)
    resumed.fit()
    ((step, text),) = memory.series("warnings")
    assert (step, "took 900 evaluations, 15.0 times the usual 60" in text) == (12, True)
    whole, memory = run([60] * 8, [900] * 8, tmp_path / "whole")
    whole.fit()
    assert [step for step, _ in memory.series("warnings")] == [9]


def test_the_watch_counts_the_backward_pass_and_blames_its_samples():
    watch, usual = EvaluationWatch(), [Attempt(1 - 0.1 * i, -0.1, True, 0.5, "state", 1) for i in range(10)]
    for _ in range(WINDOW):
        assert watch(replace(statistics_of(60, usual), nfe_backward=40)) is None
    back = [Attempt(0.3 + 1e-4 * i, 1e-4, True, 0.5, "adjoint of state", 5) for i in range(100)]
    told = watch(replace(statistics_of(60, usual), nfe_backward=4940, backward_attempts=back))
    assert told.startswith("the solve took 5000 evaluations (4940 of them backward), 50.0 times the usual 100")
    assert "around t = 0.3" in told
    assert "1.0e-04 and the adjoint of state of sample 5" in told


def test_a_run_that_is_stiff_from_its_first_solve_is_told_so():
    watch, steps = EvaluationWatch(), [Attempt(1 - 1e-3 * i, -1e-3, True, 0.5, "log_density", 2) for i in range(900)]
    told = [watch(statistics_of(nfe, steps)) for nfe in (1500, 1500, 1600, 2500)]
    assert [text is not None for text in told] == [True, False, False, True]  # again when it has doubled
    assert told[0].startswith("the solve took 1500 evaluations: the field is stiff around t = ")
    chosen = [Attempt(i / 900, 1 / 900) for i in range(900)]  # steps of fixed size are the user's own
    assert EvaluationWatch()(statistics_of(3600, chosen)) is None


def test_an_explosion_is_drawn_and_one_in_validation_told(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "figures", lambda *arguments, **settings: {})
    memory = Memory()
    stage = {"only": Stage(Exploding([60] * 6 + [900] * 6), steps=12, batch_size=16, learning_rate=1e-3)}
    told = iter([100, 110, 900, 120])

    def slow(*arguments, **settings):
        return replace(likelihood(*arguments, **settings), statistics=statistics_of(next(told, 100)))

    monkeypatch.setattr(density, "likelihood", slow)
    small_trainer(tmp_path, stages=stage, loggers=[memory], plot_every=0).fit()
    warnings = memory.series("warnings")
    assert [step for step, _ in warnings] == [7, 9]
    assert warnings[1][1].startswith("in validation, the solve took 900 evaluations, 8.6 times the usual 105")
    assert (tmp_path / "plots/solve_000007.png").exists()


def test_flow_matching_has_the_solves_of_validation_to_look_at(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "figures", lambda *arguments, **settings: {})
    dataset, memory = small_gaussian(), Memory()
    flow = small_flow(dataset)
    flow.solver = ADAPTIVE
    stage = {"flow_matching": STAGES["flow_matching"]}
    small_trainer(tmp_path, dataset, stage, flow, plot_every=3, loggers=[memory]).fit()
    for name in ("steps_accepted", "steps_rejected", "shortest_step", "limited_by_state", "limited_by_log_density"):
        assert [step for step, _ in memory.series(f"validation/{name}")] == [3, 6]
    assert [step for step, _ in memory.series("plots/solve")] == [3, 6]
    assert memory.series("plots/solve")[0][1].axes[0].get_title().startswith("validation: ")


@pytest.mark.parametrize(
    "error", [SolverError("no end in sight", 0.25, 1e-6, "state", 3), InvalidValueError("no end in sight")], ids=repr
)
def test_a_test_that_fails_leaves_the_rest_of_the_run(tmp_path, monkeypatch, error):
    """Its error ends the program, after the summary and the pictures are written."""

    def fails_in_test(*arguments, progress=None, solver_error_points=0, **settings):
        if solver_error_points > CHECKED_POINTS:
            raise error
        return likelihood(*arguments, **settings)

    monkeypatch.setattr(plots, "figures", lambda *arguments, **settings: {})
    monkeypatch.setattr(density, "likelihood", fails_in_test)
    with pytest.raises(type(error), match=r"its test stopped: no end in sight\. The weights are in .*checkpoints") as e:
        small_trainer(tmp_path, plot_every=0, on_solver_error="skip").fit()
    if isinstance(error, SolverError):
        assert (e.value.t, e.value.component, e.value.sample) == (0.25, "state", 3)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 11
    assert not [name for name in summary if name.startswith("test_")]
    assert (tmp_path / "plots/curves.png").exists()


def test_few_evaluations_are_no_reason_to_worry():
    watch = EvaluationWatch()
    for nfe in [10] * WINDOW + [90]:
        assert watch(statistics_of(nfe)) is None


def test_what_solves_tell_is_in_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "figures", lambda *arguments, **settings: {})
    dataset = small_gaussian()
    flow = small_flow(dataset, Hutchinson(num_probes=2))
    flow.solver = ADAPTIVE
    memory = Memory()
    small_trainer(tmp_path, dataset, flow=flow, plot_every=10, loggers=[memory], log_every=1).fit()
    content = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "images": 0})
    content.Reload()
    tags = content.Tags()
    names = {"steps_accepted", "steps_rejected", "steps_forced", "shortest_step", "limited_by_state"}
    assert {f"maximum_likelihood/{name}" for name in names} <= set(tags["scalars"])
    assert "plots/solve" in tags["images"]
    assert (tmp_path / "plots/solve_000010.png").exists()
    assert (tmp_path / "plots/solve.png").exists()  # of the last step
    shares = [dict(memory.series(f"train/limited_by_{name}")) for name in ("state", "log_density")]
    for step, share in shares[0].items():
        assert share + shares[1][step] == pytest.approx(1)
    for step, accepted in memory.series("train/steps_accepted"):
        rejected, nfe = (dict(memory.series(f"train/{name}"))[step] for name in ("steps_rejected", "nfe_forward"))
        assert nfe == 2 + 6 * (accepted + rejected)


# Compilation


@pytest.fixture
def quick_compiler(monkeypatch):
    """Traces as the compiler does, and leaves out what takes it minutes."""
    compile = torch.compile

    def without_code(function, options=None, **settings):
        return compile(function, backend="aot_eager", **settings)

    monkeypatch.setattr(torch, "compile", without_code)
    torch._dynamo.reset()


@pytest.mark.parametrize("estimator", [Analytic(), pytest.param(Hutchinson(2, mode="forward"), marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
def test_compiled_training_is_training(tmp_path, quick_compiler, estimator):
    costly = MaximumLikelihood({"kinetic": KineticEnergy(0.1), "jacobian": JacobianNorm(0.1)})
    stages = STAGES | {"costly": replace(STAGES["maximum_likelihood"], objective=costly)}
    runs = {}
    for setting in (False, True):
        dataset = small_table()
        flow = small_flow(dataset, estimator)
        short = {name: replace(stage, steps=2, warmup_steps=0) for name, stage in stages.items()}
        trainer = small_trainer(tmp_path / str(setting), dataset, stages=short, flow=flow, compile=setting)
        trainer.fit()
        runs[setting] = flow_of(trainer)
        assert flow.divergence == estimator
        assert flow.field._compiled_call_impl is None
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for name, value in runs[False].items():
        torch.testing.assert_close(runs[True][name], value, rtol=1e-6, atol=1e-8)


class Differentiating(torch.nn.Module):
    """Takes its divergence by autograd, as fields of one's own may."""

    event_shape = (2,)

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))

    def forward(self, t, x):
        return self.layers(x) + t.reshape(-1, 1)

    def value_and_divergence(self, t, x):
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            value = self(t, x)
            rows = [torch.autograd.grad(value[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
        return value, sum(rows)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of the tracer
def test_double_backward_within_a_field_is_explained(tmp_path, quick_compiler):
    dataset = small_table()
    flow = small_flow(dataset, Analytic())
    flow.field = Differentiating()
    objective = FlowMatching(divergence_weight=1.0)
    stage = {"matching": Stage(objective, steps=2, batch_size=8, learning_rate=1e-3)}
    small_trainer(tmp_path / "plain", dataset, stages=stage, flow=flow).fit()
    with pytest.raises(ValueError, match=r"something within an evaluation calls autograd.* or hardware.compile=false"):
        small_trainer(tmp_path / "compiled", dataset, stages=stage, flow=flow, compile=True).fit()
    assert flow.field._compiled_call_impl is None


def test_auto_compiles_what_it_can(tmp_path, monkeypatch):
    dataset = small_table()
    flow = small_flow(dataset, Exact())
    long = replace(STAGES["maximum_likelihood"], steps=1000)
    matching = replace(STAGES["flow_matching"], steps=1000)
    assert stages_to_compile("auto", "cpu", flow, STAGES) == (set(), [])
    assert stages_to_compile("auto", "cpu", flow, {"long": long, "matching": matching}) == ({"long"}, [])
    chosen, (notice,) = stages_to_compile("auto", "cuda", flow, STAGES)
    assert chosen == {"maximum_likelihood"}
    assert notice.startswith("hardware.compile=auto leaves the stage flow_matching uncompiled: ")
    flow.solver = ODESolver("explicit_adams", step_size=0.1)
    assert stages_to_compile("auto", "cpu", flow, {"long": long})[1][0].endswith("or compile=False")
    monkeypatch.setattr("flows.training.trainer.stages_to_compile", lambda *arguments: (set(), [notice]))
    memory = Memory()
    small_trainer(tmp_path, dataset, flow=small_flow(dataset, Hutchinson()), compile="auto", loggers=[memory]).fit()
    assert memory.series("warnings") == [(0, notice)]


def test_double_backward_is_refused_with_a_way_out(tmp_path):
    dataset = small_table()
    stage = {"m": replace(STAGES["flow_matching"], objective=FlowMatching(divergence_weight=1.0))}
    for estimator in (Exact(), Exact(chunk_size=2)):
        flow = small_flow(dataset, estimator)
        with pytest.raises(ValueError, match=r"does not go with divergence \w+\(mode='reverse'\).*divergence.mode=f"):
            small_trainer(tmp_path, dataset, stages=stage, flow=flow, compile=True)
        solving = {"m": STAGES["maximum_likelihood"]}
        small_trainer(tmp_path, dataset, stages=solving, flow=flow, compile=True)  # takes compiled steps


def test_the_summary_says_what_was_compiled(tmp_path, quick_compiler):
    dataset = small_table()
    flow = small_flow(dataset, Hutchinson(1))
    flow.solver = ODESolver("heun2", step_size=0.5)
    stage = {"likelihood": replace(STAGES["maximum_likelihood"], steps=2)}
    summary = small_trainer(tmp_path, dataset, stages=stage, flow=flow, compile=True).fit()
    assert flow.solver.compile is False
    found = summary.as_dict()
    assert found["compilations"] == summary.compilations.count >= 1
    assert found["compile_seconds"] > 0
    assert "programs of solver steps" in str(summary)


def test_the_wait_for_the_compiler_is_told(quick_compiler, monkeypatch, capsys):
    monkeypatch.setattr("flows.solvers.programs.COMPILATIONS", Compilations())
    flow = small_flow(small_table(), Analytic())
    flow.solver = ODESolver("heun2", step_size=0.5, compile=True)
    x = torch.randn(7, 2)
    with warnings_above_bars(), torch.no_grad():
        for points in (x, x[:3]):
            flow.log_prob(points)
    assert capsys.readouterr().err.count("compiling solver steps, each once") == 1


def test_matching_the_divergence_compiles_where_it_can(quick_compiler):
    flow, objective = small_flow(small_table(), Analytic()), FlowMatching(divergence_weight=1.0)
    flow.solver = ODESolver(gradient="adjoint")  # it is not used
    batch, plain = Batch(torch.randn(8, 2)), flow.divergence
    losses = [objective(flow, batch, torch.Generator().manual_seed(0)).loss]
    with compiled(flow, objective):
        assert flow.divergence is not plain
        losses.append(objective(flow, batch, torch.Generator().manual_seed(0)).loss)
    assert flow.divergence is plain
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(loss, list(flow.field.parameters())) for loss in losses]
    torch.testing.assert_close(*gradients)
    flow.divergence = Exact()
    with pytest.raises(ValueError, match=r"does not go with divergence Exact\(mode='rev"), compiled(flow, objective):
        pass


def test_a_stage_that_solves_nothing_leaves_the_estimator_alone(quick_compiler):
    flow = small_flow(small_table(), Exact())
    with compiled(flow, FlowMatching(divergence_weight=0)):
        assert flow.divergence == Exact()
        assert flow.field._compiled_call_impl is not None
    assert flow.field._compiled_call_impl is None
    flow.field.compile(dynamic=True)
    own = flow.field._compiled_call_impl
    with (
        pytest.raises(ValueError, match="does not go with"),
        compiled(flow, FlowMatching(divergence_weight=1.0)),
    ):
        pass
    with compiled(flow, FlowMatching(divergence_weight=0)):
        assert flow.field._compiled_call_impl is not own
    assert flow.field._compiled_call_impl is own
    flow.field._compiled_call_impl = None
    assert math.isfinite(float(flow.log_prob(torch.zeros(1, 2)).detach()))
