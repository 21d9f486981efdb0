"""Whether the adjoint's gradients can be trusted on a model."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from flows.solvers.solver import TIGHTER, ODESolver


class Flow(Protocol):
    """What is checked: :class:`flows.CNF`, or anything like it."""

    solver: ODESolver

    def log_prob(self, x: Tensor, context: Tensor | None, generator: torch.Generator) -> Tensor: ...

    def named_parameters(self) -> object: ...


@dataclass(frozen=True)
class GradientCheck:
    """How far the gradients of mean log p lie apart, as ‖difference‖ / ‖reference‖ over all parameters and x.

    The reference is backprop at tolerances 100 times tighter.
    """

    difference: float  # of the adjoint from backprop, at the flow's own tolerances
    adjoint_error: float  # of the adjoint from the reference
    backprop_error: float  # of backprop from the reference: what the forward tolerances cost
    tighter_adjoint_difference: float  # of backprop from an adjoint with adjoint tolerances 100 times tighter
    worst: str  # the parameter (or "x") with the largest relative difference
    worst_difference: float  # of that parameter
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
            f"({self.worst_difference:.1e}); against a solve at tolerances {TIGHTER:.0f} times tighter: adjoint "
            f"{self.adjoint_error:.1e}, backprop {self.backprop_error:.1e}. {self.advice}"
        )


def check_gradients(
    flow: Flow,
    x: Tensor,  # (*batch, *event), data space
    context: Tensor | None = None,
    tolerance: float = 1e-2,
    seed: int = 0,
) -> GradientCheck:
    """Compare the adjoint's gradient of mean log p(x) with that of backprop, on your model, and say what to change.

    ::

        print(flows.solvers.check_gradients(flow, x))

    Four gradients are computed, at the solver's settings whatever its ``gradient`` says: backprop, adjoint, adjoint
    at adjoint tolerances 100 times tighter, and backprop at tolerances 100 times tighter (for a fixed-step method:
    a step half as long). The flow is left as it is; probes are the same in all four. Backprop's memory is needed,
    so take a small batch; tolerances below 1e-6 need float64.

    Args:
        flow: has ``log_prob(x, context, generator)``, ``named_parameters()`` and ``solver``.
        x, context: some data.
        tolerance: the relative difference to be content with. Noise of minibatches is around 0.1.
        seed: of the probes.
    """
    solver = flow.solver
    rtol, atol = solver.adjoint_rtol or solver.rtol, solver.adjoint_atol or solver.atol
    backprop = _gradients(flow, replace(solver, gradient="backprop"), x, context, seed)
    adjoint = _gradients(flow, replace(solver, gradient="adjoint"), x, context, seed)
    if solver.is_fixed_step:
        finer = replace(solver, gradient="adjoint", step_size=solver.step_size / 2)
        exact = replace(finer, gradient="backprop")
    else:
        exact = replace(solver.tighter(), gradient="backprop")
        finer = replace(
            solver,
            gradient="adjoint",
            adjoint_rtol=rtol / TIGHTER,
            adjoint_atol=atol / TIGHTER,
            max_steps=exact.max_steps,
        )
    tighter = _gradients(flow, finer, x, context, seed)
    reference = _gradients(flow, exact, x, context, seed)
    own = {name: _relative({name: adjoint[name]}, {name: backprop[name]}) for name in backprop}
    worst = max(own, key=own.__getitem__)
    figures = {
        "difference": _relative(adjoint, backprop, reference),
        "adjoint_error": _relative(adjoint, reference),
        "backprop_error": _relative(backprop, reference),
        "tighter_adjoint_difference": _relative(tighter, backprop, reference),
    }
    return GradientCheck(
        **figures,
        worst=worst,
        worst_difference=own[worst],
        tolerance=tolerance,
        advice=_advice(solver, rtol, atol, tolerance, **figures),
    )


def _gradients(flow: Flow, solver: ODESolver, x: Tensor, context: Tensor | None, seed: int) -> dict[str, Tensor]:
    probe = copy.copy(flow)  # shares the parameters
    probe.solver = solver
    points = x.detach().clone().requires_grad_()
    named = {"x": points} | {name: p for name, p in flow.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        value = probe.log_prob(points, context, torch.Generator(x.device).manual_seed(seed)).mean()
        found = torch.autograd.grad(value, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, found, strict=True))


def _relative(a: Mapping[str, Tensor], b: Mapping[str, Tensor], scale: Mapping[str, Tensor] | None = None) -> float:
    """‖a − b‖ / ‖scale‖, with the norm of ``b`` for a scale by default."""
    difference = sum(float((a[name] - b[name]).double().square().sum()) for name in b)
    norm = sum(float(value.double().square().sum()) for value in (b if scale is None else scale).values())
    return (difference / norm) ** 0.5 if norm > 0 else float("inf") * difference if difference else 0.0


def _advice(
    solver: ODESolver,
    adjoint_rtol: float,
    adjoint_atol: float,
    tolerance: float,
    difference: float,
    adjoint_error: float,
    backprop_error: float,
    tighter_adjoint_difference: float,
) -> str:
    if max(difference, adjoint_error, backprop_error) <= tolerance:
        return "Nothing needs to change"
    checkpoint = ", or use gradient='checkpoint'"
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
    return advice + (checkpoint if helps else "")
