"""Compiled steps: they compute what uncompiled ones do, compile seldom, and say where they cannot."""

import copy
import logging
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

import flows
from flows.divergence import Analytic, Auto, Exact, Hutchinson
from flows.fields import MLP, ConcatSquashMLP
from flows.path_costs import JacobianNorm, KineticEnergy
from flows.promises.plain_values import changed_names, plain_values
from flows.solvers import ErrorControl, compilations, many_solves, programs
from flows.solvers.tableaux import RUNGE_KUTTA

ODESolver = flows.ODESolver


@pytest.fixture
def account(monkeypatch):
    """What a test compiles, and why it does not; without the code generation that takes minutes."""
    monkeypatch.setattr(torch, "compile", _without_code)
    found = programs.Compilations()
    monkeypatch.setattr(programs, "COMPILATIONS", found)
    monkeypatch.setattr("flows.solvers.compiled.COMPILATIONS", found)
    torch._dynamo.reset()
    return found


def _without_code(function, options=None, **settings):
    return _compile(function, backend="aot_eager", **settings)


_compile = torch.compile


def flow_with(solver, divergence=None, hidden=(6, 5), **options):
    torch.manual_seed(0)
    return flows.CNF(ConcatSquashMLP((2,), hidden, **options), divergence or Analytic(), solver).double()


def both(flow, compute):
    """What `compute` gives with uncompiled and with compiled steps."""
    found = []
    for compiles in (False, True):
        flow.zero_grad()
        flow.solver = replace(flow.solver, compile=compiles)
        found.append(compute(flow))
    return found


def step(flow, x, costs=(), context=None):
    estimate = flow.estimate_log_prob(
        x, context, torch.Generator().manual_seed(1), solver_error=False, path_costs=costs
    )
    loss = estimate.value.mean() + sum(cost.mean() for cost in estimate.path_costs.values())
    loss.backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in flow.parameters()])
    counts = (estimate.nfe, estimate.statistics.nfe_backward, len(estimate.statistics.attempts))
    return estimate.value.detach(), gradients, *(cost.detach() for cost in estimate.path_costs.values()), counts


