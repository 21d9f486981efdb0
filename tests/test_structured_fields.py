"""Fields built so that their divergence is cheap: exactness, structure, symmetries, gradients, errors."""

import copy
from functools import partial

import pytest
import torch

from flows import CNF, ODESolver
from flows.divergence import Analytic, Exact, divergence
from flows.fields import (
    MLP,
    ConvNet,
    EquivariantKernel,
    Hollow,
    PeriodicConv,
    Planar,
    Potential,
    UNet,
    bind,
)

FIELDS = {  # name: (how to build it, event shape), the parameters away from their special first values
    "hollow": (partial(Hollow, hidden=(12,), num_features=3), (3,)),
    "hollow_deep_tanh": (partial(Hollow, hidden=(7, 12, 5), num_features=2, activation="tanh"), (2, 4)),
    "hollow_1d": (partial(Hollow, hidden=(4,), num_features=2), (1,)),
    "potential": (partial(Potential, width=8), (3,)),
    "potential_one_layer": (partial(Potential, width=5, num_layers=1), (2, 2)),
    "potential_deep": (partial(Potential, width=6, num_layers=4), (5,)),
    "potential_wide_event": (partial(Potential, width=3, num_layers=3), (2, 4)),
    "potential_no_rank": (partial(Potential, width=4, rank=0), (2,)),
    "planar": (partial(Planar, num_units=5), (3,)),
    "planar_gates": (partial(Planar, num_units=5, hypernetwork=False, activation="silu"), (2, 2)),
    "equivariant": (partial(EquivariantKernel, num_kernels=5), (4, 3)),
    "equivariant_pair": (partial(EquivariantKernel, num_kernels=3), (2, 1)),
    "periodic_1d": (partial(PeriodicConv, num_channels=4), (2, 5)),
    "periodic_2d_tight": (partial(PeriodicConv, num_channels=3, activation="silu"), (2, 3, 3)),
    "periodic_uneven": (partial(PeriodicConv, num_channels=3, kernel_size=(1, 5), activation="sine"), (2, 5, 6)),
    "periodic_uneven_turned": (partial(PeriodicConv, num_channels=3, kernel_size=(5, 3)), (1, 5, 5)),
    "periodic_3d": (partial(PeriodicConv, num_channels=2), (1, 3, 3, 4)),
}
OPEN = {  # without a closed form
    "conv_net": (partial(ConvNet, hidden=(4, 3)), (1, 3, 4)),
    "unet": (partial(UNet, channels=4, multipliers=(1, 2), num_heads=2), (1, 2, 3)),
}


def build(name, context_shape=None, noise=0.3):
    """A field of that name, moved away from special initial values such as zero last layers."""
    make, event_shape = (FIELDS | OPEN)[name]
    field = make(event_shape, context_shape=context_shape)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return field


def jacobian(field, t, x, context=None):  # (B, d, d)
    def one(t, x, context):
        return field(t, x[None], None if context is None else context[None])[0].flatten()

    t = t.expand(len(x))
    jacobians = torch.func.vmap(torch.func.jacrev(one, argnums=1), in_dims=(0, 0, None if context is None else 0))
    return jacobians(t, x, context).flatten(2)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("context_shape", [None, (2,)])
@pytest.mark.parametrize("per_sample_time", [False, True])
def test_closed_form_is_the_dense_trace_with_its_gradients(name, context_shape, per_sample_time):
    field = build(name, context_shape)
    x = 1.5 * torch.randn(4, *field.event_shape)
    context = None if context_shape is None else torch.randn(4, *context_shape)
    t = torch.rand(4) if per_sample_time else torch.tensor(0.3)
    value, ours = bind(field, context).value_and_divergence(t, x)
    dense = jacobian(field, t, x, context).diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(value, field(t, x, context), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours, dense, rtol=0, atol=1e-10)
    assert ours.shape == (4,)
    assert ours.std() > 1e-3 or name == "hollow_1d"
    parameters = list(field.parameters())
    ours, dense = (torch.autograd.grad(d.sin().sum(), parameters, allow_unused=True) for d in (ours, dense))
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(*(torch.zeros(()) if g is None else g for g in (a, b)))


