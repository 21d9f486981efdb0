"""Student's t, whose tails are heavier than the normal's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flows.arguments import checked
from flows.bases.base import Base
from flows.bases.normal import entries
from flows.checks import check_number, check_points
from flows.errors import InvalidValueError


@checked(own=("loc", "scale"))
class StudentT(Base):
    r"""Independent entries with Student's t distribution.

    log p(z) = Σ_i log Γ((ν+1)/2) − log Γ(ν/2) − ½ log(πν) − log s_i − (ν+1)/2 · log(1 + ((z_i − m_i)/s_i)²/ν).

    A smooth flow cannot change how heavy tails are by much: a base with the tails of the data leaves less to learn.
    [Jaini et al. 2020, arXiv:1907.04481; Alexanderson & Henter 2020, arXiv:2006.06599]

    Args:
        event_shape: shape of a point.
        df: ν > 0, the degrees of freedom. Default: 5; the variance is infinite up to 2.
        loc: m, one number for all entries or numbers of the event shape. Default: 0.
        scale: s > 0, likewise. Default: 1.
        trainable: whether likelihood training moves ν (one for each entry), m and s. Default: `False`.

    Raises:
        InvalidValueError: a number is out of range, or a shape is wrong.

    Example:
        ```python
        import flows

        flow = flows.CNF(flows.fields.MLP((2,)), base=flows.bases.StudentT((2,), df=3.0))  # heavy tails stay heavy
        ```
    """

    log_df: Tensor  # (*event)
    loc: Tensor  # (*event)
    log_scale: Tensor  # (*event)

    def __init__(
        self,
        event_shape: int | Sequence[int],
        df: float = 5.0,
        loc: float | Sequence[Any] | Tensor = 0.0,
        scale: float | Sequence[Any] | Tensor = 1.0,
        trainable: bool = False,
    ) -> None:
        super().__init__(event_shape)
        check_number("df", df, above=0)
        width = entries("scale", scale, self.event_shape)
        if not width.is_meta and not bool((width > 0).all()):
            raise InvalidValueError(f"scale must be above 0, got {scale}")
        log_df = torch.full(self.event_shape, math.log(df))
        self.hold(trainable, log_df=log_df, loc=entries("loc", loc, self.event_shape), log_scale=width.log())

    def sample(self, shape: int | Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        noise = self.standard_normal(shape, generator)
        half = (self.log_df.exp() / 2).expand(noise.shape)
        if generator is not None:
            half = half.to(generator.device)
        standard_gamma = getattr(torch, "_standard_gamma")  # noqa: B009 (torch.distributions draws with it, too)
        gamma = standard_gamma(half, generator=generator).to(noise)
        chi_square = (2 * gamma).clamp_min(torch.finfo(noise.dtype).tiny)
        return self.loc + self.log_scale.exp() * noise * torch.sqrt(self.log_df.exp() / chi_square)

    def log_prob(
        self,
        z: Tensor,  # (*batch, *event)
    ) -> Tensor:  # (*batch)
        """The log-density in nats."""
        check_points("z", z, self.event_shape, batched=False)
        df = self.log_df.exp()
        constant = torch.lgamma((df + 1) / 2) - torch.lgamma(df / 2) - 0.5 * torch.log(math.pi * df) - self.log_scale
        power = torch.log1p(((z - self.loc) * torch.exp(-self.log_scale)).square() / df)
        return (constant - (df + 1) / 2 * power).flatten(z.ndim - len(self.event_shape)).sum(-1)
