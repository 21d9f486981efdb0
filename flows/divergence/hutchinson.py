"""Hutchinson's stochastic trace estimator."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flows.arguments import checked
from flows.divergence.autodiff import Mode, check_mode, linearise
from flows.divergence.base import DivergenceEstimator, FieldSample
from flows.divergence.probes import ProbeFamily
from flows.errors import InvalidValueError
from flows.naming import by_name
from flows.vector_field import BoundField


@checked
@dataclass(frozen=True)
class Hutchinson(DivergenceEstimator):
    r"""div v ≈ ε_kᵀ J ε_k, one unbiased estimate for each of K random probes.

    The K estimates stay apart, so that a likelihood comes with its standard error. Cost: K products. The variance is
    that of the probe family (`flows.divergence.probes`).

    Sources: Hutchinson 1990; Skilling 1989; in flows: Grathwohl et al. 2019, arXiv:1810.01367.

    Args:
        num_probes: K >= 1.
        probes: a `ProbeFamily` or its lower-case name, such as `"rademacher"` or `"gaussian"`.
        mode: `"reverse"` or `"forward"` Jacobian products.
        chunk_size: products in one vectorised call; `None`: 1 in reverse, 16 in forward mode.

    Example:
        ```python
        import torch

        import flows
        from flows.divergence import Hutchinson, divergence

        noisy = divergence(torch.tanh, torch.randn(10, 50), estimator=Hutchinson(num_probes=8))  # equal in expectation
        flow = flows.CNF(flows.fields.MLP((50,)), divergence=Hutchinson(num_probes=2))
        ```
    """

    num_probes: int = 1
    probes: ProbeFamily | str = "rademacher"
    mode: Mode = "reverse"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.num_probes < 1:
            raise InvalidValueError(
                f"num_probes must be >= 1, got {self.num_probes}; for no sampling noise use Exact()"
            )
        check_mode(self.mode, self.chunk_size)
        object.__setattr__(self, "probes", by_name(ProbeFamily, self.probes, "probes"))

    def draw_probes(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.family.draw(self.num_probes, x, generator)

    def __call__(self, t: Tensor, x: Tensor, probes: Tensor) -> FieldSample:
        value, products = linearise(self.field, t, x, self.mode, self.chunk_size)
        return FieldSample(value, (products(probes) * probes).flatten(2).sum(2))

    def with_jacobian_norm(self, t: Tensor, x: Tensor, probes: Tensor, directions: Tensor) -> FieldSample:
        """‖J‖²_F as the mean of ‖Jᵀε_k‖², for free."""
        value, products = linearise(self.field, t, x, self.mode, self.chunk_size)
        rows = products(probes)
        norm = rows.square().flatten(2).sum(2).mean(0)
        return FieldSample(value, (rows * probes).flatten(2).sum(2), norm)

    def with_budget(self, num_products: int, field: BoundField) -> Hutchinson:
        return replace(self, num_probes=max(1, min(num_products, field.dimension)))

    @property
    def is_exact(self) -> bool:
        return self._spread_factor == 0

    def standard_error(self, estimates: Tensor) -> Tensor:
        return super().standard_error(estimates) * self._spread_factor

    def variance(
        self,
        jacobian: Tensor,  # (..., d, d)
    ) -> Tensor:  # (...)
        """The variance of the mean over the probes."""
        return self.family.variance(jacobian, self.num_probes)

    @property
    def family(self) -> ProbeFamily:
        """The probe family, as an object."""
        return by_name(ProbeFamily, self.probes)

    @property
    def _spread_factor(self) -> float:
        return self.family.spread_factor(self.num_probes, self.field.dimension)
