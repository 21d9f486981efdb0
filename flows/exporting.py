"""Trained models as programs of `torch.export`, which run without this package."""

from __future__ import annotations

import copy
import itertools
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flows.arguments import checked
from flows.errors import ComputationError, InvalidTypeError, InvalidValueError
from flows.models.cnf import CNF
from flows.models.neural_ode import NeuralODE
from flows.solvers.stepping import grid, through
from flows.solvers.tableaux import RUNGE_KUTTA, RungeKutta

EXAMPLES = 7  # in the batch that is traced, a number that no other size is likely to have
What = Literal["field", "sample", "log_prob"]


@checked
def export(model: CNF | NeuralODE, what: What = "field") -> torch.export.ExportedProgram:
    """Export a part of a model as a program of `torch.export`, for batches of any size.

    | `what` | the program | needs |
    |---|---|---|
    | `"field"` | v(t, y) in flow space, from t () and y (B, *event) | nothing |
    | `"sample"` | x from z (B, *event), a draw of the base | fixed steps |
    | `"log_prob"` | log p(x) in nats, (B,), from x (B, *event) | fixed steps, a divergence in closed form |

    Of a conditional flow, each program takes the context (B, *context) in data units as its last argument. The steps
    of the solve are written out one after the other, so many of them make a large program.

    What depends on the data cannot be written out. An adaptive solve takes as many steps as they need. A stochastic
    divergence and the noise of dequantisation need a generator. And a field may take decisions by the values of
    tensors, as `Forced` does to look up its inputs.

    Args:
        model: on the CPU or elsewhere; the program is for the same device and dtype.
        what: the part. A `NeuralODE` has its field alone.

    Returns:
        The program: `program.module()(x)` runs it, `torch.export.save(program, "moons.pt2")` keeps it.

    Raises:
        InvalidTypeError, InvalidValueError: the model has no such program; the message says why, and what to change.
        ComputationError: torch cannot trace the field.

    Example:
        ```python
        import torch

        import flows

        flow = flows.CNF(flows.fields.MLP(2, hidden=(16,)), solver=flows.ODESolver("rk4", step_size=0.5))
        program = flows.export(flow, "sample")
        x = program.module()(torch.randn(100, 2))
        ```
    """
    if isinstance(model, NeuralODE) and what != "field":
        raise InvalidTypeError(f"a NeuralODE has no {what}; export its field, flows.export(model, 'field')")
    flow = copy.deepcopy(model).eval().requires_grad_(False)
    tensor = next(itertools.chain(flow.parameters(), flow.buffers()), torch.empty(()))
    points = torch.zeros(EXAMPLES, *flow.event_shape, dtype=flow.dtype, device=tensor.device)
    context = _example_context(flow, points)
    arguments = [points, *([] if context is None else [context])]
    shapes: list[Any] = [{0: torch.export.Dim.DYNAMIC} for _ in arguments]
    if what == "field":
        program: nn.Module = _Field(flow)
        arguments, shapes = [torch.zeros((), dtype=flow.dtype, device=tensor.device), *arguments], [None, *shapes]
    else:
        assert isinstance(flow, CNF)
        program = _Sample(flow) if what == "sample" else _LogProb(flow)
    try:
        with torch.no_grad():
            return torch.export.export(program, tuple(arguments), dynamic_shapes=(tuple(shapes),), strict=False)
    except (InvalidTypeError, InvalidValueError):
        raise
    except Exception as error:  # torch raises almost anything
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ComputationError(
            f"torch cannot export the field {type(flow.field).__name__} ({type(error).__name__}: {line[:300]}): a "
            "program takes no decision by the values of tensors, and the size of a batch is x.shape[0], not len(x); "
            "call the model itself instead"
        ) from error


def _example_context(flow: CNF | NeuralODE, points: Tensor) -> Tensor | None:
    encoder = flow.encoder if isinstance(flow, CNF) else None
    view = flow.bind()
    if not view.takes_context:
        return None
    shape = view.context_shape if encoder is None else encoder.context_shape
    if shape is None:
        raise InvalidValueError(
            f"the field {view.name} does not state the shape of its contexts; give it an attribute context_shape"
        )
    if encoder is not None and encoder.conditions is not None and encoder.conditions.categories:
        raise InvalidTypeError(
            "the encoder looks up categories and refuses unknown ones, which a program cannot; export a flow without "
            "an encoder, flows.CNF(flow.field, ...), and pass it flow.encode(context)"
        )
    return points.new_zeros(len(points), *shape)