@pytest.mark.parametrize("name", [*FIELDS, *OPEN])
def test_a_gradient_reaches_every_parameter_and_the_context(name):
    field = build(name, (2,))
    x = torch.randn(5, *field.event_shape)
    context = torch.randn(5, 2, requires_grad=True)
    (field(torch.rand(5), x, context) * torch.randn_like(x)).sum().backward()
    assert context.grad.abs().min() > 0
    unused = [n for n, p in field.named_parameters() if p.numel() and (p.grad is None or not p.grad.any())]
    # in one dimension nothing is left for the conditioner to see
    assert unused == (["layers.0.weight", "direct.weight"] if name == "hollow_1d" else [])


@pytest.mark.parametrize("name", [*FIELDS, *OPEN])
def test_dtype_is_kept_and_no_grad_builds_no_graph(name):
    field = build(name).float()
    x = torch.randn(3, *field.event_shape, dtype=torch.float32)
    t = torch.tensor(0.3, dtype=torch.float32)
    with torch.no_grad():
        outputs = [field(t, x)] if name in OPEN else [field(t, x), *field.value_and_divergence(t, x)]
    assert {(o.dtype, o.requires_grad) for o in outputs} == {(torch.float32, False)}


@pytest.mark.parametrize("name", [*FIELDS, *OPEN])
def test_every_tensor_follows_the_device(name):
    field = build(name).to("meta")  # a tensor made on the CPU would not mix with these
    x = torch.randn(3, *field.event_shape, device="meta")
    t = torch.rand(3, device="meta")
    outputs = [field(t, x)] if name in OPEN else field.value_and_divergence(t, x)
    assert [o.device.type for o in outputs] == ["meta"] * len(outputs)
    assert outputs[0].shape == x.shape


@pytest.mark.parametrize("name", ["hollow", "potential", "planar", "equivariant", "periodic_1d", "conv_net"])
def test_flow_trains_by_likelihood_with_both_gradients(name):
    flow = CNF(build(name, (2,), noise=0.1), Exact(chunk_size=12) if name in OPEN else Analytic())
    points, context = 0.5 * torch.randn(3, *flow.event_shape), torch.randn(3, 2)
    gradients = []
    for gradient in ("backprop", "adjoint"):
        flow.solver = ODESolver(rtol=1e-6, atol=1e-6, gradient=gradient)
        with torch.no_grad():
            x, log_prob = flow.sample_and_log_prob((), context)
            torch.testing.assert_close(flow.log_prob(x, context), log_prob, rtol=0, atol=1e-3)
            assert (flow.base.log_prob(x) - log_prob).abs().max() > 0.1
        loss = flow.log_prob(points, context).mean()
        gradient = torch.autograd.grad(loss, list(flow.parameters()), allow_unused=True)
        gradients.append(torch.cat([g.flatten() for g in gradient if g is not None]))
    backprop, adjoint = gradients
    assert (backprop - adjoint).norm() < 1e-3 * backprop.norm()


@pytest.mark.parametrize("name", ["hollow", "hollow_deep_tanh", "hollow_1d"])
def test_a_conditioner_sees_all_coordinates_but_its_own(name):
    field = build(name)
    dimension = field.gain.shape[0]
    x = torch.randn(3, dimension)
    shaped = lambda x: field.conditioner(torch.tensor(0.3), x[None].view(1, *field.event_shape))[0]  # noqa: E731
    reach = torch.func.vmap(torch.func.jacrev(shaped))(x).abs().amax((0, 2))  # (d, d): of x_j on h_i
    assert torch.equal(reach == 0, torch.eye(dimension, dtype=torch.bool))
    assert (jacobian(field, torch.tensor(0.3), x.view(3, *field.event_shape)).abs().amax(0) > 0).all()


def test_the_masked_layers_alone_see_everything_where_they_are_wide_enough():
    field = Hollow((5,), (8, 8), num_features=2)  # 4 units a direction, one for each of the 4 places to split 5
    with torch.no_grad():
        field.direct.weight.zero_()
    reach = torch.func.jacrev(lambda x: field.conditioner(torch.tensor(0.3), x[None])[0])(torch.randn(5))
    assert torch.equal(reach.abs().amax(1) == 0, torch.eye(5, dtype=torch.bool))


