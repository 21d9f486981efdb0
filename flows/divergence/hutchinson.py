"""Hutchinson's stochastic trace estimator."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flows.divergence.autodiff import Mode, check_mode, linearise
from flows.divergence.base import DivergenceEstimator, FieldSample, VectorField
from flows.divergence.probes import ProbeFamily, Rademacher
from flows.errors import InvalidValueError
from flows.naming import by_name


@dataclass(frozen=True)
class Hutchinson(DivergenceEstimator):
    r"""div v ≈ ε_kᵀ J ε_k, one unbiased estimate for each of K random probes.

    The K estimates stay apart, so that a likelihood comes with its standard error. Cost: K products. The
    variance is that of the probe family (:mod:`flows.divergence.probes`).

    Sources: Hutchinson 1990; Skilling 1989; in flows: Grathwohl et al. 2019, arXiv:1810.01367.

    Args:
        num_probes: K >= 1.
        probes: a :class:`ProbeFamily` or its lower-case name, such as ``"rademacher"`` or ``"gaussian"``.
        mode: ``"reverse"`` or ``"forward"`` Jacobian products.
        chunk_size: products in one vectorised call; ``None``: 1 in reverse, 16 in forward mode.
    """

    num_probes: int = 1
    probes: ProbeFamily | str = Rademacher()  # noqa: RUF009 (stateless)
    mode: Mode = "reverse"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.num_probes < 1:
            raise InvalidValueError(
                f"num_probes must be >= 1, got {self.num_probes}; for no sampling noise use Exact()"
            )
        check_mode(self.mode, self.chunk_size)
        object.__setattr__(self, "probes", by_name(ProbeFamily, self.probes))

    def draw_probes(self, x: Tensor, generator: torch.Generator | None = None, field: object | None = None) -> Tensor:
        return self.probes.draw(self.num_probes, x, generator)

    def __call__(self, field: VectorField, t: Tensor, x: Tensor, probes: Tensor) -> FieldSample:
        value, products = linearise(field, t, x, self.mode, self.chunk_size)
        return FieldSample(value, (products(probes) * probes).flatten(2).sum(2))

    def with_jacobian_norm(
        self, field: VectorField, t: Tensor, x: Tensor, probes: Tensor, directions: Tensor
    ) -> FieldSample:
        """‖J‖²_F as the mean of ‖Jᵀε_k‖², which costs nothing more."""
        value, products = linearise(field, t, x, self.mode, self.chunk_size)
        rows = products(probes)
        norm = rows.square().flatten(2).sum(2).mean(0)
        return FieldSample(value, (rows * probes).flatten(2).sum(2), norm)

    @property
    def num_estimates(self) -> int:
        return self.num_probes

    def cost(self, event_shape: tuple[int, ...], field: object | None = None) -> int:
        return self.num_probes

    def with_budget(self, num_products: int, event_shape: tuple[int, ...], field: object | None = None) -> Hutchinson:
        return replace(self, num_probes=max(1, min(num_products, math.prod(event_shape))))

    def is_exact(self, event_shape: tuple[int, ...], field: object | None = None) -> bool:
        return self.probes.spread_factor(self.num_probes, math.prod(event_shape)) == 0

    def standard_error(self, estimates: Tensor, event_shape: tuple[int, ...], field: object | None = None) -> Tensor:
        factor = self.probes.spread_factor(self.num_probes, math.prod(event_shape))
        return super().standard_error(estimates, event_shape, field) * factor

    def variance(
        self,
        jacobian: Tensor,  # (..., d, d)
        event_shape: tuple[int, ...],
        field: object | None = None,
    ) -> Tensor:  # (...)
        """The variance of the mean over the probes."""
        return self.probes.variance(jacobian, self.num_probes)
