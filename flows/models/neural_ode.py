"""A neural ODE: states at any times from an initial state."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flows.arguments import checked
from flows.bases import Normal
from flows.checks import check_number
from flows.dynamics import StateDynamics
from flows.errors import InvalidValueError
from flows.fields import named_field
from flows.models.examination import examine, foreign_tensors, look_for_jumps
from flows.models.precision import keeping_complex, suitable_context, working_dtype
from flows.models.results import DataNames, Trajectory
from flows.models.times import Times
from flows.naming import by_name
from flows.path_costs import PathCost, draw_directions
from flows.shares import steps_together
from flows.solvers import ODESolver, SolverError, as_solver
from flows.transforms import Identity, Transform
from flows.vector_field import BoundField, bind


@checked
class NeuralODE(nn.Module):
    """The solution of dy/dt = v(t, y) from an initial state, with y = transform(x).

    By default y is the state x itself. A transform such as `Standardise` lets the field work on numbers of unit scale.
    Times have any unit and any origin: the field sees them as they are given. A whole batch of initial states is solved
    at once, also where each has times of its own. [Chen et al. 2018, arXiv:1806.07366]

    ```python
    import torch
    import flows

    ode = flows.NeuralODE(flows.fields.MLP(event_shape=(2,)))
    path = ode.trajectory(torch.randn(5, 2), torch.linspace(0, 3, 20))
    path.states.shape, path.solver_error.max()  # (5, 20, 2), and how far a much tighter solve is away
    ```

    Args:
        field: a `flows.fields.Field`, or any module with `forward(t, x)` or `forward(t, x, context)`; or the lower-case
            name of a class of `flows.fields`, such as `"mlp"`.
        solver: settings of the solve, or the name of an adaptive method such as `"dopri8"`; may be replaced.
        transform: from states to what the field sees, or its name such as `"standardise"`; `Identity()` by default.
        event_shape: shape of a state; needed if `field` does not state one.
        noise: the first guess of the standard deviation of observations about the states, in the units of y. It
            becomes a parameter, `log_noise`, with a value for each entry of a state, which an objective with a
            likelihood fits. `None` (default): the model knows no noise.

    Raises:
        InvalidValueError: the event shape is missing or disagrees with the field's, or the noise is not > 0.
    """

    names: DataNames = DataNames()  # what the data are called, once the model has been trained on some

    def __init__(
        self,
        field: nn.Module | str,
        solver: ODESolver | str | None = None,
        transform: Transform | str | None = None,
        event_shape: int | Sequence[int] | None = None,
        noise: float | None = None,
    ) -> None:
        super().__init__()
        field = named_field(field, event_shape)
        self.event_shape = bind(field, event_shape=event_shape).event_shape
        self.field = field
        self.solver = as_solver(solver, unit_time=False)
        self.transform = (
            Identity()
            if transform is None
            else by_name(Transform, transform, "transform", event_shape=self.event_shape)
        )
        if self.transform.num_levels is not None:
            raise InvalidValueError(f"{type(transform).__name__} adds noise to whole numbers; states take none")
        weights = [p for p in field.parameters() if p.is_floating_point()]
        self.log_noise: nn.Parameter | None = None
        if noise is not None:
            check_number("noise", noise, above=0)
            device = weights[0].device if weights else None
            self.log_noise = nn.Parameter(torch.full(self.event_shape, noise, dtype=self.dtype, device=device).log())

    @property
    def noise(self) -> Tensor | None:  # (*event)
        """The standard deviation of observations of y; `None` if the model knows no noise."""
        return None if self.log_noise is None else self.log_noise.exp()

    def bind(
        self,
        context: Tensor | None = None,  # (B, *context)
    ) -> BoundField:
        """The field as one solve sees it."""
        return bind(self.field, context, self.event_shape).in_units(self.transform)

    @checked
    def forward(
        self,
        x0: Tensor,  # (*batch, *event)
        times: Tensor | Sequence[float],  # (T,) or (*batch, T)
        context: Tensor | None = None,  # (*batch, *context)
        mask: Tensor | None = None,  # (*batch, T)
    ) -> Tensor:  # (*batch, T, *event)
        """The states of `trajectory`, without their solver error."""
        return self.trajectory(x0, times, context, mask, solver_error=False).states

    @checked
    def trajectory(
        self,
        x0: Tensor,  # (*batch, *event)
        times: Tensor | Sequence[float],  # (T,) or (*batch, T)
        context: Tensor | None = None,  # (*batch, *context)
        mask: Tensor | None = None,  # (*batch, T)
        solver_error: bool = True,
        path_costs: Sequence[PathCost] = (),
        generator: torch.Generator | None = None,
        rows: slice | None = None,
    ) -> Trajectory:
        """Solve from `x0` at the first time, and return the states at all times.

        All rows of the batch share one solve and its steps. Times of shape (*batch, T) give each row its own, which may
        start and end anywhere. A state between two steps is interpolated, so that more times cost no evaluations; the
        memory is that of the states. A row is not followed beyond the step that covers its last time.

        The states can be differentiated with respect to `x0`, `context`, the parameters and the times. The derivative
        with respect to a time is v(t, x) there, which takes one more evaluation of the field.

        The solver error of a state is its distance, entry by entry, to a second solve by `ODESolver.tighter`, at
        tolerances 100 times tighter (or steps a tenth as long), plus the rounding of the largest value that the entry
        has had until then. It costs more than the states themselves, and is NaN where that solve fails.

        Args:
            x0: the states at the first time of each row.
            times: strictly increasing, or strictly decreasing to go back in time.
            context: what a conditional field takes.
            mask: which of the times count, for times of shape (*batch, T). Elsewhere the state before is repeated, and
                the time may hold anything, NaN too. The first time that counts is that of `x0`.
            solver_error: whether to solve again for it.
            path_costs: have their integrals computed in the same solve.
            generator: of the directions that some path costs draw.
            rows: solve only these of the rows of a batch (B, *event), in steps that serve all. So processes share a
                batch; see `flows.shares`.

        Raises:
            InvalidValueError: the times are not monotonic or not finite, or shapes do not fit.
            SolverError: the solve cannot go on, because states explode in finite time for example; says when.
        """
        points, batch_shape = self._flatten(x0)
        context = self._flatten_context(context, batch_shape)
        points = self.transform(points)[0].to(self.dtype)
        table = Times(times, mask, batch_shape, points)
        directions = draw_directions(path_costs, points, generator)
        bound = self.bind(context)
        bound.check_times(*table.ends)
        normal = Normal(self.event_shape).to(points.device, points.dtype)
        examine(normal, bound, points, own_times=table.own_times(self.solver.gradient))
        dynamics = every = StateDynamics(bound, path_costs, directions, table.starts)
        samples = points  # all of them: jumps that one process finds, all must find
        if rows is not None:
            context = None if context is None else context[rows]
            points, table, batch_shape = points[rows], table.part(rows), (len(points[rows]),)
            mask = None if mask is None else mask[rows]
            dynamics = every.part(rows, self.bind(context))
        own = dynamics.field
        start = table.differentiable_start(own, points)
        extra = [*self.field.parameters(), *(known for known in (context, dynamics.directions) if known is not None)]
        if self.solver.gradient != "backprop" and torch.is_grad_enabled():
            others = foreign_tensors(own, points, extra, span=table.span)
            extra += others
            if self.solver.gradient == "adjoint":
                look_for_jumps(normal, bound, samples, [*self.field.parameters(), *others], table.span)
        with steps_together(rows):
            try:
                solution = table.solve(self.solver, dynamics, dynamics.initial_state(start), extra)
            except SolverError as error:
                raise table.at_its_own_time(error) from error
        states = self._in_data_space(table.spread(table.differentiable_states(own, solution.states[0])))
        error = None
        if solver_error:
            with torch.no_grad(), steps_together(rows):
                error = (states - self._reference(dynamics, table, points.detach())).abs() + rounding(states)
                error = error.reshape(*batch_shape, table.length, *self.event_shape)
        costs = dynamics.path_costs(solution.end[1:], table.sign)
        return Trajectory(
            times=table.given,
            states=states.reshape(*batch_shape, table.length, *self.event_shape),
            solver_error=error,
            nfe=solution.statistics.nfe_forward,
            statistics=solution.statistics,
            path_costs={name: cost.reshape(batch_shape) for name, cost in costs.items()},
            mask=mask,
        )

    def _reference(self, dynamics: StateDynamics, table: Times, points: Tensor) -> Tensor:  # (B, T, *event)
        """The states by a much tighter solve; NaN if it fails even at a tenth of the tolerances.

        Processes that share the batch fail together.
        """
        for solver in (self.solver.tighter(), self.solver.tighter(10.0)):
            again = StateDynamics(dynamics.field.fresh(), starts=table.starts, whole=dynamics.whole)
            with contextlib.suppress(SolverError):
                return self._in_data_space(table.spread(table.solve(solver, again, (points,)).states[0]))
        return points.new_full((len(points), table.length, *self.event_shape), torch.nan)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what the field sees: that of most of its trainable numbers."""
        return working_dtype(self.field)

    def _apply(self, fn, recurse: bool = True):
        """Move or convert all tensors; complex ones keep their imaginary parts."""
        return super()._apply(keeping_complex(fn), recurse)

    def _in_data_space(self, states: Tensor) -> Tensor:  # (B, T, *event)
        return self.transform.inverse(states.flatten(0, 1))[0].reshape(states.shape)

    def _flatten(self, x0: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Initial states (B, *event) and the batch shape."""
        ndim = len(self.event_shape)
        batch_shape = tuple(x0.shape[: max(x0.ndim - ndim, 0)])
        if tuple(x0.shape[len(batch_shape) :]) != self.event_shape:
            expected = ", ".join(["*batch", *map(str, self.event_shape)])
            raise InvalidValueError(f"expected initial states of shape ({expected}), got {tuple(x0.shape)}")
        bad = (~x0.isfinite()).reshape(-1, *self.event_shape).flatten(1).any(1).nonzero()
        if len(bad):
            raise InvalidValueError(
                f"{len(bad)} initial states hold NaN or infinite values, the first at index {bad[0].item()}; a state "
                "with missing values cannot be solved from"
            )
        return x0.reshape(-1, *self.event_shape), batch_shape

    def _flatten_context(self, context: Tensor | None, batch_shape: tuple[int, ...]) -> Tensor | None:
        if context is None:
            return None
        if tuple(context.shape[: len(batch_shape)]) != batch_shape:
            raise InvalidValueError(
                f"expected a context for each of the initial states, of shape {(*batch_shape, '*context')}, got "
                f"{tuple(context.shape)}"
            )
        return suitable_context(context, self.bind()).reshape(-1, *context.shape[len(batch_shape) :])


def rounding(
    states: Tensor,  # (B, T, *event)
) -> Tensor:
    """The rounding of the largest value of each entry up to each time; two solves may share it."""
    largest = states.abs().cummax(1).values if states.shape[1] else states.abs()
    return torch.finfo(states.dtype).eps * largest
