"""Solving the ODE: settings, what a solve returns, and how it fails."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torchdiffeq import odeint, odeint_adjoint
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver
from torchdiffeq._impl.solvers import FixedGridODESolver

State = tuple[Tensor, ...]
Dynamics = Callable[[Tensor, State], State]  # (t, state) -> time derivative of each component


class SolverError(RuntimeError):
    """A solve that cannot go on; the message says where and what to try."""

    def __init__(self, message: str, t: float, dt: float) -> None:
        super().__init__(message)
        self.t = t
        self.dt = dt


@dataclass
class SolverStatistics:
    """What a solve has cost so far. The backward counts grow while gradients are computed (adjoint only)."""

    nfe_forward: int = 0  # evaluations of the dynamics
    nfe_backward: int = 0
    accepted: int = 0  # steps forward; a fixed-step method accepts all
    rejected: int = 0


@dataclass(frozen=True)
class Solution:
    """The states at the requested times, and what it took to reach them."""

    times: Tensor  # (T,)
    states: State  # each component (T, *component)
    statistics: SolverStatistics

    @property
    def end(self) -> State:
        """The state at the last time."""
        return tuple(component[-1] for component in self.states)


@dataclass(frozen=True)
class ODESolver:
    """Settings of a solve by torchdiffeq.

    The step size of an adaptive method is shared by the batch: a step is accepted when, for each component
    of the state (position, log-density change), the root mean square over the batch of error/tolerance is
    at most one, with tolerance ``atol + rtol · |component|``. A NaN in any component rejects the step.

    Args:
        method: any method of torchdiffeq.
        rtol, atol: tolerances of an adaptive method; below 1e-6 they need float64.
        step_size: of a fixed-step method, in units of time (a flow runs for 1); refused otherwise.
        gradient: ``"backprop"`` differentiates through the steps: the exact gradient of what was computed, and
            memory in proportion to the evaluations. ``"adjoint"`` solves the adjoint ODE backwards: constant
            memory, and a gradient as accurate as the tolerances.
        adjoint_rtol, adjoint_atol: tolerances of the adjoint solve; default to the forward ones.
        max_steps: the attempted steps after which an adaptive solve is given up, forward or backward.
        options: further options of torchdiffeq's method, such as ``{"solver": "RK45"}`` for scipy_solver.

    Raises:
        ValueError: an unknown method or setting, or a ``step_size`` that is missing or does not apply.
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    step_size: float | None = None
    gradient: Literal["backprop", "adjoint"] = "backprop"
    adjoint_rtol: float | None = None
    adjoint_atol: float | None = None
    max_steps: int = 1000
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in SOLVERS:
            raise ValueError(f"method must be one of {', '.join(sorted(SOLVERS))}, got {self.method!r}")
        if self.gradient not in ("backprop", "adjoint"):
            raise ValueError(f"gradient must be 'backprop' or 'adjoint', got {self.gradient!r}")
        if self.is_fixed_step and not (self.step_size and self.step_size > 0):
            raise ValueError(
                f"method {self.method!r} takes steps of fixed size: set step_size > 0, such as 0.05 for twenty steps "
                f"from 0 to 1; got {self.step_size}"
            )
        if not self.is_fixed_step and self.step_size is not None:
            raise ValueError(
                f"method {self.method!r} chooses its own steps and takes no step_size, got {self.step_size}; set "
                "rtol and atol instead"
            )
        for name in ("rtol", "atol", "adjoint_rtol", "adjoint_atol", "max_steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be > 0, got {value}")

    @property
    def is_fixed_step(self) -> bool:
        """Whether the method takes steps of a fixed size rather than control its error."""
        return issubclass(SOLVERS[self.method], FixedGridODESolver)

    def solve(
        self,
        dynamics: Dynamics,
        state: State,
        times: Tensor | Sequence[float],
        parameters: Sequence[Tensor] = (),
    ) -> Solution:
        """Integrate ``dynamics`` from ``state`` at ``times[0]`` through all ``times``, which may decrease.

        Args:
            dynamics: the right-hand side; a tuple of derivatives shaped like ``state``.
            state: components, all of one dtype and device.
            times: (T,), at least two, strictly monotonic.
            parameters: with ``gradient="adjoint"``, every tensor beside the state that ``dynamics`` depends on
                and that needs a gradient.

        Raises:
            SolverError: the step size underflows, ``max_steps`` is reached, or the state becomes non-finite.
        """
        times = torch.as_tensor(times, dtype=state[0].dtype, device=state[0].device)
        if self.gradient == "backprop" and self.method == "scipy_solver" and torch.is_grad_enabled():
            raise ValueError("scipy_solver cannot be differentiated through; set gradient='adjoint'")
        monitor = _Monitor(dynamics, self)
        arguments = {
            "rtol": self.rtol,
            "atol": self.atol,
            "method": self.method,
            "options": self._options(),
        }
        if self.gradient == "adjoint":
            arguments |= {
                "adjoint_rtol": self.adjoint_rtol or self.rtol,
                "adjoint_atol": self.adjoint_atol or self.atol,
                "adjoint_options": self._adjoint_options(),
                "adjoint_params": tuple(p for p in parameters if p.requires_grad),
            }
        states = (odeint_adjoint if self.gradient == "adjoint" else odeint)(monitor, state, times, **arguments)
        monitor.forward_is_done(times, states)
        return Solution(times, states, monitor.statistics)

    def _options(self) -> dict[str, Any]:
        options = {"norm": _largest_rms} | dict(self.options)
        if self.method == "explicit_adams":
            options.setdefault("max_order", 4)  # torchdiffeq's 12 is unstable beyond steps of about 0.001/|λ|
        if self.is_fixed_step:
            options["grid_constructor"] = lambda function, state, t: _grid(t, self.step_size)
        return options

    def _adjoint_options(self) -> dict[str, Any]:
        # The gradients of the parameters are integrals that feed nothing back: with the seminorm they do not
        # limit the step size. [Kidger et al. 2021, "Hey, that's not an ODE"]
        return self._options() | {"norm": "seminorm"}


