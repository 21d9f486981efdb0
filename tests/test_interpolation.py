"""Interpolation by way of the base: arcs of great circles, whose ends are the points themselves."""

import pytest
import torch

import flows
from flows.fields import Linear


def turning():
    """A rotation of three dimensions, which moves latents and keeps their angles."""
    turn = torch.tensor([[0.0, -1.0, 0.3], [1.0, 0.0, 0.2], [-0.3, -0.2, 0.0]], dtype=torch.float64)
    return flows.CNF(Linear((3,), turn), solver=flows.ODESolver(rtol=1e-10, atol=1e-10)).double()


def test_equal_radii_give_an_arc_in_equal_steps():
    generator = torch.Generator().manual_seed(0)
    start, end = (torch.randn(6, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    start, end = (2 * x / x.norm(dim=1, keepdim=True) for x in (start, end))
    path = flows.interpolate(turning(), start, end, num_points=5)
    assert path.shape == (5, 6, 3)
    torch.testing.assert_close(path[0], start)
    torch.testing.assert_close(path[-1], end)
    torch.testing.assert_close(path.norm(dim=2), torch.full((5, 6), 2.0, dtype=torch.float64))
    whole = ((start * end).sum(1) / 4).arccos()
    steps = ((path[1:] * path[:-1]).sum(2) / 4).arccos()
    torch.testing.assert_close(steps, (whole / 4).expand(4, 6))


def test_each_path_has_its_own_context():
    """v = c: the context of a path moves all of it, so that ends under it are the points themselves."""

    class Shift(torch.nn.Module):
        event_shape, context_shape = (2,), (2,)

        def forward(self, t, x, context):
            return context + 0 * x

    flow = flows.CNF(Shift(), solver="rk4").double()
    start, end, context = torch.randn(3, 4, 2, dtype=torch.float64)
    path = flows.interpolate(flow, start, end, 3, context)
    torch.testing.assert_close(path[0], start)
    torch.testing.assert_close(path[-1], end)
    single = flows.interpolate(flow, start[2:3], end[2:3], 3, context[2:3])
    torch.testing.assert_close(path[:, 2:3], single)
    for wrong in (context[0], context[:1]):
        with pytest.raises(ValueError, match=r"context must have a row for each of 4 paths, got one of shape \("):
            flows.interpolate(flow, start, end, 3, wrong)


def test_a_latent_in_the_middle_of_the_base_is_an_end_like_others():
    start, end = torch.zeros(2, 3).double(), torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]).double()
    path = flows.interpolate(turning(), start, end, num_points=3)
    torch.testing.assert_close(path[0], start)
    torch.testing.assert_close(path[-1], end)
    assert 0 < path[1, 0].norm() < end[0].norm()


def test_ends_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"as many points of shape \(3,\), got \(2, 3\) and \(1, 3\)"):
        flows.interpolate(turning(), torch.zeros(2, 3).double(), torch.zeros(1, 3).double())
    with pytest.raises(ValueError, match="num_points must be"):
        flows.interpolate(turning(), torch.zeros(2, 3).double(), torch.zeros(2, 3).double(), num_points=1)
