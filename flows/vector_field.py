"""A vector field as one solve sees it: v(t, x), and what else the field can do."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from flows.arguments import checked
from flows.checks import as_shape
from flows.errors import InvalidTypeError, InvalidValueError
from flows.promises.evaluation import Evaluation
from flows.promises.traits import Traits, traits_of

VectorField = Callable[[Tensor, Tensor], Tensor]  # (t, x) -> v, with v shaped like x

if TYPE_CHECKING:
    from functools import cached_property as at_first_use
else:

    class at_first_use:
        """`functools.cached_property` without its lock, at which torch's compiler would end a graph."""

        def __init__(self, function):
            self.function, self.name, self.__doc__ = function, function.__name__, function.__doc__

        def __get__(self, instance, owner=None):
            if instance is None:  # asked of the class, as documentation does
                return self
            value = self.function(instance)
            setattr(instance, self.name, value)  # which is found first from now on
            return value


class BoundField:
    """A field with its context fixed, for one solve.

    Calling it evaluates the field. Any callable is a field as it is: a network of another package, a function. What it
    offers beyond its value is looked up once, here, and is `None` where the field lacks it:

    - `velocity(t, x) -> (B, *event)`: the same value for many evaluations; by default the field itself.
    - `value_and_divergence(t, x) -> (value (B, *event), divergence (B,))`: the divergence in closed form.
    - `value_divergence_and_products(t, x, directions (P, B, *event))`: products with the Jacobian as well.
    - `encode(t, x) -> (B, H)`, `decode(t, h) -> (B, *event)` and `bottleneck_width`, H: the two halves of a field
      that passes through a narrow layer.
    - `potential(t, x) -> (B,)`: Φ of a field v = −∇Φ.
    - `receptive_radius`: how many grid sites away, along any axis, a velocity can depend on x.
    - `correction(t, x) -> (B, *event)`: what a network adds to known equations, of a view such as that of `Physics`.
    - `jumps`: the times at which the field jumps, (J,) for all samples or (B, J), onto which solves step.

    Whether it takes a context is the business of

    - `context_shape`: shape of one context, `None` for an unconditional field. A field that does not state it takes a
      context if its `forward` has a third argument, of any shape (`takes_context`).

    A field offers these under the same names; its functions take the context as one more argument at the end. It may
    also have

    - `periodic` (or `padding_mode == "circular"`): its grid wraps around.
    - `divergence_cost`: the Jacobian products that its closed form costs as much as; 0 by default.
    - `precompute()`: what its closed forms need of the parameters alone. It is computed at most once a solve; the
      closed forms take a function that returns it, as `precomputed=`.

    Args:
        field: called as `field(t, x)`, or `field(t, x, context)` if there is a context.
        context: (B, *context).
        event_shape: shape of one point, for a field that does not state its own.
        traits: what is known of the field; looked up by default.

    Raises:
        ValueError: the event shape is missing.

    Example:
        ```python
        import torch

        import flows
        from flows.divergence import Exact, bind

        field = bind(flows.fields.MLP((2,), context_shape=(1,)), context=torch.ones(10, 1))
        x = torch.randn(10, 2)
        estimator = Exact().bind(field)
        sample = estimator(torch.tensor(0.5), x, estimator.draw_probes(x))
        sample.value, sample.estimates  # (10, 2) and (1, 10)
        ```
    """

    def __init__(
        self,
        field: Callable[..., Tensor],
        context: Tensor | None = None,
        event_shape: int | Sequence[int] | None = None,
        traits: Traits | None = None,
    ) -> None:
        self.field = field
        self.context = context
        self.name: str = getattr(field, "__name__", type(field).__name__)
        stated = getattr(field, "event_shape", None)
        shape = event_shape if stated is None else stated
        if shape is None:
            raise InvalidValueError(f"{self.name} does not state its event_shape; pass event_shape=(2,) or the like")
        self.event_shape = as_shape("event_shape", shape)
        self.traits = traits_of(field) if traits is None else traits
        self._evaluation = None if self.traits.built_in else Evaluation(field, self.name, self.traits)
        self.context_shape: tuple[int, ...] | None = getattr(field, "context_shape", None)
        self.correction: Callable[..., Tensor] | None = None

    # What many evaluations never ask for is looked up at its first use.
    @at_first_use
    def receptive_radius(self) -> int | None:
        """How many grid sites away a velocity can depend on x."""
        return getattr(self.field, "receptive_radius", None)

    @at_first_use
    def bottleneck_width(self) -> int | None:
        """The width of a narrow layer that the field passes through."""
        return getattr(self.field, "bottleneck_width", None)

    @at_first_use
    def _velocity(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        return self._closed_form("velocity") if self.traits.built_in else None

    @at_first_use
    def value_and_divergence(self) -> Callable[..., Any] | None:
        """v(t, x) and its divergence in closed form."""
        return self._closed_form("value_and_divergence")

    @at_first_use
    def value_divergence_and_products(self) -> Callable[..., Any] | None:
        """The same with products of directions with the Jacobian."""
        return self._closed_form("value_divergence_and_products")

    @at_first_use
    def encode(self) -> Callable[..., Any] | None:
        """The half of a field before its narrow layer."""
        return self._given_context(self._watched(getattr(self.field, "encode", None)))

    @at_first_use
    def decode(self) -> Callable[..., Any] | None:
        """The half after it."""
        return self._given_context(self._watched(getattr(self.field, "decode", None)))

    @at_first_use
    def potential(self) -> Callable[..., Any] | None:
        """Φ of a field v = −∇Φ."""
        return self._given_context(self._watched(getattr(self.field, "potential", None)))

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        if self._evaluation is not None:
            return self._evaluation(self.field, t, x, *(() if self.context is None else (self.context,)))
        return self.field(t, x) if self.context is None else self.field(t, x, self.context)

    def velocity(self, t: Tensor, x: Tensor) -> Tensor:
        """v(t, x), from what is computed once a solve where the field can."""
        return self(t, x) if self._velocity is None else self._velocity(t, x)

    def at(self, t: Tensor, x: Tensor, *context: Tensor) -> Tensor:
        """The velocity with a context of this evaluation's own, of a field that was bound to none."""
        return self.field(t, x, *context) if self._evaluation is None else self._evaluation(self.field, t, x, *context)

    @property
    def jumps(self) -> Tensor | Sequence[float]:  # (J,) or (B, J)
        """The times at which the field jumps: those that it states, and those that an examination found."""
        return *getattr(self.field, "jumps", ()), *self.found_jumps

    @property
    def found_jumps(self) -> tuple[float, ...]:
        """Times at which an examination found that the field jumps."""
        return tuple(time for times in self.traits.jumps.values() for time in times)

    def check_times(self, first: Tensor | float | None, last: Tensor | float | None) -> None:
        """Raise `InvalidValueError` if the field is not known at all times of a solve.

        Args:
            first, last: the ends of the solve, for all samples or (B,).
        """
        del first, last

    def in_units(
        self,
        transform: Any,  # from data space to the space of the field
    ) -> BoundField:
        """The view for states behind a transform. A network takes any numbers; equations have units."""
        del transform
        return self

    @property
    def strangers(self) -> list[BoundField]:
        """The views that evaluate fields which are not of this package; see `flows.promises`."""
        return [] if self._evaluation is None else [self]

    @property
    def takes_context(self) -> bool:
        """Whether the field may be given a context."""
        if self.context_shape is not None:
            return True
        if hasattr(self.field, "context_shape"):  # it states None
            return False
        try:
            given = inspect.signature(
                self.field.forward if isinstance(self.field, nn.Module) else self.field
            ).parameters
        except (TypeError, ValueError):  # written in C
            return False
        by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        many = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in given.values())
        return many or sum(parameter.kind in by_place for parameter in given.values()) > 2

    def suits_contexts(self, shape: Sequence[int]) -> bool:
        """Whether contexts of this shape are those that the field was built for."""
        return self.context_shape is None or self.context_shape == tuple(shape)

    @property
    def dimension(self) -> int:
        """The number of entries of one point."""
        return math.prod(self.event_shape)

    @property
    def periodic(self) -> bool:
        """Whether the grid wraps around."""
        return bool(getattr(self.field, "periodic", False)) or getattr(self.field, "padding_mode", "") == "circular"

    @property
    def divergence_cost(self) -> int:
        """The Jacobian products that the closed form costs as much as."""
        return getattr(self.field, "divergence_cost", 0)

    def given(self, context: Tensor | None) -> BoundField:
        """The same field with another context."""
        return bind(self.field, context, self.event_shape)

    def fresh(self) -> BoundField:
        """The same binding without the tensors that it keeps, whose graph may be gone."""
        if type(self) is BoundField and getattr(self.field, "bind", None) is None:
            renewed = BoundField(self.field, self.context, self.event_shape, self.traits)
        else:
            renewed = bind(self.field, self.context, self.event_shape)
        if self._evaluation is not None and renewed._evaluation is not None:
            renewed._evaluation.buffers = self._evaluation.buffers
        return renewed

    def _closed_form(self, name: str) -> Callable[..., Any] | None:
        function = getattr(self.field, name, None)
        if function is not None and hasattr(self.field, "precompute"):
            function = partial(function, precomputed=self._precomputed())
        return self._given_context(self._watched(function))

    def _watched(self, function: Callable[..., Any] | None) -> Callable[..., Any] | None:
        """`function` of a stranger's field under the protection of its evaluations."""
        return function if function is None or self._evaluation is None else partial(self._evaluation, function)

    def _precomputed(self) -> _Once:
        if "_once" not in self.__dict__:
            self._once = _Once(self.field.precompute)  # pyright: ignore[reportFunctionMemberAccess]
        return self._once

    def _given_context(self, function: Callable[..., Any] | None) -> Callable[..., Any] | None:
        """`function` with the context as its last argument."""
        if function is None or self.context is None:
            return function
        context = self.context  # a closure of self would keep it alive in a cycle
        return lambda *arguments: function(*arguments, context)


