"""The contract of a divergence estimator."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from flows.arguments import CheckedMethods
from flows.errors import InvalidTypeError, InvalidValueError
from flows.vector_field import BoundField


@dataclass(frozen=True)
class FieldSample:
    """A vector field at one time, with estimates of its divergence there.

    One evaluation of the field serves both.

    Example:
        ```python
        import torch

        import flows
        from flows.divergence import Exact, bind

        x, estimator = torch.randn(10, 2), Exact().bind(bind(flows.fields.MLP((2,))))
        sample = estimator(torch.tensor(0.5), x, estimator.draw_probes(x))
        sample.divergence  # (10,)
        ```
    """

    value: Tensor  # (B, *event), v(t, x)
    estimates: Tensor  # (K, B), exchangeable estimates of +div v; K = 1 if the estimator is deterministic
    squared_jacobian_norm: Tensor | None = None  # (B,), ‖J‖²_F or an unbiased estimate of it, where it was asked for

    @property
    def divergence(self) -> Tensor:  # (B,)
        """The mean of the K estimates."""
        return self.estimates.mean(0)


class DivergenceEstimator(CheckedMethods, ABC, checks=("draw_probes", "with_budget")):
    """Estimates div v(x) = tr ∂v/∂x beside the value of a vector field v.

    An estimator is a frozen set of options. `bind(field)` puts it to work on one field for one solve: the bound
    estimator is the same class with the same options, and has `self.field`, the `BoundField`. All other methods are
    those of a bound estimator.

    What is random, the *probes*, is drawn once a solve by `draw_probes` and passed to every evaluation, so that the
    right-hand side of the ODE is a fixed, smooth function.

    Tensors have exactly one batch dimension, `x: (B, *event)` with any event shape. Callers flatten theirs, as
    `flows.divergence.divergence` and `flows.CNF` do.

    To add one: subclass it, define `__call__` (and `draw_probes` if it is stochastic), and add a yaml with its
    `_target_` to `conf/divergence`. Override whatever else does not fit.

    Example:
        ```python
        from dataclasses import dataclass

        import torch

        from flows.divergence import DivergenceEstimator, FieldSample, Gaussian, divergence, linearise


        @dataclass(frozen=True)
        class OneProbe(DivergenceEstimator):
            '''div v ≈ εᵀ J ε with ε ~ N(0, I).'''

            def draw_probes(self, x, generator=None):  # once a solve: (1, B, *event)
                return Gaussian().draw(1, x, generator)

            def __call__(self, t, x, probes):
                value, products = linearise(self.field, t, x)
                return FieldSample(value, (products(probes) * probes).flatten(2).sum(2))


        divergence(torch.tanh, torch.randn(10, 3), estimator=OneProbe())
        ```
    """

    num_probes: int = 1  # K; each costs one product and gives one estimate, unless a class says otherwise
    mode: Literal["reverse", "forward"] | None = None  # of the Jacobian products; None: it takes none
    _field: BoundField | None = None

    def bind(self, field: BoundField) -> DivergenceEstimator:
        """The estimator at work on `field`; an estimator that stands for others returns the one it chooses."""
        if not isinstance(field, BoundField):
            raise InvalidTypeError(
                f"{type(self).__name__} binds a flows.divergence.BoundField, got {type(field).__name__}; write "
                ".bind(flows.fields.bind(field)) for a field, or .bind(flow.bind()) for a flow"
            )
        bound = copy.copy(self)
        object.__setattr__(bound, "_field", field)  # options are frozen
        return bound

    @property
    def field(self) -> BoundField:
        """The field that it is bound to."""
        if self._field is None:
            name = type(self).__name__
            raise InvalidValueError(
                f"{name} is not bound to a field; use {name}(...).bind(flows.fields.bind(field)), or a flow, which does"
            )
        return self._field

    def fresh(self) -> DivergenceEstimator:
        """The same binding without the tensors that the bound field keeps from earlier evaluations."""
        return self.bind(self.field.fresh())

    def draw_probes(
        self,
        x: Tensor,  # (B, *event); gives shape, dtype and device
        generator: torch.Generator | None = None,
    ) -> Tensor | None:
        """Draw the randomness of one solve; `None`, the default, for a deterministic estimator."""
        return None

    @abstractmethod
    def __call__(
        self,
        t: Tensor,  # 0-d or (B,)
        x: Tensor,  # (B, *event)
        probes: Tensor | None = None,
    ) -> FieldSample:
        """Evaluate the field at `(t, x)` together with the estimates of its divergence.

        Differentiable with respect to `x` and the parameters where autograd records, without a second-order graph
        where it does not.
        """

    def with_jacobian_norm(
        self,
        t: Tensor,
        x: Tensor,  # (B, *event)
        probes: Tensor | None,
        directions: Tensor,  # (P, B, *event), u_p with Σ_p E[u_p u_pᵀ] = I
    ) -> FieldSample:
        """Evaluate as in a call, with ‖J‖²_F beside, for regularisers.

        This one takes Σ_p ‖Jᵀu_p‖², exact if the directions are a basis. It costs one more evaluation of the field and
        P products. Estimators whose own products give the norm override it and ignore the directions.
        """
        from flows.divergence.autodiff import linearise  # which builds on this module

        _, products = linearise(self.field, t, x)
        norm = products(directions).square().flatten(2).sum((0, 2))
        return replace(self(t, x, probes), squared_jacobian_norm=norm)

    @property
    def num_estimates(self) -> int:
        """K: how many estimates a call returns."""
        return self.num_probes

    @property
    def cost(self) -> int:
        """What a call costs beyond one field evaluation, in products of a vector with the Jacobian."""
        return self.num_probes

    @property
    def is_exact(self) -> bool:
        """Whether the estimates carry no sampling error."""
        return False

    @property
    def description(self) -> str:
        """Its name for tables and pictures."""
        return type(self).__name__

    def standard_error(
        self,
        estimates: Tensor,  # (K, B); of the divergence, or of its integral over a solve
    ) -> Tensor:  # (B,)
        """The standard error of the mean of the K estimates: 0 if exact, NaN with a single one."""
        if self.is_exact:
            return estimates.new_zeros(estimates.shape[1])
        if len(estimates) < 2:
            return torch.full_like(estimates[0], torch.nan)
        return estimates.std(0) / len(estimates) ** 0.5

    def with_budget(self, num_products: int, field: BoundField) -> DivergenceEstimator:
        """The options that make the best use of `num_products` Jacobian products on `field`.

        Where no setting is so cheap, the cheapest; never more products than exactness takes. An estimator whose cost
        does not depend on its options returns itself, as this one does.
        """
        return self
