"""Points between two others, by way of the base."""

from __future__ import annotations

import torch
from torch import Tensor

from flows.arguments import checked
from flows.checks import whole_number
from flows.conditions import Named
from flows.errors import InvalidValueError
from flows.models.cnf import CNF
from flows.models.inputs import context_ndim, contexts_of


@checked(own=("context",))
@torch.no_grad()
def interpolate(
    flow: CNF,
    start: Tensor,  # (B, *event), data space
    end: Tensor,  # (B, *event), data space
    num_points: int = 9,
    context: Tensor | Named | None = None,  # (B, *context), the same at both ends
    generator: torch.Generator | None = None,  # of dequantisation noise
) -> Tensor:  # (num_points, B, *event), data space
    """Interpolate between points along a great circle of their latents.

    With the latents z and w of both ends, at the angle a, and s from 0 to 1, the points between are those of

        (sin((1 − s) a) z + sin(s a) w) / sin a.

    Straight lines between latents of many dimensions pass through the middle of a normal base, where no data come
    from; a great circle stays where its ends are. The first and the last points are the ends themselves.

    Raises:
        InvalidValueError: the ends differ in shape, `num_points` is below 2, or there is not a context for each path.

    Example:
        ```python
        import torch

        import flows

        flow = flows.CNF(flows.fields.MLP((2,), hidden=(8,)))
        path = flows.interpolate(flow, torch.zeros(3, 2), torch.ones(3, 2), num_points=5)  # (5, 3, 2)
        ```
    """
    whole_number("num_points", num_points, 2)
    if start.shape != end.shape or tuple(start.shape[1:]) != flow.event_shape or not len(start):
        raise InvalidValueError(
            f"start and end must be as many points of shape {flow.event_shape}, got {tuple(start.shape)} and "
            f"{tuple(end.shape)}"
        )
    rows = len(start)
    context = contexts_of(flow, context)
    if context is not None and (context.ndim == context_ndim(flow, context) or len(context) != rows):
        raise InvalidValueError(
            f"context must have a row for each of {rows} paths, got one of shape {tuple(context.shape)}; for the same "
            f"one in all, write context.expand({rows}, ...)"
        )
    twice = None if context is None else context.repeat(2, *[1] * (context.ndim - 1))
    points = flow.to_flow_space(torch.cat([start, end]), twice, generator)
    z, w = flow.transport(points, (1.0, 0.0), twice, log_density=False).x.flatten(1).split(rows)
    lengths = z.norm(dim=1) * w.norm(dim=1)
    cosine = (z * w).sum(1) / lengths.clamp(min=torch.finfo(z.dtype).tiny)  # a latent of zero has no direction
    angle = cosine.clamp(-1 + 1e-6, 1 - 1e-6).arccos().unsqueeze(1)
    shares = torch.linspace(0, 1, num_points).to(z).view(-1, 1, 1)
    latent = (((1 - shares) * angle).sin() * z + (shares * angle).sin() * w) / angle.sin()
    latent = latent.reshape(-1, *flow.event_shape)
    each = None if context is None else context.repeat(num_points, *[1] * (context.ndim - 1))
    decoded = flow.to_data_space(flow.transport(latent, (0.0, 1.0), each, log_density=False).x, each)
    return decoded.unflatten(0, (num_points, rows))
