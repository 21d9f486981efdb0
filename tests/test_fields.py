"""Fields: closed forms against dense traces, gradients, contexts, adapters."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from flows import CNF
from flows.divergence import divergence
from flows.fields import (
    MLP,
    Activation,
    Adapter,
    ConcatSquashMLP,
    Elementwise,
    Hollow,
    Linear,
    Planar,
    Potential,
    SinusoidalTime,
    bind,
)
from flows.fields.activations import Tanh

WIDTHS = [(7,), (7, 5), (7, 5, 6), (3, 6, 2, 5), (9, 8, 7, 6, 5)]
EVENTS = [(3,), (2, 4)]


def randomised(field):
    """Away from special initial values, such as gates that do not depend on time yet."""
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return field


def build(kind, event_shape, hidden, context_shape):
    if kind == "mlp":
        return MLP(event_shape, hidden, context_shape=context_shape)
    if kind == "sine":
        return MLP(event_shape, hidden, "tanh", sine_frequency=2.0, context_shape=context_shape)
    return ConcatSquashMLP(event_shape, hidden, context_shape=context_shape)


@pytest.mark.parametrize("event_shape", EVENTS)
@pytest.mark.parametrize("hidden", WIDTHS)
@pytest.mark.parametrize("kind", ["mlp", "sine", "concat_squash"])
@pytest.mark.parametrize("context_shape", [None, (2,)])
@pytest.mark.parametrize("per_sample_time", [False, True])
def test_closed_form_is_the_dense_trace(event_shape, hidden, kind, context_shape, per_sample_time):
    field = randomised(build(kind, event_shape, hidden, context_shape))
    x = torch.randn(4, *event_shape)
    context = None if context_shape is None else torch.randn(4, *context_shape)
    t = torch.rand(4) if per_sample_time else torch.tensor(0.3)
    bound = bind(field, context)
    value, ours = bound.value_and_divergence(t, x)
    dense = divergence(lambda x: bound(t, x), x, len(event_shape))
    torch.testing.assert_close(value, bound(t, x))
    torch.testing.assert_close(ours, dense, rtol=0, atol=1e-10)
    parameters = list(field.parameters())
    ours, dense = (torch.autograd.grad(d.sin().sum(), parameters, allow_unused=True) for d in (ours, dense))
    for parameter, a, b in zip(parameters, ours, dense, strict=True):
        torch.testing.assert_close(*(torch.zeros_like(parameter) if g is None else g for g in (a, b)))


@pytest.mark.parametrize("kind", ["mlp", "sine", "concat_squash"])
@pytest.mark.parametrize("context_shape", [None, (2,)])
@pytest.mark.parametrize("per_sample_time", [False, True])
@pytest.mark.parametrize("width", [7, 50])  # wider than four batches
def test_the_velocity_of_a_solve_is_that_of_the_field(kind, context_shape, per_sample_time, width):
    field = randomised(build(kind, (2, 3), (width, 5), context_shape))
    x, t = torch.randn(4, 2, 3), torch.rand(4) if per_sample_time else torch.tensor(0.3)
    bound = bind(field, None if context_shape is None else torch.randn(4, *context_shape))
    values = bound.velocity(t, x), bound(t, x)
    torch.testing.assert_close(*values)
    gradients = [torch.autograd.grad(value.sin().sum(), [*field.parameters()]) for value in values]
    for ours, autograd in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, autograd)


@pytest.mark.parametrize("build", [lambda: MLP((2,), (4,)), lambda: Adapter(nn.Linear(2, 2), (2,), ("x",))])
def test_a_view_is_freed_with_its_last_reference(build):
    """It holds contexts and graphs, which would wait for the garbage collector."""
    view = bind(build())
    view.velocity(torch.tensor(0.3), torch.randn(4, 2))
    alive = weakref.ref(view)
    gc.disable()
    try:
        del view
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("hidden", [(7, 5, 6), (3, 6, 2, 5), (9, 8, 7, 6, 5)])
def test_products_of_weights_that_would_be_too_large_are_not_kept(hidden, monkeypatch):
    """Tangents are then pushed one by one, to the same trace."""
    for event_shape in EVENTS:
        field = randomised(MLP(event_shape, hidden))
        x, t = torch.randn(4, *event_shape), torch.tensor(0.3)
        expected = field.value_and_divergence(t, x)[1]
        assert torch.equal(field.value_and_divergence(t, x)[1], expected)
        with monkeypatch.context() as patch:
            patch.setattr("flows.fields.trace.MAX_KEPT_NUMBERS", 0)
            pushed = field.value_and_divergence(t, x)[1]
        torch.testing.assert_close(pushed, expected, rtol=0, atol=1e-10)
        assert not torch.equal(pushed, expected)  # in another order


@pytest.mark.parametrize("name", ["tanh", "logistic", "silu", "softplus", "sine", "elementwise"])
def test_slopes_are_the_derivatives(name):
    activation = MLP((1,), (1,), name).activations[0]
    z = torch.linspace(-4, 4, 41, requires_grad=True)
    value, slope = activation.value_and_slope(z)
    torch.testing.assert_close(value, activation(z))
    torch.testing.assert_close(slope, torch.autograd.grad(activation(z).sum(), z)[0])


@pytest.mark.parametrize("name", ["tanh", "logistic", "silu", "softplus", "sine", "elementwise"])
def test_a_rescaled_activation_is_the_same_function(name):
    z = torch.linspace(-20, 20, 401)
    activation = MLP((2,), (3,), name, sine_frequency=None).activations[0]
    function, stretch, scale, offset = activation.rescaled()
    value, slope = function.value_and_slope(stretch * z)
    expected, expected_slope = activation.value_and_slope(z)
    torch.testing.assert_close(scale * value + offset, expected)
    torch.testing.assert_close(scale * stretch * slope, expected_slope)


class Stretched(Tanh):
    """tanh with a learned slope: another function than its base class."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(1.7))

    def forward(self, z):
        return super().forward(self.slope * z)

    def value_and_slope(self, z):
        value, slope = super().value_and_slope(self.slope * z)
        return value, self.slope * slope


