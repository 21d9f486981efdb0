"""Several processes that train together give the run of one process, and end together."""

import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import flows
import flows.cli.main
from flows.datasets import Batch
from flows.errors import InvalidValueError
from flows.evaluation import DensityEvaluator
from flows.objectives import FlowMatching, LossOutput, MaximumLikelihood, Objective, ReverseKL
from flows.path_costs import JacobianNorm, KineticEnergy
from flows.shares import Share, current_share
from flows.solvers.integrator import Integrator
from flows.training.loss import LossModule
from flows.training.processes import check_processes, started_together
from tests.threads import check_shared, in_threads, loss_and_gradients

ROOT = Path(__file__).parents[1]
TWO_CORES = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="a process takes a core")


def flow_with(**options):
    torch.manual_seed(0)
    field = flows.fields.MLP((2,), hidden=(16,)).double()
    for parameter in field.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if options.get("base") == "flow":
        options["base"] = flows.bases.FlowBase(flow_with(divergence="exact", solver=solver()))
    return flows.CNF(field, **options)


COSTS = (KineticEnergy(0.1), JacobianNorm(0.1))
LIKELIHOOD = MaximumLikelihood(COSTS)


def solver(**options):
    return flows.solvers.ODESolver(**{"rtol": 1e-3, "atol": 1e-3, **options})


def solver_of_steps(size):
    return flows.ODESolver("rk4", step_size=size)


CASES = {
    "likelihood": (LIKELIHOOD, {"divergence": "hutchinson", "solver": solver()}),
    "hutch++": (MaximumLikelihood(), {"divergence": "hutch_plus_plus", "solver": solver()}),
    "adjoint": (LIKELIHOOD, {"divergence": "hutchinson", "solver": solver(gradient="adjoint")}),
    "checkpoint": (LIKELIHOOD, {"divergence": "hutchinson", "solver": solver(gradient="checkpoint")}),
    "per sample": (
        LIKELIHOOD,
        {"divergence": "hutchinson", "solver": solver(error_control=flows.solvers.ErrorControl(per_sample=True))},
    ),
    "fixed steps": (LIKELIHOOD, {"divergence": "exact", "solver": solver_of_steps(0.25)}),
    "flow as a base": (LIKELIHOOD, {"divergence": "exact", "solver": solver(), "base": "flow"}),
    "sampled": (FlowMatching(target="sampled"), {}),
    "marginal": (FlowMatching(target="marginal", num_queries=13, divergence_weight=0.1), {}),
    "transport": (FlowMatching(coupling="optimal_transport"), {}),
    "reverse": (ReverseKL(flows.datasets.DoubleWell().log_density), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_mean_over_processes_is_that_of_one(case):
    objective, options = CASES[case]
    check_shared(objective, flow_with(**options), Batch(torch.randn(17, 2, dtype=torch.float64)))


def test_a_reference_that_fails_in_one_process_is_repeated_by_all(monkeypatch):
    flow, x = flow_with(divergence="exact", solver=solver_of_steps(0.25)), torch.randn(10, 2, dtype=torch.float64)
    integrate, finer = Integrator.integrate, [0, 0]

    def failing(self, *arguments, **options):
        rank = current_share().index
        if self.step_size < 0.25:
            finer[rank] += 1
            if rank == 1 and finer[rank] == 1:
                raise flows.SolverError("too stiff", 0.5, 0.1)
        return integrate(self, *arguments, **options)

    monkeypatch.setattr(Integrator, "integrate", failing)
    found = in_threads(2, lambda rank: flow.estimate_log_prob(x, rows=current_share().rows(10)).solver_error)
    assert finer == [2, 2]
    assert all(error.isfinite().all() for error in found)


def test_each_process_solves_its_own_rows_alone():
    seen = {}

    class Watched(flows.fields.MLP):
        def forward(self, t, x, context=None):
            seen.setdefault(threading.get_ident(), set()).add(len(x))
            return super().forward(t, x, context)

    flow = flows.CNF(Watched((2,), hidden=(8,)).double())
    batch = Batch(torch.randn(17, 2, dtype=torch.float64))
    in_threads(2, lambda rank: loss_and_gradients(LIKELIHOOD, flow, batch))
    assert sorted(size for sizes in seen.values() for size in sizes & {8, 9, 17}) == [8, 9]


def test_parameters_that_an_objective_leaves_alone_keep_no_gradient():
    """Each process gives a gradient to all parameters, as the others wait for it."""

    class OfOwnRows(Objective):
        def __call__(self, model, batch, generator=None):
            used = model[0] if current_share().index else model[1]
            return LossOutput(used.weight.square().sum())

    def gradients(rank):
        torch.manual_seed(0)
        module = LossModule(nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(3))))
        module.batch = Batch(torch.zeros(2, 1))
        module.begin(OfOwnRows(), None, current_share())
        found = []
        for _ in range(2):
            module().backward()
            found.append([p.grad is not None for p in module.parameters()])
            module.leave_idle()
            found.append([p.grad is not None for p in module.parameters()])
        return found, [float(p.grad) for p in list(module.parameters())[:2]]

    one, other = in_threads(2, gradients)
    assert one[0] == other[0] == [[True] * 3, [True, True, False]] * 2
    assert one[1][0] == other[1][1] == 0
    assert one[1][1] != 0