def assert_equal(found, expected):
    assert found[-1] == expected[-1]
    for one, other in zip(found[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


GRADIENTS = ("backprop", "checkpoint", "adjoint")


def test_a_context_of_a_trained_encoder_gets_its_gradient():
    """The steps end their backward pass at the context, and need not keep the graph before it."""
    flow = flow_with(ODESolver("bosh3", rtol=1e-3, atol=1e-3, gradient="checkpoint"), context_shape=(3,))
    encoder = torch.nn.Linear(2, 3).double()
    x, context = torch.randn(5, 2), torch.randn(5, 2)

    def gradients(flow):
        encoder.zero_grad()
        flow.log_prob(x, encoder(context)).sum().backward()
        parameters = [*flow.field.parameters(), *encoder.parameters()]
        return torch.cat([parameter.grad.flatten() for parameter in parameters])

    torch.testing.assert_close(*both(flow, gradients), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "gradient", ["backprop", *(pytest.param(name, marks=pytest.mark.slow) for name in ("checkpoint", "adjoint"))]
)
def test_compiled_steps_are_the_same_steps(account, gradient):
    flow = flow_with(ODESolver("bosh3", rtol=1e-3, atol=1e-3, gradient=gradient))
    x = torch.randn(7, 2, dtype=torch.float64)
    eager, compiled = both(flow, lambda flow: step(flow, x))
    assert_equal(compiled, eager)
    assert account.count == {"backprop": 1, "checkpoint": 2, "adjoint": 2}[gradient]
    assert not account.reasons
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(1.5)
    eager, changed = both(flow, lambda flow: step(flow, x))
    assert_equal(changed, eager)
    assert (changed[0] - compiled[0]).abs().max() > 1e-3
    assert account.count <= 2


@pytest.mark.slow
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize(
    "divergence",
    [Exact(), Exact("forward"), Hutchinson(2), Hutchinson(2, mode="forward"), Auto(), flows.divergence.XTrace(4)],
    ids=lambda estimator: f"{type(estimator).__name__}-{getattr(estimator, 'mode', None)}",
)
def test_every_way_to_the_divergence_compiles(account, divergence, gradient):
    context_shape = (1,) if isinstance(divergence, Hutchinson) else None
    flow = flow_with(ODESolver("bosh3", gradient=gradient), divergence, context_shape=context_shape)
    context = None if context_shape is None else torch.randn(7, 1, dtype=torch.float64)
    x = torch.randn(7, 2, dtype=torch.float64)
    costs = (KineticEnergy(0.1), JacobianNorm(0.1))
    eager, compiled = both(flow, lambda flow: step(flow, x, costs, context))
    assert_equal(compiled, eager)
    assert account.count > 0
    assert not account.reasons


@pytest.mark.slow
@pytest.mark.parametrize("method", ["flow5", "dopri5", "dopri8", "fehlberg2", "adaptive_heun", "rk4", "euler", "heun3"])
def test_every_method_compiles(account, method):
    adaptive = RUNGE_KUTTA[method].is_adaptive
    flow = flow_with(ODESolver(method, step_size=None if adaptive else 0.25))
    x = torch.randn(5, 2, dtype=torch.float64)
    eager, compiled = both(flow, lambda flow: step(flow, x))
    assert_equal(compiled, eager)
    assert account.count == 1
    assert not account.reasons


@pytest.mark.slow
def test_potentials_and_errors_by_sample_compile(account):
    solver = ODESolver("bosh3", error_control=ErrorControl(per_sample=True, path_costs=1.0))
    torch.manual_seed(0)
    flow = flows.CNF(flows.fields.Potential((2,), width=6), solver=solver).double()
    x = torch.randn(5, 2, dtype=torch.float64)
    eager, compiled = both(flow, lambda flow: step(flow, x, (KineticEnergy(0.1),)))
    assert_equal(compiled, eager)
    assert account.count == 1
    assert not account.reasons


def test_samples_and_trajectories_use_the_same_steps(account):
    flow = flow_with(ODESolver("bosh3", rtol=1e-3, atol=1e-3))
    times = torch.tensor([[0.0, 0.3, 1.0], [0.0, 0.5, 0.6], [0.0, 0.2, 0.7]], dtype=torch.float64)
    x = torch.randn(3, 2, dtype=torch.float64)

    def compute(flow):
        ode = flows.NeuralODE(flow.field, flow.solver)
        with torch.no_grad():
            paths = ode.trajectory(x, times, solver_error=False)
            shared = ode.trajectory(x, times[0], solver_error=False)
            return paths.states, shared.states, flow.sample((3,), generator=torch.Generator().manual_seed(0)), paths.nfe

    eager, compiled = both(flow, compute)
    assert_equal(compiled, eager)
    assert account.count > 0
    assert not account.reasons


def test_few_batch_sizes_are_compiled(account, monkeypatch, caplog):
    monkeypatch.setattr(programs, "MAX_SIZES", 1)
    flow = flow_with(ODESolver("heun2", step_size=0.5, compile=True), hidden=(3,))
    points = torch.randn(6, 2, dtype=torch.float64)
    expected = replace_solver(flow, compile=False).log_prob(points).detach()
    with torch.no_grad(), caplog.at_level(logging.WARNING, "flows"):
        for size in (6, 5, 4, 6, 5):
            torch.testing.assert_close(flow.log_prob(points[:size]), expected[:size])
        loose = replace_solver(flow, step_size=0.25).log_prob(points)
    assert (loose - expected).abs().max() > 0
    assert account.count == 1
    assert [record.message for record in caplog.records] == [f"solver steps run uncompiled: {account.reasons[0]}"]
    assert "give batches equal sizes" in account.reasons[0]


def replace_solver(flow, **settings):
    other = copy.copy(flow)
    other.solver = replace(flow.solver, **settings)
    return other


class Dropping(torch.nn.Module):
    event_shape = (2,)

    def forward(self, t, x):
        return torch.nn.functional.dropout(x, 0.5)


class Deciding(torch.nn.Module):
    event_shape = (2,)

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, t, x):
        return self.scale * x if float(self.scale) > 0 else -x


def test_what_cannot_be_compiled_runs_uncompiled(account):
    flow = flows.CNF(Deciding(), Exact(), ODESolver("heun2", step_size=0.5, compile=True)).double()
    x = torch.randn(4, 2, dtype=torch.float64)
    value = flow.log_prob(x)
    torch.testing.assert_close(value, replace_solver(flow, compile=False).log_prob(x))
    assert account.count == 0
    assert "reads values of tensors in Python" in account.reasons[0]
    solver = ODESolver("heun2", step_size=0.5, compile=True)
    end = solver.solve(lambda t, state: (-state[0],), (x,), (0.0, 1.0)).end[0]
    assert end.shape == x.shape
    assert "have no method `compilable`" in account.reasons[1]


def test_what_draws_random_numbers_is_not_compiled(account):
    program = programs.Program("field")
    assert program(lambda x: (torch.rand_like(x),), [torch.ones(2)], False) is None
    assert "draws random numbers" in account.reasons[0]
    assert account.count == 0


def test_wrong_code_is_noticed(account, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **settings: lambda x: (x + 1e-2,))
    assert programs.Program("field")(lambda x: (2 * x,), [torch.zeros(3)], False) is None
    assert "gave other values" in account.reasons[0]


def test_a_missing_compiler_is_one_sentence(account, monkeypatch):
    def fail(*arguments, **settings):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nlong\ntext")

    monkeypatch.setattr(torch, "compile", fail)
    assert programs.Program("field")(lambda x: (2 * x,), [torch.zeros(3)], False) is None
    assert account.reasons == [programs.NO_COMPILER]


def test_auto_compiles_in_long_runs_only(account):
    flow = flow_with(ODESolver("heun2", step_size=0.5, compile="auto"), hidden=(3,))
    x = torch.randn(4, 2, dtype=torch.float64)
    flow.log_prob(x)
    with many_solves(False):
        flow.log_prob(x)
    with many_solves(), torch.no_grad():
        flow.log_prob(x)
    assert account.count == 0
    with many_solves():
        flow.log_prob(x).sum().backward()
    assert account.count == 1


def test_settings_of_compilation_are_checked():
    with pytest.raises(ValueError, match="compile"):
        ODESolver(compile="maybe")
    with pytest.raises(ValueError, match="compile=True is for Runge-Kutta methods"):
        ODESolver("explicit_adams", step_size=0.1, compile=True)
    assert compilations() is programs.COMPILATIONS


@pytest.mark.slow
def test_generated_code_computes_the_same():
    """Once with the code generation that users get."""
    torch._dynamo.reset()
    before = compilations().count
    torch.manual_seed(0)
    flow = flows.CNF(MLP((2,), (8, 8)), solver=ODESolver("bosh3")).double()
    x = torch.randn(7, 2, dtype=torch.float64)
    eager, compiled = both(flow, lambda flow: step(flow, x, (KineticEnergy(0.1),)))
    assert_equal(compiled, eager)
    assert compilations().count == before + 1
    assert compilations().seconds > 0


def test_large_batches_without_gradients_share_one_program(account, monkeypatch):
    monkeypatch.setattr("flows.dynamics.piece_size", lambda: 8)
    flow = flow_with(ODESolver("bosh3", rtol=1e-3, atol=1e-3), hidden=(3,))
    points = torch.randn(23, 2, dtype=torch.float64)
    times = torch.cat([torch.zeros(9, 1), torch.linspace(0.1, 1.0, 9)[:, None]], dim=1).double()

    def compute(flow):
        ode = flows.NeuralODE(flow.field, flow.solver)
        with torch.no_grad():
            estimates = [flow.estimate_log_prob(points[:size], solver_error=False) for size in (23, 16, 9, 8)]
            paths = ode.trajectory(points[:9], times, solver_error=False)  # each sample ends at its own time
        nfe = [estimate.nfe for estimate in estimates]
        return *(estimate.value for estimate in estimates), paths.states, (nfe, paths.nfe)

    eager, compiled = both(flow, compute)
    assert_equal(compiled, eager)
    assert account.count == 3  # log_prob; trajectories while all move, and after
    assert not account.reasons


def test_auto_compiles_large_batches_without_gradients(account, monkeypatch):
    monkeypatch.setattr("flows.dynamics.piece_size", lambda: 8)
    flow = flow_with(ODESolver("heun2", step_size=0.5, compile="auto"), hidden=(3,))
    x = torch.randn(20, 2, dtype=torch.float64)
    with torch.no_grad():
        expected = flow.log_prob(x)
        with many_solves():
            flow.log_prob(x[:7])
            assert account.count == 0
            torch.testing.assert_close(flow.log_prob(x), expected)
            flow.log_prob(x[:11])
    assert account.count == 1


@pytest.mark.slow
def test_generated_gradients_in_single_precision_are_right():
    torch._dynamo.reset()
    before = copy.deepcopy(compilations())
    torch.manual_seed(0)
    flow = flows.CNF(ConcatSquashMLP((2,)), solver=ODESolver("dopri5", compile=True))
    (-flow.log_prob(torch.randn(512, 2)).mean()).backward()  # compared with uncompiled code
    found = compilations().since(before)
    assert (found.count, found.reasons) == (1, [])


class Reading(torch.nn.Module):
    """A field that reads from Python what it computes with."""

    event_shape = (2,)
    power = 1

    def __init__(self, activation):
        super().__init__()
        self.inner = torch.nn.Linear(2, 2)
        self.scales, self.options, self.array = [1.0, 2.0], {"scale": 1.0}, np.ones(2)
        self.settings = types.SimpleNamespace(scale=1.0)
        self.activation = activation

    def forward(self, t, x):
        factor = self.scales[0] * self.options["scale"] * float(self.array[0]) * self.settings.scale * GLOBAL[0]
        return self.activation(self.inner(x)) * factor**self.power


GLOBAL = [1.0]


def activation_with(scale):
    return lambda x: torch.tanh(scale[0] * x)


SCALE = [1.0]
CHANGES = {
    "list": lambda field: field.scales.__setitem__(0, 2.0),
    "mapping": lambda field: field.options.update(scale=2.0),
    "array": lambda field: field.array.fill(2.0),
    "object": lambda field: setattr(field.settings, "scale", 2.0),
    "function": lambda field: setattr(field, "activation", torch.sin),
    "closure": lambda field: SCALE.__setitem__(0, 2.0),
    "class": lambda field: setattr(Reading, "power", 2),
    "variable": lambda field: GLOBAL.__setitem__(0, 2.0),
    "frozen": lambda field: field.inner.requires_grad_(False),
    "layout": lambda field: setattr(field.inner, "weight", torch.nn.Parameter(field.inner.weight.detach().T)),
}


SEEN = CHANGES.keys() - {"frozen", "layout"}
QUICK = {"list", "frozen"}


@pytest.fixture
def unchanged(monkeypatch):
    monkeypatch.setattr(Reading, "power", 1)
    monkeypatch.setitem(globals(), "GLOBAL", [1.0])
    monkeypatch.setitem(globals(), "SCALE", [1.0])


@pytest.mark.parametrize("change", sorted(SEEN))
def test_what_a_field_reads_from_python_is_seen(change, unchanged):
    field = Reading(activation_with(SCALE))
    before = plain_values(field)
    assert plain_values(field) == before
    CHANGES[change](field)
    assert len(changed_names(before, plain_values(field))) == 1


@pytest.mark.parametrize(
    "change", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CHANGES]
)
def test_what_a_field_reads_from_python_may_change(account, change, unchanged):
    field = Reading(activation_with(SCALE))
    field.scales[0], field.options["scale"] = 0.5, 1.5
    flow = flows.CNF(field, Exact(), ODESolver("heun2", step_size=0.5)).double()
    x = torch.randn(4, 2, dtype=torch.float64)
    before = replace_solver(flow, compile=True).log_prob(x).detach()
    CHANGES[change](field)
    eager, compiled = both(flow, lambda flow: (flow.log_prob(x).detach(), None))
    assert_equal(compiled, eager)
    assert (eager[0] - before).abs().max() > 1e-3 or change == "frozen"
    assert (account.count, account.reasons) == (2, [])


