"""The times of a batch of trajectories, as given and as the solver takes them."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from flows.errors import InvalidValueError
from flows.solvers import Dynamics, ODESolver, Solution, SolverError, SolverStatistics, State
from flows.vector_field import BoundField


class Times:
    """The times of a batch: as given, and as the solver takes them.

    Rows that start apart are shifted to start at 0 together. Times that count are moved to the front of their row.
    """

    def __init__(
        self, times: Tensor | Sequence[float], mask: Tensor | None, batch_shape: tuple[int, ...], points: Tensor
    ) -> None:
        try:
            given = torch.as_tensor(times)
        except (TypeError, ValueError, RuntimeError):
            raise InvalidValueError(f"times must be a tensor or a sequence of numbers, got {times!r}") from None
        self.given = given
        self.whole, self.rows = self, None
        self.length = given.shape[-1] if given.ndim else 0
        if not self.length:
            raise InvalidValueError(f"times must hold at least one number, got {times!r}")
        values = given.detach().to("cpu", torch.float64)
        self.counts = self.starts = self.front = self.order = None
        self.shared = given.ndim == 1 and mask is None
        if self.shared:
            self.relative = values
            self.seconds = given.to(points)  # (T,), for all rows
            self.sign = -1 if values[-1] < values[0] else 1
            return
        if given.ndim == 1:
            given, values = (tensor.expand(*batch_shape, len(tensor)) for tensor in (given, values))
        if tuple(given.shape[:-1]) != batch_shape:
            raise InvalidValueError(
                f"times must have the shape (T,) or {(*batch_shape, 'T')}, a row for each initial state, got "
                f"{tuple(given.shape)}"
            )
        rows = values.reshape(len(points), self.length)
        if mask is not None:
            rows = self._compact(rows, mask, tuple(given.shape))
        if self.counts is not None and len(rows) and bool((self.counts == self.length).all()):
            self.counts = self.front = self.order = None  # all times count
        self.relative = rows
        if len(rows) and not bool((rows[:, 0] == rows[0, 0]).all()):
            self.starts = rows[:, 0].to(points)
            self.relative = rows - rows[:, :1]
        if self.counts is None and len(rows) and bool((self.relative == self.relative[:1]).all()):
            self.relative = self.relative[0]  # the same for all rows, which the solver reads off at once
        self.sign = -1 if len(rows) and rows[:, -1].sum() < rows[:, 0].sum() else 1
        flat = given.reshape(len(points), self.length)
        self.seconds = (flat if self.front is None else flat.gather(1, self.front.to(flat.device))).to(points).T

    def _compact(self, rows: Tensor, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
        if mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise InvalidValueError(
                f"the mask must be a bool tensor of shape {shape}, like the times, got {mask.dtype} of shape "
                f"{tuple(mask.shape)}"
            )
        kept = mask.detach().to("cpu").reshape(rows.shape)
        self.counts = kept.sum(1)
        if bool((self.counts == 0).any()):
            row = int((self.counts == 0).nonzero()[0])
            raise InvalidValueError(f"the mask leaves no time in row {row}; drop the row, or keep its first time")
        # The times that count first, in their order; after them the last one again.
        front = (~kept).to(torch.int8).argsort(dim=1, stable=True)
        self.front = front.gather(1, torch.arange(rows.shape[1]).clamp(max=self.counts[:, None] - 1))
        self.order = (kept.cumsum(1) - 1).clamp(min=0)  # (B, T): which of the compact times each time shows
        return rows.gather(1, self.front)

    def part(self, rows: slice) -> Times:
        """The times of some rows, in a solve whose steps serve all."""
        own = copy.copy(self)
        own.whole, own.rows = self, rows
        if self.given.ndim > 1:
            own.given = self.given[rows]
        if not self.shared:
            own.seconds = self.seconds[:, rows]
        if self.relative.ndim > 1:
            own.relative = self.relative[rows]
        for name in ("counts", "starts", "front", "order"):
            table = getattr(self, name)
            setattr(own, name, None if table is None else table[rows])
        return own

    def solve(self, solver: ODESolver, dynamics: Dynamics, state: State, parameters: Sequence[Tensor] = ()) -> Solution:
        """The states at all times that count; where no row has more than the first, nothing is solved."""
        relative, counts = self.whole.relative, self.whole.counts
        if len(state[0]) and self.length > 1 and (counts is None or bool((counts > 1).any())):
            return solver.solve(dynamics, state, relative, parameters, counts, self.rows)
        if not bool(self.relative.isfinite().all()):
            raise InvalidValueError(f"times must be finite numbers, got {self.relative.tolist()}")
        states = tuple(component.expand(self.length, *component.shape) for component in state)
        return Solution(self.relative, states, SolverStatistics())

    def differentiable_start(self, field: BoundField, x0: Tensor) -> Tensor:
        """`x0` with the derivative −v(t, x0) to the first time, where the times require gradients."""
        if not (self.given.requires_grad and torch.is_grad_enabled()):
            return x0
        return x0 - self._change(field, 0, x0)

    def differentiable_states(self, field: BoundField, states: Tensor) -> Tensor:
        """The states (T, B, *event) with the derivative v(t, x) to their times, where the times require gradients."""
        if not (self.given.requires_grad and torch.is_grad_enabled()):
            return states
        later = [states[j] + self._change(field, j, states[j]) for j in range(1, len(states))]
        return torch.stack([states[0] + self._change(field, 0, states[0]), *later])

    @property
    def span(self) -> tuple[float, float]:
        """The first and the last time of all rows."""
        times = self.seconds.detach()
        return (float(times.min()), float(times.max())) if times.numel() else (0.0, 1.0)

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The first and the last time of each row, (B,), or of all, (), as given."""
        rows = self.relative if self.starts is None else self.relative + self.starts.to("cpu", torch.float64)[:, None]
        return rows[..., 0], rows[..., -1]

    def at_its_own_time(self, error: SolverError) -> SolverError:
        """The failure of a solve, with the time of the row that it befell."""
        starts = self.whole.starts
        if starts is None or error.sample is None or error.sample >= len(starts):
            return error
        own = error.t + float(starts[error.sample])
        return error.retold(
            f"{error}. Rows start apart, and these times count from the start of each: in row {error.sample} it is "
            f"t = {own:.6g}"
        )

    def own_times(self, gradient: str) -> str:
        """Why the field will be called with one time per sample, if it will."""
        if self.starts is not None:
            return "rows of times that start apart are solved together, each at a time of its own"
        if self.shared or not torch.is_grad_enabled():
            return ""
        if self.given.requires_grad:
            return "the derivative to times of shape (*batch, T) takes the field at a time of its own for each row"
        if gradient == "adjoint" and self.relative.ndim == 2:
            return (
                "gradient='adjoint' solves back through times of shape (*batch, T) with a time of its own for each row"
            )
        return ""

    def _change(self, field: BoundField, j: int, states: Tensor) -> Tensor:
        """0, with the derivative v(t, x) to the time."""
        t = self.seconds[j]
        return field(t.detach(), states) * (t - t.detach()).view(-1, *[1] * (states.ndim - 1))

    def spread(self, states: Tensor) -> Tensor:
        """States (T, B, *event) of the solver as states (B, T, *event) at the given times."""
        states = states.movedim(0, 1)
        if self.order is None:
            return states
        rows = torch.arange(len(states), device=states.device)[:, None]
        return states[rows, self.order.to(states.device)]
