"""Known equations with parameters to fit, and a network for what they miss."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flows import equations
from flows.arguments import checked
from flows.checks import check_number
from flows.errors import InvalidTypeError, InvalidValueError
from flows.fields.base import Field
from flows.vector_field import BoundField, bind, checked_value


@checked
@dataclass(frozen=True)
class Coefficient:
    """A parameter of known equations: where its fit starts, and its bounds.

    A bound is kept by a transform, of an unbounded number r: low + eʳ, high − eʳ, or low + (high − low) σ(r).

    Args:
        start: a number, or a list of numbers.
        low, high: bounds, which the value never reaches. `low=0` keeps it positive.
        fixed: hold it at `start`.

    Raises:
        InvalidValueError: the start is not between the bounds.

    Example:
        ```python
        import flows
        from flows.equations import pendulum

        friction = flows.fields.Coefficient(0.1, low=0.0)
        field = flows.fields.Physics(pendulum, event_shape=(2,), parameters={"stiffness": 1.0, "friction": friction})
        ```
    """

    start: float | Sequence[float]
    low: float | None = None
    high: float | None = None
    fixed: bool = False

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name))
        start = torch.as_tensor(self.start, dtype=torch.float64, device="cpu")
        low, high = -math.inf if self.low is None else self.low, math.inf if self.high is None else self.high
        if not bool(start.isfinite().all()) or not bool(((start > low) & (start < high)).all()):
            raise InvalidValueError(
                f"start must be finite, > low and < high, got {self.start!r}, {self.low}, {self.high}"
            )

    @property
    def scale(self) -> float:
        """The size of the start, in which a parameter without bounds is measured."""
        return float(torch.as_tensor(self.start, dtype=torch.float64, device="cpu").abs().max()) or 1.0

    def raw(self) -> Tensor:
        """r at the start."""
        start = torch.as_tensor(self.start, dtype=torch.float64, device="cpu")
        if self.low is not None and self.high is not None:
            return torch.logit((start - self.low) / (self.high - self.low))
        if self.low is not None:
            return (start - self.low).log()
        return start / self.scale if self.high is None else (self.high - start).log()

    def value(self, raw: Tensor) -> Tensor:
        """The parameter at r."""
        if self.low is not None and self.high is not None:
            return self.low + (self.high - self.low) * raw.sigmoid()
        if self.low is not None:
            return self.low + raw.exp()
        return raw * self.scale if self.high is None else self.high - raw.exp()


@checked
class Physics(Field):
    r"""v(t, x) = f(t, x; θ) + c(t, x): known equations f with parameters θ to fit, and a network c for what they miss.

    f is a function `f(t, x, name=start, ...)`, such as those of `flows.equations`. Its arguments after `x` are the
    parameters, and their defaults are where the fit starts; each is fitted unless `parameters` says otherwise. An
    argument `context` is given the context: static covariates, or the input of `Forced`. x is (B, *event).

    A parameter without bounds is fitted in units of its start, so that a learning rate of 0.01 means steps of about a
    percent. `values()` are the parameters at the moment; training reports them under `parameter/<name>`.

    The divergence is in closed form where f declares its own (`flows.equations.with_divergence`) and c has one.

    The equations see states in the units of the data. With a transform of the model they are converted exactly: if
    y = A x + b, then dy/dt = A f(t, A⁻¹(y − b); θ) + c(t, y). `Standardise` and `Whiten` are such; other transforms are
    refused. c sees y, of unit scale. [Rackauckas et al. 2020, arXiv:2001.04385]

    Args:
        known: f.
        event_shape: shape of a point.
        parameters: starts, as numbers, `Coefficient`s or mappings such as `{"start": 1.0, "low": 0.0}`. If given, only
            those that it names are fitted; others are held at the defaults of f. By default all are fitted.
        correction: c, a field; or what makes one from `event_shape` and `context_shape`, such as a class or
            `functools.partial` (`_partial_: true` in a yaml). Default: none.
        correction_scale: factor of c, small so that the fit begins at the known equations.
        context_shape: shape of the context, if f or c takes one.
        jumps: times at which f jumps.

    Raises:
        InvalidTypeError, InvalidValueError: f has no such parameter, or one has no start; nothing takes the context.

    Example:
        ```python
        import torch

        import flows
        from flows.equations import pendulum

        field = flows.fields.Physics(pendulum, event_shape=(2,), parameters={"stiffness": 0.8, "friction": 0.1})
        flows.NeuralODE(field).trajectory(torch.ones(1, 2), [0.0, 1.0])
        field.values()  # {"stiffness": tensor(0.8000), "friction": tensor(0.1000)}
        ```
    """

    def __init__(
        self,
        known: Callable[..., Tensor],
        event_shape: int | Sequence[int],
        parameters: Mapping[str, Any] | None = None,
        correction: Callable[..., Any] | None = None,
        correction_scale: float = 1.0,
        context_shape: int | Sequence[int] | None = None,
        jumps: Sequence[float] = (),
    ) -> None:
        super().__init__(event_shape, context_shape)
        if isinstance(known, functools.partial):  # without what the maker of a partial may have added to it
            known = functools.partial(known.func, *known.args, **known.keywords)
        self.known = known
        self.known_divergence = _divergence_of(known)
        named = _arguments_of(known)
        self.takes_context = "context" in named
        self.coefficients = _coefficients(known, named, parameters)
        self.others = {k: v for k, v in named.items() if k not in self.coefficients and k != "context"}
        for name, coefficient in self.coefficients.items():
            raw = coefficient.raw().to(torch.get_default_dtype())
            if coefficient.fixed:
                self.register_buffer(f"raw_{name}", raw)
            else:
                self.register_parameter(f"raw_{name}", nn.Parameter(raw))
        check_number("correction_scale", correction_scale)
        self.correction_scale = correction_scale
        if correction is not None and not isinstance(correction, nn.Module):
            correction = correction(event_shape=self.event_shape, context_shape=self.context_shape)
        self.correction = correction
        self.correction_takes_context = correction is not None and bind(correction).takes_context
        if self.context_shape is not None and not (self.takes_context or self.correction_takes_context):
            raise InvalidValueError(
                f"there is a context of shape {self.context_shape}, and neither {_name(known)} nor the correction "
                "takes one; give the equations an argument `context`, or the correction a context_shape"
            )
        self.jumps = tuple(float(jump) for jump in jumps)

    def values(self) -> dict[str, Tensor]:
        """The parameters by name, with their gradients."""
        return {name: one.value(getattr(self, f"raw_{name}")) for name, one in self.coefficients.items()}

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.check_context(context)
        return self.bind(context)(t, x)

    def bind(self, context: Tensor | None = None) -> BoundField:
        return _BoundPhysics(self, context)

    @property
    def takes_inputs(self) -> bool:
        return self.takes_context and not self.correction_takes_context

    @property
    def runs_foreign_code(self) -> bool:
        """Whether the equations are not of this package."""
        known = self.known.func if isinstance(self.known, functools.partial) else self.known
        return getattr(known, "__module__", None) != equations.__name__

    @property
    def divergence_cost(self) -> int:
        return 0 if self.correction is None else bind(self.correction).divergence_cost


class _BoundPhysics(BoundField):
    """Known equations at work, with their parameters as they are in one solve."""

    def __init__(self, field: Physics, context: Tensor | None, units: Any = None, learned: BoundField | None = None):
        super().__init__(field, context)
        self.physics = field
        self.units = units
        self.learned = learned
        if field.correction is not None and learned is None:
            self.learned = bind(field.correction, None, self.event_shape)
        self._values: tuple[bool, dict[str, Any]] | None = None  # with the grad mode that they were computed in
        closed = None if self.learned is None else self.learned.value_and_divergence
        if field.known_divergence is not None and (self.learned is None or closed is not None):
            self.value_and_divergence = self._value_and_divergence
        if self.learned is not None:
            self.correction = self._correction

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        return self.at(t, x, *(() if self.context is None else (self.context,)))

    def at(self, t: Tensor, x: Tensor, *context: Tensor) -> Tensor:
        if self._evaluation is None:
            return self._velocity(t, x, *context)
        return self._evaluation(self._velocity, t, x, *context)

    def in_units(self, transform: Any) -> BoundField:
        if not transform.is_affine:
            raise InvalidValueError(
                f"Physics knows its equations in the units of the data, and {type(transform).__name__} is no affine "
                "transform, through which they could be converted; use Standardise(), Whiten() or Identity()"
            )
        return _BoundPhysics(self.physics, self.context, transform, self.learned)

    def fresh(self) -> BoundField:
        renewed = _BoundPhysics(
            self.physics, self.context, self.units, None if self.learned is None else self.learned.fresh()
        )
        if self._evaluation is not None and renewed._evaluation is not None:
            renewed._evaluation.buffers = self._evaluation.buffers
        return renewed

    def _velocity(self, t: Tensor, y: Tensor, *context: Tensor) -> Tensor:
        velocity = self._known_velocity(t, self._states(y), y, *context)
        return velocity if self.learned is None else velocity + self._correction(t, y, *context)

    def _correction(self, t: Tensor, y: Tensor, *context: Tensor) -> Tensor:
        assert self.learned is not None
        return self.physics.correction_scale * self.learned.at(t, y, *self._of_correction(context))

    def _value_and_divergence(self, t: Tensor, y: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        x, given = self._states(y), context or self._own_context()
        value = self._known_velocity(t, x, y, *given)
        assert self.physics.known_divergence is not None
        known = self.physics.known_divergence(t, x, **self._arguments(), **self._of_equations(given))
        divergence = torch.as_tensor(known, dtype=y.dtype, device=y.device).expand(len(y))  # no linear map changes it
        if self.learned is None:
            return value, divergence
        closed, scale = self.learned.value_and_divergence, self.physics.correction_scale
        assert closed is not None
        learned, its_divergence = closed(t, y, *self._of_correction(given))
        return value + scale * learned, divergence + scale * its_divergence

    def _known_velocity(self, t: Tensor, x: Tensor, y: Tensor, *context: Tensor) -> Tensor:
        given = context or self._own_context()
        velocity = self.physics.known(t, x, **self._arguments(), **self._of_equations(given))
        if self.units is not None:
            velocity = self.units.push_velocity(velocity)
        return checked_value(velocity.to(y.dtype) if isinstance(velocity, Tensor) else velocity, y)

    def _states(self, y: Tensor) -> Tensor:
        return y if self.units is None else self.units.inverse(y)[0]

    def _own_context(self) -> tuple[Tensor, ...]:
        return () if self.context is None else (self.context,)

    def _of_correction(self, context: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (context or self._own_context()) if self.physics.correction_takes_context else ()

    def _of_equations(self, context: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return {"context": context[0]} if self.physics.takes_context and context else {}

    def _arguments(self) -> dict[str, Any]:
        """All parameters of the equations, computed once a solve."""
        recording = torch.is_grad_enabled()
        if self._values is None or (recording and not self._values[0]):
            self._values = recording, {**self.physics.others, **self.physics.values()}
        return self._values[1]


def _name(known: Callable[..., Any]) -> str:
    inner = known.func if isinstance(known, functools.partial) else known
    return getattr(inner, "__name__", type(inner).__name__)


def _divergence_of(known: Callable[..., Any]) -> Callable[..., Any] | None:
    """The closed form that the equations declare."""
    return getattr(known.func if isinstance(known, functools.partial) else known, "divergence", None)


def _arguments_of(known: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of f(t, x, ...) after x with their defaults; `inspect.Parameter.empty` where there is none."""
    try:
        given = list(inspect.signature(known.forward if isinstance(known, nn.Module) else known).parameters.values())
    except (TypeError, ValueError):
        given = []
    names = [p.name for p in given if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if len(names) < 2 or any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in given):
        raise InvalidTypeError(
            f"known must be a function f(t, x, name=start, ...) that names each of its parameters, got {_name(known)}"
            f"({', '.join(str(p) for p in given)})"
        )
    return {p.name: p.default for p in given if p.name in names[2:]}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _coefficients(
    known: Callable[..., Any], named: Mapping[str, Any], parameters: Mapping[str, Any] | None
) -> dict[str, Coefficient]:
    """What is fitted, from the arguments of the equations and the user's choice."""
    if parameters is None:
        parameters = {name: default for name, default in named.items() if _is_number(default)}
    unknown = [str(name) for name in parameters if name not in named or name == "context"]
    if unknown:
        raise InvalidValueError(
            f"{_name(known)} has no parameter {', '.join(unknown)}; its parameters are "
            f"{', '.join(name for name in named if name != 'context')}"
        )
    missing = [
        name
        for name, default in named.items()
        if default is inspect.Parameter.empty and name not in parameters and name != "context"
    ]
    if missing:
        raise InvalidValueError(
            f"{_name(known)} needs a start of {', '.join(missing)}: give the function a default, or "
            f"parameters={{{missing[0]!r}: 1.0}}"
        )
    return {name: _coefficient(name, value) for name, value in parameters.items()}


def _coefficient(name: str, value: Any) -> Coefficient:
    if isinstance(value, Coefficient):
        return value
    try:
        return Coefficient(**value) if isinstance(value, Mapping) else Coefficient(value)
    except (InvalidValueError, InvalidTypeError) as error:
        raise type(error)(f"parameters[{name!r}]: {error}") from error
