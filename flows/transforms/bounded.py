"""From a box, a half line or the whole line to the whole line, entry by entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from flows.arguments import checked
from flows.checks import as_shape
from flows.errors import InvalidTypeError, InvalidValueError
from flows.transforms.base import Transform

Bounds = tuple[Tensor, Tensor]  # (*event) each, ±inf where there is none


@checked(own=("bounds",))
class Unbounded(Transform):
    """Each entry from its support to the whole line.

    y = logit((x − low)/(high − low)) between two bounds, y = log(x − low) above one, y = −log(high − x) below one, and
    y = x without bounds. The flow then has no mass outside, and points on a bound have no image. log|dy/dx| is exact:
    for a box log(high − low) − log(x − low) − log(high − x), summed over the entries.

    The bounds are buffers, so checkpoints hold them. Computed in float64 where the point is.

    Args:
        event_shape: shape of a point.
        bounds: low and high, each a number or one for each entry; infinite where there is none. Runs get those of the
            data. Default: none.

    Raises:
        InvalidTypeError, InvalidValueError: the bounds are no such pair, or low is not below high.

    Example:
        ```python
        import torch

        import flows

        transform = flows.transforms.Unbounded(2, bounds=([0.0, -1.0], [float("inf"), 1.0]))
        y, log_det = transform(torch.tensor([[2.0, 0.5]]))
        ```
    """

    term = "bounds"
    exact_buffers: ClassVar[tuple[str, ...]] = ("low", "high")
    low: Tensor
    high: Tensor

    def __init__(
        self,
        event_shape: int | Sequence[int],
        bounds: tuple[float | Sequence[float] | Tensor, float | Sequence[float] | Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.event_shape = as_shape("event_shape", event_shape)
        low, high = bounds_of(self.event_shape, (-torch.inf, torch.inf) if bounds is None else bounds)
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    @property
    def is_defined_everywhere(self) -> bool:
        return not bool((self.low.isfinite() | self.high.isfinite()).any())

    def check(self, x: Tensor) -> None:
        outside = (x <= self.low) | (x >= self.high)
        if outside.any():
            row, *entry = outside.nonzero()[0].tolist()
            place = tuple(entry)
            raise InvalidValueError(
                f"{int(outside.flatten(1).any(1).sum())} of {len(x)} points lie outside the support or on its edge: "
                f"entry {place} of point {row} is {x[outside][0].item():g}, and its bounds are "
                f"{self.low[place].item():g} and {self.high[place].item():g}"
            )

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        exact = x.to(self.low.dtype)
        above, below, both = self._kinds()
        log_low = torch.where(above, exact - torch.where(above, self.low, 0), 1.0).log()
        log_high = torch.where(below, torch.where(below, self.high, 0) - exact, 1.0).log()
        y = torch.where(above | below, log_low - log_high, exact)
        width = torch.where(both, self.high - self.low, 1.0).log()
        return y.to(x.dtype), (width - log_low - log_high).flatten(1).sum(1).to(x.dtype)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        exact = y.to(self.low.dtype)
        above, below, both = self._kinds()
        low, high = torch.where(above, self.low, 0), torch.where(below, self.high, 0)
        width = torch.where(both, high - low, 1.0)
        x = torch.where(above & ~below, low + exact.exp(), exact)
        x = torch.where(below & ~above, high - (-exact).exp(), x)
        x = torch.where(both, low + width * exact.sigmoid(), x)
        log_det = torch.where(above & ~below, exact, 0) - torch.where(below & ~above, exact, 0)
        inside = width.log() + functional.logsigmoid(exact) + functional.logsigmoid(-exact)
        log_det = torch.where(both, inside, log_det)
        x = x.to(y.dtype)
        edges = (
            torch.nextafter(bound.to(x), x.new_tensor(sign)) for bound, sign in ((self.low, 1e30), (self.high, -1e30))
        )
        lowest, highest = edges  # rounding may reach a bound, which has no image
        return x.clamp(torch.where(above, lowest, -torch.inf), torch.where(below, highest, torch.inf)), (
            log_det.flatten(1).sum(1).to(y.dtype)
        )

    def _kinds(self) -> tuple[Tensor, Tensor, Tensor]:
        above, below = self.low.isfinite(), self.high.isfinite()
        return above, below, above & below


def bounds_of(event_shape: Sequence[int], bounds: object) -> Bounds:
    """Return low and high as tensors (*event) in float64.

    Raises:
        InvalidTypeError, InvalidValueError: they are no such pair.
    """
    expected = f"bounds must be a pair, low and high, each a number or an array of shape {tuple(event_shape)}"
    if not isinstance(bounds, Sequence) or isinstance(bounds, str) or len(bounds) != 2:
        raise InvalidTypeError(f"{expected}, got {bounds!r}")
    try:
        low, high = (torch.as_tensor(b, dtype=torch.float64).expand(*event_shape).clone() for b in bounds)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidValueError(f"{expected}, got {bounds!r}") from error
    if not low.is_meta and not bool((low < high).all()):
        place = tuple((~(low < high)).nonzero()[0].tolist())
        raise InvalidValueError(
            f"{expected}, and low must be below high: at entry {place} they are {low[place]:g} and {high[place]:g}"
        )
    return low, high
