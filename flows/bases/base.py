"""The contract of a base: the distribution of a flow at t = 0."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from flows.arguments import CheckedMethods, checked
from flows.checks import as_shape
from flows.errors import InvalidTypeError, InvalidValueError


class NoDensityError(InvalidTypeError):
    """A density is needed, and the base has none."""


@checked
class Base(CheckedMethods, nn.Module, ABC, checks=("sample", "log_prob", "fit", "companions")):
    """A distribution over points of one event shape, in flow space.

    It follows `.to(device, dtype)` like any module, and draws on its device and in its dtype. To add one: subclass it,
    implement `sample` and, if there is a density, `log_prob`; add a yaml with its `_target_` to `conf/base`.

    Class attributes tell objectives what they may do with it:

    Attributes:
        is_closed_form: whether `log_prob` is a formula, so that millions of values are affordable. Default: `True`.
        has_rsample: whether gradients of draws reach trained parameters. Default: `True`.
        context_shape: shape of the contexts that it depends on, see `ConditionalNormal`. Default: `None`, on none.

    Args:
        event_shape: shape of a point.

    Example:
        ```python
        import torch

        import flows

        class Laplace(flows.bases.Base):
            def sample(self, shape, generator=None):
                u = torch.rand((*shape, *self.event_shape), generator=generator, dtype=self.dtype) - 0.5
                return -u.sign() * torch.log1p(-2 * u.abs())

            def log_prob(self, z):
                return (-z.abs() - torch.log(torch.tensor(2.0))).flatten(-len(self.event_shape)).sum(-1)

        flow = flows.CNF(flows.fields.MLP((2,)), base=Laplace((2,)))
        ```
    """

    is_closed_form: ClassVar[bool] = True
    has_rsample: ClassVar[bool] = True
    context_shape: tuple[int, ...] | None = None
    _like: Tensor  # has the device and the dtype
    _ready: bool = True  # False until what is fitted to data has been fitted or loaded

    def __init_subclass__(cls, **options: Any) -> None:
        """Let every base draw and compute densities in its own precision, whatever autocast asks for."""
        for name in ("sample", "log_prob", "companions"):
            if name in vars(cls):
                setattr(cls, name, _in_own_precision(vars(cls)[name]))
        super().__init_subclass__(**options)

    def __init__(self, event_shape: int | Sequence[int]) -> None:
        super().__init__()
        self.event_shape = as_shape("event_shape", event_shape)
        self.register_buffer("_like", torch.zeros(()), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where points are drawn."""
        return self._like.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the points."""
        return self._like.dtype

    @property
    def has_density(self) -> bool:
        """Whether there is a `log_prob`. Default: whether the class overrides it."""
        return type(self).log_prob is not Base.log_prob

    @property
    def support(self) -> constraints.Constraint:
        """Where the density is positive. Default: everywhere."""
        return constraints.independent(constraints.real, len(self.event_shape))

    @property
    def is_positive_everywhere(self) -> bool:
        """Whether the density is positive on all of ℝᵈ."""
        return self.has_density and _is_real(self.support)

    @property
    def is_standard(self) -> bool:
        """Whether this is N(0, I), which formulas know. Default: no."""
        return False

    @property
    def needs_fit(self) -> bool:
        """Whether `fit` has anything to do. Default: whether the class overrides it."""
        return type(self).fit is not Base.fit

    @property
    def is_trained(self) -> bool:
        """Whether it has parameters to train."""
        return any(parameter.requires_grad for parameter in self.parameters())

    @abstractmethod
    def sample(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """Draw points of shape (*shape, *event)."""

    def log_prob(
        self,
        z: Tensor,  # (*batch, *event)
    ) -> Tensor:  # (*batch)
        """The log-density in nats.

        Raises:
            NoDensityError: the base is a source of points without a density.
        """
        raise NoDensityError(self.why_no_density())

    def require_density(self) -> None:
        """Raise `NoDensityError` unless there is a density."""
        if not self.has_density:
            raise NoDensityError(self.why_no_density())

    def why_no_density(self) -> str:
        """Say why there is no density, and what to do."""
        return (
            f"{type(self).__name__} is a source of points and has no density, so neither has the flow that starts from "
            "it: train with objective=flow_matching, judge with evaluation=distance, or choose another base, such as "
            "base=normal or base=mixture"
        )

    def fit(
        self,
        points: Tensor,  # (n, *event), training data in flow space
        to_flow_space: Callable[[Tensor], Tensor] | None = None,  # what made them
    ) -> Base:
        """Fit the base to training data and return it. Default: nothing to fit.

        A base with data of its own takes them to flow space by `to_flow_space`.
        """
        return self

    def companions(
        self,
        points: Tensor,  # (n, *event), data in flow space
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:  # (n, *event) each
        """Draw a point of the base for each data point, and return the middle of the part that it comes from.

        Default: independent draws of the whole base, with the middle 0.
        """
        return self.sample((len(points),), generator), torch.zeros_like(points)

    def _require_fit(self, name: str, instead: str) -> None:
        """Refuse to draw from, or to judge by, what neither data nor arguments have set."""
        if not self._ready:
            raise InvalidValueError(
                f"{name} has not been fitted to data; call flow.fit_ends(data.reference()) or base.fit(points), or "
                f"give {instead}"
            )

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        self._ready = True

    def hold(self, trained: bool, **tensors: Tensor) -> None:
        """Keep tensors in checkpoints: parameters if they are `trained`, otherwise buffers."""
        for name, tensor in tensors.items():
            if trained:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    def standard_normal(
        self, shape: int | Sequence[int], generator: torch.Generator | None
    ) -> Tensor:  # (*shape, *event)
        """Draw N(0, I) with the generator on its device, then move it."""
        size, like = (*as_shape("shape", shape, at_least=0), *self.event_shape), self._like
        if generator is None or generator.device == like.device:
            return torch.randn(size, generator=generator, dtype=like.dtype, device=like.device)
        return torch.randn(size, generator=generator, dtype=like.dtype, device=generator.device).to(like.device)

    def uniform(
        self, shape: int | Sequence[int], generator: torch.Generator | None, event_shape: Sequence[int] | None = None
    ) -> Tensor:  # (*shape, *event)
        """Draw U(0, 1) with the generator on its device, then move it."""
        size = (*as_shape("shape", shape, at_least=0), *(self.event_shape if event_shape is None else event_shape))
        device = self.device if generator is None else generator.device
        return torch.rand(size, generator=generator, dtype=self.dtype, device=device).to(self.device)


def _in_own_precision(method: Callable[..., Any]) -> Callable[..., Any]:
    """The same method without autocast, which would round a density by tenths of a nat."""

    @functools.wraps(method)
    def precise(self: Base, *arguments: Any, **named: Any) -> Any:
        kind = self._like.device.type
        known = kind == "cpu" or torch.amp.is_autocast_available(kind)
        if not known or not torch.is_autocast_enabled(kind):
            return method(self, *arguments, **named)
        with torch.autocast(kind, enabled=False):
            return method(self, *arguments, **named)

    return precise


def _is_real(support: constraints.Constraint) -> bool:
    inner: Any = support
    while hasattr(inner, "base_constraint"):  # of independent entries, or of the components of a mixture
        inner = inner.base_constraint
    return inner is constraints.real
