"""Settings of a solve, and the solve."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from flows.arguments import checked
from flows.checks import check_number
from flows.errors import InvalidTypeError, InvalidValueError
from flows.freed_memory import keep_freed_memory
from flows.shares import share_of_steps
from flows.solvers.adjoint import solve_with_adjoint
from flows.solvers.control import ErrorControl, ErrorNorm
from flows.solvers.errors import failing_together
from flows.solvers.integrator import Integrator
from flows.solvers.jumps import jumps_of
from flows.solvers.multistep import ADAMS, SCIPY, check_options
from flows.solvers.outputs import Outputs
from flows.solvers.problem import ADJOINT, PARAMETERS, Dynamics, State, batch_size_of, component_names
from flows.solvers.programs import expects_many_solves
from flows.solvers.recompute import solve_with_checkpoints
from flows.solvers.replay import Precision
from flows.solvers.statistics import Solution, SolverStatistics
from flows.solvers.step_size import CONTROLLERS
from flows.solvers.stepping import StepLimits
from flows.solvers.tableaux import RUNGE_KUTTA
from flows.solvers.task import Task, checked_outputs, checked_state

METHODS = (*RUNGE_KUTTA, *ADAMS, SCIPY)
GRADIENTS = ("backprop", "checkpoint", "adjoint")
MAX_STEPS = 10**9
UNCONTROLLED = {"min_step": 0.0, "max_step": None, "error_control": ErrorControl(), "controller": "i"}
REFERENCE_FACTOR = 100.0  # how much tighter the tolerances of a reference solve are
REFERENCE_MAX_STEP = 0.2  # the longest step of a reference solve
REFERENCE_STEP_SIZE = 0.05  # the same of fixed-step methods
REFERENCE_TOLERANCE = 1e-4  # the loosest of a reference solve


@checked(own="all")
@dataclass(frozen=True)
class ODESolver:
    """Settings of a solve.

    An adaptive method uses one step size for the whole batch; `error_control` says which errors drive it.

    There are three ways to compute gradients. With n steps:

    | `gradient`     | gradient of           | memory | extra evaluations                                     |
    |----------------|-----------------------|--------|-------------------------------------------------------|
    | `"backprop"`   | what was computed     | O(n)   | none                                                  |
    | `"checkpoint"` | what was computed     | O(√n)  | every accepted step again, in the backward pass       |
    | `"adjoint"`    | the exact solution    | O(1)   | a second solve, backwards in time, with its own steps |

    `"checkpoint"` equals `"backprop"` up to rounding. `"adjoint"` is as accurate as its tolerances.
    `flows.solvers.check_gradients` compares them on your model.
    [Chen et al. 2018, arXiv:1806.07366; Gholami et al. 2019, arXiv:1902.10298]

    Args:
        method: adaptive: flow5, tsit5, dopri5, dopri8, bosh3, fehlberg2, adaptive_heun. Fixed steps: euler, midpoint,
            heun2, heun3, rk4, and explicit_adams and implicit_adams by torchdiffeq. By scipy: scipy_solver. The last
            three cannot use checkpoints. The default, flow5, has nodes that suit the integral of a divergence: for a
            mean error of 1e-4 nats in log p it takes a quarter fewer evaluations than dopri5.
        rtol, atol: tolerances of an adaptive method. Below 1e-6 they need float64.
        step_size: the longest step of a fixed-step method, in units of time (a flow runs for 1). Refused by other
            methods.
        gradient: see the table.
        adjoint_rtol, adjoint_atol: tolerances of the adjoint solve. By default those of the forward solve.
        adjoint_seminorm: leave the gradients of the parameters out of the adjoint's error control, because nothing
            depends on them. They are controlled even so if the dynamics jump in time. [Kidger et al. 2021,
            arXiv:2009.09457]
        max_steps: attempted steps after which an adaptive solve fails, forward or backward. For scipy_solver, ten
            evaluations count as a step.
        min_step: an adaptive step of this size is accepted whatever its error, and counted in `statistics.forced` if
            the error is above the tolerance. By default 0: no step is.
        max_step: the longest adaptive step. By default there is no limit, but the first step covers at most half of the
            solve.
        error_control: which components drive the step size.
        compile: run each step of a Runge-Kutta method as compiled code: all stages, the divergence, path costs and the
            norm of the error in one program, with its gradients. It takes a C++ compiler, and seconds to a minute for
            each batch size, up to four for a model. The first step is compared with uncompiled code. What cannot be
            compiled runs uncompiled, and `flows.solvers.compilations()` says why. Second derivatives need
            `compile=False`. `"auto"`: compile where `flows.Trainer` announces a long run: steps with gradients, and
            those of large batches without gradients whose samples differ in their states alone, in equal pieces.
        controller: how errors set the size of adaptive steps: "i" by the last one, "pi" by the last two, "pid" by the
            last three, which makes sizes change more smoothly. Flows take as many evaluations with each.
        grid: instead of `step_size`, the increasing times at which the steps of a Runge-Kutta method with fixed steps
            end, such as (0, 0.2, 0.6, 1). Those inside a solve count, in its direction. `flows.fit_grid` fits one.
        options: further options: `max_order` of Adams methods, `max_iters` of implicit_adams, and `solver` of
            scipy_solver, such as `{"solver": "RK45"}`.

    Raises:
        InvalidValueError: a setting is unknown, missing or out of range, or has no effect on the method.

    Example:
        ```python
        import flows

        fast = flows.ODESolver(method="rk4", step_size=0.1)
        fine = flows.ODESolver(rtol=1e-7, atol=1e-7, gradient="adjoint")  # flow5; memory does not grow with the steps
        flow = flows.CNF(flows.fields.MLP((2,)), solver=fine)
        ```
    """

    method: str = "flow5"
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
    compile: bool | Literal["auto"] = False
    controller: Literal["i", "pi", "pid"] = "i"
    grid: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InvalidValueError(f"method must be one of {', '.join(sorted(METHODS))}, got {self.method!r}")
        if self.gradient not in GRADIENTS:
            raise InvalidValueError(f"gradient must be 'backprop', 'checkpoint' or 'adjoint', got {self.gradient!r}")
        self._check_numbers()
        if not isinstance(self.adjoint_seminorm, bool):
            raise InvalidValueError(f"adjoint_seminorm must be true or false, got {self.adjoint_seminorm!r}")
        if not isinstance(self.compile, bool) and self.compile != "auto":
            raise InvalidValueError(f"compile must be true, false or 'auto', got {self.compile!r}")
        if self.controller not in CONTROLLERS:
            raise InvalidValueError(f"controller must be 'i', 'pi' or 'pid', got {self.controller!r}")
        if not isinstance(self.error_control, ErrorControl):
            raise InvalidValueError(f"error_control must be an ErrorControl, got {self.error_control!r}")
        if not isinstance(self.options, Mapping):
            raise InvalidValueError(f"options must be a mapping, got {self.options!r}")
        self._check_effects()

    def _check_numbers(self) -> None:
        for name in ("rtol", "adjoint_rtol"):
            if name == "rtol" or self.adjoint_rtol is not None:
                check_number(name, getattr(self, name), above=0, below=1)
        for name in ("atol", "adjoint_atol"):
            if name == "atol" or self.adjoint_atol is not None:
                check_number(name, getattr(self, name), above=0, below=1e9)
        check_number("max_steps", self.max_steps, whole=True, at_least=1, at_most=MAX_STEPS)
        check_number("min_step", self.min_step, at_least=0)
        if self.max_step is not None:
            no_limit = "use None for no limit"
            check_number("max_step", self.max_step, above=0, otherwise=no_limit)
            if self.max_step <= self.min_step:
                raise InvalidValueError(
                    f"max_step must be > min_step = {self.min_step:g}, got {self.max_step:g}; {no_limit}"
                )

    def _check_grid(self) -> None:
        if self.step_size is not None or self.method not in RUNGE_KUTTA or self.controls_error:
            instead = "give one of the two" if self.step_size is not None else "choose a method such as 'midpoint'"
            raise InvalidValueError(
                "grid sets the steps of a Runge-Kutta method with fixed steps, and takes no step_size beside it, got "
                f"method {self.method!r} and step_size {self.step_size!r}; {instead}"
            )
        try:
            times = tuple(float(time) for time in self.grid or ())
        except (TypeError, ValueError):
            times = ()
        rising = len(times) > 1 and all(0 < b - a < math.inf for a, b in itertools.pairwise(times))
        if isinstance(self.grid, str) or not rising:
            raise InvalidValueError(
                f"grid must be at least two increasing numbers, such as [0, 0.2, 0.6, 1], got {self.grid!r}"
            )
        object.__setattr__(self, "grid", times)

    def _check_effects(self) -> None:
        if self.grid is not None:
            self._check_grid()
        elif self.is_fixed_step:
            check_number(
                f"step_size of method {self.method!r}",
                self.step_size,
                above=0,
                otherwise="0.05, for example, takes twenty steps from 0 to 1",
            )
        elif self.step_size is not None:
            raise InvalidValueError(
                f"method {self.method!r} chooses its own steps and takes no step_size, got {self.step_size!r}; set "
                "rtol and atol instead"
            )
        if not self.controls_error:
            for name, default in UNCONTROLLED.items():
                if getattr(self, name) != default:
                    instead = "set step_size" if self.is_fixed_step else "choose a method that uses it, such as flow5"
                    raise InvalidValueError(
                        f"{name} has no effect on method {self.method!r}, got {getattr(self, name)}; {instead}"
                    )
        if self.method not in RUNGE_KUTTA:
            check_options(self.method, self.options)
            if self.compile is True:
                raise InvalidValueError(
                    f"compile=True is for Runge-Kutta methods, and {self.method!r} is run by another package; choose "
                    "a method such as 'flow5' or 'rk4', or compile=False"
                )
            if self.gradient == "checkpoint":
                raise InvalidValueError(
                    f"method {self.method!r} cannot start again from a checkpoint, because its steps depend on "
                    "earlier ones; choose a Runge-Kutta method such as 'flow5' or 'rk4', or gradient='adjoint'"
                )
        elif self.options:
            raise InvalidValueError(f"method {self.method!r} takes no further options, got {dict(self.options)}")

    @property
    def is_fixed_step(self) -> bool:
        """Whether the method takes steps of a fixed size."""
        return not self.controls_error and self.method != SCIPY

    @property
    def longest_step(self) -> float | None:
        """The longest of fixed steps; infinite where a grid sets them, `None` for other methods."""
        return math.inf if self.grid is not None else self.step_size

    @property
    def controls_error(self) -> bool:
        """Whether the method is an adaptive Runge-Kutta method, which uses `error_control` and the bounds of steps."""
        return self.method in RUNGE_KUTTA and RUNGE_KUTTA[self.method].is_adaptive

    def tighter(self, factor: float = REFERENCE_FACTOR) -> ODESolver:
        """Settings of a reference solve: tolerances 100 times tighter, or fixed steps a tenth as long.

        Tolerances become at most 1e-4 and fixed steps at most 0.05 units of time. `min_step` becomes a tenth, and
        adaptive Runge-Kutta methods take steps of at most 0.2 units of time. Without these bounds, a solve whose steps
        do not depend on its settings might be compared with itself.
        """
        if self.grid is not None:
            return replace(self, grid=divided(self.grid, 10, REFERENCE_STEP_SIZE))
        if self.is_fixed_step:
            assert self.step_size is not None
            return replace(self, step_size=min(self.step_size / 10, REFERENCE_STEP_SIZE))
        finer = replace(
            self,
            rtol=min(self.rtol / factor, REFERENCE_TOLERANCE),
            atol=min(self.atol / factor, REFERENCE_TOLERANCE),
            max_steps=min(10 * self.max_steps, MAX_STEPS),
        )
        if not self.controls_error:
            return finer
        shortest = min(self.min_step / 10, REFERENCE_MAX_STEP / 2)
        return replace(finer, min_step=shortest, max_step=min(self.max_step or REFERENCE_MAX_STEP, REFERENCE_MAX_STEP))

    def solve(
        self,
        dynamics: Dynamics,
        state: State,
        times: Tensor | Sequence[float],
        parameters: Sequence[Tensor] = (),
        counts: Tensor | None = None,
        rows: slice | None = None,
    ) -> Solution:
        """Integrate `dynamics` from `state` at the first time through all `times`.

        Times in between do not change the steps of an adaptive method, which interpolates. The last step ends at the
        last time. With times of shape (B, T), each sample has its own, and takes the memory of its own. One solve
        serves all of them. A sample no longer moves after the step that covers its last time.

        Dynamics may have six more attributes:

        - `component_names`: a name for each component, for error control and messages. "state" and "log_density" have
          weights of their own; all others are path costs.
        - `observe(derivatives)`: returns named 0-d tensors, which are kept for every accepted step.
        - `leading(t, state)`: returns the derivative of the first component alone. Stated where all derivatives depend
          on that component alone; then stages that do not enter the result evaluate no other.
        - `fresh()`: returns the same dynamics without tensors that earlier evaluations have cached.
        - `jumps`: the times at which the derivatives jump, for all samples together, as a switched input does. Steps
          end there, so that the method keeps its order, and each step sees the values between two jumps only. A method
          by torchdiffeq starts anew there.
        - `time_offset`: the largest number that the dynamics add to times, for the rounding of jumps.

        Args:
            dynamics: the right-hand side; returns a tuple of derivatives shaped like `state`.
            state: components of one dtype and device. The first is (B, *event), the others are (*, B).
            times: (T,), at least two, strictly increasing or strictly decreasing; or (B, T), such a row for each
                sample, all in the same direction from the same first time. With (B, T), `gradient="adjoint"` calls the
                dynamics with times of shape (B,), and Adams methods and scipy keep the states of all samples at all
                times.
            parameters: all tensors besides the state that `dynamics` depends on and that need a gradient. Needed by
                `gradient="adjoint"` and `"checkpoint"`.
            counts: (B,), how many of the times of each row count. The states at the others repeat the last that counts.
            rows: which of the rows of `times` and `counts` are those of `state`, whose B is then smaller. Other
                processes solve the others, in the same steps; see `flows.shares`.

        Raises:
            SolverError: the step size underflows, `max_steps` is reached, or the state becomes non-finite.
            InvalidValueError: the times are not such a sequence, or require gradients; or the dtype cannot resolve
                `max_step`.
        """
        if not callable(dynamics):
            raise InvalidTypeError(f"dynamics must be a function of (t, state), got {dynamics!r}")
        state = checked_state(state)
        needed = tuple(parameter for parameter in parameters if parameter.requires_grad)
        outputs = checked_outputs(times, state, counts, rows)
        task = self._task(dynamics, state, outputs, len(needed))
        at = outputs.as_tensor().to(state[0])
        if state[0].numel() == 0:  # an empty batch
            states = tuple(component.expand(outputs.size, *component.shape) for component in state)
            return Solution(at, states, task.statistics)
        if state[0].is_cpu:
            keep_freed_memory()
        function = task.forward_function(state)
        with failing_together():
            if self.gradient == "backprop" or not torch.is_grad_enabled():
                if self.method == SCIPY and torch.is_grad_enabled():
                    raise InvalidValueError("scipy_solver cannot be differentiated through; set gradient='adjoint'")
                joined = task.forward.integrate(function, state, outputs, task.forward_log())
            elif self.gradient == "adjoint":
                joined = solve_with_adjoint(task, state, needed)
            else:
                joined = solve_with_checkpoints(task, RUNGE_KUTTA[self.method], state, needed)
            solution = Solution(at, outputs.arrange(state, joined), task.statistics)
            names = task.statistics.components
            task.forward.check_finite(function, state, outputs.span, solution.end, names, "forward")
        return solution

    def _task(self, dynamics: Dynamics, state: State, outputs: Outputs, num_parameters: int) -> Task:
        names, size = component_names(dynamics, state), batch_size_of(state)
        weights = self.error_control.weights(dynamics, names)
        share = share_of_steps() if self.controls_error else None  # scipy takes steps of its own in each process
        norm = ErrorNorm(names, weights, self.rtol, self.atol, size, self.error_control.per_sample, share)
        limits = StepLimits(
            self.max_steps,
            self.min_step,
            float("inf") if self.max_step is None else self.max_step,
            abs(outputs.end - outputs.start) / 2,  # the error estimate of a single step over everything is unreliable
        )
        compiles: bool | Literal["pieces"] = self.compile is True
        if self.compile == "auto" and expects_many_solves():
            compiles = True if torch.is_grad_enabled() else "pieces"
        forward = Integrator(
            self.method, norm, limits, self.longest_step, self.options, compiles, self.controller, self.grid
        )
        counted = 0 if self.adjoint_seminorm else num_parameters
        adjoint_norm = replace(
            norm,
            names=(*names, *(ADJOINT + name for name in names), *(PARAMETERS,) * counted),
            weights=(*weights, *weights, *(1.0,) * counted),
            rtol=self.rtol if self.adjoint_rtol is None else self.adjoint_rtol,
            atol=self.atol if self.adjoint_atol is None else self.adjoint_atol,
        )
        backward = replace(forward, norm=adjoint_norm)
        jumps = jumps_of(dynamics, outputs.start, outputs.end, state[0].dtype)
        return Task(dynamics, outputs, forward, backward, SolverStatistics(names), Precision(state[0].device), jumps)


def divided(grid: Sequence[float], parts: int, longest: float = math.inf) -> tuple[float, ...]:
    """The grid with each interval in at least so many equal parts, none longer than `longest`."""
    points = [grid[0]]
    for start, end in itertools.pairwise(grid):
        count = max(parts, math.ceil((end - start) / longest))
        points += [start + (end - start) * i / count for i in range(1, count)] + [end]
    return tuple(points)