class _Once:
    """Computes a value at the first call and returns it at every call."""

    def __init__(self, compute: Callable[[], Any]) -> None:
        self.compute = compute
        self.value = None

    def __call__(self) -> Any:
        if self.value is None:
            self.value = self.compute()
        return self.value


@checked
def bind(
    field: Callable[..., Tensor], context: Tensor | None = None, event_shape: int | Sequence[int] | None = None
) -> BoundField:
    """Fix the context of any field for one solve; see `BoundField`.

    A field with a `bind(context)` of its own makes its own view.

    Raises:
        ValueError: the event shape is missing, or not the one that the field states.

    Example:
        ```python
        import torch

        import flows
        from flows.divergence import Exact, bind

        field = bind(flows.fields.MLP((2,), context_shape=(1,)), context=torch.ones(10, 1))
        x = torch.randn(10, 2)
        estimator = Exact().bind(field)
        sample = estimator(torch.tensor(0.5), x, estimator.draw_probes(x))
        sample.value, sample.estimates  # (10, 2) and (1, 10)
        ```
    """
    return view_of(field, context, event_shape)


def view_of(
    field: Callable[..., Tensor], context: Tensor | None = None, event_shape: int | Sequence[int] | None = None
) -> BoundField:
    """The same as `bind`, for arguments that are known to be right."""
    own = getattr(field, "bind", None)
    view = BoundField(field, context, event_shape) if own is None else own(context)
    if event_shape is not None and view.event_shape != as_shape("event_shape", event_shape):
        given = as_shape("event_shape", event_shape)
        raise InvalidValueError(f"the field's event_shape is {view.event_shape}, and {given} was given")
    return view


def checked_value(
    value: Tensor,  # what the field returned
    x: Tensor,  # (B, *event)
) -> Tensor:
    """Return `value` if it is a velocity for `x`.

    Raises:
        TypeError: it is no tensor.
        ValueError: it has another shape.
    """
    if not isinstance(value, Tensor):
        raise InvalidTypeError(
            f"a vector field must return a tensor, got {type(value).__name__}; let forward return the velocity alone"
        )
    if value.shape != x.shape:
        raise InvalidValueError(
            f"a vector field must return one velocity a point, of shape {tuple(x.shape)}, got {tuple(value.shape)}"
        )
    if not value.is_floating_point():
        raise InvalidTypeError(f"a vector field must return real floating-point velocities, got {value.dtype}")
    if value.device != x.device:
        raise InvalidValueError(
            f"a vector field must return velocities where its points are, on {x.device}, and got some on {value.device}"
        )
    return value
