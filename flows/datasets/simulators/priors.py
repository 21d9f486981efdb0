"""Priors of simulators: any distribution with `sample` and `log_prob`, and where its parameters lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, Uniform, constraints

from flows.arguments import checked, show
from flows.errors import InvalidTypeError, InvalidValueError

Bounds = tuple[Tensor, Tensor]


@checked
def box(low: float | Sequence[float], high: float | Sequence[float]) -> Independent:
    """The uniform distribution on a box, as a prior.

    Args:
        low, high: the edges, a number for each parameter.

    Raises:
        InvalidValueError: their lengths differ, or low is not below high.

    Example:
        ```python
        import flows

        prior = flows.datasets.box([0.0, -1.0], [1.0, 1.0])
        theta = prior.sample((5,))  # (5, 2)
        ```
    """
    lows, highs = (torch.atleast_1d(torch.tensor(edge, dtype=torch.get_default_dtype())) for edge in (low, high))
    if lows.shape != highs.shape or lows.ndim != 1 or not bool((lows < highs).all()):
        raise InvalidValueError(
            f"a box needs as many low edges as high ones, each below its high one, got low={low} and high={high}"
        )
    return Independent(Uniform(lows, highs), 1)


@checked
class Prior:
    """A prior as this package uses it.

    Args:
        distribution: any object with `sample(shape)` and `log_prob(theta)`, such as a torch distribution, which those
            of `sbi` are. Batch dimensions count as independent parameters.

    Raises:
        InvalidTypeError: it lacks one of the two.
        InvalidValueError: its parameters have no shape (d,), or its density cannot be computed.

    Example:
        ```python
        import torch
        from torch.distributions import Independent, Uniform

        import flows

        prior = flows.datasets.Prior(Independent(Uniform(-torch.ones(2), torch.ones(2)), 1))
        theta = prior.sample(10)  # (10, 2)
        ```
    """

    def __init__(self, distribution: Any) -> None:
        if isinstance(distribution, Prior):
            distribution = distribution.distribution
        missing = [name for name in ("sample", "log_prob") if not callable(getattr(distribution, name, None))]
        if missing or isinstance(distribution, type):
            raise InvalidTypeError(
                "a prior must have sample(shape) and log_prob(theta), such as flows.datasets.box([0.0], [1.0]) or any "
                f"torch.distributions.Distribution; {show(distribution)} has no "
                f"{' and no '.join(missing) or 'values, it is a class'}. For parameters without a density, simulate "
                "yourself and pass flows.datasets.Simulations(theta, x)"
            )
        self.distribution = distribution
        if getattr(_support(distribution), "is_discrete", False):
            raise InvalidValueError(
                f"the prior {show(distribution)} has no density, as its parameters are whole numbers; a flow learns "
                "densities, so give it continuous parameters, such as flows.datasets.box([0.0], [10.0])"
            )
        if _support(distribution) is constraints.simplex:
            raise InvalidValueError(
                f"the prior {show(distribution)} has no density, as its parameters add up to 1; leave the last one out"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            few = torch.as_tensor(distribution.sample((2,)))
        if few.ndim != 2:
            raise InvalidValueError(
                f"a prior must give one row of parameters a draw: sample((2,)) must have the shape (2, d), got "
                f"{tuple(few.shape)}; a single parameter is written Uniform(torch.zeros(1), torch.ones(1))"
            )
        self.event_shape = tuple(few.shape[1:])
        self._inside = few[0]  # where there is a density
        self.bounds = bounds_of_support(distribution, self.event_shape)
        try:
            density = self.log_prob(few)
        except NotImplementedError as error:
            raise InvalidValueError(
                f"the prior {show(distribution)} has no density: its log_prob is not implemented; take one with a "
                "density, or simulate yourself and pass flows.datasets.Simulations(theta, x)"
            ) from error
        if not bool(density.isfinite().all()):
            raise InvalidValueError(
                f"the prior {show(distribution)} gives its own draws the log-density {density.tolist()}; it must be "
                "finite where the prior draws"
            )

    def sample(self, count: int) -> Tensor:  # (count, d)
        """Draw parameters, by torch's global random numbers."""
        theta = torch.as_tensor(self.distribution.sample((count,))).detach()
        bad = (~theta.isfinite()).any(1).nonzero()
        if len(bad):
            raise InvalidValueError(f"the prior drew NaN or infinite parameters, {theta[int(bad[0])].tolist()}")
        return self.inside(theta)

    def inside(self, theta: Tensor) -> Tensor:  # (*batch, d) -> (*batch, d)
        """Move parameters that rounding has put on the edge of the support next to it, in torch's dtype or their own.

        A box [1000, 1001] has 16,000 numbers of float32, so that some of ten thousand draws are its edges.
        """
        if self.bounds is None:
            return theta
        for dtype in {theta.dtype, torch.get_default_dtype()}:
            low, high = (bound.to(dtype) for bound in self.bounds)
            rounded = theta.to(dtype)
            above, below = (torch.nextafter(edge, other) for edge, other in ((low, high), (high, low)))
            theta = torch.where((rounded <= low) & (theta >= low), above.to(theta), theta)
            theta = torch.where((rounded >= high) & (theta <= high), below.to(theta), theta)
        return theta

    def log_prob(self, theta: Tensor) -> Tensor:  # (*batch, d) -> (*batch)
        """log p(theta) in nats, −∞ outside the support."""
        support = self.bounds
        inside = torch.ones_like(theta[..., 0], dtype=torch.bool)
        if support is not None:
            low, high = (bound.to(theta) for bound in support)
            inside = ((theta >= low) & (theta <= high)).all(-1)
            theta = torch.where(inside.unsqueeze(-1), theta, self._inside.to(theta))
        given = torch.as_tensor(self.distribution.log_prob(theta))
        value = given.reshape(*theta.shape[:-1], -1).sum(-1)
        return torch.where(inside, value, -torch.inf)


def bounds_of_support(distribution: Any, event_shape: Sequence[int]) -> Bounds | None:
    """Return low and high of each parameter, ±inf without a bound; None if there are none or they are unknown."""
    support = _support(distribution)
    if support is None:
        return None
    edges = [_edges(part) for part in _parts(support)]
    if any(edge is None for edge in edges):
        return None
    try:
        low, high = (_row([edge[i] for edge in edges if edge is not None], event_shape) for i in (0, 1))
    except RuntimeError:  # edges of another shape than the parameters
        return None
    return None if bool((low.isinf() & high.isinf()).all()) else (low, high)


def _support(distribution: Any) -> Any:
    try:
        return distribution.support
    except (AttributeError, NotImplementedError):
        return None


def _parts(support: Any) -> list[Any]:
    """The constraints of a support, of which each is for one group of parameters."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if isinstance(support, constraints.cat | constraints.stack):
        return [part for one in support.cseq for part in _parts(one)]
    return [support]


def _edges(support: Any) -> tuple[Any, Any] | None:
    if support in (constraints.real, constraints.real_vector):
        return -math.inf, math.inf
    known = [getattr(support, name, None) for name in ("lower_bound", "upper_bound")]
    if all(edge is None for edge in known):
        return None
    low, high = known
    return -math.inf if low is None else low, math.inf if high is None else high


def _row(edges: Sequence[Any], event_shape: Sequence[int]) -> Tensor:
    parts = [torch.as_tensor(edge, dtype=torch.float64) for edge in edges]
    row = parts[0] if len(parts) == 1 else torch.cat([part.reshape(-1) for part in parts])
    return row.expand(*event_shape).clone()
