"""Gradients through strangers' fields: tensors that they hold, buffers that they change, operations that lack some."""

import math
from contextlib import nullcontext

import pytest
import torch
from strange_fields import Clean
from torch import nn

import flows
from flows import CNF, ODESolver
from flows.datasets import Batch
from flows.divergence import Exact, Hutchinson, Probing
from flows.errors import FieldWarning
from flows.objectives import FlowMatching
from flows.promises import explained, traits_of
from flows.promises.jumps import jump_in_space, jumps_in_time
from flows.training.state import ExponentialMovingAverage


class Held(Clean):
    """A field with a tensor that is none of its parameters; `seed` is the leaf behind it."""

    def __init__(self):
        super().__init__()
        self.__dict__["encoder"] = nn.Linear(3, 2)  # no submodule

    def prepare(self):
        """Compute anew what is held."""

    @property
    def seeds(self):
        return list(self.encoder.parameters())

    def code(self, size=()):
        return self.encoder(torch.ones(*size, 3)).tanh()


class Attribute(Held):
    def prepare(self):
        self.scale = torch.tensor([0.3, 0.7], requires_grad=True)

    @property
    def seeds(self):
        return [self.scale]

    def forward(self, t, x):
        return self.velocity(t, x) * self.scale


class LayersInAList(Held):
    def prepare(self):
        self.layers = [{"last": nn.Linear(2, 2)}]

    @property
    def seeds(self):
        return list(self.layers[0]["last"].parameters())

    def forward(self, t, x):
        return self.layers[0]["last"](self.velocity(t, x))


class Code(Held):
    def prepare(self):
        self.held = self.code()

    def forward(self, t, x):
        return self.velocity(t, x) * self.held


class CodeOfTheBatch(Code):
    def prepare(self):
        self.held = self.code((4,))


class CodeInAClosure(Held):
    def prepare(self):
        code = self.code((4,))
        self.scaled = lambda v: v * code

    def forward(self, t, x):
        return self.scaled(self.velocity(t, x))


class HalvesOfACode(Held):
    def prepare(self):
        self.halves = self.code().repeat(2).chunk(2)

    def forward(self, t, x):
        return self.velocity(t, x) * self.halves[1] + self.halves[0]


class GeneratedWeights(Held):
    def prepare(self):
        self.layer = nn.Linear(2, 2)
        del self.layer.weight
        self.layer.weight = self.code().outer(self.code())

    def forward(self, t, x):
        return self.layer(self.velocity(t, x))


class SpectralNorm(Held):
    """Its first layers change their own buffers in training."""

    def prepare(self):
        self.old = nn.utils.spectral_norm(nn.Linear(2, 2))
        self.new = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2))

    @property
    def seeds(self):
        return []

    def forward(self, t, x):
        return self.new(self.old(self.velocity(t, x)))


class WeightNorm(SpectralNorm):
    def prepare(self):
        with pytest.warns(FutureWarning, match="weight_norm"):
            self.old = nn.utils.weight_norm(nn.Linear(2, 2))
        self.new = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))


def gradients(kind, gradient, estimator):
    torch.manual_seed(0)
    field = kind()
    field.prepare()
    flow = CNF(field, estimator, ODESolver("dopri5", rtol=1e-7, atol=1e-7, gradient=gradient))
    upstream = nn.Linear(2, 2)
    log_p = flow.log_prob(upstream(torch.randn(4, 2)), generator=torch.Generator().manual_seed(1))
    wanted = [*field.parameters(), *field.seeds, *upstream.parameters()]
    return torch.cat([g.flatten() for g in torch.autograd.grad(log_p.mean(), wanted)])


