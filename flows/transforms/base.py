"""The contract of a transform, and chains of transforms."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from flows.arguments import CheckedMethods, checked
from flows.checks import check_points
from flows.errors import InvalidValueError

MAX_OFFSET = 64.0  # |mean|/sd up to which float32 holds points with five digits of their sd


class Transform(CheckedMethods, nn.Module, ABC, checks=("forward", "inverse", "check", "fit")):
    """A map y = T(x) from data space to flow space.

    log p(x) = log p_flow(y) + log_det. For a bijection, log_det = log|det ∂y/∂x|.

    `Dequantise`, for discrete data, adds noise, so y is random. Its log_det is −log of the density of that noise, and
    the sum is a lower bound on log P(x) in expectation.

    Attributes:
        term: name of log_det among the terms of the log-density.
        num_levels: number L of levels if the transform makes whole numbers 0, ..., L − 1 continuous. Default: None.
        event_shape: shape of a point. Default: None, any.
        is_affine: whether y = A x + b, so that equations in data space can be converted exactly. Default: no.
        exact_buffers: names of buffers that stay in float64 when the module is moved to another dtype.

    Example:
        ```python
        import torch

        import flows


        class Logarithm(flows.transforms.Transform):
            '''y = log x, for positive data.'''

            def forward(self, x, generator=None):
                return x.log(), -x.log().flatten(1).sum(1)

            def inverse(self, y):
                return y.exp(), y.flatten(1).sum(1)


        flow = flows.CNF(flows.fields.MLP((2,)), transform=Logarithm())
        flow.log_prob(torch.rand(10, 2))
        ```
    """

    term: str = "scaling"
    num_levels: int | None = None
    event_shape: tuple[int, ...] | None = None
    is_affine: bool = False
    exact_buffers: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        """Let the methods of every transform check the points that they are given."""
        for name in ("forward", "inverse", "check", "fit"):
            if name in vars(cls):
                setattr(cls, name, _of_points(vars(cls)[name]))
        super().__init_subclass__(**options)

    def _apply(self, fn, recurse: bool = True):
        exact = {name: self._buffers[name] for name in self.exact_buffers}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = self._buffers[name]
            if before is None or after is None or after.dtype == torch.float64 or after.device.type == "mps":
                continue  # mps has no float64
            kept = after if before.is_meta else before.to(after.device)
            self._buffers[name] = kept.double()
        return self

    @property
    def is_defined_everywhere(self) -> bool:
        """Whether it takes all points but a set without volume. Default: whether the class has no `check`."""
        return type(self).check is Transform.check

    @abstractmethod
    def forward(
        self,
        x: Tensor,  # (B, *event), data space
        generator: torch.Generator | None = None,  # for noise, if there is any
    ) -> tuple[Tensor, Tensor]:  # (B, *event) and (B,)
        """Return y and log_det in nats."""

    @abstractmethod
    def inverse(
        self,
        y: Tensor,  # (B, *event), flow space
    ) -> tuple[Tensor, Tensor]:  # (B, *event) and (B,)
        """Return x and −log_det in nats."""

    def unrounded(
        self,
        y: Tensor,  # (B, *event), flow space
    ) -> Tensor:  # (B, *event)
        """Return x of `inverse`, but before whole numbers are rounded. Default: nothing is.

        Raises:
            InvalidValueError: the class dequantises and does not say what its points are before they are rounded.
        """
        if self.num_levels is not None:
            raise InvalidValueError(
                f"{type(self).__name__} makes {self.num_levels} levels continuous, and does not say what a point is "
                "before it is rounded to a level; define unrounded(y), which returns x + u and keeps the derivative"
            )
        return self.inverse(y)[0]

    def from_unrounded(
        self,
        x: Tensor,  # (B, *event), data space; whole numbers with their noise
    ) -> Tensor:  # (B, *event)
        """Return y with `unrounded(y)` = x. Default: y of `forward`, whose noise is new if the class dequantises."""
        if self.num_levels is not None:
            x = x.floor().clamp(0, self.num_levels - 1)
        return self(x)[0]

    def push_velocity(
        self,
        velocity: Tensor,  # dx/dt, (B, *event)
    ) -> Tensor:  # dy/dt, (B, *event)
        """Return A dx/dt, for an affine transform."""
        raise InvalidValueError(f"{type(self).__name__} is no affine transform, so velocities depend on x")

    def account(
        self, x: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:  # (B, *event), and (B,) for each term
        """Return y and the named terms that sum to log_det."""
        y, log_det = self(x, generator)
        return y, {self.term: log_det}

    def check(
        self,
        x: Tensor,  # (B, *event)
    ) -> None:
        """Raise `InvalidValueError` if the transform is not defined on `x`."""

    def fit(
        self,
        points: Tensor,  # (n, *event), data space
    ) -> Transform:
        """Fit the transform to training data and return it. Default: nothing to fit."""
        return self


def _of_points(method: Callable[..., Any]) -> Callable[..., Any]:
    """The same method with a check of its first argument, the points."""
    name = list(inspect.signature(method).parameters)[1]
    fits = method.__name__ == "fit"  # which says itself what it needs

    @functools.wraps(method)
    def checked_method(self: Transform, *arguments: Any, **named: Any) -> Any:
        x = arguments[0] if arguments else named[name]
        check_points(f"{name} of {type(self).__name__}", x, None if fits else self.event_shape)
        return method(self, *arguments, **named)

    return checked_method


def in_data_units(
    x: Tensor,  # (B, *event), computed in float64
    dtype: torch.dtype,  # of y
    offset: Tensor,  # |mean|/sd of the data, any shape
) -> Tensor:
    """Round x to the dtype of y, unless that would round differences between points away."""
    if torch.compiler.is_compiling():  # as for an export, which takes no decision by values
        return x
    return x if offset.max() > MAX_OFFSET else x.to(dtype)


@checked
class Identity(Transform):
    """The identity: data space is flow space.

    Example:
        ```python
        import torch

        import flows

        y, log_det = flows.transforms.Identity()(torch.randn(10, 2))  # the points, and zeros
        ```
    """

    is_affine = True

    def push_velocity(self, velocity: Tensor) -> Tensor:
        return velocity

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        return x, x.new_zeros(x.shape[0])

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y, y.new_zeros(y.shape[0])


@checked
class Compose(Transform):
    """A chain of transforms, applied in the given order.

    Args:
        transforms: named transforms; any names will do. None is skipped.

    Raises:
        InvalidValueError: there is no transform, or one that dequantises is not the first.

    Example:
        ```python
        import torch

        from flows.transforms import Compose, Dequantise, Logit, UnitInterval

        transform = Compose(dequantise=Dequantise(256), unit=UnitInterval(256), logit=Logit(0.05))
        y, log_det = transform(torch.randint(256, (5, 1, 8, 8)).float())
        ```
    """

    def __init__(self, **transforms: Transform | None) -> None:
        super().__init__()
        given = {name: part for name, part in transforms.items() if part is not None}
        if not given:
            raise InvalidValueError("Compose needs at least one transform; to change nothing, use Identity()")
        self.transforms = nn.ModuleDict(given)
        _, *later = given.items()
        late = next((name for name, part in later if part.num_levels is not None), None)
        if late is not None:
            raise InvalidValueError(f"the transform {late!r} dequantises and must come first, got {list(given)}")

    @property
    def num_levels(self) -> int | None:
        return self._parts()[0].num_levels

    @property
    def is_affine(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(part.is_affine for part in self._parts())

    def push_velocity(self, velocity: Tensor) -> Tensor:
        for transform in self._parts():
            velocity = transform.push_velocity(velocity)
        return velocity

    def _parts(self) -> list[Transform]:
        return cast("list[Transform]", list(self.transforms.values()))

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        y, terms = self.account(x, generator)
        return y, torch.stack(list(terms.values())).sum(0)

    def account(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        total: dict[str, Tensor] = {}
        for transform in self._parts():
            x, terms = transform.account(x, generator)
            for name, value in terms.items():
                total[name] = total[name] + value if name in total else value
        return x, total

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        total = y.new_zeros(y.shape[0])
        for transform in reversed(self._parts()):
            y, log_det = transform.inverse(y)
            total = total + log_det
        return y, total

    def unrounded(self, y: Tensor) -> Tensor:
        for transform in reversed(self._parts()):
            y = transform.unrounded(y)
        return y

    def from_unrounded(self, x: Tensor) -> Tensor:
        for transform in self._parts():
            x = transform.from_unrounded(x)
        return x

    @property
    def is_defined_everywhere(self) -> bool:
        return all(part.is_defined_everywhere for part in self._parts())

    def check(self, x: Tensor) -> None:
        self._parts()[0].check(x)

    def fit(self, points: Tensor) -> Compose:
        """Fit each transform to the output of those before it. Noise has a fixed seed."""
        generator = torch.Generator(points.device).manual_seed(0)
        with torch.no_grad():
            for transform in self._parts():
                transform.fit(points)
                points, _ = transform(points, generator)
        return self