def test_evaluation_is_that_of_one_process(monkeypatch):
    monkeypatch.setattr("flows.evaluation.density.has_mass", lambda flow: False)  # each process integrates the whole
    flow = flow_with(divergence="hutchinson", solver=solver())
    data = flows.datasets.Moons(num_validation=50, num_test=101)
    evaluator = DensityEvaluator(data, divergence="hutchinson", batch_size=60, solver_error_points=40)
    alone = evaluator.likelihood(flow)
    for found in in_threads(2, lambda rank: evaluator.likelihood(copy.deepcopy(flow))):
        torch.testing.assert_close(found.values, alone.values, rtol=1e-12, atol=1e-12)
        assert found.solver_error == pytest.approx(alone.solver_error, rel=1e-6)
        assert found.metrics().keys() == alone.metrics().keys()


@pytest.mark.parametrize("number", [1, 2, 3, 7, 12])
def test_rows_of_all_processes_are_all_rows(number):
    shares = [Share(index, 3, lambda own: own) for index in range(3)]
    if number < 3:
        assert all(share.rows(number) == slice(0, number) and share.weight(number) == 1 for share in shares)
        return
    assert [i for share in shares for i in range(number)[share.rows(number)]] == list(range(number))
    assert sum(share.weight(number) for share in shares) == pytest.approx(3)