def test_a_field_that_changes_again_and_again_is_not_compiled_without_end(account, caplog):
    field = Reading(torch.tanh)
    flow = flows.CNF(field, Exact(), ODESolver("heun2", step_size=0.5)).double()
    x = torch.randn(4, 2, dtype=torch.float64)
    with caplog.at_level(logging.WARNING, "flows"):
        for i in range(programs.MAX_STATES + 2):
            field.options["count"] = i
            with torch.no_grad():
                eager, compiled = both(flow, lambda flow: (flow.log_prob(x), None))
            assert_equal(compiled, eager)
    assert account.count == programs.MAX_STATES
    assert [record.message for record in caplog.records] == [f"solver steps run uncompiled: {account.reasons[0]}"]
    assert "What changes: options. Keep a number that changes in a buffer" in account.reasons[0]


def test_settings_of_torch_may_change_between_solves(account):
    flow = flow_with(ODESolver("heun2", step_size=0.5), hidden=(3,))
    x = torch.randn(4, 2, dtype=torch.float64)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 1):
            torch.set_num_threads(number)
            eager, compiled = both(flow, lambda flow: (flow.log_prob(x).detach(), None))
            assert_equal(compiled, eager)
    finally:
        torch.set_num_threads(threads)
    assert (account.count, account.reasons) == (2, [])


