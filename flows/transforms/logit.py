"""From the unit interval to the whole line."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from flows.errors import InvalidValueError
from flows.transforms.base import Transform


class Logit(Transform):
    r"""y = logit(s) with s = α + (1 − 2α) x, for x in [0, 1].

    log|dy/dx| = log(1 − 2α) − log s − log(1 − s), summed over the entries. The shrinking towards ½ keeps y finite
    at both ends; a larger α means milder tails, but leaves probability outside [0, 1], where there is no data.
    [Dinh et al. 2017, arXiv:1605.08803; Papamakarios et al. 2017, arXiv:1705.07057]

    Args:
        alpha: α, above 0 and below ½.
    """

    term = "logit"

    def __init__(self, alpha: float = 0.05) -> None:
        super().__init__()
        if not 0 < alpha < 0.5:
            raise InvalidValueError(f"alpha must lie between 0 and 0.5, both excluded, got {alpha}")
        self.alpha = alpha

    def check(self, x: Tensor) -> None:
        outside = (x < 0) | (x > 1)
        if outside.any():
            raise InvalidValueError(
                f"the logit takes values from 0 to 1, got {x[outside][0].item():g} ({int(outside.sum())} values "
                "outside); scale the data first, with UnitInterval if they are levels"
            )

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        scale = 1 - 2 * self.alpha
        log_s, log_rest = (self.alpha + scale * x).log(), (self.alpha + scale * (1 - x)).log()
        return log_s - log_rest, (math.log(scale) - log_s - log_rest).flatten(1).sum(1)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """x, which lies outside [0, 1] where s is nearer to 0 or 1 than α."""
        scale = 1 - 2 * self.alpha
        log_det = functional.logsigmoid(y) + functional.logsigmoid(-y) - math.log(scale)
        return (y.sigmoid() - self.alpha) / scale, log_det.flatten(1).sum(1)
