"""U-Net and multiscale fields: what they reach, what they cost, and that a chain of flows is one flow."""

import math
from functools import partial

import pytest
import torch
from problems import at_work

from flows import CNF, ODESolver
from flows.datasets import Batch
from flows.divergence import Exact, Hutchinson, Probing
from flows.fields import ConvNet, Multiscale, UNet
from flows.fields.unet import _Attention
from flows.objectives import FlowMatching

T = torch.tensor(0.3)


def moved(field, noise=0.2):
    """The field away from its zero last layers."""
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return field


def small_multiscale(event_shape=(1, 4, 4), num_scales=2, noise=0.1, **options):
    return moved(Multiscale(event_shape, partial(ConvNet, hidden=(4,)), num_scales, **options), noise)


# U-Net


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 5)])
def test_unet_starts_at_the_identity(shape):
    field = UNet(shape, 8, context_shape=(10,))
    x = torch.randn(4, *shape)
    assert field(torch.rand(4), x, torch.eye(10)[:4]).eq(0).all()
    flow, seed = CNF(UNet(shape, 8)), torch.Generator().manual_seed
    torch.testing.assert_close(flow.sample((2,), generator=seed(0)), flow.base.sample((2,), seed(0)))


def test_unet_knows_time_class_and_no_class():
    field = moved(UNet((1, 6, 6), 4, (1, 2), num_heads=2, context_shape=(3,)))
    x = torch.randn(1, 1, 6, 6).expand(4, -1, -1, -1)
    contexts = torch.cat([torch.eye(3), torch.zeros(1, 3)])
    for velocities in (field(T, x, contexts), field(torch.rand(4), x, contexts[:1].expand(4, 3))):
        assert torch.pdist(velocities.flatten(1)).min() > 1e-2


@pytest.mark.parametrize(("multipliers", "num_blocks"), [((1,), 1), ((1, 1), 1), ((1, 2), 2)])
def test_without_attention_a_unet_reaches_as_far_as_it_says(multipliers, num_blocks):
    field = moved(UNet((1, 80, 2), 2, multipliers, num_blocks, ()))
    x = torch.randn(1, 1, 80, 2, requires_grad=True)
    value, reach = field(T, x), 0
    for row in (38, 39, 40, 41):
        (gradient,) = torch.autograd.grad(value[0, 0, row].sum(), x, retain_graph=True)
        seen = gradient[0, 0].abs().amax(1).nonzero().flatten()
        reach = max(reach, row - seen[0].item(), seen[-1].item() - row)
    assert reach == field.receptive_radius
    estimator = Probing(field.receptive_radius + 1)
    assert at_work(estimator, field).is_exact
    assert not at_work(Probing(field.receptive_radius), field).is_exact


def test_with_attention_every_pixel_sees_all():
    field = moved(UNet((1, 9, 9), 4, (1,), attention_levels=(0,), num_heads=1))
    assert field.receptive_radius is None
    jacobian = torch.func.jacrev(lambda x: field(T, x[None])[0].flatten())(torch.randn(1, 9, 9))
    assert jacobian.flatten(1).abs().min() > 0
    assert UNet((1, 9, 9), 4, attention_levels=()).receptive_radius is not None


def test_attention_is_that_of_torch():
    layer = moved(_Attention(6, 3))
    h = torch.randn(2, 6, 4, 5)
    normed = h / (h.square().mean(1, keepdim=True) + 1e-3).sqrt()
    queries, keys, values = layer.into(normed).flatten(2).mT.chunk(3, dim=2)
    heads = [part.unflatten(2, (3, 2)).transpose(1, 2) for part in (queries, keys, values)]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(h), layer.out(expected.mT.reshape(2, 6, 4, 5)))


