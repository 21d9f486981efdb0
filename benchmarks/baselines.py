"""The same network and tolerance in other packages."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from flows.bases import Normal
from flows.datasets import Batch
from flows.fields import Field
from flows.models.cnf import CNF
from flows.objectives import FlowMatching
from flows.solvers import ODESolver


class LikelihoodMethod(ABC):
    """log p(x) in flow space, as one package computes it.

    Args:
        field: v(t, x); not copied.
        tolerance: absolute and relative tolerance of dopri5.

    Raises:
        ImportError: the package is not installed.
    """

    name: ClassVar[str]

    def __init__(self, field: Field, tolerance: float = 1e-5) -> None:
        self.field = field
        self.tolerance = tolerance
        self.base = Normal(field.event_shape)
        self.evaluations = 0  # of the field since the last call, its backward pass included

        def count(*_: object) -> None:  # a bound method would make copies of the field copy this object too
            self.evaluations += 1

        field.register_forward_pre_hook(count)

    def __call__(self, x: Tensor) -> Tensor:  # (B, d) to (B,), nats
        """log p(x)."""
        self.evaluations = 0
        return self.log_prob(x)

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:  # (B, d) to (B,)
        """Compute log p(x)."""

    def evaluations_of_a_step(self, x: Tensor) -> tuple[int, int]:
        """Evaluations of the field for one gradient: in the solve, and in the backward pass."""
        value = self(x)
        forward = self.evaluations
        value.mean().backward()
        self.field.zero_grad()
        return forward, self.evaluations - forward


class Flows(LikelihoodMethod):
    """This package with its defaults: closed-form divergence, gradients by backprop."""

    name = "flows"

    def __init__(self, field: Field, tolerance: float = 1e-5) -> None:
        super().__init__(field, tolerance)
        self.flow = CNF(field, solver=ODESolver("dopri5", rtol=tolerance, atol=tolerance))

    def log_prob(self, x: Tensor) -> Tensor:
        estimate = self.flow.estimate_log_prob(x, solver_error=False)
        self.statistics = estimate.statistics
        return estimate.value

    def evaluations_of_a_step(self, x: Tensor) -> tuple[int, int]:
        self(x).mean().backward()
        self.field.zero_grad()
        return self.statistics.nfe_forward, self.statistics.nfe_backward


class CompiledFlows(Flows):
    """This package with `ODESolver(compile=True)`."""

    name = "flows, compiled"

    def __init__(self, field: Field, tolerance: float = 1e-5) -> None:
        super().__init__(field, tolerance)
        self.flow.solver = replace(self.flow.solver, compile=True)


class PublishedFFJORD(LikelihoodMethod):
    """FFJORD's own method: a loop of reverse-mode products, and torchdiffeq's adjoint without the seminorm.

    [Grathwohl et al. 2019, arXiv:1810.01367]
    """

    name = "FFJORD's way"

    def log_prob(self, x: Tensor) -> Tensor:
        from torchdiffeq import odeint_adjoint

        times = torch.tensor([1.0, 0.0]).to(x)
        settings = {"rtol": self.tolerance, "atol": self.tolerance, "method": "dopri5"}
        z, change = odeint_adjoint(_LoopDynamics(self.field), (x, x.new_zeros(len(x))), times, **settings)
        return self.base.log_prob(z[-1]) - change[-1]


class _LoopDynamics(nn.Module):
    """(v, −div v), by one reverse-mode product per row of the Jacobian."""

    def __init__(self, field: Field) -> None:
        super().__init__()
        self.field = field

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x = state[0]
        with torch.enable_grad():
            x.requires_grad_()
            v = self.field(t, x)
            rows = (torch.autograd.grad(v[:, i].sum(), x, create_graph=True)[0] for i in range(x.shape[1]))
            return v, -sum(row[:, i] for i, row in enumerate(rows))


class Zuko(LikelihoodMethod):
    """zuko's free-form Jacobian with the exact trace and its adjoint; it weights log-densities by 1 % in errors."""

    name = "zuko"

    def __init__(self, field: Field, tolerance: float = 1e-5) -> None:
        super().__init__(field, tolerance)
        from zuko.transforms import FreeFormJacobianTransform

        self.transform = FreeFormJacobianTransform(
            field, 1.0, 0.0, field.parameters(), atol=tolerance, rtol=tolerance, exact=True
        )

    def log_prob(self, x: Tensor) -> Tensor:
        z, log_det = self.transform.call_and_ladj(x)
        return self.base.log_prob(z) + log_det


class Torchdyn(LikelihoodMethod):
    """torchdyn's CNF with its loop for the trace and its default gradients, by backprop."""

    name = "torchdyn"

    def __init__(self, field: Field, tolerance: float = 1e-5) -> None:
        super().__init__(field, tolerance)
        from torchdyn.core import NeuralODE
        from torchdyn.models import CNF as TorchdynCNF

        dynamics = TorchdynCNF(_TimeAsAttribute(field))
        with contextlib.redirect_stdout(None):  # it prints how it wraps the field
            self.ode = NeuralODE(dynamics, solver="dopri5", atol=tolerance, rtol=tolerance, return_t_eval=False)

    def log_prob(self, x: Tensor) -> Tensor:
        start = torch.cat([x.new_zeros(len(x), 1), x], dim=1)
        end = self.ode(start, torch.tensor([1.0, 0.0]).to(x))[-1]
        return self.base.log_prob(end[:, 1:]) - end[:, 0]


class _TimeAsAttribute(nn.Module):
    """A field that reads its time from the attribute `t`, which torchdyn sets."""

    def __init__(self, field: Field) -> None:
        super().__init__()
        self.field = field
        self.t = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        return self.field(self.t, x)


MatchingLoss = Callable[[Tensor], Tensor]  # (B, d), flow space, to 0-d


def own_matching(field: Field, coupling: str) -> MatchingLoss:
    """This package's flow matching with sampled targets."""
    flow, objective = CNF(field), FlowMatching("sampled", coupling=coupling)
    return lambda x: objective(flow, Batch(x)).loss


def torchcfm_matching(field: Field, coupling: str) -> MatchingLoss:
    """torchcfm's flow matching, on the same path.

    Raises:
        ImportError: it is not installed.
    """
    from torchcfm import ConditionalFlowMatcher, ExactOptimalTransportConditionalFlowMatcher

    matchers = {"independent": ConditionalFlowMatcher, "optimal_transport": ExactOptimalTransportConditionalFlowMatcher}
    matcher = matchers[coupling](sigma=0.0)

    def loss(x: Tensor) -> Tensor:
        t, position, velocity = matcher.sample_location_and_conditional_flow(torch.randn_like(x), x)
        return (field(t, position) - velocity).square().mean()

    return loss


LIKELIHOODS = (Flows, PublishedFFJORD, Zuko, Torchdyn)
MATCHINGS = {"flows": own_matching, "torchcfm": torchcfm_matching}
COUPLINGS = ("independent", "optimal_transport")
