"""Distributions of torch, and other flows, as bases."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Transform, constraints

from flows.arguments import checked
from flows.bases.base import Base, NoDensityError
from flows.bases.normal import Normal
from flows.checks import as_shape, check_points
from flows.errors import InvalidTypeError, InvalidValueError
from flows.naming import by_name


@checked
class TorchDistribution(Base):
    """Any continuous `torch.distributions.Distribution` as a base, with fixed parameters.

    Its tensors are copied, saved with the flow, and moved with it. Batch dimensions count as independent entries of a
    point: `Laplace(torch.zeros(2), torch.ones(2))` is a base for two numbers.

    Args:
        distribution: what to draw from.
        event_shape: shape of a point. Default: batch and event shape of the distribution.

    Raises:
        InvalidTypeError: it is discrete, or its tensors need gradients.
        InvalidValueError: it draws points of another shape.

    Example:
        ```python
        import torch

        import flows

        laplace = torch.distributions.Laplace(torch.zeros(2), torch.ones(2))
        flow = flows.CNF(flows.fields.MLP((2,)), base=flows.bases.TorchDistribution(laplace))
        ```
    """

    has_rsample: ClassVar[bool] = True

    def __init__(self, distribution: Distribution, event_shape: int | Sequence[int] | None = None) -> None:
        own = (*distribution.batch_shape, *distribution.event_shape)
        super().__init__(own if event_shape is None else event_shape)
        name = type(distribution).__name__
        if own != self.event_shape:
            raise InvalidValueError(
                f"the base {name} draws points of shape {tuple(own)}, and the field's event_shape is "
                f"{self.event_shape}; give it parameters of that shape, e.g. loc=torch.zeros({self.event_shape})"
            )
        support = _support(distribution)
        if support is not None and support.is_discrete:
            raise InvalidTypeError(
                f"a flow starts from a continuous distribution, and {name} is discrete; choose another base"
            )
        trained = [path for path, _, _, tensor in _tensors(distribution) if tensor.requires_grad]
        if trained:
            raise InvalidTypeError(
                f"the base {name} has parameters that need gradients ({trained[0]}), which would not be saved with the "
                "flow; detach them, or use flows.bases.Normal(..., trainable=True), StudentT or Mixture"
            )
        distribution = _copied(distribution, {})
        batch_ndim = len(distribution.batch_shape)
        self.distribution = Independent(distribution, batch_ndim) if batch_ndim else distribution
        for path, holder, key, tensor in list(_tensors(self.distribution)):
            self.register_buffer(path.replace(".", "_"), _put(holder, key, tensor.clone(), self.dtype))

    @property
    def support(self) -> constraints.Constraint:
        stated = _support(self.distribution)  # made of its tensors as they are now
        return super().support if stated is None else stated

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self._take_buffers()
        return self

    def _take_buffers(self) -> None:
        """Let the distribution use the tensors of this module."""
        for path, holder, key, _ in list(_tensors(self.distribution)):
            name = path.replace(".", "_")
            if name in self._buffers:
                _put(holder, key, self.get_buffer(name), None)
            else:  # computed from these at first use, and then kept
                del vars(holder)[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> TorchDistribution:
        memo[id(self)] = copied = object.__new__(type(self))
        for name, value in vars(self).items():
            vars(copied)[name] = _copied(value, {}) if name == "distribution" else copy.deepcopy(value, memo)
        copied._take_buffers()
        return copied

    def sample(self, shape: int | Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        shape = as_shape("shape", shape, at_least=0)
        if generator is None:
            return self.distribution.sample(shape).to(self.dtype)
        # Distributions of torch take no generator: a seed from it decides what torch's own one draws.
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            return self.distribution.sample(shape).to(self.dtype)

    def log_prob(
        self,
        z: Tensor,  # (*batch, *event)
    ) -> Tensor:  # (*batch)
        """The log-density in nats; −∞ outside of the support."""
        check_points("z", z, self.event_shape, batched=False)
        support = self.support
        if self.is_positive_everywhere:
            return self.distribution.log_prob(z)
        inside = support.check(z)  # (*batch)
        middle = self.sample((), torch.Generator().manual_seed(0)).detach()  # any point inside
        safe = torch.where(inside.view(*inside.shape, *[1] * len(self.event_shape)), z, middle)
        return torch.where(inside, self.distribution.log_prob(safe), -torch.inf)


@checked
class FlowBase(Base):
    """A trained flow as the base of another one.

    Its density takes a solve of its own. In Python, `flows.CNF(field, base=flow)` does the same.

    Args:
        flow: anything with `event_shape`, `sample(shape, generator=...)` and `log_prob(x)`, such as a `flows.CNF`.
        trainable: whether likelihood training moves it, too. Default: `False`; then a copy with fixed weights is used.

    Raises:
        InvalidTypeError: it lacks one of these, draws whole numbers, or needs a context.

    Example:
        ```python
        import flows

        first = flows.CNF(flows.fields.MLP((2,)))
        second = flows.CNF(flows.fields.MLP((2,)), base=flows.bases.FlowBase(first))
        ```
    """

    is_closed_form: ClassVar[bool] = False

    def __init__(self, flow: nn.Module, trainable: bool = False) -> None:
        missing = [name for name in ("event_shape", "sample", "log_prob") if not hasattr(flow, name)]
        if missing:
            raise InvalidTypeError(
                f"a flow as a base needs event_shape, sample and log_prob, and {type(flow).__name__} lacks "
                f"{', '.join(missing)}"
            )
        stated: Any = flow
        super().__init__(stated.event_shape)
        if getattr(getattr(flow, "transform", None), "num_levels", None) is not None:
            raise InvalidTypeError("a flow of whole numbers cannot be a base: its transform dequantises")
        if hasattr(flow, "bind") and stated.bind().context_shape is not None:
            raise InvalidTypeError("a flow that needs a context cannot be a base, which has none")
        self.trainable = trainable
        self.flow = flow if trainable else copy.deepcopy(flow).requires_grad_(False).eval()
        self.to(getattr(flow, "device", None), getattr(flow, "dtype", None))

    @property
    def has_density(self) -> bool:
        return getattr(getattr(self.flow, "base", None), "has_density", True)

    @property
    def support(self) -> constraints.Constraint:
        return getattr(getattr(self.flow, "base", None), "support", super().support)

    @property
    def is_positive_everywhere(self) -> bool:
        inner, transform = getattr(self.flow, "base", None), getattr(self.flow, "transform", None)
        positive = inner.is_positive_everywhere if isinstance(inner, Base) else super().is_positive_everywhere
        return positive and getattr(transform, "is_defined_everywhere", True)  # it is 0 where the transform is not

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return getattr(getattr(self.flow, "base", None), "has_rsample", True)

    def train(self, mode: bool = True) -> FlowBase:
        """Set the mode; a flow with fixed weights stays in evaluation mode."""
        super().train(mode)
        if not self.trainable:
            self.flow.eval()
        return self

    def why_no_density(self) -> str:
        inner = getattr(self.flow, "base", None)
        return inner.why_no_density() if isinstance(inner, Base) else super().why_no_density()

    def sample(self, shape: int | Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        flow: Any = self.flow
        return flow.sample(as_shape("shape", shape, at_least=0), generator=generator)

    def log_prob(
        self,
        z: Tensor,  # (*batch, *event)
    ) -> Tensor:  # (*batch)
        """The log-density of the flow, in nats."""
        if not self.has_density:
            raise NoDensityError(self.why_no_density())
        flow: Any = self.flow
        return flow.log_prob(z)


@checked(own=("base",))
def as_base(base: Any, event_shape: Sequence[int]) -> Base:
    """Return a base for points of this shape, also by its name, such as "student_t".

    `None` is N(0, I); a distribution and another flow get an adapter.

    Raises:
        InvalidTypeError: it is none of these.
        InvalidValueError: it draws points of another shape.

    Example:
        ```python
        import torch

        from flows.bases import as_base

        as_base(None, (2,))  # N(0, I)
        as_base(torch.distributions.Gumbel(torch.zeros(2), torch.ones(2)), (2,))
        ```
    """
    if base is None:
        return Normal(event_shape)
    if isinstance(base, str):
        return by_name(Base, base, "base", event_shape=tuple(event_shape))
    if isinstance(base, Distribution):
        return TorchDistribution(base, event_shape)
    if not isinstance(base, Base) and isinstance(base, nn.Module) and hasattr(base, "log_prob"):
        base = FlowBase(base)
    if not isinstance(base, Base):
        got = f"the class {base.__name__}" if isinstance(base, type) else f"an object of class {type(base).__name__}"
        raise InvalidTypeError(
            f"base must be a flows.bases.Base or None, or a torch.distributions.Distribution or a flow, got {got}; "
            "e.g. flows.bases.Normal((2,))"
        )
    if base.event_shape != tuple(event_shape):
        raise InvalidValueError(
            f"the base's event_shape is {base.event_shape}, and the field's is {tuple(event_shape)}; build both for "
            "the same points"
        )
    return base


def _support(distribution: Distribution) -> constraints.Constraint | None:
    """Where the density is positive; `None` where the distribution does not say."""
    try:
        return distribution.support
    except NotImplementedError:
        return None


def _copied(value: Any, known: dict[int, Any]) -> Any:
    """A deep copy. That of torch loses what an inverse transform inverts; the two may hold each other."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, list):
        return [_copied(part, known) for part in value]
    if isinstance(value, weakref.ref):  # of a transform to its inverse
        return None
    if not isinstance(value, Distribution | Transform):
        return value
    if id(value) not in known:
        known[id(value)] = copied = object.__new__(type(value))
        vars(copied).update({key: _copied(part, known) for key, part in vars(value).items()})
    return known[id(value)]


def _tensors(owner: Any, path: str = "", within: tuple[Any, ...] = ()) -> Iterator[tuple[str, Any, Any, Tensor]]:
    """Yield every tensor in a distribution: its name, what holds it under which key, and the tensor."""
    if any(owner is one for one in within):
        return
    items: Iterator[tuple[Any, Any]] | Any = enumerate(owner) if isinstance(owner, list) else vars(owner).items()
    for key, value in list(items):
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, Tensor):
            yield name, owner, key, value
        elif isinstance(value, Distribution | Transform | list):
            yield from _tensors(value, name, (*within, owner))


def _put(holder: Any, key: Any, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Replace a tensor of a distribution; numbers take the dtype."""
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    if isinstance(holder, list):
        holder[key] = tensor
    else:
        vars(holder)[key] = tensor
    return tensor
