"""The logit: from the unit interval to the whole line."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from flows.arguments import checked
from flows.checks import check_number
from flows.errors import InvalidValueError
from flows.transforms.base import Transform


@checked
class Logit(Transform):
    """The logit y = logit(s) with s = α + (1 − 2α) x.

    x lies in [0, 1]. log|dy/dx| = log(1 − 2α) − log s − log(1 − s), summed over the entries. Shrinking x towards ½
    keeps y finite at both ends. A larger α gives lighter tails, but the flow then has more mass outside [0, 1],
    where there are no data. [Dinh et al. 2017, arXiv:1605.08803; Papamakarios et al. 2017, arXiv:1705.07057]

    Args:
        alpha: α, between 0 and ½.

    Raises:
        InvalidTypeError, InvalidValueError: `alpha` is no number in that range.

    Example:
        ```python
        import torch

        import flows

        logit = flows.transforms.Logit(alpha=0.05)
        y, log_det = logit(torch.rand(10, 2))  # (10, 2), (10,)
        x, _ = logit.inverse(y)
        ```
    """

    term = "logit"

    def __init__(self, alpha: float = 0.05) -> None:
        super().__init__()
        check_number("alpha", alpha, above=0, below=0.5)
        self.alpha = alpha

    def check(self, x: Tensor) -> None:
        outside = (x < 0) | (x > 1)
        if outside.any():
            raise InvalidValueError(
                f"the logit takes values from 0 to 1, got {x[outside][0].item():g} ({int(outside.sum())} values "
                "outside); scale the data first, levels with UnitInterval"
            )

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        scale = 1 - 2 * self.alpha
        log_s, log_rest = (self.alpha + scale * x).log(), (self.alpha + scale * (1 - x)).log()
        return log_s - log_rest, (math.log(scale) - log_s - log_rest).flatten(1).sum(1)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and −log_det. x lies outside [0, 1] if s is closer than α to 0 or 1."""
        scale = 1 - 2 * self.alpha
        log_det = functional.logsigmoid(y) + functional.logsigmoid(-y) - math.log(scale)
        return (y.sigmoid() - self.alpha) / scale, log_det.flatten(1).sum(1)
