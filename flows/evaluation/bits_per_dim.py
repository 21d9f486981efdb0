"""Bits per dimension with every term that goes into them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BitsPerDim:
    r"""−log₂ P(x)/d for discrete data of d dimensions, as the sum of its parts.

    log P(x) ≥ log p_flow(y) + log|det ∂y/∂x| − log q(u | x) has one term for each step from levels to flow space; each
    part is a term times −1/(d log 2). ``model`` is the density of the flow, ``logit`` and ``scaling`` are
    log-determinants, ``dequantisation`` is that of the noise, and ``importance_weighting`` what several draws of the
    noise gain over one, so that it is never positive. Levels count from 0 in steps of 1: a uniform guess costs
    log₂ L bits.

    Args:
        parts: in bits per dimension, by name.
        standard_error: of their sum; NaN where it is unknown.
    """

    parts: Mapping[str, float]
    standard_error: float = math.nan

    @property
    def value(self) -> float:
        """The sum of the parts."""
        return math.fsum(self.parts.values())

    @classmethod
    def from_log_prob(
        cls,
        terms: Mapping[str, float],  # nats; they add up to log P(x)
        event_shape: Sequence[int],
        standard_error: float = math.nan,  # nats
    ) -> BitsPerDim:
        """Change units and sign."""
        unit = math.prod(event_shape) * math.log(2)
        return cls({name: 0.0 - value / unit for name, value in terms.items()}, standard_error / unit)

    def __str__(self) -> str:
        error = "" if math.isnan(self.standard_error) else f" ± {self.standard_error:.4f}"
        parts = " ".join(f"{value:+.4f} {name.replace('_', ' ')}" for name, value in self.parts.items())
        return f"{self.value:.4f}{error} = {parts}"