KINDS = [
    Attribute, LayersInAList, Code, CodeOfTheBatch, CodeInAClosure, HalvesOfACode, GeneratedWeights, SpectralNorm,
    WeightNorm,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("estimator", [Exact(), Hutchinson(mode="forward")], ids=["reverse", "forward"])
def test_all_gradient_modes_reach_what_a_field_holds(kind, estimator):
    if kind is SpectralNorm:  # forward mode refuses buffers that change
        estimator = Exact()
    expected = gradients(kind, "backprop", estimator)
    assert expected.norm() > 0
    torch.testing.assert_close(gradients(kind, "checkpoint", estimator), expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(gradients(kind, "adjoint", estimator), expected, rtol=1e-3, atol=1e-4)


def test_fields_with_computed_attributes_can_be_trained():
    class Remembering(WeightNorm):
        def forward(self, t, x):
            self.latest = super().forward(t, x)
            return self.latest

    field = Remembering()
    field.prepare()
    flow = CNF(field, solver=ODESolver("rk4", step_size=0.5))
    flow.log_prob(torch.randn(4, 2))  # leaves a graph in the attributes
    before = field.old.weight_g.detach().clone()
    average = ExponentialMovingAverage(flow, 0.9)
    flow.log_prob(torch.randn(4, 2)).mean().backward()
    torch.optim.SGD(field.parameters(), 0.1).step()
    average.update_parameters(flow)
    assert not torch.equal(field.old.weight_g, before)
    x = torch.randn(4, 2)
    torch.testing.assert_close(average.module.log_prob(x), flow.log_prob(x))
    field.__dict__["notes"] = [field.latest]
    with pytest.raises(ValueError, match="a list or a dict in it holds tensors that carry a graph"):
        ExponentialMovingAverage(flow, 0.9)


ELSEWHERE = {}


def test_a_tensor_that_is_nowhere_to_be_found_is_an_error():
    ELSEWHERE["code"] = nn.Linear(3, 2)(torch.ones(3))

    class Hidden(Clean):
        def forward(self, t, x):
            return self.velocity(t, x) * ELSEWHERE["code"]

    x = torch.randn(4, 2)
    assert CNF(Hidden()).log_prob(x).requires_grad
    for gradient in ("checkpoint", "adjoint"):
        flow = CNF(Hidden(), solver=ODESolver(gradient=gradient))
        with pytest.raises(ValueError, match=r"computed before the solve .* pass it as context"):
            flow.log_prob(x)


def test_a_cache_of_parameters_is_refused():
    class Caching(Clean):
        product = None

        def forward(self, t, x):
            if self.product is None:
                self.product = self.a.T @ self.b.T
            return x @ self.product

    with pytest.raises(ValueError, match=r"keeps a tensor of an earlier evaluation .* compute it anew"):
        CNF(Caching()).log_prob(torch.randn(4, 2))


def test_power_iterations_go_on_by_one_step_a_solve():
    class Normed(Clean):
        def __init__(self):
            super().__init__()
            self.layer = nn.utils.spectral_norm(nn.Linear(2, 2))

        def forward(self, t, x):
            return self.layer(self.velocity(t, x))

    field, x = Normed(), torch.randn(4, 2)
    flow = CNF(field, solver=ODESolver("rk4", step_size=0.25))
    before = field.layer.weight_u.clone()
    first = flow.log_prob(x)
    after = field.layer.weight_u.clone()
    assert not torch.equal(before, after)
    one_step = nn.functional.normalize(
        field.layer.weight_orig @ nn.functional.normalize(field.layer.weight_orig.T @ before, dim=0), dim=0
    )
    torch.testing.assert_close(after, one_step.detach())
    for _ in range(40):
        flow.log_prob(x)
    settled = flow.log_prob(x)
    torch.testing.assert_close(flow.log_prob(x), settled)
    assert not torch.allclose(first, settled)
    flow.eval()
    torch.testing.assert_close(flow.log_prob(x), settled)


def test_an_examination_leaves_no_trace():
    class Diary(Clean):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2).eval()
            self.register_buffer("calls", torch.zeros(()))
            self.history, self.last = [], None

        def forward(self, t, x):
            self.calls += 1
            self.history.append(1)
            self.last = x.detach()
            torch.rand(1)
            return self.velocity(t, self.norm(x))

    field, x = Diary(), torch.randn(4, 2)
    state = torch.get_rng_state()
    flow = CNF(field)
    flows.models.cnf.examine(flow.base, flow.bind(), x)
    assert traits_of(field).examined
    assert torch.equal(torch.get_rng_state(), state)
    assert field.calls == 0
    assert field.history == []
    assert field.last is None


def test_fields_of_this_package_are_not_examined():
    field = flows.fields.MLP((2,))
    field.compile(backend="eager")  # changes nothing
    assert traits_of(field).built_in
    assert traits_of(flows.fields.UNet((1, 4, 4), channels=4, multipliers=(1,))).built_in
    field.layers[0].register_forward_hook(lambda module, given, value: value)
    assert not traits_of(field.eval()).built_in
    assert not traits_of(flows.fields.Adapter(nn.Linear(2, 2), (2,), ("x",))).built_in


def test_fields_that_are_zero_at_the_start_are_seen_through():
    class Asleep(Clean):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(2, 2)
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)

        def forward(self, t, x):
            return self.last(self.velocity(t, x) - x.mean(0))

    field = Asleep()
    with pytest.raises(ValueError, match="mixes the samples"):
        CNF(field).sample((3,))
    assert not field.last.weight.any()


