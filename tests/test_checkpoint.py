"""Checkpoints: bit-for-bit resume, safe and atomic files, settings that cannot run code."""

import contextlib
import os
import pickle
import random
import signal

import pytest
import torch
import yaml
from small_run import STAGES, Memory, small_flow, small_gaussian, small_table, small_trainer, stopping_at

import flows
from flows.errors import InvalidTypeError
from flows.training import (
    CheckpointError,
    TrainingInterrupted,
    build_dataset,
    check_trusted,
    find_checkpoint,
    load_checkpoint,
    load_flow,
    save_checkpoint,
)
from flows.training.building import build_flow, model_parts
from flows.training.checkpoint import RUN, VERSION
from flows.training.fitting import check_optimizer
from flows.training.identity import load_best
from flows.training.trusted import UntrustedConfigError, foreign_packages

CONFIG = {
    "data": {"_target_": "flows.datasets.EightGaussians", "num_test": 50},
    "transform": {"_target_": "flows.transforms.Standardise"},
    "field": {"_target_": "flows.fields.MLP", "hidden": [8, 8]},
    "divergence": {"_target_": "flows.divergence.Analytic"},
    "solver": {"_target_": "flows.ODESolver", "method": "rk4", "step_size": 0.5},
}


def flat(tree, prefix=""):
    """Every leaf of nested dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else None
    if items is None:
        return {prefix: tree}
    return {path: leaf for key, value in items for path, leaf in flat(value, f"{prefix}/{key}").items()}


def assert_same_state(one, two):
    """Equal in every weight, moment, generator and counter; only the clock and the run's name differ."""
    one, two = flat(one), flat(two)
    assert one.keys() == two.keys()
    for path, value in one.items():
        if path in ("/position/seconds", "/position/seconds_in_stage", "/run"):
            continue
        same = torch.equal(value, two[path]) if isinstance(value, torch.Tensor) else value == two[path]
        assert same, f"{path} differs: {value} and {two[path]}"


@pytest.mark.parametrize("dataset", [small_gaussian, small_table], ids=["density", "table"])
@pytest.mark.parametrize("stop", [1, 4, 6, 9, 11], ids=lambda step: f"stop-at-{step}")
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, dataset, stop):
    """Inside the first stage (1, 4), at its end (6), inside the second (9), at the very end (11)."""
    straight, stopped, resumed = Memory(), Memory(), Memory()
    small_trainer(tmp_path / "straight", dataset(), loggers=[straight], log_every=2).fit()
    first = small_trainer(tmp_path / "run", stopping_at(dataset(), stop), loggers=[stopped], log_every=2)
    with pytest.raises(TrainingInterrupted, match=f"stopped after step {stop} ") as interruption:
        first.fit()
    assert interruption.value.checkpoint == tmp_path / "run/checkpoints/last.pt"

    torch.manual_seed(12345)  # nothing of the process that resumes may matter
    flow = small_flow(dataset(), seed=99)
    second = small_trainer(
        tmp_path / "run", dataset(), flow=flow, resume=tmp_path / "run", loggers=[resumed], log_every=2
    )
    assert second.fit().position.step == 11

    for name in ("last", "best"):
        assert_same_state(
            load_checkpoint(tmp_path / f"straight/checkpoints/{name}.pt"),
            load_checkpoint(tmp_path / f"run/checkpoints/{name}.pt"),
        )
    for name in ("train/loss", "train/gradient_norm", "train/learning_rate", "validation/nll"):
        assert stopped.series(name) + resumed.series(name) == straight.series(name), name


def test_resuming_elsewhere_leaves_the_first_run_alone(tmp_path):
    with pytest.raises(TrainingInterrupted):
        small_trainer(tmp_path / "run", stopping_at(small_gaussian(), 8, signal.SIGTERM)).fit()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    small_trainer(tmp_path / "branch", resume=tmp_path / "run").fit()
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    small_trainer(tmp_path / "straight").fit()
    assert_same_state(
        load_checkpoint(tmp_path / "straight/checkpoints/best.pt"),
        load_checkpoint(tmp_path / "branch/checkpoints/best.pt"),
    )
    with pytest.raises(OSError, match="holds another run already"):
        small_trainer(tmp_path / "straight", resume=tmp_path / "run").fit()


