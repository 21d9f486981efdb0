"""How accurate the adjoint's gradients are on a model."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from flows.arguments import checked
from flows.errors import InvalidValueError
from flows.solvers.solver import REFERENCE_FACTOR, ODESolver, divided
from flows.solvers.tableaux import RUNGE_KUTTA


class Cost(Protocol):
    """A path cost, such as `flows.path_costs.KineticEnergy`."""

    name: str
    weight: float


class Estimate(Protocol):
    """log p (*batch), and the integrals of the path costs (*batch) by name."""

    value: Tensor
    path_costs: Mapping[str, Tensor]


class Flow(Protocol):
    """What is checked: a `flows.CNF`, or anything like it."""

    solver: ODESolver

    def estimate_log_prob(
        self,
        x: Tensor,
        context: Tensor | None,
        generator: torch.Generator,
        solver_error: bool,
        path_costs: Sequence[Cost],
    ) -> Estimate: ...

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]: ...


@dataclass(frozen=True)
class GradientCheck:
    """Relative differences between gradients of the loss, over all parameters and x.

    Each is ‖difference‖ / ‖reference‖. The reference is backprop at tolerances 100 times tighter.

    Example:
        ```python
        import torch

        import flows
        from flows.solvers import check_gradients

        flow = flows.CNF(flows.fields.MLP((2,), hidden=(8,)))
        check = check_gradients(flow, torch.randn(10, 2))
        check.difference, check.advice
        ```
    """

    difference: float  # adjoint against backprop, at the flow's own tolerances
    adjoint_error: float  # adjoint against the reference
    backprop_error: float  # backprop against the reference: the error due to the forward tolerances
    tighter_adjoint_difference: float  # adjoint at adjoint tolerances 100 times tighter against backprop
    worst: str  # the parameter (or "x") with the largest relative difference
    worst_difference: float  # its difference
    tolerance: float
    advice: str

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.difference <= self.tolerance

    def __str__(self) -> str:
        return (
            f"adjoint against backprop: {self.difference:.1e} of the norm of the gradient "
            f"({'within' if self.passed else 'above'} {self.tolerance:.0e}), most in {self.worst} "
            f"({self.worst_difference:.1e}); against a solve at tolerances {REFERENCE_FACTOR:.0f} times tighter: "
            f"adjoint {self.adjoint_error:.1e}, backprop {self.backprop_error:.1e}. {self.advice}"
        )


@checked
def check_gradients(
    flow: Flow,
    x: Tensor,  # (*batch, *event), data space
    context: Tensor | None = None,
    tolerance: float = 1e-2,
    seed: int = 0,
    path_costs: Sequence[Cost] | Mapping[str, Cost] = (),
) -> GradientCheck:
    """Compare the adjoint's gradient with backprop's on your model, and advise what to change.

    The gradient is that of −mean log p(x) + Σ weight · mean path cost:

    ```python
    import torch

    import flows

    flow = flows.CNF(flows.fields.MLP(event_shape=(2,), hidden=(16, 16)))
    print(flows.solvers.check_gradients(flow, torch.randn(16, 2)))
    ```

    Four gradients are computed, whatever the solver's `gradient` is: backprop, adjoint, adjoint at adjoint tolerances
    100 times tighter, and backprop at tolerances 100 times tighter (for a fixed-step method: half the step size). All
    use the same probes, and the flow stays unchanged. Backprop keeps the whole graph, so take a small batch.
    Tolerances below 1e-6 need float64.

    Args:
        flow: has `estimate_log_prob`, `named_parameters()` and `solver`.
        x, context: some data.
        tolerance: the largest relative difference that passes. The noise of minibatches is around 0.1.
        seed: of the probes.
        path_costs: those of the objective, with their weights, as `flows.objectives.MaximumLikelihood` takes them.

    Raises:
        InvalidValueError: the method is scipy's, which has no backprop.
    """
    solver = flow.solver
    if solver.method == "scipy_solver":
        raise InvalidValueError(
            "scipy_solver has only the adjoint's gradients, and there is no backprop to compare them with; check a "
            "flow with solver=ODESolver('flow5') at the same tolerances"
        )
    rtol, atol = solver.adjoint_rtol or solver.rtol, solver.adjoint_atol or solver.atol
    given = path_costs.values() if isinstance(path_costs, Mapping) else path_costs
    costs = tuple(cost for cost in given if cost.weight)

    def gradients(solver: ODESolver) -> dict[str, Tensor]:
        return _gradients(flow, solver, x, context, seed, costs)

    backprop = gradients(replace(solver, gradient="backprop"))
    adjoint = gradients(replace(solver, gradient="adjoint"))
    if solver.grid is not None:
        finer = replace(solver, gradient="adjoint", grid=divided(solver.grid, 2))
        exact = replace(finer, gradient="backprop")
    elif solver.step_size is not None:
        finer = replace(solver, gradient="adjoint", step_size=solver.step_size / 2)
        exact = replace(finer, gradient="backprop")
    else:
        exact = replace(solver.tighter(), gradient="backprop")
        finer = replace(
            solver,
            gradient="adjoint",
            adjoint_rtol=rtol / REFERENCE_FACTOR,
            adjoint_atol=atol / REFERENCE_FACTOR,
            max_steps=exact.max_steps,
        )
    tighter = gradients(finer)
    reference = gradients(exact)
    differences = {name: _relative({name: adjoint[name]}, {name: backprop[name]}) for name in backprop}
    worst = max(differences, key=differences.__getitem__)
    figures = {
        "difference": _relative(adjoint, backprop, reference),
        "adjoint_error": _relative(adjoint, reference),
        "backprop_error": _relative(backprop, reference),
        "tighter_adjoint_difference": _relative(tighter, backprop, reference),
    }
    return GradientCheck(
        **figures,
        worst=worst,
        worst_difference=differences[worst],
        tolerance=tolerance,
        advice=_advice(solver, rtol, atol, tolerance, bool(costs), **figures),
    )


def _gradients(
    flow: Flow, solver: ODESolver, x: Tensor, context: Tensor | None, seed: int, path_costs: Sequence[Cost]
) -> dict[str, Tensor]:
    probe = copy.copy(flow)  # shares the parameters
    probe.solver = solver
    points = x.detach().clone().requires_grad_()
    named = {"x": points} | {name: p for name, p in flow.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        generator = torch.Generator(x.device).manual_seed(seed)
        estimate = probe.estimate_log_prob(points, context, generator, False, path_costs)
        loss = -estimate.value.mean()
        for cost in path_costs:
            loss = loss + cost.weight * estimate.path_costs[cost.name].mean()
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, found, strict=True))


def _relative(a: Mapping[str, Tensor], b: Mapping[str, Tensor], scale: Mapping[str, Tensor] | None = None) -> float:
    """‖a − b‖ / ‖scale‖; the scale is `b` by default."""
    difference = sum(float((a[name] - b[name]).double().square().sum()) for name in b)
    norm = sum(float(value.double().square().sum()) for value in (b if scale is None else scale).values())
    return (difference / norm) ** 0.5 if norm > 0 else float("inf") * difference if difference else 0.0


def _advice(
    solver: ODESolver,
    adjoint_rtol: float,
    adjoint_atol: float,
    tolerance: float,
    has_costs: bool,
    difference: float,
    adjoint_error: float,
    backprop_error: float,
    tighter_adjoint_difference: float,
) -> str:
    if max(difference, adjoint_error, backprop_error) <= tolerance:
        return "Nothing needs to change"
    other = "checkpoint" if solver.method in RUNGE_KUTTA else "backprop"
    checkpoint = f", or use gradient='{other}'"
    if solver.grid is not None:
        return f"Take a finer grid{checkpoint if difference > tolerance else ''}"
    if solver.is_fixed_step:
        return f"Lower step_size (now {solver.step_size:g}){checkpoint if difference > tolerance else ''}"
    helps = difference > tolerance and (tighter_adjoint_difference < difference / 2 or backprop_error <= tolerance)
    if helps:
        names, rtol, atol, error = "adjoint_rtol and adjoint_atol", adjoint_rtol, adjoint_atol, difference
    else:
        names, rtol, atol, error = "rtol and atol", solver.rtol, solver.atol, max(adjoint_error, backprop_error)
    factor = max(10 ** -math.floor(math.log10(tolerance / error)), 10)
    advice = f"Lower {names} from {rtol:g} and {atol:g} to about {rtol / factor:.0e} and {atol / factor:.0e}"
    if rtol / factor < 1e-6:
        advice += ", in float64"
    if has_costs and not solver.error_control.path_costs:
        advice += ", or let path costs drive the step size too: error_control=ErrorControl(path_costs=1.0)"
    return advice + (checkpoint if helps else "")
