"""The settings of a solve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.solvers import FixedGridODESolver

from flows.errors import InvalidValueError
from flows.solvers.adjoint import solve_with_adjoint
from flows.solvers.control import ErrorControl
from flows.solvers.problem import Dynamics, State
from flows.solvers.recompute import solve_with_checkpoints
from flows.solvers.runge_kutta import runge_kutta
from flows.solvers.statistics import Solution
from flows.solvers.task import Task

GRADIENTS = ("backprop", "checkpoint", "adjoint")
TIGHTER, LONGEST = 100.0, 0.2  # times the tolerances, and the longest step, of solves to compare with


@dataclass(frozen=True)
class ODESolver:
    """Settings of a solve.

    The step size of an adaptive method is shared by the batch; ``error_control`` says what drives it.

    Three ways lead to gradients. With n steps:

    ============== ======================== ============ =========================================================
    ``gradient``   is                       memory       evaluations
    ============== ======================== ============ =========================================================
    "backprop"     of what was computed     O(n)         no more
    "checkpoint"   of what was computed     O(√n)        every accepted step is solved once more, in the backward
                                                         pass; equal to "backprop" up to rounding
    "adjoint"      as accurate as the       O(1)         a second solve, backwards, with steps of its own
                   tolerances
    ============== ======================== ============ =========================================================

    :func:`flows.solvers.check_gradients` compares them on your model. [Chen et al. 2018, arXiv:1806.07366; Gholami
    et al. 2019, arXiv:1902.10298]

    Args:
        method: adaptive: dopri5, dopri8, bosh3, fehlberg2, adaptive_heun; of fixed step: euler, midpoint, heun2,
            heun3, rk4; by torchdiffeq, without checkpoints: explicit_adams, implicit_adams, scipy_solver.
        rtol, atol: tolerances of an adaptive method; below 1e-6 they need float64.
        step_size: of a fixed-step method, in units of time (a flow runs for 1); refused otherwise.
        gradient: see above.
        adjoint_rtol, adjoint_atol: tolerances of the adjoint solve; default to the forward ones.
        adjoint_seminorm: leave the gradients of the parameters, which feed nothing back, out of the error control of
            the adjoint solve. [Kidger et al. 2021, arXiv:2009.09457]
        max_steps: the attempted steps after which an adaptive solve is given up, forward or backward;
            for scipy_solver, ten evaluations are taken for a step.
        min_step: in units of time; an adaptive step of this length is accepted whatever its error, and counted in
            ``statistics.forced`` where that is above the tolerance. 0: never.
        max_step: in units of time; the longest adaptive step. ``None``: no limit, but the first is at most half of
            the solve.
        error_control: which components drive the step size. It, ``min_step`` and ``max_step`` are refused by methods
            that they have no effect on, those of fixed step or by torchdiffeq.
        options: further options of torchdiffeq's method, such as ``{"solver": "RK45"}`` for scipy_solver.

    Raises:
        ValueError: an unknown method or setting, or one that is missing or does not apply.
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    step_size: float | None = None
    gradient: Literal["backprop", "checkpoint", "adjoint"] = "backprop"
    adjoint_rtol: float | None = None
    adjoint_atol: float | None = None
    adjoint_seminorm: bool = True
    max_steps: int = 1000
    min_step: float = 0.0
    max_step: float | None = None
    error_control: ErrorControl = field(default_factory=ErrorControl)
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.method not in SOLVERS:
            raise InvalidValueError(f"method must be one of {', '.join(sorted(SOLVERS))}, got {self.method!r}")
        if self.gradient not in GRADIENTS:
            raise InvalidValueError(f"gradient must be 'backprop', 'checkpoint' or 'adjoint', got {self.gradient!r}")
        if self.is_fixed_step and not (self.step_size and self.step_size > 0):
            raise InvalidValueError(
                f"method {self.method!r} takes steps of fixed size: set step_size > 0, such as 0.05 for twenty steps "
                f"from 0 to 1; got {self.step_size}"
            )
        if not self.is_fixed_step and self.step_size is not None:
            raise InvalidValueError(
                f"method {self.method!r} chooses its own steps and takes no step_size, got {self.step_size}; set "
                "rtol and atol instead"
            )
        for name in ("rtol", "atol", "adjoint_rtol", "adjoint_atol", "max_steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InvalidValueError(f"{name} must be > 0, got {value}")
        if not self.min_step >= 0:
            raise InvalidValueError(f"min_step must be >= 0, got {self.min_step}")
        if self.max_step is not None and not self.max_step > self.min_step:
            raise InvalidValueError(
                f"max_step must be > min_step, which is {self.min_step}, or None for no limit, got {self.max_step}"
            )
        if not self.controls_error:
            for name, default in (("min_step", 0.0), ("max_step", None), ("error_control", ErrorControl())):
                if getattr(self, name) != default:
                    instead = "set step_size" if self.is_fixed_step else "choose one that is controlled here, dopri5"
                    raise InvalidValueError(
                        f"{name} has no effect on method {self.method!r}, got {getattr(self, name)}; {instead}"
                    )
        if runge_kutta(self.method) is not None and self.options:
            raise InvalidValueError(f"method {self.method!r} takes no further options, got {dict(self.options)}")
        if runge_kutta(self.method) is None and self.gradient == "checkpoint":
            raise InvalidValueError(
                f"method {self.method!r} cannot start again from a checkpoint, since its steps are not "
                "self-contained; choose a Runge-Kutta method such as 'dopri5' or 'rk4', or gradient='adjoint'"
            )

    @property
    def is_fixed_step(self) -> bool:
        """Whether the method takes steps of a fixed size rather than control its error."""
        return issubclass(SOLVERS[self.method], FixedGridODESolver)

    @property
    def controls_error(self) -> bool:
        """Whether the method is an adaptive Runge-Kutta one, for ``error_control`` and bounds of steps to act on."""
        method = runge_kutta(self.method)
        return method is not None and method.is_adaptive

    def tighter(self) -> ODESolver:
        """Settings of a solve to compare with: tolerances 100 times tighter, or fixed steps a tenth as long.

        ``min_step`` is a tenth too, and adaptive Runge-Kutta methods take steps of at most a fifth of a unit of time,
        or a solve whose steps the tolerances do not limit might be compared with itself.
        """
        if self.is_fixed_step:
            return replace(self, step_size=self.step_size / 10)
        finer = replace(self, rtol=self.rtol / TIGHTER, atol=self.atol / TIGHTER, max_steps=10 * self.max_steps)
        if not self.controls_error:
            return finer
        shortest, longest = min(self.min_step / 10, LONGEST / 2), min(self.max_step or LONGEST, LONGEST)
        return replace(finer, min_step=shortest, max_step=longest)

    def solve(
        self,
        dynamics: Dynamics,
        state: State,
        times: Tensor | Sequence[float],
        parameters: Sequence[Tensor] = (),
    ) -> Solution:
        """Integrate ``dynamics`` from ``state`` at ``times[0]`` through all ``times``, which may decrease.

        Steps do not depend on the times in between, where an adaptive method interpolates; the last step ends at
        the last time.

        Dynamics may tell more about themselves: ``component_names``, one for each component, for error control and
        messages ("state" and "log_density" are known, all others are path costs); ``observe(derivatives)``, named
        0-d tensors that are kept for every accepted step; ``fresh()``, the same dynamics without the tensors that
        they have kept from earlier evaluations, if they keep any.

        Args:
            dynamics: the right-hand side; a tuple of derivatives shaped like ``state``.
            state: components, all of one dtype and device; the first is (B, *event), the others (*, B).
            times: (T,), at least two, strictly monotonic.
            parameters: with ``gradient="adjoint"`` or ``"checkpoint"``, every tensor beside the state that
                ``dynamics`` depends on and that needs a gradient.

        Raises:
            SolverError: the step size underflows, ``max_steps`` is reached, or the state becomes non-finite.
            ValueError: the times are no such sequence or require gradients, or ``max_step`` is less than the dtype
                resolves.
        """
        task = Task(self, dynamics, state, times)
        if state[0].numel() == 0:  # nobody moves
            states = tuple(component.expand(len(task.seconds), *component.shape) for component in state)
            return Solution(task.times, states, task.statistics)
        if self.gradient == "backprop" or not torch.is_grad_enabled():
            if self.method == "scipy_solver" and torch.is_grad_enabled():
                raise InvalidValueError("scipy_solver cannot be differentiated through; set gradient='adjoint'")
            states = task.integrate(state)
        else:
            needed = tuple(parameter for parameter in parameters if parameter.requires_grad)
            states = (solve_with_adjoint if self.gradient == "adjoint" else solve_with_checkpoints)(task, state, needed)
        task.check(states, state)
        return Solution(task.times, states, task.statistics)