class HoldingTensor(Deciding):
    def __init__(self):
        super().__init__()
        self.shift = torch.ones(2, dtype=torch.float64)

    def forward(self, t, x):
        return self.scale * x + self.shift


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        (Deciding, "the field Deciding reads values of tensors in Python"),
        (HoldingTensor, "the field HoldingTensor uses a tensor that is neither a parameter nor a buffer"),
    ],
)
def test_reasons_name_the_field_and_the_line(account, field, reason):
    flow = flows.CNF(field(), Exact(), ODESolver("heun2", step_size=0.5, compile=True)).double()
    with torch.no_grad():
        flow.log_prob(torch.randn(4, 2, dtype=torch.float64))
    assert len(account.reasons) == 1
    assert reason in account.reasons[0]
    assert "(test_compiled_steps.py, line " in account.reasons[0]


def test_compiled_steps_are_differentiated_once(account):
    flow = flow_with(ODESolver("heun2", step_size=0.5, compile=True), hidden=(3,))
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    message = "create_graph=True and retain_graph=True .*compile=False"
    with pytest.raises(flows.FlowsError, match=message):
        torch.autograd.grad(flow.log_prob(x).sum(), x, create_graph=True)
    with pytest.raises(flows.FlowsError, match=message):
        flow.log_prob(x).sum().backward(retain_graph=True)
    assert account.count == 1