def test_resuming_another_model_or_other_stages_is_refused(tmp_path):
    with pytest.raises(TrainingInterrupted):
        small_trainer(tmp_path, stopping_at(small_gaussian(), 8)).fit()
    with pytest.raises(CheckpointError, match="stopped in the stage 'maximum_likelihood', this run has flow_matching"):
        small_trainer(tmp_path, resume=tmp_path, stages={"flow_matching": STAGES["flow_matching"]}).fit()
    dataset = small_gaussian()
    wider = flows.CNF(flows.fields.MLP((2,), hidden=(9,)), transform=flows.transforms.Standardise((2,)))
    with pytest.raises(CheckpointError, match="belongs to another model"):
        small_trainer(tmp_path, dataset, flow=wider, resume=tmp_path).fit()
    with pytest.raises(CheckpointError, match="started on the data 'gaussian' and is resumed on 'table'"):
        small_trainer(tmp_path, small_table(), resume=tmp_path).fit()


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = save_checkpoint(tmp_path / "last.pt", {"value": torch.ones(3)})

    def crash(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, {"value": torch.zeros(3)})
    monkeypatch.undo()
    assert torch.equal(load_checkpoint(path)["value"], torch.ones(3))
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]


def test_missing_damaged_and_foreign_checkpoints_are_explained(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere; a relative path starts at"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "missing.pt")
    (tmp_path / "empty_run").mkdir()
    (tmp_path / "empty_run" / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"expected checkpoints/best.pt in it, found notes.txt"):
        find_checkpoint(tmp_path / "empty_run")

    whole = save_checkpoint(tmp_path / "whole.pt", {"value": torch.randn(1000)})
    for keep in (0, 10, 500, whole.stat().st_size - 30):
        cut = tmp_path / "cut.pt"
        cut.write_bytes(whole.read_bytes()[:keep])
        with pytest.raises(CheckpointError, match="damaged"):
            load_checkpoint(cut)

    foreign = tmp_path / "foreign.pt"
    torch.save({"state_dict": {}}, foreign)
    with pytest.raises(CheckpointError, match="is not a flows checkpoint"):
        load_checkpoint(foreign)
    foreign.write_text("hello")
    with pytest.raises(CheckpointError, match=r"foreign.pt is "):
        load_checkpoint(foreign)
    save_checkpoint(foreign, {})
    content = torch.load(foreign) | {"version": 99}
    torch.save(content, foreign)
    with pytest.raises(CheckpointError, match="has checkpoint version 99, this version of flows reads 4; read it"):
        load_checkpoint(foreign)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickled_call_in_a_checkpoint_is_not_run(tmp_path):
    content = {"format": "flows checkpoint", "version": VERSION, "config": Bomb(str(tmp_path / "owned"))}
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="could run code"):
        load_checkpoint(tmp_path / "x.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb(str(tmp_path / "owned"))))
    with pytest.raises(CheckpointError, match=r"plain.pt is "):
        load_checkpoint(tmp_path / "plain.pt")
    assert not (tmp_path / "owned").exists()


def trained(folder, config):
    dataset = build_dataset(config)
    torch.manual_seed(0)
    flow = build_flow(config, dataset.event_shape, dataset)
    small_trainer(folder, dataset, flow=flow, config=config).fit()
    return flow


def test_load_flow_rebuilds_the_averaged_flow(tmp_path):
    flow = trained(tmp_path / "run", CONFIG)
    torch.set_default_dtype(torch.float32)  # of the process that loads; the weights are float64
    for path in (tmp_path / "run", tmp_path / "run/checkpoints/best.pt"):
        loaded = load_flow(path)
        assert not loaded.training
        x = torch.randn(5, 2, dtype=torch.float64)
        assert torch.equal(loaded.log_prob(x), flow.log_prob(x))
    torch.set_default_dtype(torch.float64)
    assert torch.equal(flows.load(tmp_path / "run").log_prob(x), flow.log_prob(x))
    filled = load_flow(tmp_path / "run", flow=build_flow(CONFIG, (2,)))
    assert torch.equal(filled.log_prob(x), flow.log_prob(x))
    other = build_flow({**CONFIG, "field": {"_target_": "flows.fields.MLP", "hidden": [4]}}, (2,))
    with pytest.raises(CheckpointError, match="belong to another model"):
        load_flow(tmp_path / "run", flow=other)


def test_a_run_without_settings_says_what_to_do(tmp_path):
    def log_prob(flow):
        return flow.log_prob(torch.tensor([[0.5, 1.0]]), generator=torch.Generator().manual_seed(0))

    trainer = small_trainer(tmp_path / "plain")
    trainer.fit()
    assert torch.equal(log_prob(load_flow(tmp_path / "plain")), log_prob(trainer.model))  # the model tells them

    class Own(flows.fields.MLP):
        """Nobody else can import it."""

    trainer = small_trainer(tmp_path / "own")
    trainer.model.field.__class__ = Own
    trainer.fit()
    with pytest.raises(CheckpointError, match=r"build the flow yourself and call flows.load\(path, flow=flow\)"):
        load_flow(tmp_path / "own")
    assert torch.equal(log_prob(flows.load(tmp_path / "own", flow=trainer.model)), log_prob(trainer.model))


HOSTILE = {
    "a function of the system": {"_target_": "os.system", "_args_": ["touch owned"]},
    "the system through a module of ours": {"_target_": "flows.datasets.tables.readers.os.system"},
    "the system through training": {"_target_": "flows.training.files.os.system", "command": "touch owned"},
    "a builtin": {"_target_": "builtins.eval", "_args_": ["1"]},
    "our own loader, with trust in everything": {"_target_": "flows.training.load_flow", "trust": ["os"]},
    "a writer of ours": {"_target_": "flows.training.save_checkpoint", "path": "owned"},
    "a trainer, out of its place": {"_target_": "flows.training.Trainer", "output_dir": "owned"},
    "a class of torch through ours": {"_target_": "flows.models.cnf.torch.load", "f": "owned"},
    "another class of torch": {"_target_": "torch.hub.load"},
    "hydra itself": {"_target_": "hydra.utils.call", "config": {"_target_": "os.system"}},
    "a module": {"_target_": "flows.fields"},
    "something that is not there": {"_target_": "flows.fields.Nothing"},
    "a name that only looks like ours": {"_target_": "flows_evil.Field"},
    "not a name": {"_target_": ["os.system"]},
}


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("nested", [False, True])
def test_hostile_settings_are_refused_before_anything_runs(tmp_path, monkeypatch, hostile, nested):
    monkeypatch.chdir(tmp_path)
    field = {**CONFIG["field"], "hidden": [[hostile]]} if nested else hostile
    save_checkpoint(
        tmp_path / "x.pt", {"config": yaml.safe_dump({**CONFIG, "field": field}), "data": {"event_shape": [2]}}
    )
    with pytest.raises(UntrustedConfigError, match=r"the settings call .* at field"):
        load_flow(tmp_path / "x.pt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"field": {"_target_": "flows.fields.MLP", "hidden": "${oc.env:HOME}"}}, r"an interpolation at field.hidden"),
        ({"field": {"_target_": "flows.fields.MLP", "_recursive_": False}}, "special key _recursive_ at field"),
        ({"field": {"${x}": 1}}, r"have the key '\$\{x\}' at field"),
        ({"field": {3: 1}}, "have the key 3 at field"),
    ],
)
def test_other_tricks_are_refused(settings, message):
    with pytest.raises(UntrustedConfigError, match=message):
        check_trusted(settings)


