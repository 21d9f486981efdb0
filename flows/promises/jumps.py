"""Where a field jumps: in time, and along lines between points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flows.promises.specimen import is_velocity
from flows.promises.untouched import awake, untouched

NUM_NODES = 33  # of each line
STEEP = 4.0  # times the typical change between two nodes makes one look closer
MAX_LOOKS = 8  # places that are looked at closer
HALVINGS = {torch.float64: 44, torch.float32: 12}  # of the distance between two nodes
LEFT = 0.2  # of the change between two nodes, after the halvings; that of a continuous function has vanished
LEAST = 1e-3  # of the largest velocity, for a jump that matters
LEAST_IN_SPACE = 0.02  # the same along lines between points; layers in half precision jump by less
LEAST_OF_PARAMETERS = 0.3  # the same of the derivative by a parameter, which jumps a little at every kink
NEAR = 1e-5  # of the time, around a jump
MAX_NUMBERS = 20_000  # entries of the points on all lines
Values = Callable[[Tensor, Tensor], Tensor]  # lines (n,), places from 0 to 1 (n,) -> (n, m)


def find_jumps(
    values: Values,
    num_lines: int,
    dtype: torch.dtype,
    device: torch.device,
    least: Tensor | float = LEAST,  # of the largest value, for a jump that matters; (m,)
) -> list[tuple[int, float, float]]:
    """Find where functions on [0, 1] jump: the line, the place, and the size of each jump, the places rising.

    A change between two nodes that is much larger than the typical one is followed by halving the distance. A jump
    stays, while the change of a continuous function shrinks with the distance.
    """
    places = torch.linspace(0, 1, NUM_NODES, dtype=dtype, device=device)
    lines = torch.arange(num_lines, device=device)
    nodes = values(lines.repeat_interleave(NUM_NODES), places.repeat(num_lines))
    nodes = nodes.reshape(num_lines, NUM_NODES, -1)
    if not bool(nodes.isfinite().all()):
        return []
    change = nodes.diff(dim=1).abs()
    scale = least * nodes.abs().amax((0, 1)) + 1e-30
    unusual, component = (change / (STEEP * change.median(1, keepdim=True).values + scale)).max(-1)
    found = (unusual > 1).nonzero()
    if not len(found):
        return []
    found = found[unusual[found[:, 0], found[:, 1]].argsort(descending=True)[:MAX_LOOKS]]
    line, node = found.T
    which = component[line, node][:, None]

    def at(place: Tensor) -> Tensor:
        return values(line, place).gather(1, which)[:, 0]

    low, high = places[node], places[node + 1]
    below, above = at(low), at(high)
    first = (above - below).abs()
    for _ in range(HALVINGS.get(dtype, 6)):
        middle = (low + high) / 2
        value = at(middle)
        left = (value - below).abs() >= (above - value).abs()
        high, above = torch.where(left, middle, high), torch.where(left, value, above)
        low, below = torch.where(left, low, middle), torch.where(left, below, value)
    size = (above - below).abs()
    stays = (size > LEFT * first) & (size > scale[which[:, 0]])
    kept = zip(line[stays].tolist(), high[stays].tolist(), size[stays].tolist(), strict=True)
    return sorted(kept, key=lambda jump: jump[1])


def jumps_in_time(
    evaluate: Callable[[Tensor, Tensor], Any],  # v(t, x)
    field: Any,
    x: Tensor,  # (n, *event)
    parameters: Sequence[Tensor],  # for which gradients are computed
    span: tuple[float, float],
) -> tuple[float, ...]:
    """The times at which the field jumps for all points: its value, or its derivative by a parameter.

    A field that takes other weights in another part of the time jumps in that derivative even while the weights are
    equal. Costs one evaluation with a backward pass at each of 33 times, and more near a jump.
    """
    used = [tensor for tensor in parameters if tensor.requires_grad]
    start, end = span

    def at(place: Tensor | float, points: Tensor) -> Tensor:
        t = torch.as_tensor(start + (end - start) * place).to(x)
        with torch.enable_grad():
            value = evaluate(t, points.clone().requires_grad_().clone())
            assert is_velocity(value, points)
            gradients: Sequence[Tensor | None] = [None] * len(used)
            if value.requires_grad and used:
                total = (value * _weights(value)).sum()
                gradients = torch.autograd.grad(total, used, retain_graph=True, allow_unused=True)
        parts = [x.new_zeros(()) if g is None else (g * _weights(g)).sum().to(x) for g in gradients]
        return torch.cat([value.detach().flatten(), *(part[None] for part in parts)])

    half = (len(x) + 1) // 2
    some, others = x[:half], x[-half:]
    least = torch.full((some.numel() + len(used),), LEAST, dtype=x.dtype, device=x.device)
    least[some.numel() :] = LEAST_OF_PARAMETERS

    def is_jump(place: float) -> bool:
        """Whether the other points jump there too, which they do not at a kink."""
        around = torch.stack([at(min(max(place + shift, 0.0), 1.0), others) for shift in (-0.2, -NEAR, NEAR, 0.2)])
        return bool(((around[2] - around[1]).abs() > least * around.abs().amax(0) + 1e-30).any())

    with untouched(field, x.device), awake(field):
        found = find_jumps(
            lambda _, places: torch.stack([at(place, some) for place in places]), 1, torch.float64, x.device, least
        )
        return tuple(start + (end - start) * place for _, place, _ in found if is_jump(place))


def _weights(like: Tensor) -> Tensor:
    """Fixed weights of either sign, so that what two parts of a tensor contribute is told apart."""
    return torch.arange(1, like.numel() + 1, dtype=like.dtype, device=like.device).mul_(1.7).cos_().view_as(like)


def jump_in_space(
    evaluate: Callable[[Tensor, Tensor], Any],  # v(t, x) at any number of points
    field: Any,
    x: Tensor,  # (n, *event)
) -> tuple[Tensor, float] | None:
    """A point (*event) where the velocity jumps, and by how much; None if there is none on the lines between points."""
    others = x.roll(1, 0)
    num_lines = min(len(x), MAX_NUMBERS // max(1, NUM_NODES * x[0].numel()))
    if num_lines < 1:
        return None
    t = x.new_full((), 0.43)

    def values(lines: Tensor, places: Tensor) -> Tensor:
        share = places.view(-1, *[1] * (x.ndim - 1))
        points = (1 - share) * x[lines] + share * others[lines]
        with torch.enable_grad():
            value = evaluate(t, points.requires_grad_().clone())
        assert is_velocity(value, points)
        return value.detach().flatten(1)

    with untouched(field, x.device), awake(field):
        found = find_jumps(values, num_lines, x.dtype, x.device, LEAST_IN_SPACE)
    if not found:
        return None
    line, place, size = max(found, key=lambda jump: jump[2])
    return (1 - place) * x[line] + place * others[line], size


def in_words(times: Sequence[float]) -> str:
    """Times as a phrase."""
    *others, last = (f"{t:.4g}" for t in times)
    return f"{', '.join(others)} and {last}" if others else last
