"""Fields of strangers give the numbers of a clean twin, or an error that names the broken promise."""

import collections
import re
import warnings

import numpy as np
import pytest
import torch
from strange_fields import STRANGE, USES, Clean

import flows
from flows import CNF, ODESolver
from flows.datasets import Batch
from flows.divergence import Exact
from flows.fields import MLP
from flows.objectives import FlowMatching

SOLVER = ODESolver("rk4", step_size=0.5)


def points(field, n=4):
    return torch.randn(n, *field.event_shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def used(field, use, shape):
    """A number that a use of the field gives."""
    estimator = Exact(mode="forward") if use == "forward" else None
    flow = CNF(field, estimator, SOLVER, event_shape=shape)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = x.clone()
    with torch.no_grad():
        if use == "sample":
            result = flow.sample((4,), generator=generator)
        elif use in ("log_prob", "forward"):
            result = flow.log_prob(x)
        else:
            weight = 0.1 if use == "divergence_matching" else 0
            objective = FlowMatching(target="sampled", divergence_weight=weight)
            result = objective(flow, Batch(x), generator).loss
    assert torch.equal(x, before), "the caller's tensor has changed"
    assert not torch.is_grad_enabled() or True
    return result


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("case", STRANGE, ids=lambda case: case.name)
def test_a_strange_field_is_right_or_refused(case, use):
    shape = case.twin().event_shape
    words = case.errors.get(use)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`torch.jit.", DeprecationWarning)  # torch's own forward mode uses it
        if words and not words.startswith("^$"):
            with pytest.raises(flows.FlowsError, match=words):
                used(case.make(), use, shape)
            assert torch.is_grad_enabled()
            return
        try:
            result = used(case.make(), use, shape)
        except flows.FlowsError as error:
            by_chance = words is not None and words.startswith("^$|")
            if not by_chance or re.search(words[3:], str(error)) is None:
                raise
    if words is None:
        torch.testing.assert_close(result, used(case.twin(), use, shape), rtol=1e-6, atol=1e-9)


class Settings(torch.nn.Module):
    """A field whose habits its attributes set."""

    event_shape = (3,)

    def __init__(self, noise=0.0, columns=False):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Linear(3, 3)).double()
        self.noise, self.columns, self.calls = noise, columns, 0

    def forward(self, t, x):
        self.calls += 1
        t = t.reshape(-1, 1) if self.columns else t
        return self.layers(x) + t + self.noise * torch.randn_like(x)


@pytest.mark.parametrize("first", ["noisy", "quiet"])
def test_a_changed_setting_is_seen(first):
    field = Settings()
    flow = CNF(field, solver=SOLVER)
    for noise in (0.1, 0.0, 0.1, 0.0) if first == "noisy" else (0.0, 0.1, 0.0):
        field.noise = noise
        if noise:
            with pytest.raises(flows.FlowsError, match="draws random numbers"):
                flow.log_prob(points(field))
        else:
            assert flow.log_prob(points(field)).isfinite().all()


def test_a_refused_field_is_examined_again():
    field = Settings()
    secret = {"columns": False}  # where no attribute shows it
    field.forward = lambda t, x: field.layers(x) + (t.reshape(-1, 1) if secret["columns"] else t)
    flow, batch = CNF(field, solver=SOLVER), Batch(points(field))
    with pytest.raises(flows.FlowsError, match="flow matching draws one time per sample"):
        FlowMatching(divergence_weight=0)(flow, batch)
    secret["columns"] = True
    assert FlowMatching(divergence_weight=0)(flow, batch).loss.isfinite()


def test_counters_of_a_field_cost_few_examinations():
    field = Settings()
    flow, x = CNF(field, solver=SOLVER), points(field)
    for _ in range(8):
        flow.sample((4,))
    before = field.calls
    flow.sample((4,))
    assert field.calls == before + 8  # rk4 with two steps
    field.noise = 0.1
    with pytest.raises(flows.FlowsError, match="draws random numbers"):
        flow.log_prob(x)


def test_replaced_layers_and_hooks_are_seen():
    field = Settings()
    flow, x = CNF(field, solver=SOLVER), points(field)
    flow.log_prob(x)
    field.layers[0] = torch.nn.ReLU(inplace=True)
    given, found = x.clone(), flow.log_prob(x)
    field.layers[0] = torch.nn.ReLU()
    torch.testing.assert_close(found, flow.log_prob(x))
    assert torch.equal(given, x)
    flow = CNF(MLP((2,), hidden=[4]), solver=SOLVER)
    value = flow.log_prob(torch.ones(3, 2))
    hook = flow.field.register_forward_hook(lambda module, inputs, output: output + torch.randn_like(output))
    with pytest.raises(flows.FlowsError, match="draws random numbers"):
        CNF(flow.field, Exact(), SOLVER).log_prob(torch.ones(3, 2))
    hook.remove()
    assert torch.equal(flow.log_prob(torch.ones(3, 2)), value)


def test_rows_with_times_of_their_own_need_a_field_that_takes_them():
    field, x = Settings(), points(Settings(), 3)
    times = torch.tensor([[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]], dtype=torch.float64)
    with pytest.raises(flows.FlowsError, match=r"rows of times that start apart .* does not take t of shape"):
        flows.NeuralODE(field).trajectory(x, times)
    together = torch.tensor([[0.0, 0.5, 1.0], [0.0, 0.7, 2.0], [0.0, 1.3, 3.0]], dtype=torch.float64)
    with pytest.raises(flows.FlowsError, match=r"gradient='adjoint' solves back .* does not take t of shape"):
        flows.NeuralODE(field, ODESolver(gradient="adjoint")).trajectory(x, together)
    with pytest.raises(flows.FlowsError, match=r"derivative to times .* does not take t of shape"):
        flows.NeuralODE(field).trajectory(x, together.requires_grad_())
    right = Settings(columns=True)
    right.load_state_dict(field.state_dict())
    shared = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    gradients = [  # shared times go to the field as they are
        torch.autograd.grad(flows.NeuralODE(one).trajectory(x, shared).states.sum(), shared) for one in (field, right)
    ]
    torch.testing.assert_close(*gradients)
    fine = flows.NeuralODE(right, ODESolver(rtol=1e-8, atol=1e-8))
    both = fine.trajectory(x, times).states
    for i in range(3):
        torch.testing.assert_close(both[i], fine.trajectory(x[i], times[i]).states, rtol=1e-5, atol=1e-6)


class Normalised(torch.nn.Module):
    event_shape = (3,)

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3)
        ).double()

    def forward(self, t, x):
        return self.layers(torch.cat([x, t.reshape(-1, 1).expand(len(x), 1)], 1))


def test_flow_matching_trains_a_normalised_field():
    flow = CNF(Normalised(), solver=SOLVER)
    assert FlowMatching(divergence_weight=0)(flow, Batch(points(flow.field, 8))).loss.isfinite()
    with pytest.raises(flows.FlowsError, match="BatchNorm1d normalises"):
        flow.log_prob(points(flow.field))
    flow.eval()
    assert flow.log_prob(points(flow.field)).isfinite().all()


class Remembers(Settings):
    """A field with a fading memory of earlier times."""

    memory = 0.0

    def forward(self, t, x):
        self.memory = 0.5 * self.memory + 0.5 * float(t.mean())
        return self.layers(x) + self.memory


def test_a_memory_is_called_a_memory():
    field = Remembers()
    with pytest.raises(flows.FlowsError, match="it keeps state between calls"):
        CNF(field, solver=SOLVER).log_prob(points(field))


class Logs(Settings):
    def __init__(self):
        super().__init__(columns=True)
        self.logs = [collections.deque([0]), collections.OrderedDict(n=[0]), collections.defaultdict(int), {"n": [0]}]

    def forward(self, t, x):
        queue, ordered, counts, nested = self.logs
        queue.append(queue.pop() + 1)
        ordered["n"][0] += 1
        counts["n"] += 1
        nested["n"][0] += 1
        return super().forward(t, x)


def test_an_examination_leaves_no_trace_in_containers():
    field = Logs()
    with torch.no_grad():
        CNF(field, solver=ODESolver("euler", step_size=0.25)).sample((3,))
    queue, ordered, counts, nested = field.logs
    assert [queue[0], ordered["n"][0], counts["n"], nested["n"][0]] == [4, 4, 4, 4]


def test_a_function_of_numpy_is_told_in_words():
    with pytest.raises(flows.FlowsError, match="computes with numpy, which autograd cannot follow"):
        flows.divergence.divergence(np.sin, torch.randn(4, 2))


def test_a_field_that_mixes_large_batches_only_is_refused():
    class Centres(Clean):
        def forward(self, t, x):
            return self.velocity(t, x - x.mean(0) if len(x) > 8 else x)

    flow = flows.CNF(Centres())
    for use in (flow.log_prob, lambda x: flow.sample((len(x),))):
        with pytest.raises(flows.FlowsError, match="mixes the samples"):
            use(torch.randn(20, 2, dtype=torch.float64))