def test_yaml_tags_are_not_obeyed(tmp_path):
    text = "field: !!python/object/apply:os.mkdir ['owned']"
    save_checkpoint(tmp_path / "x.pt", {"config": text, "data": {"event_shape": [2]}})
    with pytest.raises(CheckpointError, match="not valid yaml"):
        load_flow(tmp_path / "x.pt")


def test_a_trusted_package_is_let_through():
    config = {"field": {"_target_": "my_package.Net"}}
    with pytest.raises(UntrustedConfigError, match=r"pass trust=\[my_package\]"):
        check_trusted(config)
    check_trusted(config, trust=["my_package"])
    assert foreign_packages([config, {"optimizer": {"_target_": "torch.optim.Adam"}}]) == ["my_package"]
    assert foreign_packages(CONFIG) == foreign_packages(None) == []
    with pytest.raises(UntrustedConfigError, match=r"os\.system"):
        check_trusted({"field": {"_target_": "os.system"}}, trust=["my_package"])


def test_everything_that_our_own_settings_name_passes():
    check_trusted(CONFIG)
    check_trusted(
        {
            "optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True},
            "hardware": {"_target_": "flows.training.Hardware"},
            "evaluation": {"_target_": "flows.evaluation.DensityEvaluator"},
        }
    )


# Damaged and foreign files


def explained(function):
    """Whether it works, or says that the checkpoint is at fault; anything else gets out."""
    with contextlib.suppress(CheckpointError):
        function()