# Operations without some derivative

ATTENTION = "second derivative.*plain products"


class Attention(nn.Module):
    event_shape = (2,)

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(1, 24), nn.Linear(8, 1)

    def forward(self, t, x):
        q, k, v = self.into(x[:, None, :, None]).chunk(3, -1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v)).flatten(1)


class MultiheadAttention(Attention):
    def __init__(self):
        super().__init__()
        self.into, self.attention = nn.Linear(1, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, t, x):
        h = self.into(x.unsqueeze(-1))
        return self.out(self.attention(h, h, h, need_weights=False)[0]).squeeze(-1)


class Distances(nn.Module):
    event_shape = (2,)

    def __init__(self):
        super().__init__()
        self.centres, self.out = nn.Parameter(torch.randn(5, 2)), nn.Linear(5, 2)

    def forward(self, t, x):
        return self.out(torch.cdist(x, self.centres))


class Normalised(Clean):
    """The forward mode of layer normalisation has wrong derivatives in torch."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(5)

    def velocity(self, t, x):
        return self.norm((x @ self.a.T + t.reshape(-1, 1) * self.u).tanh()) @ self.b.T


class ReentrantCheckpoint(Clean):
    def forward(self, t, x):
        return torch.utils.checkpoint.checkpoint(self.velocity, t, x, use_reentrant=True)


class Scripted(nn.Module):
    event_shape = (2,)

    def __init__(self):
        super().__init__()
        with pytest.warns(DeprecationWarning, match="script"):
            self.inner = torch.jit.script(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)))

    def forward(self, t, x):
        return self.inner(x)


@pytest.mark.parametrize(
    ("kind", "estimator", "words"),
    [
        (Attention, Exact(), ATTENTION),
        (MultiheadAttention, Exact(), ATTENTION),
        (Attention, Exact(mode="forward"), "fused attention has no forward mode.*mode='reverse'.*plain products"),
        (Distances, Exact(), "second derivative.*Write distances as"),
        (Distances, Exact(mode="forward"), "cdist has no forward mode; write distances as"),
        (Normalised, Exact(mode="forward"), "its derivative changes by .*mode='reverse'.*LayerNorm"),
        (ReentrantCheckpoint, Exact(), "use_reentrant=False"),
        (Scripted, Exact(mode="forward"), "torch.jit.*mode='reverse'"),
    ],
    ids=lambda value: getattr(value, "__name__", getattr(value, "mode", "")),
)
@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
def test_operations_without_a_derivative_are_named_with_a_cure(kind, estimator, words, gradient):
    flow = CNF(kind(), estimator, ODESolver("rk4", step_size=0.5, gradient=gradient))
    x = torch.randn(4, 2)
    for _ in range(2):  # an evaluation in between forgets nothing
        with pytest.raises(flows.FlowsError, match=words):
            flow.log_prob(x).mean().backward()
        if kind is not ReentrantCheckpoint:  # which torch warns about
            with torch.no_grad():
                flow.sample((2,))


def test_a_stated_receptive_radius_is_checked():
    class Far(nn.Module):
        event_shape, receptive_radius = (1, 6, 6), 1

        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 1, 3, padding=1))

        def forward(self, t, x):
            return self.layers(x)

    x = torch.randn(2, 1, 6, 6)
    with pytest.raises(ValueError, match=r"receptive_radius = 1, .* a site 2 sites away"):
        CNF(Far(), Probing(2)).log_prob(x)
    Far.receptive_radius = 2
    exact, probed = (CNF(Far().requires_grad_(False), e) for e in (Exact(), Probing(3)))
    probed.field.load_state_dict(exact.field.state_dict())
    torch.testing.assert_close(probed.log_prob(x), exact.log_prob(x))


@pytest.mark.parametrize("kind", [Attention, Distances, Normalised])
def test_what_needs_no_second_derivative_works(kind):
    flow, x = CNF(kind(), Exact(), ODESolver("rk4", step_size=0.5)), torch.randn(4, 2)
    assert flow.log_prob(x).isfinite().all()
    with torch.no_grad():
        assert flow.sample((3,)).isfinite().all()
    FlowMatching(divergence_weight=0)(flow, Batch(x)).loss.backward()


class ByParts(Clean):
    def forward(self, t, x):
        return self.velocity(t, x) if float(x.sum()) < 1e9 else x


def test_batched_products_that_vmap_refuses_name_the_way_out():
    flow = CNF(ByParts(), Exact(chunk_size=2))
    assert flow.log_prob(torch.randn(3, 2)).isfinite().all()

    class Looped(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            return g * (2.0 if float(g.sum()) < 1e9 else 3.0)

    class Branching(Clean):
        def forward(self, t, x):
            return Looped.apply(self.velocity(t, x))

    flow = CNF(Branching(), Exact(chunk_size=2))
    with pytest.raises(flows.FlowsError, match="chunk_size=1"):
        flow.log_prob(torch.randn(3, 2))


class ByTime(nn.Module):
    """A field whose tensors take turns."""

    event_shape = (2,)

    def __init__(self, kind):
        super().__init__()
        self.layer = nn.Linear(2, 2).double()
        self.pieces = [nn.Linear(2, 2).double() for _ in range(4)]
        if kind == "tensors":
            self.pieces = [torch.full((2, 2), 0.1 * k, dtype=torch.float64, requires_grad=True) for k in range(4)]
        self.leaves = [p for piece in self.pieces for p in (piece.parameters() if kind == "layers" else [piece])]
        if kind == "computed":
            self.leaves = [torch.full((2, 2), 0.1 * k, dtype=torch.float64, requires_grad=True) for k in range(4)]
            self.pieces = [leaf.sin() for leaf in self.leaves]

    def forward(self, t, x):
        piece = self.pieces[min(int(4 * t.reshape(-1)[0]), 3)]
        return torch.tanh(self.layer(x)) + (x @ piece if isinstance(piece, torch.Tensor) else piece(x))


@pytest.mark.parametrize("kind", ["tensors", "layers", "computed"])
@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint"])
def test_tensors_that_are_used_a_part_of_the_time_get_their_gradients(gradient, kind):
    found = []
    for one in (gradient, "backprop"):
        torch.manual_seed(0)
        field = ByTime(kind)
        if one != "adjoint":  # which finds them
            field.jumps = (0.25, 0.5, 0.75)
        flow = CNF(field, solver=ODESolver("rk4", step_size=0.05, gradient=one))
        told = pytest.warns(FieldWarning, match="jumps in time, near t = 0.25, 0.5 and 0.75")
        with told if one == "adjoint" else nullcontext():
            flow.log_prob(torch.randn(5, 2, dtype=torch.float64)).mean().backward()
        found.append(torch.cat([leaf.grad.flatten() for leaf in field.leaves]))
    torch.testing.assert_close(
        *found, rtol=1e-3 if gradient == "adjoint" else 1e-8, atol=1e-3 * (gradient == "adjoint")
    )


class Rates(nn.Module):
    """v = a_k x in the k-th part of the time; all rates begin equal, so that the value does not jump."""

    event_shape = (1,)

    def __init__(self, number, rate=0.3):
        super().__init__()
        self.rates = nn.ParameterList([torch.full((), rate, dtype=torch.float64) for _ in range(number)])

    def forward(self, t, x):
        return x * self.rates[min(int(len(self.rates) * t.reshape(-1)[0]), len(self.rates) - 1)]


@pytest.mark.parametrize("number", [2, 4, 7])
def test_the_adjoint_of_a_field_that_jumps_in_time_misses_no_part(number):
    """d/da_k log p(x) = (z² − 1) / number with z = x exp(−mean a), for the density of x = z exp(mean a)."""
    field, x = Rates(number), torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    flow = CNF(field, solver=ODESolver(gradient="adjoint"))
    with pytest.warns(FieldWarning, match="the field Rates jumps in time, near t = .*`jumps`"):
        flow.log_prob(x).sum().backward()
    expected = float(((x * math.exp(-0.3)).square() - 1).sum()) / number
    for rate in field.rates:
        assert float(rate.grad) == pytest.approx(expected, rel=1e-4)


def test_the_adjoint_of_trajectories_that_jump_in_time_misses_no_part():
    field = Rates(2)
    ode = flows.NeuralODE(field, ODESolver(gradient="adjoint"))
    with pytest.warns(FieldWarning, match="near t = 0.5"):
        path = ode.trajectory(torch.ones(3, 1, dtype=torch.float64), [0.0, 0.8], solver_error=False)
    path.states[:, -1].sum().backward()
    scale = 3 * math.exp(0.3 * 0.8)
    assert float(field.rates[0].grad) == pytest.approx(0.5 * scale, rel=1e-4)
    assert float(field.rates[1].grad) == pytest.approx(0.3 * scale, rel=1e-4)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Hardtanh, nn.LeakyReLU, nn.Tanh])
@pytest.mark.parametrize("scale", [1, 5])
def test_kinks_and_steep_places_are_no_jumps(activation, scale):
    class Network(nn.Module):
        event_shape = (2,)

        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(3, 32), activation(), nn.Linear(32, 32), activation(), nn.Linear(32, 2)
            )

        def forward(self, t, x):
            y = self.layers(torch.cat([x, t.expand(len(x))[:, None]], 1))
            return y + torch.sigmoid(100 * (t - 0.3)) * torch.tanh(50 * x)

    for seed in range(5):
        torch.manual_seed(seed)
        field, x = Network(), torch.randn(6, 2)
        with torch.no_grad():
            for weights in field.parameters():
                weights *= scale
        assert jumps_in_time(field, field, x, list(field.parameters()), (0.0, 1.0)) == ()
        assert jump_in_space(field, field, x) is None


@pytest.mark.parametrize(
    "step", [lambda x: (x > 0.1).to(x), torch.sign, torch.round, lambda x: torch.where(x < 0, x, 1 - x)]
)
def test_a_field_that_jumps_in_x_is_told(step):
    class Jumping(Clean):
        def forward(self, t, x):
            return self.velocity(t, x) + 0.3 * step(x)

    with pytest.warns(FieldWarning, match=r"the field Jumping jumps in x, near x = \(.*sigmoid"):
        CNF(Jumping()).log_prob(torch.randn(5, 2, dtype=torch.float64))


class SharesALayer(nn.Module):
    """Its context, and a tensor that it holds, come from its own parameters."""

    event_shape, context_shape = (2,), (2,)

    def __init__(self):
        super().__init__()
        self.layer, self.encoder = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()
        self.code = self.encoder.weight.exp()

    def forward(self, t, x, context):
        return torch.tanh(self.layer(x) @ self.code + context + self.encoder(x))


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_gradients_through_a_context_of_the_field_itself_count_once(gradient):
    torch.manual_seed(0)
    field = SharesALayer()
    flow = CNF(field, solver=ODESolver("rk4", step_size=0.05, gradient=gradient))
    x = torch.randn(4, 2, dtype=torch.float64)

    def value():
        field.code = field.encoder.weight.exp()
        return flow.log_prob(x, field.encoder(torch.ones(4, 2, dtype=torch.float64)).exp()).sum()

    value().backward()
    found, step = field.encoder.weight.grad[0, 1].item(), 1e-5
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            field.encoder.weight[0, 1] += sign * step
            values.append(value().item())
            field.encoder.weight[0, 1] -= sign * step
    assert found == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4)


class Falls(nn.Module):
    """Weak drag beside a large constant, whose differences are lost in rounding."""

    event_shape = (2,)

    def __init__(self, constant, drag):
        super().__init__()
        self.constant, self.drag = constant, drag

    def forward(self, t, x):
        return self.constant - self.drag * x


@pytest.mark.parametrize(("constant", "drag"), [(1e4, 1e-3), (9.81, 1e-5), (1e6, 1.0)])
def test_rounding_contradicts_no_derivative(constant, drag):
    flow = CNF(Falls(constant, drag), Exact(), ODESolver("rk4", step_size=0.5))
    assert flow.log_prob(torch.randn(4, 2)).shape == (4,)


class Steps(Clean):
    def forward(self, t, x):
        return self.steps(4 * self.velocity(t, x)) / 4


@pytest.mark.parametrize("steps", [torch.round, torch.floor, torch.sign], ids=lambda steps: steps.__name__)
def test_a_field_of_steps_is_refused(steps):
    Steps.steps = staticmethod(steps)
    with pytest.raises(flows.FlowsError, match="changes by steps"):
        CNF(Steps(), Exact(), ODESolver("rk4", step_size=0.5)).log_prob(torch.randn(4, 2, dtype=torch.float64))


def test_a_field_that_does_not_depend_on_x_is_no_field_of_steps():
    class Drift(Clean):
        def forward(self, t, x):
            return t + 0 * x

    flow = CNF(Drift(), Exact(), ODESolver("rk4", step_size=0.5))
    x = torch.randn(4, 2, dtype=torch.float64)
    torch.testing.assert_close(flow.log_prob(x), flow.base.log_prob(x - 0.5))


def test_errors_of_the_field_itself_are_not_explained_by_their_words():
    class Own(Clean):
        def forward(self, t, x):
            raise NotImplementedError("the derivative of this case is not implemented by me")

    with pytest.raises(flows.FlowsError, match=r"cannot be evaluated.*by me") as told:
        CNF(Own()).sample((3,))
    assert "second derivative" not in str(told.value)
    for error in (ValueError("cdist"), RuntimeError("scaled_dot_product_attention: Expected attn_mask dtype")):
        assert explained(error, "Own") is error
    assert isinstance(explained(RuntimeError(""), "Own"), RuntimeError)


def test_flows_that_were_pickled_with_plain_options_are_read():
    flow = CNF(Clean(), solver=ODESolver(rtol=1e-3))
    state = dict(flow.__dict__)
    for name in ("solver", "divergence"):
        state[name] = state.pop(f"_{name}")
    old = CNF.__new__(CNF)
    old.__setstate__(state)
    assert old.solver.rtol == 1e-3
    x = torch.randn(3, 2, dtype=torch.float64)
    assert torch.equal(old.log_prob(x), flow.log_prob(x))
