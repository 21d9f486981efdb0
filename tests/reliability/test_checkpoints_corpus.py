"""Damaged and hostile checkpoints are refused by name, without side effects, quickly and in little memory."""

import contextlib
import io
import json
import os
import resource
import select
import shutil
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from figures import report_figure
from hostile_checkpoints import make

from flows import FlowsError, plots  # noqa: F401 (imported before the children are timed)
from flows.cli import evaluate, sample
from flows.cli.resuming import resumed_config
from flows.training import load_flow
from flows.training.runs import build_trainer

CORPUS = yaml.safe_load((Path(__file__).parent / "checkpoints.yaml").read_text(encoding="utf-8"))
SETTINGS = {
    "data": {"_target_": "flows.datasets.EightGaussians", "num_test": 50, "num_validation": 50},
    "transform": {"_target_": "flows.transforms.Standardise"},
    "field": {"_target_": "flows.fields.MLP", "hidden": [8, 8]},
    "divergence": {"_target_": "flows.divergence.Analytic"},
    "solver": {"_target_": "flows.ODESolver", "method": "rk4", "step_size": 0.25},
    "objective": {
        "flow_matching": {
            "_target_": "flows.training.Stage",
            "objective": {"_target_": "flows.objectives.FlowMatching"},
            "steps": 4,
            "batch_size": 16,
        }
    },
    "optimizer": {"_target_": "torch.optim.Adam", "_partial_": True},
    "optimization": {},
    "hardware": {"accelerator": "cpu"},
    "reporting": {"progress_bar": False, "plot_every": None},
    "evaluation": {"_target_": "flows.evaluation.DensityEvaluator", "solver_error_points": 0, "points": 50},
    "seed": 0,
}
MAX_SECONDS = 2.0  # of computation
SPARE_MEMORY = 200_000  # kB
TIMEOUT = 20.0
WATCHED = {"socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.fork", "os.mkdir"}
_events: list[str] | None = None  # where events are collected in a child


def _watch(event, arguments):
    if _events is None:
        return
    if event == "os.mkdir" and os.path.isdir(arguments[0]):
        return
    if event in WATCHED:
        _events.append(f"{event} {str(arguments[0])[:100]}")
    elif event == "open":
        _, mode, flags = arguments
        writes = (
            any(letter in mode for letter in "wax+") if isinstance(mode, str) else flags & (os.O_WRONLY | os.O_RDWR)
        )
        if writes and not str(arguments[0]).startswith("/dev/"):
            _events.append(f"writes {arguments[0]}")


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """A run of four steps."""
    torch.set_default_dtype(torch.float32)
    folder = tmp_path_factory.mktemp("good") / "run"
    build_trainer({**SETTINGS, "output_dir": str(folder)}).fit()
    with contextlib.suppress(ImportError):  # slow to import, which is not to be timed
        import datasets  # noqa: F401
    sys.addaudithook(_watch)
    return folder


def use(how, path):
    """What a user does with the checkpoint; an error of ours is expected."""
    if how == "load":
        load_flow(path)
    elif how == "resume":
        config, checkpoint = resumed_config(path, [])
        build_trainer(config, checkpoint, network=False).fit()
    else:
        output = io.StringIO()
        try:
            with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
                {"evaluate": evaluate, "sample": sample}[how].main([f"checkpoint={path}"])
        except SystemExit as stop:
            if stop.code == 2 and "Traceback" not in output.getvalue():
                raise FlowsError(output.getvalue()) from None
            raise RuntimeError(f"exit code {stop.code}: {output.getvalue()}") from None


def _memory():
    return {line.split(":")[0]: int(line.split()[1]) for line in Path("/proc/self/status").open() if "kB" in line}


def _child(entry, path, to_parent):
    """Use a checkpoint and report what happened; runs in a process of its own."""
    global _events
    devnull = os.open(os.devnull, os.O_RDWR)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    torch.set_default_dtype(torch.float32)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before, started = _memory()["VmRSS"], time.process_time()  # others use this machine, too
    _events = []
    outcome, message = "accepted", ""
    try:
        use(entry.get("how", "load"), path)
    except FlowsError as error:
        outcome, message = "refused", str(error)
    except BaseException:
        outcome, message = "traceback", traceback.format_exc()
    events, _events = _events, None
    found = {
        "outcome": outcome,
        "message": message,
        "seconds": time.process_time() - started,
        "memory": _memory()["VmHWM"] - before,
        "events": events,
    }
    with os.fdopen(to_parent, "w") as file:
        file.write(json.dumps(found))