def test_damaged_bytes_are_explained(tmp_path):
    trained(tmp_path / "run", CONFIG)
    whole, numbers = (tmp_path / "run/checkpoints/last.pt").read_bytes(), random.Random(0)
    damaged = tmp_path / "damaged.pt"
    for _ in range(40):
        content = bytearray(whole)
        for _ in range(numbers.choice([1, 20, 400])):
            content[numbers.randrange(len(content))] = numbers.randrange(256)
        damaged.write_bytes(content)
        explained(lambda: load_flow(damaged))


def test_foreign_contents_are_explained(tmp_path):
    """Every entry left out or replaced, at the top and in the settings."""
    trained(tmp_path / "run", CONFIG)
    content = torch.load(tmp_path / "run/checkpoints/last.pt")
    config, odd = yaml.safe_load(content["config"]), tmp_path / "odd.pt"

    def resume():
        dataset = build_dataset(CONFIG)
        folder = tmp_path / f"new{len(list(tmp_path.iterdir()))}"
        small_trainer(folder, dataset, resume=odd, solver_error_points=0).fit()

    for value in (None, 3):
        for name in content:
            kept = {key: entry for key, entry in content.items() if key != name}
            torch.save(kept if value is None else kept | {name: value}, odd)
            explained(lambda: load_flow(odd))
            if value == 3 and name in RUN:
                explained(resume)
        for name in model_parts(CONFIG):
            torch.save(content | {"config": yaml.safe_dump(config | {name: value})}, odd)
            explained(lambda: load_flow(odd))
    for name in ("version", "data", "ema", "position", "config"):
        torch.save({key: entry for key, entry in content.items() if key != name}, odd)
        with pytest.raises(CheckpointError):
            load_flow(odd)
    for changed, message in (
        ({"optimizer": {"state": {}, "param_groups": []}}, "its optimiser, metrics or random numbers do not fit"),
        ({"ema": {"a": 1}}, "not a whole checkpoint of a run: ema missing or not as written by flows"),
        ({"position": {"step": 3}}, "its position must have best_score"),
    ):
        torch.save(content | changed, odd)
        with pytest.raises(CheckpointError, match=message):
            resume()
    torch.save(content | {"config": "&a [*a]"}, odd)
    with pytest.raises(CheckpointError, match="not valid yaml"):
        load_flow(odd)


def test_a_run_goes_on_on_another_kind_of_device(tmp_path):
    with pytest.raises(TrainingInterrupted):
        small_trainer(tmp_path / "run", stopping_at(small_gaussian(), 8)).fit()
    path = tmp_path / "run/checkpoints/last.pt"
    content = torch.load(path)
    state = torch.zeros(16, dtype=torch.uint8)  # the size of a CUDA generator's
    content["ranks"][0] |= {"objective": state, "cuda": state}
    save_checkpoint(path, content)
    with pytest.warns(UserWarning, match="resumed on cpu, another kind of device .* not bit for bit"):
        summary = small_trainer(tmp_path / "run", resume=path).fit()
    assert summary.position.step == 11


# Extra states and dtypes


class WithExtraState(torch.nn.Module):
    """A linear field that counts nothing, but keeps something beside its weights."""

    def __init__(self, extra=None, frozen=None):
        super().__init__()
        self.linear, self.extra = torch.nn.Linear(2, 2), extra
        if frozen is not None:
            self.frozen = torch.nn.Linear(2, 2).to(frozen).requires_grad_(False)
            self.phases = torch.nn.Parameter(torch.ones(2, dtype=torch.complex128))
            self.register_buffer("wide", torch.ones(2, dtype=torch.float64))

    def forward(self, t, x):
        return self.linear(x)

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def flow_with(*arguments):
    return flows.CNF(WithExtraState(*arguments), event_shape=(2,))


def test_extra_state_is_saved_averaged_and_loaded(tmp_path):
    extra = {"count": 3, "scale": torch.ones(2), "name": "a", "more": [1.5, None]}
    small_trainer(tmp_path, flow=flow_with(extra)).fit()
    loaded = load_flow(tmp_path, flow=flow_with())
    assert flat(loaded.field.extra).keys() == flat(extra).keys()
    assert torch.equal(loaded.field.extra["scale"], extra["scale"])
    resumed = small_trainer(tmp_path, flow=flow_with(), resume=tmp_path)
    resumed.fit()
    assert resumed.model.field.extra["count"] == 3


@pytest.mark.parametrize(
    "extra", [{1, 2}, {"a": Memory()}, torch.zeros(2).to_sparse()], ids=["set", "object", "sparse"]
)
def test_extra_state_that_cannot_be_loaded_is_refused_when_it_is_saved(tmp_path, extra):
    with pytest.raises(flows.FlowsError, match=r"_extra_state.* cannot be kept in a checkpoint: it is a"):
        small_trainer(tmp_path, flow=flow_with(extra)).fit()


