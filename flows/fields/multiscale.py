"""Multiscale flows of images as one field."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from flows.arguments import check_keywords, checked
from flows.checks import whole_number
from flows.errors import InvalidTypeError, InvalidValueError
from flows.expectations import show
from flows.fields.base import Field
from flows.vector_field import bind


@checked
class Multiscale(Field):
    r"""FFJORD's multiscale flow as one field, whose stages take turns in time.

    From the data to the base, one scale does this to an image (C, H, W):

    1. a flow of the image;
    2. a squeeze of 2 × 2 pixels into channels, (4C, H/2, W/2);
    3. a flow of the squeezed image;
    4. half of the channels are factored out: they rest until the base. The other half is the image of the next scale.

    The last scale is a flow alone. So n scales have S = 2n − 1 stages, each with a field f_k of its own. Stage
    k = 0, ..., S − 1 acts for t from 1 − (k + 1)/S to 1 − k/S and moves only the coordinates y that do not rest yet:

        dy/dt = S w′(τ) f_k(w(τ), y),    τ = S t − (S − 1 − k) ∈ [0, 1],    w(τ) = 6τ⁵ − 15τ⁴ + 10τ³.

    The clock w slows down at both ends of a stage, so that v and its time derivative are continuous where the next
    stage takes over. The clock changes neither the end points of a stage nor their log-density. As N(0, I) is the same
    for every order of the coordinates, the density is exactly that of the composed flows.
    [Grathwohl et al. 2019, arXiv:1810.01367; squeeze and factor-out: Dinh et al. 2017, arXiv:1605.08803; here the lower
    of each two rows is factored out, in all channels]

    All points of a batch share one time. Flow matching draws a time for each point, so it cannot train this field; use
    maximum likelihood.

    Args:
        event_shape: (C, H, W), H and W divisible by 2ⁿ⁻¹.
        field: called for each stage as `field(event_shape=..., context_shape=...)`: a class, or a `partial` of one
            with its other arguments, such as `partial(ConvNet, hidden=(32, 32))`.
        num_scales: n >= 1.
        context_shape: shape of the context, which every stage gets; `None` for an unconditional field.

    Example:
        ```python
        from functools import partial

        import flows

        conv = partial(flows.fields.ConvNet, hidden=(8,))
        flow = flows.CNF(flows.fields.Multiscale((1, 8, 8), conv, num_scales=2))
        ```
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        field: Callable[..., nn.Module],
        num_scales: int = 2,
        context_shape: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__(event_shape, context_shape)
        if len(self.event_shape) != 3:
            raise InvalidValueError(
                f"event_shape must be (channels, height, width), such as (1, 8, 8), got {self.event_shape}"
            )
        check_keywords("field", field, "event_shape", "context_shape")
        whole_number("num_scales", num_scales, at_most=max(self.event_shape[1:]))
        channels, height, width = self.event_shape
        factor = 2 ** (num_scales - 1)
        if height % factor or width % factor:
            raise InvalidValueError(
                f"num_scales = {num_scales} halves the image {num_scales - 1} times, so its sides must be divisible by "
                f"{factor}, got {height} x {width}; take fewer scales, or pad the images"
            )
        shapes = []
        for scale in range(num_scales):
            shapes.append((channels, height, width))
            channels, height, width = 4 * channels, height // 2, width // 2
            if scale < num_scales - 1:
                shapes.append((channels, height, width))
                channels = channels // 2
        stages = [field(event_shape=shape, context_shape=self.context_shape) for shape in shapes]
        if not all(isinstance(stage, nn.Module) for stage in stages):
            raise InvalidTypeError(f"field must make torch.nn.Modules, got {show(stages[0])}")
        self.stages = nn.ModuleList(stages)
        views = [bind(stage, event_shape=shape) for stage, shape in zip(self.stages, shapes, strict=True)]
        radii = [view.receptive_radius for view in views if view.receptive_radius is not None]
        if len(radii) == len(views):
            zooms = [2 ** ((stage + 1) // 2) for stage in range(len(radii))]  # pixels of x along one of the stage's
            self.receptive_radius = max(zoom * (radius + 1) - 1 for zoom, radius in zip(zooms, radii, strict=True))
        self.periodic = any(view.periodic for view in views)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.check_context(context)
        if t.numel() != 1:
            raise InvalidValueError(
                f"Multiscale moves one part of the coordinates after another, so that a batch has one time, and got "
                f"{t.numel()} times. Flow matching, which draws a time for each point, cannot train it; choose "
                "objective=maximum_likelihood"
            )
        count = len(self.stages)
        elapsed = t.reshape(()) * count
        slot = min(max(int(elapsed.detach()), 0), count - 1)
        tau = elapsed - slot
        clock = tau**3 * (6 * tau**2 - 15 * tau + 10)
        speed = 30 * count * (tau * (1 - tau)) ** 2
        stage = count - 1 - slot
        active, rests = x, []
        for squeeze in range((stage + 1) // 2):
            active = _squeeze(active)
            if squeeze < stage // 2:
                active, rest = active.chunk(2, dim=1)
                rests.append(torch.zeros_like(rest))
            else:  # an odd stage moves both halves of what it has squeezed
                rests.append(active[:, :0])
        given = () if context is None else (context,)
        velocity = speed * self.stages[stage](clock, active, *given)
        for rest in reversed(rests):
            velocity = _unsqueeze(torch.cat([velocity, rest], dim=1))
        return velocity


def _squeeze(x: Tensor) -> Tensor:  # (B, C, H, W) to (B, 4C, H/2, W/2), the upper rows first
    blocks = functional.pixel_unshuffle(x, 2).unflatten(1, (x.shape[1], 4))
    return blocks.transpose(1, 2).flatten(1, 2)


def _unsqueeze(x: Tensor) -> Tensor:
    blocks = x.unflatten(1, (4, x.shape[1] // 4)).transpose(1, 2)
    return functional.pixel_shuffle(blocks.flatten(1, 2), 2)