@pytest.mark.parametrize("name", ["hollow", "hollow_deep_tanh"])
def test_the_slope_is_one_reverse_pass_with_the_conditioner_detached(name):
    field = build(name)
    x = torch.randn(3, *field.event_shape, requires_grad=True)
    t = torch.rand(3)
    _, ours = field.value_and_divergence(t, x)
    detached = copy.copy(field)
    detached._conditioner = lambda x, modulation: Hollow._conditioner(field, x, modulation).detach()
    (slopes,) = torch.autograd.grad(detached(t, x).sum(), x)
    torch.testing.assert_close(ours, slopes.flatten(1).sum(1))


@pytest.mark.parametrize("name", [name for name in FIELDS if name.startswith("potential")])
def test_velocity_is_minus_the_gradient_of_the_potential(name):
    field = build(name, (2,))
    x = torch.randn(3, *field.event_shape, requires_grad=True)
    t, context = torch.rand(3), torch.randn(3, 2)
    (gradient,) = torch.autograd.grad(field.potential(t, x, context).sum(), x)
    torch.testing.assert_close(field(t, x, context), -gradient)
    curl = jacobian(field, t, x.detach(), context)
    torch.testing.assert_close(curl, curl.mT)


def test_potential_holds_far_out():
    field = build("potential")
    x = torch.full((1, 3), 1e4)
    outputs = [field.potential(torch.tensor(0.5), x), *field.value_and_divergence(torch.tensor(0.5), x)]
    assert all(output.isfinite().all() for output in outputs)


def test_equivariant_kernel_has_the_symmetries_of_particles():
    field = build("equivariant")
    x, t = torch.randn(3, 4, 3), torch.rand(3)
    v, trace = field.value_and_divergence(t, x)
    assert v.abs().min() > 1e-4
    rotation, _ = torch.linalg.qr(torch.randn(3, 3))
    mirror = torch.diag(torch.tensor([1.0, 1.0, -1.0]))
    order = torch.tensor([2, 0, 3, 1])
    cases = {
        "permutation": (x[:, order], v[:, order]),
        "rotation": (x @ rotation.T, v @ rotation.T),
        "reflection": (x @ mirror, v @ mirror),
        "translation": (x + torch.randn(3, 1, 3), v),
    }
    for name, (moved, expected) in cases.items():
        value, divergence_ = field.value_and_divergence(t, moved)
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12, msg=name)
        torch.testing.assert_close(divergence_, trace, rtol=0, atol=1e-11, msg=name)
    torch.testing.assert_close(v.mean(1), torch.zeros(3, 3), rtol=0, atol=1e-13)


def test_equivariant_kernel_is_smooth_where_particles_meet():
    field = build("equivariant")
    x = torch.zeros(2, 4, 3, requires_grad=True)
    value, trace = field.value_and_divergence(torch.tensor(0.5), x)
    (gradient,) = torch.autograd.grad(value.sum() + trace.sum(), x, create_graph=True)
    assert gradient.isfinite().all()
    torch.testing.assert_close(value, torch.zeros_like(value))
    dense = jacobian(field, torch.tensor(0.5), x.detach()).diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(trace, dense)


def test_periodic_conv_commutes_with_translations_of_the_lattice():
    field = build("periodic_uneven")
    x, t = torch.randn(3, *field.event_shape), torch.tensor(0.3)
    shifted = field(t, x.roll((2, -1), (2, 3)))
    torch.testing.assert_close(shifted, field(t, x).roll((2, -1), (2, 3)))


@pytest.mark.parametrize("padding", ["zeros", "circular", "reflect", "replicate"])
def test_nothing_acts_beyond_the_receptive_radius(padding):
    fields = [
        ConvNet((1, 9, 8), (3, 3), padding_mode=padding),
        ConvNet((1, 9, 8), (3,), kernel_size=5, padding_mode=padding),
    ]
    fields += [PeriodicConv((1, 9, 8), 3, (1, 5)), PeriodicConv((1, 9, 8), 3)] if padding == "circular" else []
    for field in fields:
        with torch.no_grad():
            for parameter in field.parameters():
                parameter.add_(torch.randn_like(parameter))
        assert field.periodic == (padding == "circular")
        seen = jacobian(field, torch.tensor(0.3), torch.randn(2, 1, 9, 8)).abs().amax(0) > 0
        apart = torch.zeros(72, 72, dtype=torch.long)
        for axis, size in ((0, 9), (1, 8)):
            site = torch.cartesian_prod(torch.arange(9), torch.arange(8))[:, axis]
            distance = (site[:, None] - site[None]).abs()
            apart = apart.maximum(distance.minimum(size - distance) if field.periodic else distance)
        assert apart[seen].max() == field.receptive_radius


