"""The contract of a divergence estimator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flows.errors import InvalidTypeError, InvalidValueError

VectorField = Callable[[Tensor, Tensor], Tensor]  # (t, x) -> v, with v shaped like x


@dataclass(frozen=True)
class FieldSample:
    """A vector field at one point in time, with the estimates of its divergence there.

    One evaluation of the field serves both.
    """

    value: Tensor  # (B, *event), v(t, x)
    estimates: Tensor  # (K, B), exchangeable estimates of +div v; K = 1 when the estimator is deterministic
    squared_jacobian_norm: Tensor | None = None  # (B,), ‖J‖²_F or an unbiased estimate of it, where it was asked for

    @property
    def divergence(self) -> Tensor:  # (B,)
        """The mean of the K estimates."""
        return self.estimates.mean(0)


class DivergenceEstimator(ABC):
    """Estimates div v(x) = tr ∂v/∂x beside the value of a vector field v.

    An estimator is a frozen set of options. What is random about it, its *probes*, is drawn once a solve by
    :meth:`draw_probes` and handed to every evaluation, so that the right-hand side of the ODE is a fixed,
    smooth function.

    All tensors have exactly one batch dimension, ``x: (B, *event)`` with any event shape; callers flatten
    theirs (:func:`flows.divergence.divergence` and :class:`flows.CNF` do).

    To add one: subclass it, and add a yaml with its ``_target_`` to ``conf/divergence``.
    """

    @abstractmethod
    def draw_probes(
        self,
        x: Tensor,  # (B, *event); gives shape, dtype and device
        generator: torch.Generator | None = None,
        field: object | None = None,  # the field of the solve, where the shape of the probes depends on it
    ) -> Tensor | None:
        """Draw the randomness of one solve; ``None`` for a deterministic estimator."""

    @abstractmethod
    def __call__(
        self,
        field: VectorField,
        t: Tensor,  # 0-d or (B,)
        x: Tensor,  # (B, *event)
        probes: Tensor | None,
    ) -> FieldSample:
        """Evaluate ``field`` at ``(t, x)`` together with the estimates of its divergence.

        Differentiable with respect to ``x`` and the parameters where autograd records, without a
        second-order graph where it does not.
        """

    def with_jacobian_norm(
        self,
        field: VectorField,
        t: Tensor,
        x: Tensor,  # (B, *event)
        probes: Tensor | None,
        directions: Tensor,  # (P, B, *event), u_p with Σ_p E[u_p u_pᵀ] = I
    ) -> FieldSample:
        """Evaluate as in a call, with ‖J‖²_F beside, for regularisers.

        This one takes Σ_p ‖Jᵀu_p‖², exact if the directions are a basis, at one more evaluation of the field and P
        products. Estimators whose own products tell the norm override it, and need no directions.
        """
        from flows.divergence.autodiff import linearise  # which builds on this module

        _, products = linearise(field, t, x)
        norm = products(directions).square().flatten(2).sum((0, 2))
        return replace(self(field, t, x, probes), squared_jacobian_norm=norm)

    @property
    def num_estimates(self) -> int:
        """K: how many estimates a call returns."""
        return 1

    @abstractmethod
    def cost(self, event_shape: tuple[int, ...], field: object | None = None) -> int:
        """The cost of a call beyond one field evaluation, in products of a vector with the Jacobian.

        Like everywhere below, ``field`` is only looked at by estimators that use its structure.
        """

    def choose(self, event_shape: tuple[int, ...], field: object | None = None) -> DivergenceEstimator:
        """The estimator that does the work for this field: itself, unless it stands for others."""
        return self

    def with_budget(
        self, num_products: int, event_shape: tuple[int, ...], field: object | None = None
    ) -> DivergenceEstimator:
        """The same kind of estimator at the best setting that costs at most ``num_products`` products.

        Where none is so cheap, the cheapest; never a dearer one than it takes to be exact. An estimator whose cost
        is not a matter of choice returns itself, as this one does.
        """
        return self

    def is_exact(self, event_shape: tuple[int, ...], field: object | None = None) -> bool:
        """Whether the estimates of ``field`` on this event shape carry no sampling error."""
        return False

    def description(self, event_shape: tuple[int, ...], field: object | None = None) -> str:
        """What a reader is told of the estimator at work on this field."""
        return type(self).__name__

    def standard_error(
        self,
        estimates: Tensor,  # (K, B); of the divergence, or of its integral over a solve
        event_shape: tuple[int, ...],
        field: object | None = None,
    ) -> Tensor:  # (B,)
        """The standard error of the mean of the K estimates: 0 if exact, NaN where K = 1 leaves it unknown."""
        if self.is_exact(event_shape, field):
            return estimates.new_zeros(estimates.shape[1])
        if len(estimates) < 2:
            return torch.full_like(estimates[0], torch.nan)
        return estimates.std(0) / len(estimates) ** 0.5


def checked_value(
    value: Tensor,  # what the field returned
    x: Tensor,  # (B, *event)
) -> Tensor:
    """Return ``value`` if it is a velocity for ``x``; raise ``ValueError`` on another shape."""
    if not isinstance(value, Tensor):
        raise InvalidTypeError(f"a vector field must return a tensor, got {type(value).__name__}")
    if value.shape != x.shape:
        raise InvalidValueError(
            f"a vector field must return one velocity a point, of shape {tuple(x.shape)}, got {tuple(value.shape)}"
        )
    return value


def declared(field: object | None, name: str) -> object | None:
    """What the user's field states about itself under ``name``; ``None`` if nothing."""
    return getattr(unwrapped(field), name, None)


def unwrapped(field: object | None) -> object | None:
    """The user's own field within what this package wraps around it for a solve.

    Such a wrapper says so by ``is_wrapper = True`` and holds the field as ``.field``. What any other object holds
    says nothing about the object: a function of a local field need not be local.
    """
    while getattr(field, "is_wrapper", False):
        field = field.field
    return field


def field_name(field: object) -> str:
    """The name by which the user knows a field, wrapped or not."""
    field = unwrapped(field)
    return getattr(field, "__name__", type(field).__name__)