@torch.no_grad()
def _largest_rms(components: State) -> Tensor:
    """The largest root mean square of a component; NaN if any holds one, unlike Python's max.

    Step sizes are constants for autograd: the root has no gradient at an error of zero.
    """
    return torch.stack([component.square().mean().sqrt() for component in components]).amax()


def _grid(times: Tensor, step_size: float) -> Tensor:
    """The times themselves, with equal steps of at most ``step_size`` between them."""
    pieces = [times[:1]]
    for start, end in itertools.pairwise(times):
        steps = max(1, math.ceil(float((end - start).abs()) / step_size - 1e-3))  # forgive rounding of times
        pieces.append(torch.linspace(float(start), float(end), steps + 1, dtype=times.dtype, device=times.device)[1:])
        pieces[-1][-1] = end
    return torch.cat(pieces)


class _Monitor:
    """The dynamics as torchdiffeq sees them: counts evaluations and steps, and stops a hopeless solve."""

    def __init__(self, dynamics: Dynamics, solver: ODESolver) -> None:
        self.dynamics = dynamics
        self.solver = solver
        self.statistics = SolverStatistics()
        self.forward = True
        self.attempts = 0
        self.last: tuple[Tensor, State] | None = None  # the latest state that was finite
        method = SOLVERS[solver.method]
        if issubclass(method, RKAdaptiveStepsizeODESolver):
            self.callback_step = self.callback_step_adjoint = self._attempt
            self.callback_accept_step = self._accept
            self.callback_reject_step = self._reject
        elif issubclass(method, FixedGridODESolver):
            self.callback_step = self._accept

    def __call__(self, t: Tensor, state: State) -> State:
        if self.forward:
            self.statistics.nfe_forward += 1
        else:
            self.statistics.nfe_backward += 1
        return self.dynamics(t, state)

    def forward_is_done(self, times: Tensor, states: State) -> None:
        self.forward = False
        self.attempts = 0
        if not all(bool(component[-1].isfinite().all()) for component in states):
            raise SolverError(
                f"the state is not finite at t = {float(times[-1]):.4g} with method {self.solver.method!r}; check "
                "the field for overflow, take smaller steps, or try an adaptive method such as 'dopri5'",
                float(times[-1]),
                float("nan"),
            )

    def _accept(self, t: Tensor, state: State, dt: Tensor) -> None:
        self.statistics.accepted += 1

    def _reject(self, t: Tensor, state: State, dt: Tensor) -> None:
        self.statistics.rejected += 1

    def _attempt(self, t: Tensor, state: State, dt: Tensor) -> None:
        where, size = float(t.detach()), float(dt.detach())
        direction = "forward" if self.forward else "adjoint"
        self.attempts += 1
        if self.attempts > self.solver.max_steps:
            raise SolverError(
                f"the {direction} solve reached t = {where:.6g} after max_steps = {self.solver.max_steps} steps, the "
                f"last of size {size:.2g}: the field is stiff there. Try larger rtol and atol, a lower learning "
                "rate or a regulariser while training, or a larger max_steps",
                where,
                size,
            )
        finite = all(bool(component.isfinite().all()) for component in state)
        if not finite or where + size == where or where - size == where:
            raise SolverError(
                f"the {direction} solve {'underflowed' if finite else 'failed'} at t = {where:.6g}, dt = {size:.2g}: "
                f"{self._diagnosis(t, state, finite)}",
                where,
                size,
            )
        self.last = t, state

    def _diagnosis(self, t: Tensor, state: State, finite: bool) -> str:
        if not finite:
            if self.last is None:
                return "the state holds NaN or infinite values from the start. Check the input"
            t, state = self.last
        if self.forward:
            with torch.no_grad():
                derivatives = self.dynamics(t.to(state[0].dtype), state)
            names = ["the velocity"] + ["its divergence"] * (len(state) - 1)
            for name, derivative in zip(names, derivatives, strict=True):
                bad = (~derivative.isfinite()).sum().item()
                if bad:
                    return (
                        f"{name} has {bad} NaN or infinite values there. Look for a division, a logarithm or an "
                        "overflow in the field, or a training run that has diverged"
                    )
        if not finite:
            return "the step before it ended in NaN or infinite values. Check the field for overflow"
        return (
            f"no step meets rtol = {self.solver.rtol:g} and atol = {self.solver.atol:g}. Try larger tolerances "
            "(float32 resolves about 1e-6), float64, or a fixed-step method such as rk4; a field with jumps in t or x "
            "cannot be solved adaptively"
        )