def test_frozen_half_complex_and_wide_parts_keep_their_dtypes(tmp_path):
    torch.set_default_dtype(torch.float32)
    flow = flow_with(1, torch.float16)
    assert flow.dtype == torch.float32
    small_trainer(tmp_path, flow=flow).fit()
    loaded = load_flow(tmp_path, flow=flow_with(1, torch.float16))
    dtypes = {name: value.dtype for name, value in loaded.state_dict().items() if torch.is_tensor(value)}
    assert dtypes["field.linear.weight"] == torch.float32
    assert dtypes["field.frozen.weight"] == torch.float16
    assert dtypes["field.phases"] == torch.complex128
    assert dtypes["field.wide"] == torch.float64


def test_moving_a_flow_keeps_imaginary_parts():
    flow = flow_with(1, torch.float16)
    with torch.no_grad():
        flow.field.phases.copy_(torch.tensor([1 + 2j, 3 - 1j]))
    flow.to(torch.float32)
    assert flow.field.phases.dtype == torch.complex64
    assert flow.field.phases.tolist() == [1 + 2j, 3 - 1j]


def test_a_checkpoint_of_another_run_is_not_resumed_in_this_folder(tmp_path):
    for name in ("one", "two"):
        with pytest.raises(TrainingInterrupted):
            small_trainer(tmp_path / name, stopping_at(small_gaussian(), 4)).fit()
    foreign = tmp_path / "two/checkpoints/last.pt"
    (tmp_path / "one/checkpoints/last.pt").write_bytes(foreign.read_bytes())
    with pytest.raises(CheckpointError, match=r"was written by another run .* than the one that lives in"):
        small_trainer(tmp_path / "one", resume=tmp_path / "one").fit()
    small_trainer(tmp_path / "new", resume=tmp_path / "one").fit()


@pytest.mark.parametrize("failure", [OSError(116, "Stale file handle"), MemoryError()], ids=["disk", "memory"])
def test_best_weights_that_cannot_be_read_now_are_left_alone(tmp_path, monkeypatch, failure):
    save_checkpoint(tmp_path / "checkpoints/best.pt", {"step": 1})
    before = (tmp_path / "checkpoints/best.pt").read_bytes()

    def fail(file):
        raise failure

    monkeypatch.setattr("flows.training.checkpoint.read_archive", fail)
    with pytest.raises(
        CheckpointError, match=r"best weights of the run cannot be read: .*(Stale|memory).*Resume again"
    ):
        load_best(tmp_path)
    assert (tmp_path / "checkpoints/best.pt").read_bytes() == before


@pytest.mark.parametrize("value", [b"", b"\xff", 10**700, -(10**700), 2**31, -1, "", "\ud800", 1.5, True, None, {}, []])
def test_what_may_be_saved_can_be_read(tmp_path, value):
    content = load_checkpoint(save_checkpoint(tmp_path / "a.pt", {"value": value, "again": [value, (value,)]}))
    assert (content["value"], content["again"]) == (value, [value, (value,)])
    assert type(content["value"]) is type(value)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_numbers_that_could_not_be_read_are_not_saved(tmp_path):
    with pytest.raises(InvalidTypeError, match=r"model.a cannot be kept .* complex32; convert"):
        save_checkpoint(tmp_path / "a.pt", {"model": {"a": torch.zeros(2, dtype=torch.complex32)}})


OPTIMIZERS = ["Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimiser_of_torch_fits_its_own_state(name):
    build = getattr(torch.optim, name)
    shapes = [(), (3,), (4, 2), (3, 2, 2), (2, 3, 2, 2)]
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.float32)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = build(parameters, lr=1e-3)
    optimizer.step()
    check_optimizer(optimizer.state_dict(), build(parameters, lr=1e-3), build, 1e-3, 1)


def test_damaged_best_weights_are_set_aside(tmp_path):
    with pytest.raises(TrainingInterrupted):
        small_trainer(tmp_path, stopping_at(small_gaussian(), 8)).fit()
    best = tmp_path / "checkpoints/best.pt"
    best.write_bytes(best.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=r"best.pt is damaged, and kept as best.pt.damaged"):
        summary = small_trainer(tmp_path, resume=tmp_path).fit()
    assert summary.position.step == 11
    assert load_checkpoint(best)["run"] == load_checkpoint(tmp_path / "checkpoints/last.pt")["run"]