def test_processes_of_torchrun_train_together(monkeypatch):
    assert started_together() is None
    here = {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "localhost", "RANK": "0", "LOCAL_RANK": "0"}
    for name, value in {**here, "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    check_processes("cpu", 1)
    assert started_together().machines == 4
    with pytest.raises(InvalidValueError, match=r"torchrun has started 1 processes .* hardware.devices=2; leave out"):
        check_processes("cpu", 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100000")
    with pytest.raises(InvalidValueError, match=r"100,000 processor cores.* this machine has .*use --nproc_per_node="):
        check_processes("cpu", 1)


def test_an_interactive_session_starts_no_processes(monkeypatch):
    from flows.training.launcher import _Others

    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with pytest.raises(InvalidValueError, match="interactive session has none that could be run again; write a script"):
        _Others.of(2)


SCRIPT = """
import os, sys, time
import flows
from flows.training import Hardware, Reporting, Trainer

class Objective(flows.objectives.FlowMatching):
    calls = 0
    def __call__(self, flow, batch, generator=None):
        Objective.calls += 1
        if "fail" in sys.argv and os.environ.get("LOCAL_RANK") == "1" and Objective.calls > 3:
            raise RuntimeError("this process is broken")
        time.sleep(0.02)
        return super().__call__(flow, batch, generator)

class Evaluator(flows.evaluation.DensityEvaluator):
    def validate(self, model):
        if "bad validation" in sys.argv and os.environ.get("LOCAL_RANK") == "1":
            raise flows.SolverError("this part cannot be solved", 0.5, 0.1)
        return super().validate(model)

    def test(self, model):
        if "bad test" in sys.argv and os.environ.get("LOCAL_RANK") == "1":
            raise flows.SolverError("this part cannot be solved", 0.5, 0.1)
        if "slow test" in sys.argv:
            print("testing", flush=True)
            time.sleep(30)
        return super().test(model)

if __name__ == "__main__":
    flow = flows.CNF(flows.fields.MLP(event_shape=(2,), hidden=(8,)))
    data = flows.datasets.Moons(num_validation=50, num_test=50)
    print(os.getpid(), flush=True)
    Trainer(
        flow, data, Objective(), steps=int(sys.argv[2]), evaluator=Evaluator(data, progress_bar=False),
        hardware=Hardware(accelerator="cpu", devices=2), output_dir=sys.argv[1],
        reporting=Reporting(progress_bar=False, plot_every=None, log_every=1),
    ).fit()
"""


def lives(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""  # empty if it only waits to be counted
    except OSError:
        return False


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


class TwoProcesses:
    """A script that trains in two processes; entered when both train."""

    def __init__(self, folder, steps=10_000, *options, launcher=(sys.executable,)):
        script = folder / "script.py"
        script.write_text(SCRIPT)
        self.run = folder / "run"
        self.output = folder / "output.txt"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*launcher, script, str(self.run), str(steps), *options],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )

    def wait_until(self, text=None):
        until = time.monotonic() + 120
        while time.monotonic() < until and self.process.poll() is None:
            rows = self.run / "metrics.jsonl"
            logged = rows.read_text() if rows.exists() else ""
            if text in self.text + logged if text else logged:
                break
            time.sleep(0.1)
        return self

    @property
    def text(self):
        return self.output.read_text()

    @property
    def pids(self):
        return [int(line) for line in self.text.splitlines() if line.isdecimal()]

    def ends(self, seconds=30):
        """The exit code; all processes must end in so many seconds."""
        code, until = self.process.wait(seconds), time.monotonic() + 15
        while any(map(lives, self.pids)) and time.monotonic() < until:
            time.sleep(0.1)
        assert len(self.pids) == 2
        assert not any(map(lives, self.pids))
        return code

    def last_step(self):
        return torch.load(self.run / "checkpoints" / "last.pt", weights_only=False)["position"]["step"]


@TWO_CORES
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
class TestTwoProcesses:
    def test_all_end_with_one_that_is_killed(self, tmp_path):
        run = TwoProcesses(tmp_path).wait_until()
        other = next(pid for pid in run.pids if pid != run.process.pid)
        os.kill(other, signal.SIGKILL)
        assert run.ends() != 0
        assert f"(pid {other}) of the 2 that train together was ended by SIGKILL" in run.text

    def test_all_end_with_the_first(self, tmp_path):
        run = TwoProcesses(tmp_path).wait_until()
        run.process.kill()
        assert run.ends() == -signal.SIGKILL

    def test_all_end_with_a_torchrun_that_is_killed(self, tmp_path):
        run = TwoProcesses(tmp_path, launcher=TORCHRUN).wait_until()
        run.process.kill()
        assert run.ends() == -signal.SIGKILL

    def test_all_end_with_one_that_fails(self, tmp_path):
        run = TwoProcesses(tmp_path, 10_000, "fail")
        assert run.ends(120) == 1
        assert "this process is broken" in run.text
        assert "ended with the code 1, and has said why; the whole run ends with it" in run.text

    @pytest.mark.parametrize("what", ["bad validation", "bad test"])
    def test_all_end_when_one_cannot_evaluate_its_rows(self, tmp_path, what):
        run = TwoProcesses(tmp_path, 20, what)
        assert run.ends(120) == 1
        assert "their shared evaluation failed: this part cannot be solved" in run.text
        assert not (run.run / "summary.json").exists()

    @pytest.mark.parametrize("first", [True, False])
    def test_a_signal_to_one_stops_all_with_the_state_saved(self, tmp_path, first):
        run = TwoProcesses(tmp_path).wait_until()
        run.wait_until('"step": 5')
        os.kill(next(pid for pid in run.pids if (pid == run.process.pid) == first), signal.SIGTERM)
        assert run.ends() == 1  # KeyboardInterrupt of a script
        assert f"stopped after step {run.last_step()} and saved" in run.text

    @pytest.mark.parametrize("first", [True, False])
    def test_a_signal_during_the_test_loses_no_step(self, tmp_path, first):
        run = TwoProcesses(tmp_path, 20, "slow test").wait_until("testing")
        os.kill(next(pid for pid in run.pids if (pid == run.process.pid) == first), signal.SIGTERM)
        assert run.ends(45) != 0
        assert run.last_step() == 20
        assert "after step 20 and saved" in run.text


COMMON = [
    *("data=moons", "objective=maximum_likelihood", "divergence=hutchinson", "hardware.precision=64-true"),
    *("hardware.accelerator=cpu", "data.num_test=51", "data.num_validation=50", "field.hidden=[8]"),
    *("reporting.progress_bar=false", "reporting.log_every=2", "reporting.validate_every=2"),
    *("reporting.plot_every=null", "objective.maximum_likelihood.schedule=constant"),
    "objective.maximum_likelihood.batch_size=33",
]


def train(*settings, launcher=(sys.executable,)):
    done = subprocess.run(
        [*launcher, str(ROOT / "scripts" / "train.py"), *settings],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def figures(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = "steps_per_second"
    return [
        {name: value for name, value in row.items() if value is not None and not name.endswith(timed)} for row in rows
    ]


def check_equal(one, two, figure="test_nll"):
    """Weights, figures and rows of two runs agree."""
    checkpoints = [torch.load(folder / "checkpoints" / "last.pt", weights_only=False) for folder in (one, two)]
    for part in ("model", "ema"):
        for name, weight in checkpoints[0][part].items():
            torch.testing.assert_close(checkpoints[1][part][name], weight, rtol=1e-9, atol=1e-12)
    if figure is not None:
        value, other = (json.loads((folder / "summary.json").read_text())[figure] for folder in (one, two))
        assert other == pytest.approx(value, rel=1e-9)
    for mine, its in zip(figures(one)[-2:], figures(two)[-2:], strict=True):
        assert its == pytest.approx(mine, rel=1e-6)


@TWO_CORES
def test_two_processes_give_the_run_of_one(tmp_path):
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # in which a program draws the first weights
    try:
        flows.cli.main.main(["train", *COMMON, "steps=4", f"output_dir={tmp_path / 'one'}"])
    finally:
        torch.set_default_dtype(usual)
    printed = train(*COMMON, "steps=4", "hardware.devices=2", f"output_dir={tmp_path / 'two'}")
    assert printed.count("divergence  evaluated with") == 1
    check_equal(tmp_path / "one", tmp_path / "two")


def of_series(folder):
    """Settings of two stages on series of their own times, with missing values; the first leaves the noise alone."""
    generator = np.random.default_rng(0)
    lines = ["series,time,a,b"]
    for i in range(31):
        times = i % 4 + np.sort(generator.uniform(0, 3, 4 + i % 7))
        for j, (t, value) in enumerate(zip(times, np.cos(times + 0.1 * i), strict=True)):
            other = "" if j and generator.uniform() < 0.3 else f"{value**2}"
            lines.append(f"{i},{t},{value},{other}")
    (folder / "series.csv").write_text("\n".join(lines))
    return [
        *("data=trajectories", f"data.path={folder / 'series.csv'}", "data.id=series", "data.time=time"),
        *("data.missing=mask", "hardware.precision=64-true", "hardware.accelerator=cpu", "field.hidden=[8]"),
        *("model.noise=0.2", "reporting.progress_bar=false", "reporting.log_every=2", "reporting.plot_every=null"),
        *("reporting.validate_every=2", "optimization.accumulate_batches=2", "solver.gradient=adjoint"),
        *("objective.derivative_matching.batch_size=7", "objective.trajectory_matching.batch_size=7"),
        *("objective.derivative_matching.schedule=constant", "objective.trajectory_matching.schedule=constant"),
        *("objective.derivative_matching.warmup_steps=0", "objective.trajectory_matching.warmup_steps=0"),
        *("objective.derivative_matching.steps=2", "objective.trajectory_matching.objective.loss=gaussian"),
        "objective.trajectory_matching.objective.segment_length=3",
        "objective.trajectory_matching.objective.continuity=0.5",
        "objective.trajectory_matching.objective.regularizers.kinetic_energy.weight=0.01",
    ]


@TWO_CORES
@pytest.mark.slow
def test_two_processes_share_series(tmp_path):
    settings = of_series(tmp_path)
    steps = "objective.trajectory_matching.steps"
    train(*settings, f"{steps}=3", f"output_dir={tmp_path / 'one'}")
    printed = train(*settings, f"{steps}=1", "hardware.devices=2", f"output_dir={tmp_path / 'two'}")
    resume = f"resume={tmp_path / 'two'}"
    printed += train(f"{steps}=2", resume, "hardware.devices=1") + train(f"{steps}=3", resume, "hardware.devices=2")
    assert "does not share" not in printed
    check_equal(tmp_path / "one", tmp_path / "two", "test_mse")


@TWO_CORES
@pytest.mark.slow
@pytest.mark.parametrize("objective", ["reflow", "distillation"])
def test_two_processes_share_a_teacher(tmp_path, objective):
    teacher = [setting for setting in COMMON if "maximum_likelihood" not in setting]
    train(*teacher, "objective=flow_matching", "steps=2", f"output_dir={tmp_path / 'teacher'}")
    settings = [
        f"teacher={tmp_path / 'teacher'}",
        f"objective={objective}",
        f"objective.{objective}.batch_size=33",
        "steps=4",
        "hardware.precision=64-true",
    ]
    for number, name in ((1, "one"), (2, "two")):
        train(*settings, f"hardware.devices={number}", f"output_dir={tmp_path / name}")
    check_equal(tmp_path / "one", tmp_path / "two", None)


@TWO_CORES
@pytest.mark.slow
def test_a_run_goes_on_in_another_number_of_processes(tmp_path):
    train(*COMMON, "steps=6", f"output_dir={tmp_path / 'one'}")
    train(*COMMON, "steps=2", f"output_dir={tmp_path / 'two'}", launcher=TORCHRUN)
    resume = f"resume={tmp_path / 'two'}"
    train("objective.maximum_likelihood.steps=4", resume)
    printed = train("objective.maximum_likelihood.steps=6", resume, "hardware.devices=2")
    assert printed.count("resumes after step 4") == 1
    check_equal(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("worker", ["joblib.externals.loky", "submitit.core._submit"])
def test_workers_of_a_sweep_start_no_processes(monkeypatch, worker):
    from flows.training.launcher import _Others

    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", worker])
    with pytest.raises(InvalidValueError, match=r"which is a worker of .* hydra/launcher=basic"):
        _Others(2)


@TWO_CORES
@pytest.mark.slow
def test_a_sweep_in_two_processes_has_one_table(tmp_path):
    more = ("-m", "seed=0,1", "steps=2", "hardware.devices=2", "hardware.accelerator=cpu", "field.hidden=[8]")
    sizes = ("data=moons", "data.num_test=50", "data.num_validation=50", "reporting.progress_bar=false")
    printed = train(*more, *sizes, "reporting.plot_every=null", f"output_dir={tmp_path / 'sweep'}")
    assert printed.count("all figures in") == 1
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir()) == ["seed-0", "seed-1"]