def test_only_fields_on_a_grid_state_a_receptive_radius():
    assert MLP((2,)).receptive_radius is None
    assert not MLP((2,)).periodic
    assert ConvNet((1, 8, 8)).receptive_radius == 4


def test_conv_net_starts_near_the_identity_and_is_gated_by_time_and_class():
    field = ConvNet((1, 6, 6), (4,), context_shape=(3,))
    x, one_hot = torch.randn(3, 1, 6, 6), torch.eye(3)
    assert field(torch.rand(3), x, one_hot).abs().max() < 0.3
    field = build("conv_net", (3,))
    x = torch.randn(1, *field.event_shape).expand(3, -1, -1, -1)
    by_class, by_time = field(torch.tensor(0.5), x, one_hot), field(torch.rand(3), x, one_hot[:1].expand(3, 3))
    for v in (by_class, by_time):
        assert torch.pdist(v.flatten(1)).min() > 1e-2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Hollow((2,), (1,)), r"hidden must hold the width \(>= 2\) of at least one hidden layer.*got \(1,\)"),
        (lambda: Hollow((2,), num_features=0), "num_features must be >= 1, got 0"),
        (lambda: Potential((2,), width=0), "width and num_layers must be >= 1 and rank >= 0, got width 0"),
        (lambda: Planar((2,), 0), "num_units must be >= 1, got 0"),
        (lambda: EquivariantKernel((6,)), r"\(particles, dimensions\) with at least two particles.*got \(6,\)"),
        (lambda: EquivariantKernel((4, 3), softening=0), "softening must be a finite number > 0, got 0"),
        (lambda: PeriodicConv((5,)), r"\(channels, \*lattice\) with a lattice of one to three.*got \(5,\)"),
        (lambda: PeriodicConv((1, 5), 0), "num_channels must be >= 1, got 0"),
        (lambda: PeriodicConv((1, 8), 4, 2), "kernel_size must be odd and positive, or a pair of such, got 2"),
        (lambda: PeriodicConv((1, 8, 2), 4), r"size 3 wraps around the lattice \(8, 2\) onto itself.*<= 2"),
        (lambda: ConvNet((8, 8)), r"event_shape must be \(channels, height, width\).*got \(8, 8\)"),
        (lambda: ConvNet((1, 8, 8), ()), r"channels of at least one hidden layer.*got \(\)"),
        (lambda: ConvNet((1, 8, 8), kernel_size=4), "kernel_size must be odd and positive, got 4"),
        (lambda: ConvNet((1, 8, 8), padding_mode="wrap"), "zeros, circular, reflect, replicate, got 'wrap'"),
        (lambda: ConvNet((1, 1, 8), padding_mode="reflect"), r"needs images larger than 1 pixels, got \(1, 8\)"),
    ],
)
def test_errors_say_what_came_and_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["hollow", "potential", "planar", "equivariant", "periodic_1d", *OPEN])
def test_an_unexpected_or_missing_context_is_an_error(name):
    for field, context, message in [
        (build(name), torch.randn(2, 3), "is unconditional and got a context"),
        (build(name, (3,)), None, r"needs a context of shape \(B, \*\(3,\)\)"),
    ]:
        with pytest.raises(ValueError, match=f"{type(field).__name__} {message}"):
            field(torch.tensor(0.5), torch.randn(2, *field.event_shape), context)


@pytest.mark.parametrize("name", OPEN)
def test_divergence_of_an_image_field_needs_no_closed_form(name):
    field = build(name)
    x, t = torch.randn(2, *field.event_shape), torch.tensor(0.4)
    dense = jacobian(field, t, x).diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(divergence(lambda x: field(t, x), x, 3), dense)