@pytest.mark.parametrize("kind", [MLP, ConcatSquashMLP])
def test_subclasses_of_an_activation_are_their_own_functions(kind):
    field = kind((2,), (6, 6), Stretched())
    x, t = torch.randn(5, 2), torch.tensor(0.3)
    value, trace = bind(field).value_and_divergence(t, x)
    torch.testing.assert_close(value, field(t, x))
    torch.testing.assert_close(trace, divergence(lambda x: field(t, x), x, 1))
    assert torch.autograd.grad(value.sum(), [*field.parameters()], allow_unused=True).count(None) == 0


def without_bias(field):
    field.layers[1] = nn.Linear(6, 6, bias=False)


def pruned(field):
    prune.random_unstructured(field.layers[1], "weight", 0.5)


def doubled(field):
    field.layers[1].register_forward_hook(lambda module, arguments, output: 2 * output)


@pytest.mark.parametrize("change", [without_bias, pruned, doubled])
def test_other_layers_are_called(change):
    field = MLP((2,), (6, 6))
    change(field)
    x, t = torch.randn(5, 2), torch.tensor(0.3)
    for _ in range(2):  # a pruned layer computes its weights anew
        value = field.value_and_divergence(t, x)[0]
        torch.testing.assert_close(value, field(t, x))
        value.sum().backward()


@pytest.mark.parametrize("kind", ["mlp", "sine", "concat_squash"])
def test_weights_that_hooks_compute_are_those_of_today(kind):
    """The closed form and the velocity read them, and a hook computes them at a call of the layer."""
    field = build(kind, (2,), (6, 5), None)
    for layer in [*field.layers, *field.modulation.children()] if kind != "concat_squash" else field.modules():
        if isinstance(layer, nn.Linear):
            prune.l1_unstructured(layer, "weight", 0.5)
    x, t = torch.randn(5, 2), torch.tensor(0.3)
    for _ in range(2):
        randomised(field)
        (value, trace), velocity = bind(field).value_and_divergence(t, x), bind(field).velocity(t, x)
        torch.testing.assert_close(trace, divergence(lambda x: field(t, x), x), rtol=0, atol=1e-10)
        torch.testing.assert_close(value, field(t, x))
        torch.testing.assert_close(velocity, field(t, x))
        (trace.sum() + value.sum()).backward()


