"""A trained flow as the posterior of a simulator's parameters."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from flows.arguments import checked
from flows.checks import check_number, whole_number
from flows.datasets.simulators.priors import Prior
from flows.errors import InvalidTypeError, InvalidValueError
from flows.models.cnf import CNF
from flows.models.results import LogProbEstimate
from flows.transforms import Compose, Transform, Unbounded


@checked(own=("x", "prior"))
class Posterior(Distribution):
    """p(θ | x) of a flow whose context is the observation x.

    A `torch.distributions.Distribution` over θ once it has an observation: `posterior.given(x)`. All methods also take
    `x`, one observation or a batch of them. Its support is that of the prior, if the flow was trained with
    `flows.transforms.Unbounded`; outside, log p is −∞.

    Args:
        flow: conditional on observations, such as `flows.load(run)`.
        prior: of the parameters; only kept for you. Default: unknown.
        x: the observation of calls without one. Default: none.

    Raises:
        InvalidTypeError, InvalidValueError: the flow is unconditional, or `x` has another shape than its observations.

    Example:
        ```python
        import torch

        import flows

        flow = flows.CNF(flows.fields.MLP(2, context_shape=3))
        posterior = flows.Posterior(flow).given(torch.zeros(3))
        theta = posterior.sample((10,))  # (10, 2)
        log_p = posterior.log_prob(theta)  # (10,)
        ```
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 (the base class's form)

    def __init__(self, flow: CNF, prior: Any = None, x: Any = None) -> None:
        if not flow.bind().takes_context:
            raise InvalidValueError(
                "a posterior needs a flow that takes the observation as its context; build its field with "
                "context_shape=..."
            )
        self.flow = flow
        self.prior = None if prior is None else Prior(prior)
        if self.prior is not None and self.prior.event_shape != tuple(flow.event_shape):
            raise InvalidValueError(
                f"the prior has parameters of shape {self.prior.event_shape}, and the flow has points of shape "
                f"{tuple(flow.event_shape)}"
            )
        self.x = None if x is None else self._observation(x)
        batch = torch.Size() if self.x is None else self.x.shape[: self.x.ndim - self._ndim]
        super().__init__(batch, torch.Size(flow.event_shape), validate_args=False)

    def given(self, x: Any) -> Posterior:
        """The posterior given an observation, or a batch of them."""
        return Posterior(self.flow, self.prior, x)

    def set_default_x(self, x: Any) -> Posterior:
        """`given`, in the words of `sbi`."""
        return self.given(x)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:
        bounds = self.bounds
        if bounds is None:
            return constraints.independent(constraints.real, 1)
        return constraints.independent(constraints.interval(*bounds), 1)

    @property
    def bounds(self) -> tuple[Tensor, Tensor] | None:
        """Low and high of each parameter, ±∞ without one; `None` where the transform has no bounds."""
        found = self._bounded()
        return None if found is None else (found.low, found.high)

    @checked(own=("x", "sample_shape"))
    def sample(
        self,
        sample_shape: int | Sequence[int] = (),
        x: Any = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # (*sample_shape, *batch, d)
        """Draw parameters."""
        with torch.no_grad():
            return self.flow.sample(sample_shape, self._given(x), generator)

    @checked(own=("x",))
    def log_prob(self, value: Tensor, x: Any = None) -> Tensor:  # (*batch)
        """log p(θ | x) in nats, −∞ outside the support; see `estimate_log_prob` for its error."""
        value, observed = self._broadcast(value, self._given(x))
        inside, theta = self._inside(value)
        density = self.flow.log_prob(theta, observed)
        return torch.where(inside, density, -torch.inf)

    @checked(own=("x",))
    def estimate_log_prob(
        self, theta: Tensor, x: Any = None, generator: torch.Generator | None = None
    ) -> LogProbEstimate:
        """log p(θ | x) with its standard error and its solver error, of points inside the support."""
        theta, observed = self._broadcast(theta, self._given(x))
        return self.flow.estimate_log_prob(theta, observed, generator)

    @checked(own=("x",))
    def map(
        self,
        x: Any = None,
        num_init: int = 1_000,
        num_to_optimize: int = 10,
        steps: int = 100,
        learning_rate: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # (d,)
        """The parameters with the largest density that was found, for one observation.

        The best of `num_init` draws climb log p(θ | x) by Adam, in the space of the flow, so that they stay in the
        support.
        """
        whole_number("num_init", num_init)
        whole_number("num_to_optimize", num_to_optimize)
        whole_number("steps", steps, 0)
        check_number("learning_rate", learning_rate, above=0)
        context = self._given(x)
        if context.ndim != self._ndim:
            raise InvalidValueError(f"map takes one observation, got a batch of shape {tuple(context.shape)}")
        flow = self.flow
        drawn = self.sample((num_init,), context, generator)
        with torch.no_grad():
            density = flow.log_prob(drawn, context)
            start = drawn[density.topk(min(num_to_optimize, num_init)).indices]
            given = context.expand(len(start), *context.shape)
            y = flow.to_flow_space(start, given)
        best, value = start[0].clone(), float(density.max())
        y = y.detach().requires_grad_()
        optimizer = torch.optim.Adam([y], learning_rate)
        with torch.enable_grad():
            for _ in range(steps):
                theta = flow.to_data_space(y, given)
                density = flow.log_prob(theta, context)
                (y.grad,) = torch.autograd.grad(-density.sum(), y)
                found = density.detach()
                if float(found.max()) > value:
                    best, value = theta[found.argmax()].detach().clone(), float(found.max())
                optimizer.step()
        return best

    @checked
    def expand(self, batch_shape: int | Sequence[int], _instance: object = None) -> Posterior:
        """The same posterior for more batch dimensions of equal observations."""
        x = self._given(None)
        shape = (batch_shape,) if isinstance(batch_shape, int) else tuple(batch_shape)
        new = copy.copy(self)
        new.x = x.expand(*shape, *x.shape[x.ndim - self._ndim :])
        new._batch_shape = torch.Size(shape)
        return new

    @property
    def _ndim(self) -> int:
        shape = self.flow.context_shape
        return 1 if shape is None else len(shape)

    def _given(self, x: Any) -> Tensor:
        if x is not None:
            return self._observation(x)
        if self.x is None:
            raise InvalidValueError("the posterior needs an observation: pass x=..., or write posterior.given(x)")
        return self.x

    def _observation(self, x: Any) -> Tensor:
        try:
            observed = x if isinstance(x, Tensor) else torch.as_tensor(np.asarray(x))
        except (TypeError, ValueError) as error:
            raise InvalidTypeError(
                f"an observation must be a tensor or an array of numbers, got {type(x).__name__}"
            ) from error
        if observed.is_complex():
            raise InvalidTypeError(f"an observation must hold real numbers, got {observed.dtype}")
        observed = observed.detach().to(self.flow.device)
        observed = observed if observed.is_floating_point() else observed.to(self.flow.dtype)
        shape = self.flow.context_shape
        if shape is not None and tuple(observed.shape[max(0, observed.ndim - len(shape)) :]) != shape:
            raise InvalidValueError(
                f"an observation must have the shape {shape}, as the simulations had, got {tuple(observed.shape)}"
            )
        if not bool(observed.isfinite().all()):
            raise InvalidValueError("the observation holds NaN or infinite values; no simulation of the training did")
        if observed.ndim == self._ndim + 1 and len(observed) == 1:
            return observed[0]  # a batch of one, as `sbi` keeps observations
        return observed

    def _broadcast(self, theta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The parameters with the batch dimensions of both, as densities of torch have it, and the observations."""
        batch = x.shape[: x.ndim - self._ndim]
        try:
            both = torch.broadcast_shapes(theta.shape[:-1], batch)
        except RuntimeError as error:
            raise InvalidValueError(
                f"parameters of shape {tuple(theta.shape)} do not broadcast with observations of the batch shape "
                f"{tuple(batch)}: expected (*batch, {self.event_shape[0]})"
            ) from error
        return theta.expand(*both, *theta.shape[-1:]), x

    def _inside(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Which points lie inside the support, and the points with those outside moved to its middle."""
        bounded = self._bounded()
        if bounded is None or tuple(theta.shape[-1:]) != tuple(self.event_shape):
            return torch.ones(theta.shape[:-1], dtype=torch.bool, device=theta.device), theta
        if bool(theta.isnan().any()):
            raise InvalidValueError(f"{int(theta.isnan().any(-1).sum())} of the parameters to evaluate hold NaN")
        inside = ((theta > bounded.low.to(theta)) & (theta < bounded.high.to(theta))).all(-1)
        middle = bounded.inverse(theta.new_zeros(1, *self.event_shape))[0][0]
        return inside, torch.where(inside.unsqueeze(-1), theta, middle)

    def _bounded(self) -> Unbounded | None:
        return next((part for part in _parts(self.flow.transform) if isinstance(part, Unbounded)), None)


def _parts(transform: Transform) -> list[Any]:
    if isinstance(transform, Compose):
        return [inner for part in transform.transforms.values() for inner in _parts(part)]  # type: ignore[arg-type]
    return [transform]