def in_a_child(entry, path):
    """Fork, so that nothing need be imported again and the peak of memory is that of this checkpoint."""
    from_child, to_parent = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(from_child)
        try:
            _child(entry, path, to_parent)
        finally:
            os._exit(0)
    os.close(to_parent)
    text, deadline = b"", time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        if select.select([from_child], [], [], max(0.0, deadline - time.monotonic()))[0]:
            block = os.read(from_child, 65536)
            if not block:
                break
            text += block
    else:
        os.kill(child, signal.SIGKILL)
    os.close(from_child)
    os.waitpid(child, 0)
    if not text:
        return {"outcome": "hang", "message": "", "seconds": TIMEOUT, "memory": 0, "events": []}
    return json.loads(text)


def complaints(entry, path):
    """What is wrong with the way in which a checkpoint is met."""
    found = in_a_child(entry, path)
    wrong = []
    if found["outcome"] != "refused":
        wrong.append(f"{found['outcome']}: {found['message'][-1500:]}")
    for word in entry["expect"]:
        if found["outcome"] == "refused" and not any(choice in found["message"] for choice in word.split("|")):
            wrong.append(f"no {word!r} in: {found['message'][:600]}")
    own = str(path.parent.parent)
    outside = [event for event in found["events"] if own not in event]
    network = [event for event in found["events"] if event.startswith(("socket", "subprocess"))]
    if outside or network:
        wrong.append(f"touches {', '.join(dict.fromkeys([*outside, *network]))}")
    if found["seconds"] > MAX_SECONDS:
        wrong.append(f"takes {found['seconds']:.1f} s")
    if found["memory"] > 2 * path.stat().st_size / 1000 + SPARE_MEMORY:
        wrong.append(f"takes {found['memory']:,} kB")
    return wrong, found


def meet(corpus, good, folder):
    """Meet all checkpoints of a corpus; returns what is wrong with any, and all that was found."""
    wrong, all_found = {}, []
    for entry in corpus:
        run = folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(good, run)
        path = run / "checkpoints/last.pt"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch and zipfile, about what is made here
            make(entry, good / "checkpoints/last.pt", path)
        complained, found = complaints(entry, path)
        all_found.append(found)
        if complained:
            wrong[entry["id"]] = complained
    return wrong, all_found


def explained(wrong):
    return "\n".join(f"{name}: {'; '.join(complained)}" for name, complained in wrong.items())


@pytest.mark.skipif(not hasattr(os, "fork") or not Path("/proc/self/status").exists(), reason="needs Linux")
class TestCorpus:
    """The corpus, and that its checkpoints are refused for the right reason."""

    def test_the_checkpoint_that_all_are_made_from_is_accepted(self, good, tmp_path):
        for how in ("load", "resume", "evaluate", "sample"):
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            shutil.copytree(good, tmp_path / "run")
            for sealed in (True, False) if how == "load" else (True,):
                path = tmp_path / "run/checkpoints/last.pt"
                make({"sealed": sealed}, good / "checkpoints/last.pt", path)
                found = in_a_child({"how": how}, path)
                assert found["outcome"] == "accepted", f"{how}, sealed={sealed}: {found['message']}"

    def test_a_sample_of_hostile_checkpoints_is_refused(self, good, tmp_path):
        wrong, _ = meet(CORPUS[::14], good, tmp_path)
        assert not wrong, explained(wrong)

    @pytest.mark.slow
    def test_all_hostile_checkpoints_are_refused(self, good, tmp_path):
        names = [entry["id"] for entry in CORPUS]
        assert len(set(names)) == len(names) >= 150
        wrong, found = meet(CORPUS, good, tmp_path)
        outcomes = [one["outcome"] for one in found]
        events = [event for one in found for event in one["events"]]
        report_figure(
            f"hostile checkpoints: {len(found)} cases, {outcomes.count('accepted')} silent, "
            f"{outcomes.count('traceback')} tracebacks, {outcomes.count('hang')} hangs, "
            f"{sum(event.startswith('socket') for event in events)} network, "
            f"slowest {max(one['seconds'] for one in found):.2f} s, "
            f"largest {max(one['memory'] for one in found) / 1000:.0f} MB"
        )
        assert not wrong, explained(wrong)