def test_shapes_on_the_meta_device():
    field = MLP((2,), (6, 6)).to("meta")
    value, trace = field.value_and_divergence(torch.zeros((), device="meta"), torch.zeros(5, 2, device="meta"))
    assert (value.shape, trace.shape) == ((5, 2), (5,))


def test_low_precision_keeps_the_digits_of_small_activations():
    """A logistic function near 1/2 has lost them."""
    field = ConcatSquashMLP((3,), (16, 16)).float()
    with torch.no_grad():
        for layer in field.layers:
            layer.linear.bias.zero_()
            layer.shift.weight.zero_()
    x, t = 1e-3 * torch.randn(50, 3, dtype=torch.float32), torch.tensor(0.3, dtype=torch.float32)
    bound = bind(field)
    with torch.no_grad():
        exact = bound(t, x)
        with torch.autocast("cpu", torch.bfloat16):
            found = bound.value_and_divergence(t, x)[0]
    assert (found - exact).abs().max() < 0.03 * exact.abs().max()


def test_tanh_in_single_precision_is_that_of_double():
    z = torch.linspace(-20, 20, 40_001, dtype=torch.float32, requires_grad=True)
    value = Tanh()(z)
    (slope,) = torch.autograd.grad(value.sum(), z)
    exact = z.detach().double().tanh()
    assert (value - exact).abs().max() <= 2e-7
    assert (slope - (1 - exact**2)).abs().max() <= 4e-7
    assert Tanh()(torch.zeros(1)) == 0


def test_a_new_activation_is_one_class():
    class Cubic(Activation):
        def forward(self, z):
            return z**3

        def value_and_slope(self, z):
            return z**3, 3 * z**2

    field = MLP((2,), (4, 4), "cubic")
    x = torch.randn(3, 2)
    t = torch.tensor(0.5)
    torch.testing.assert_close(
        field.value_and_divergence(t, x)[1], divergence(lambda x: field(t, x), x), rtol=0, atol=1e-10
    )


def test_any_torch_activation_has_a_closed_form_through_elementwise():
    field = MLP((2,), (4, 4), Elementwise(nn.Mish()))
    x = torch.randn(3, 2)
    t = torch.tensor(0.5)
    torch.testing.assert_close(field.value_and_divergence(t, x)[1], divergence(lambda x: field(t, x), x))


@pytest.mark.parametrize("field", [MLP((2,), (5, 4), context_shape=(3,)), ConcatSquashMLP((2,), context_shape=(3,))])
def test_every_parameter_gets_a_gradient(field):
    field = field.double()
    value, trace = field.value_and_divergence(torch.tensor(0.4), torch.randn(6, 2), torch.randn(6, 3))
    (value.sin().sum() + trace.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in field.parameters())


def test_time_matters_and_may_differ_between_samples():
    field = randomised(MLP((2,), (8,)))
    x = torch.randn(3, 2)
    t = torch.tensor([0.0, 0.5, 1.0])
    together = field(t, x)
    apart = torch.cat([field(time, point[None]) for time, point in zip(t, x, strict=True)])
    torch.testing.assert_close(together, apart)
    assert (field(torch.tensor(0.0), x) - field(torch.tensor(1.0), x)).abs().min() > 0


def test_what_is_computed_once_a_solve_is_computed_once(monkeypatch):
    field = MLP((3,), (8, 8))
    built = []
    original = field.precompute
    monkeypatch.setattr(field, "precompute", lambda: built.append(1) or original())
    bound = bind(field)
    x = torch.randn(2, 3)
    for t in torch.linspace(0, 1, 5):
        bound.value_and_divergence(t, x)
        bound.velocity(t, x)
    assert len(built) == 1


class Positional(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 2)

    def forward(self, sample, timestep):
        return self.net(torch.cat([sample, timestep.reshape(len(sample), 1)], 1))


