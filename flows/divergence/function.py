"""The divergence of any function, without time and without a flow."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from flows.arguments import check_takes, checked
from flows.divergence.analytic import Analytic
from flows.divergence.base import DivergenceEstimator
from flows.divergence.exact import Exact
from flows.errors import InvalidValueError
from flows.naming import by_name
from flows.promises import examine_derivatives, examine_values
from flows.promises.derivatives import NUM_POINTS
from flows.promises.regime import identity_of
from flows.promises.specimen import FEW, is_transformed
from flows.promises.untouched import awake, untouched
from flows.vector_field import BoundField


@overload
def divergence(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    event_ndim: int = 1,
    estimator: DivergenceEstimator | str | None = None,
    generator: torch.Generator | None = None,
    return_error: Literal[False] = False,
) -> Tensor: ...


@overload
def divergence(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    event_ndim: int = 1,
    estimator: DivergenceEstimator | str | None = None,
    generator: torch.Generator | None = None,
    *,
    return_error: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@checked
def divergence(
    f: Callable[[Tensor], Tensor],
    x: Tensor,  # (*batch, *event)
    event_ndim: int = 1,
    estimator: DivergenceEstimator | str | None = None,
    generator: torch.Generator | None = None,
    return_error: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # (*batch), and (*batch)
    r"""div f(x) = Σᵢ ∂fᵢ/∂xᵢ of a function that maps each point of a batch to a vector of the same shape.

    `f` is called on tensors of exactly the shape of `x` and must treat the points of a batch independently of each
    other. The result is differentiable where autograd records.

    ```python
    import torch

    from flows.divergence import Hutchinson, divergence

    x = torch.randn(5, 1, 4, 3)
    divergence(torch.sin, x)                           # (5, 1, 4): the last dimension makes a point
    divergence(torch.sin, x, event_ndim=2)             # (5, 1): point sets (4, 3)
    divergence(torch.sin, x, event_ndim=3)             # (5,): images (1, 4, 3)
    divergence(torch.sin, x, estimator=Hutchinson(num_probes=8))
    value, error = divergence(torch.sin, x, estimator=Hutchinson(num_probes=8), return_error=True)
    ```

    Args:
        f: `(*batch, *event) -> (*batch, *event)`. An object with `value_and_divergence(x)`, or with `encode(x)`,
            `decode(h)` and `bottleneck_width`, on points `(B, *event)`, suits `Analytic` and `Bottleneck`.
        x: the points.
        event_ndim: how many trailing dimensions of `x` make one point.
        estimator: an estimator or its lower-case name. Default: `Exact()`.
        generator: source of the probes of a stochastic estimator.
        return_error: return the standard error of each value as well, from the spread of the probes: 0 where the
            estimator is exact, NaN where a single estimate has no spread.

    Raises:
        ValueError: `event_ndim` does not fit `x`, or `f` returns another shape; or `f` mixes points, draws random
            numbers, or hides a part of itself from autograd. This is looked for at the first use of a function, which
            takes some thirty evaluations more.
    """
    check_takes("f", f, "x")
    if x.layout != torch.strided:
        raise InvalidValueError(f"x must be a dense tensor, got {x.layout}; write x.to_dense()")
    if not 1 <= event_ndim <= x.ndim:
        raise InvalidValueError(
            f"event_ndim must be between 1 and x.ndim = {x.ndim}, got {event_ndim}; it counts the trailing "
            "dimensions of x that make one point"
        )
    if not x.is_floating_point():
        raise InvalidValueError(f"x must be a floating point tensor, got {x.dtype}; convert it, e.g. x.float()")
    batch_shape, event_shape = x.shape[: x.ndim - event_ndim], x.shape[x.ndim - event_ndim :]
    chosen = Exact() if estimator is None else by_name(DivergenceEstimator, estimator)
    bound = chosen.bind(_TimelessField(f, x.shape, event_ndim))
    points = x.reshape(-1, *event_shape)
    _examine(bound, points, len(batch_shape) == 1)
    sample = bound(x.new_zeros(()), points, bound.draw_probes(points, generator))
    value = sample.divergence.reshape(batch_shape)
    return (value, bound.standard_error(sample.estimates).reshape(batch_shape)) if return_error else value


def _examine(estimator: DivergenceEstimator, x: Tensor, any_number: bool) -> None:
    """Look at the first use whether a function keeps the promises of a field; see `flows.promises`."""
    view = estimator.field
    f, traits = view.field, view.traits
    inner = getattr(estimator, "estimator", estimator)  # what a compiled one stands for
    second = torch.is_grad_enabled()
    question = f"{type(inner).__name__} {inner.mode} {second}"
    if question in traits.examined or x.numel() == 0 or x.is_meta or _is_of_torch(f) or is_transformed():
        return
    assert isinstance(view, _TimelessField)
    module = f if isinstance(f, nn.Module) else nn.ModuleList(p for p in identity_of(f)[1] if isinstance(p, nn.Module))
    with torch.inference_mode(False):
        x = x.detach().clone()
        few = x[:NUM_POINTS]
        if "values" not in traits.examined:
            traits.forget()
            with untouched(module, x.device), awake(module):
                alone = _TimelessField(f, view.shape, len(view.event_shape), any_number)
                examine_values(alone.without_protection, view.name, traits, x, few[:FEW], None)
            if traits.refuses_solves:
                reason, _ = traits.refuses_solves, traits.forget()
                raise InvalidValueError(reason)
            traits.examined.add("values")
        some = few if traits.takes_any_batch and any_number else x
        alone = _TimelessField(f, view.shape, len(view.event_shape), any_number)
        closed = alone.value_and_divergence if isinstance(inner, Analytic) else None
        reason = examine_derivatives(alone, closed, module, view.name, some, inner.mode == "forward", second)
        if second:
            traits.refuses_gradients[str(inner.mode)] = reason
        traits.examined.add(question)


def _is_of_torch(f: Any) -> bool:
    if isinstance(f, nn.Module):
        return False
    return isinstance(f, types.BuiltinFunctionType) or str(getattr(f, "__module__", "")).partition(".")[0] == "torch"


class _TimelessField(BoundField):
    """`f(x)` as a field of one batch dimension."""

    def __init__(
        self, f: Callable[[Tensor], Tensor], shape: torch.Size, event_ndim: int, any_number: bool = False
    ) -> None:
        super().__init__(f, event_shape=shape[len(shape) - event_ndim :])
        self.shape = shape
        self.any_number = any_number  # whether `f` may be called with another number of points
        self.value_and_divergence = _without_time(self.value_and_divergence)
        self.encode = _without_time(self.encode)
        self.decode = _without_time(self.decode)

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        assert self._evaluation is not None, "a function of x alone is no field of this package"
        return self._evaluation(self.without_protection, t, x)

    def without_protection(self, t: Tensor, x: Tensor) -> Tensor:
        """The value as the function returns it."""
        shape = x.shape if self.any_number else self.shape
        value = self.field(x.reshape(shape))
        return value.reshape(x.shape) if isinstance(value, Tensor) and value.shape == shape else value

    def _watched(self, function: Callable[..., Any] | None) -> Callable[..., Any] | None:
        return function


def _without_time(part: Callable[..., Any] | None) -> Callable[..., Any] | None:
    return None if part is None else lambda t, x: part(x)