def test_inference_mode_takes_one_program(account):
    flow = flow_with(ODESolver("bosh3", rtol=1e-3, atol=1e-3), hidden=(3,))
    x = torch.randn(4, 2, dtype=torch.float64)
    with torch.inference_mode():
        eager, compiled = both(flow, lambda flow: (flow.log_prob(x), flow.log_prob(x.clone()), None))
    assert_equal(compiled, eager)
    assert (account.count, account.reasons) == (1, [])


def test_threads_may_share_a_model(account):
    flow = flow_with(ODESolver("bosh3", rtol=1e-3, atol=1e-3), hidden=(3,))
    batches = [torch.randn(size, 2, dtype=torch.float64) for size in (4, 5, 5)]
    expected = [flow.log_prob(x).detach() for x in batches]
    flow.solver = replace(flow.solver, compile=True)
    with ThreadPoolExecutor(3) as pool:
        found = [value.detach() for value in pool.map(flow.log_prob, batches)]
    assert_equal((*found, None), (*expected, None))
    assert (account.count, account.reasons) == (2, [])


class Counting(Deciding):
    def __init__(self):
        super().__init__()
        self.nfe = 0

    def forward(self, t, x):
        self.nfe += 1
        return self.scale * x


def test_a_field_that_counts_its_evaluations_is_compiled_once(account, caplog):
    flow = flows.CNF(Counting(), Exact(), ODESolver("heun2", step_size=0.5)).double()
    x = torch.randn(4, 2, dtype=torch.float64)
    with caplog.at_level(logging.WARNING, "flows"):
        for _ in range(programs.MAX_STATES + 2):
            eager, compiled = both(flow, lambda flow: (flow.log_prob(x).detach(), None))
            assert_equal(compiled, eager)
    assert (account.count, account.reasons) == (1, [])
    assert [record.message for record in caplog.records] == [
        "compiled steps do not run the Python code of the field Counting, so that these values stay what they are: nfe"
    ]


class Jumping(torch.nn.Module):
    event_shape = (2,)
    jumps = torch.tensor([0.3, 0.7])

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(2, 2)

    def forward(self, t, x):
        return torch.tanh(self.inner(x)) * torch.where(t < 0.3, 1.0, torch.where(t < 0.7, -2.0, 0.5))


def test_uncompiled_evaluations_follow_compiled_steps(account):
    """As behind a jump of the field, where a divergence differentiates by the state of a compiled step."""
    torch.manual_seed(0)
    flow = flows.CNF(Jumping(), Exact(), ODESolver("bosh3", rtol=1e-3, atol=1e-3)).double()
    x = torch.randn(4, 2, dtype=torch.float64)
    eager, compiled = both(flow, lambda flow: step(flow, x))
    assert_equal(compiled, eager)
    assert account.count > 0
    assert not account.reasons