@pytest.mark.parametrize("time", ["batch", "column"])
@pytest.mark.parametrize("arguments", [("x", "t"), {"t": "timestep", "x": "sample"}])
def test_adapter_takes_arguments_in_any_order(arguments, time):
    net = Positional()
    field = Adapter(net, (2,), arguments, time)
    x = torch.randn(5, 2)
    expected = net(x, torch.full((5,), 0.3))
    torch.testing.assert_close(field(torch.tensor(0.3), x), expected)
    torch.testing.assert_close(Adapter(net.net, (2,), ("x_and_t",))(torch.tensor(0.3), x), expected)
    assert {id(p) for p in field.parameters()} == {id(p) for p in net.parameters()}


def test_adapter_for_autonomous_and_conditional_networks():
    x, context = torch.randn(5, 2), torch.randn(5, 3)
    torch.testing.assert_close(Adapter(nn.Tanh(), (2,), ("x",))(torch.tensor(0.3), x), x.tanh())
    bilinear = nn.Bilinear(2, 3, 2)
    field = Adapter(bilinear, (2,), ("x", "context"), context_shape=(3,))
    torch.testing.assert_close(field(torch.tensor(0.3), x, context), bilinear(x, context))


def test_errors_say_what_came_and_what_to_do():
    x = torch.randn(3, 2)
    with pytest.raises(ValueError, match=r"hidden must hold the width of at least one hidden layer.*got \(\)"):
        MLP((2,), ())
    with pytest.raises(ValueError, match=r"hidden must hold the width.*got \(\)"):
        ConcatSquashMLP((2,), ())
    with pytest.raises(ValueError, match=r"unknown Activation 'relu6'; expected one of .*silu.*tanh"):
        MLP((2,), (4,), "relu6")
    with pytest.raises(ValueError, match="sine_frequency must be a finite number > 0, got -1; None"):
        MLP((2,), (4,), sine_frequency=-1)
    with pytest.raises(ValueError, match=r"event_shape must hold positive sizes, such as \(2,\), got \(\)"):
        MLP((), (4,))
    with pytest.raises(ValueError, match="num_frequencies must be >= 0, got -1"):
        SinusoidalTime(-1)
    with pytest.raises(ValueError, match=r"MLP is unconditional and got a context of shape \(3, 5\); build it with"):
        MLP((2,), (4,))(torch.zeros(()), x, torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"MLP needs a context of shape \(B, \*\(5,\)\)"):
        MLP((2,), (4,), context_shape=(5,))(torch.zeros(()), x)
    with pytest.raises(ValueError, match=r"expects a context of shape \(B, \*\(5,\)\), got \(3, 4\)"):
        MLP((2,), (4,), context_shape=(5,))(torch.zeros(()), x, torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"a matrix of shape \(2, 2\) and an offset of shape \(2,\), got \(3, 3\)"):
        Linear((2,), torch.eye(3))
    with pytest.raises(ValueError, match="arguments must be made of t, x, context, x_and_t, got"):
        Adapter(nn.Tanh(), (2,), ("y",))
    with pytest.raises(ValueError, match="time must be one of scalar, batch, column, got 'row'"):
        Adapter(nn.Tanh(), (2,), ("x",), "row")
    with pytest.raises(ValueError, match="context_shape goes with 'context' among the arguments"):
        Adapter(nn.Tanh(), (2,), ("x", "context"))


def test_time_features_are_distinct_and_none_changes_faster_than_pi():
    t = torch.linspace(0, 1, 500, requires_grad=True)
    features = SinusoidalTime(8)(t)
    assert features.shape == (500, 16)
    rates = torch.stack([torch.autograd.grad(column.sum(), t, retain_graph=True)[0] for column in features.T])
    torch.testing.assert_close(rates.abs().amax(1), torch.full((16,), torch.pi), rtol=1e-3, atol=0)
    assert torch.linalg.matrix_rank(features.detach()) == 16
    assert (features[0] - features[-1]).norm() > 1  # the ends of the unit of time are told apart


@pytest.mark.parametrize("kind", [MLP, ConcatSquashMLP, Potential, Planar, Hollow])
def test_a_context_can_be_one_number(kind) -> None:
    field = kind((2,), context_shape=())
    x, context = torch.randn(4, 2), torch.randn(4)
    value = field(torch.tensor(0.5), x, context)
    assert value.shape == (4, 2)
    assert CNF(field).log_prob(x, context).shape == (4,)