class _Field(nn.Module):
    def __init__(self, model: CNF | NeuralODE) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: Tensor) -> Tensor:
        t, y, *context = arguments
        return self.model.field(t, y, *_encoded(self.model, context))


class _Solve(nn.Module):
    """A flow with its fixed steps written out."""

    def __init__(self, flow: CNF) -> None:
        super().__init__()
        solver, self.flow = flow.solver, flow
        tableau = RUNGE_KUTTA.get(solver.method)
        if tableau is None or solver.longest_step is None:
            raise InvalidValueError(
                f"a solve by {solver.method!r} cannot be exported, since its steps depend on the data; choose fixed "
                "steps, flow.solver = flows.ODESolver('rk4', step_size=0.05), and compare"
            )
        if flow.transform.num_levels is not None:
            raise InvalidTypeError(
                "a flow of whole numbers cannot be exported whole, since its transform draws noise; export its field"
            )
        if getattr(flow.base, "context_shape", None) is not None:
            raise InvalidTypeError(
                f"a flow from {type(flow.base).__name__}, which depends on the context, cannot be exported whole; "
                "export its field"
            )
        self.tableau: RungeKutta = tableau
        self.step_size, self.stops = float(solver.longest_step), solver.grid

    def solve(self, state: tuple[Tensor, ...], slope: Any, first: float, last: float) -> tuple[Tensor, ...]:
        for t0, t1 in itertools.pairwise(grid(through(self.stops, (first, last)), self.step_size)):
            h, slopes = t1 - t0, []
            for node, row in zip((0.0, *self.tableau.nodes), ((), *self.tableau.coefficients), strict=True):
                slopes.append(slope(state[0].new_tensor(t0 + node * h), *_moved(state, slopes, row, h)))
            state = _moved(state, slopes, self.tableau.weights, h)
        return state


class _Sample(_Solve):
    def forward(self, *arguments: Tensor) -> Tensor:
        z, *context = arguments
        given = _encoded(self.flow, context)
        (y,) = self.solve((z,), lambda t, y: (self.flow.field(t, y, *given),), 0.0, 1.0)
        return self.flow.to_data_space(y)


class _LogProb(_Solve):
    def __init__(self, flow: CNF) -> None:
        super().__init__(flow)
        if not flow.base.has_density:
            raise InvalidTypeError(f"a flow from {type(flow.base).__name__} has no density to export")
        if flow.bind().value_and_divergence is None:
            raise InvalidTypeError(
                "log_prob can be exported where the field has a divergence in closed form, and "
                f"{type(flow.field).__name__} has none; choose a field such as flows.fields.MLP, or export 'sample'"
            )

    def forward(self, *arguments: Tensor) -> Tensor:
        x, *context = arguments
        given = _encoded(self.flow, context)
        y, log_det = self.flow.transform(x)
        closed_form = self.flow.bind(given[0] if given else None).value_and_divergence
        assert closed_form is not None
        z, integral = self.solve((y, y.new_zeros(y.shape[0])), lambda t, y, _: closed_form(t, y), 1.0, 0.0)
        return self.flow.base.log_prob(z) + integral + log_det


def _encoded(model: CNF | NeuralODE, context: list[Tensor]) -> list[Tensor]:
    encoder = getattr(model, "encoder", None)
    return context if encoder is None else [encoder(one) for one in context]


def _moved(
    state: tuple[Tensor, ...], slopes: list[tuple[Tensor, ...]], weights: tuple[float, ...], h: float
) -> tuple[Tensor, ...]:
    """y + h Σ_i w_i k_i for each component."""
    for weight, slope in zip(weights, slopes, strict=True):
        state = tuple(y + (h * weight) * k for y, k in zip(state, slope, strict=True)) if weight else state
    return state