@pytest.mark.parametrize("field", [UNet((1, 6, 6), 8), ConvNet((1, 6, 6), (8,))])
def test_autocast_computes_in_half_precision_and_returns_that_of_x(field):
    field, x = moved(field).float(), torch.randn(3, 1, 6, 6, dtype=torch.float32)
    exact = field(T.float(), x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = field(T.float(), x)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.1 * exact.abs().max()


def gradients_and_bytes(field, estimator):
    """Gradients of a likelihood step, and the bytes that autograd keeps after one evaluation."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(3, *field.event_shape, generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        field(T, x.requires_grad_())
    parameters = sum(p.untyped_storage().nbytes() for p in field.parameters())
    flow = CNF(field, estimator, ODESolver("rk4", step_size=0.5))
    loss = flow.log_prob(x, generator=torch.Generator().manual_seed(1)).mean()
    return torch.autograd.grad(loss, list(field.parameters())), sum(kept.values()) - parameters


def test_recomputing_saves_memory_and_changes_no_gradient():
    field = moved(UNet((1, 8, 8), 8, (1, 2), num_blocks=2, num_heads=2))
    plain, plain_bytes = gradients_and_bytes(field, Hutchinson(2))
    field.recompute = True
    again, fewer_bytes = gradients_and_bytes(field, Hutchinson(2))
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)
    assert fewer_bytes < 0.35 * plain_bytes
    with pytest.raises(ValueError, match=r"recompute=True goes with reverse-mode .* choose mode='reverse'"):
        gradients_and_bytes(field, Hutchinson(2, mode="forward"))


def test_forward_and_reverse_mode_agree_on_a_unet():
    field = moved(UNet((1, 5, 5), 4, (1, 2), num_heads=2))
    x = torch.randn(2, 1, 5, 5)
    with torch.no_grad():
        forward, reverse = [at_work(Exact(mode), field)(T, x) for mode in ("forward", "reverse")]
    torch.testing.assert_close(forward.divergence, reverse.divergence)
    assert forward.divergence.abs().min() > 1e-3


# Multiscale


def by_hand(field, flow_of, x):
    """log p by a chain of flows, squeezes and halves; (C, H, W) with H and W even, two scales."""
    first, second, third = [flow_of(stage) for stage in field.stages]
    y, change = x, 0
    for flow, squeeze, split in ((first, True, False), (second, False, True), (third, False, False)):
        moved_on = flow.transport(y, (1.0, 0.0))
        y, change = moved_on.x, change + moved_on.log_density_change
        if squeeze:  # each block's upper left, upper right, lower left, lower right pixel, all channels
            y = torch.cat([y[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)
        if split:
            y, factored_out = y.chunk(2, 1)
    z = torch.cat([y.flatten(1), factored_out.flatten(1)], 1)
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(1) - change


@pytest.mark.parametrize("event_shape", [(1, 4, 4), (3, 2, 4)])
def test_log_density_is_that_of_the_composition(event_shape):
    field = small_multiscale(event_shape, noise=0.05)
    assert [stage.event_shape for stage in field.stages] == [
        (event_shape[0], event_shape[1], event_shape[2]),
        (4 * event_shape[0], event_shape[1] // 2, event_shape[2] // 2),
        (2 * event_shape[0], event_shape[1] // 2, event_shape[2] // 2),
    ]
    solver = ODESolver(rtol=1e-6, atol=1e-6)
    x = torch.randn(2, *event_shape)
    with torch.no_grad():
        expected = by_hand(field, lambda stage: CNF(stage, Exact(), solver), x)
        torch.testing.assert_close(CNF(field, Exact(), solver).log_prob(x), expected, rtol=0, atol=5e-4)
        assert (CNF(field).base.log_prob(x) - expected).abs().min() > 0.01


FLOWS = {
    "conv_net": lambda: moved(ConvNet((1, 4, 4), (4,))),
    "unet": lambda: moved(UNet((1, 4, 4), 4, (1, 1), num_heads=2), 0.05),
    "multiscale": lambda: small_multiscale(num_scales=3, noise=0.05),
}


@pytest.mark.parametrize("name", FLOWS)
def test_log_density_is_that_of_the_dense_jacobian(name):
    """log p(x) = log N(z; 0, I) + log |det dz/dx| for the map x -> z of a 4 x 4 image."""
    flow = CNF(FLOWS[name](), solver=ODESolver(rtol=1e-6, atol=1e-6))
    x = torch.randn(1, 4, 4)
    encode = lambda x: flow.transport(x[None], (1.0, 0.0), log_density=False).x.flatten()  # noqa: E731
    jacobian = torch.autograd.functional.jacobian(encode, x, vectorize=True).flatten(1)
    with torch.no_grad():
        expected = flow.base.log_prob(encode(x).view(1, 4, 4)) + torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(flow.log_prob(x), expected, rtol=0, atol=5e-4)


def test_what_is_factored_out_rests():
    """In the last slice towards the base only the upper pixel rows move, in all channels."""
    field = small_multiscale((3, 4, 4))
    velocity = field(torch.tensor(0.2), torch.randn(2, 3, 4, 4))
    rests = velocity.eq(0).all(0)
    assert rests[:, 1::2].all()
    assert not rests[:, ::2].any()
    assert not field(torch.tensor(0.5), torch.randn(2, 3, 4, 4)).eq(0).any()


def test_velocity_and_its_slope_are_continuous_where_stages_meet():
    field, x = small_multiscale(), torch.randn(2, 1, 4, 4)
    for boundary in (1 / 3, 2 / 3):
        near = [field(torch.tensor(boundary + sign * 1e-4), x).abs().max() for sign in (-1, 1)]
        assert max(near) < 1e-4
    assert field(torch.tensor(0.5), x).abs().max() > 0.1


def test_multiscale_reaches_as_far_as_it_says():
    field = small_multiscale((1, 24, 2))
    assert field.receptive_radius == 2 * (2 + 1) - 1
    for t in (0.17, 0.5, 0.83):
        x = torch.randn(1, 24, 2)
        jacobian = torch.func.jacrev(lambda x, t=t: field(torch.tensor(t), x[None])[0])(x).abs()
        seen = jacobian.sum((0, 2, 3, 5)).nonzero()
        assert (seen[:, 0] - seen[:, 1]).abs().max() <= field.receptive_radius
    attended = Multiscale((1, 8, 8), partial(UNet, channels=4, multipliers=(1,)))
    assert attended.receptive_radius is None
    assert small_multiscale((1, 8, 8)).periodic is False


def test_multiscale_trains_by_likelihood_with_classes():
    field = small_multiscale(context_shape=(3,))
    x, classes = torch.randn(3, 1, 4, 4), torch.eye(3)
    flow = CNF(field, Exact(), ODESolver("rk4", step_size=1 / 15))
    log_prob = flow.log_prob(x, classes)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(log_prob.mean(), list(field.parameters())))
    with torch.no_grad():
        assert (flow.log_prob(x, classes.roll(1, 0)) - log_prob).abs().min() > 1e-3
        drawn, of_drawn = flow.sample_and_log_prob((), classes)
        torch.testing.assert_close(flow.log_prob(drawn, classes), of_drawn, rtol=0, atol=0.02)


def test_flow_matching_refuses_a_multiscale_flow():
    flow = CNF(small_multiscale())
    message = "got 5 times. Flow matching, which draws a time for each point, cannot train it; choose objective=maximum"
    with pytest.raises(ValueError, match=message):
        FlowMatching()(flow, Batch(torch.randn(5, 1, 4, 4)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UNet((8, 8)), r"event_shape must be \(channels, height, width\).*got \(8, 8\)"),
        (lambda: UNet((1, 8, 8), 0), r"channels and num_blocks must be >= 1 .* got 0, 1 and \[1, 2, 2\]"),
        (lambda: UNet((1, 8, 3)), r"3 levels halve the image 2 times, which \(8, 3\) .* at most 2 multipliers"),
        (lambda: UNet((1, 8, 8), attention_levels=(3,)), r"between -3 and 2, the levels of 3 multipliers, got \[3\]"),
        (lambda: UNet((1, 8, 8), 7), r"num_heads must divide the channels of the attention levels, \[14\], got 4"),
        (lambda: small_multiscale((8, 8)), r"event_shape must be \(channels, height, width\).*got \(8, 8\)"),
        (lambda: small_multiscale((1, 6, 6), 3), "sides must be divisible by 4, got 6 x 6; take fewer scales"),
        (lambda: small_multiscale(num_scales=0), "num_scales must be a whole number >= 1 and <= 4, got 0"),
    ],
)
def test_errors_say_what_came_and_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()
