"""Solvers by the name of their method."""

from __future__ import annotations

from typing import Any

from flows.errors import InvalidTypeError, InvalidValueError
from flows.solvers.multistep import ADAMS, SCIPY
from flows.solvers.solver import METHODS, ODESolver
from flows.solvers.tableaux import RUNGE_KUTTA

STEP_SIZES = {1: 0.01, 2: 0.02, 3: 0.04, 4: 0.05}  # of fixed steps from 0 to 1, by the order of the method
OTHERS: dict[str, dict[str, Any]] = {
    **{method: {"step_size": 0.02} for method in ADAMS},
    "explicit_adams": {"step_size": 0.02, "options": {"max_order": 4}},  # higher orders need shorter steps
    SCIPY: {"gradient": "adjoint", "options": {"solver": "LSODA"}},  # cannot be differentiated through
}


def as_solver(solver: Any, unit_time: bool = True) -> ODESolver:
    """Return a solver, or that of a method, as the choices of `solver=` from the shell have it.

    Args:
        solver: an `ODESolver`, the name of a method, or `None` for the default one.
        unit_time: whether the solve goes from 0 to 1, so that the length of fixed steps can be chosen.

    Raises:
        InvalidTypeError, InvalidValueError: it is neither, there is no such method, or its steps need a length.
    """
    if solver is None:
        return ODESolver()
    if isinstance(solver, ODESolver):
        return solver
    if not isinstance(solver, str):
        got = (
            f"the class {solver.__name__}"
            if isinstance(solver, type)
            else f"an object of class {type(solver).__name__}"
        )
        raise InvalidTypeError(
            f"solver must be a flows.ODESolver or the name of a method such as 'dopri5', got {got}; write "
            "flows.ODESolver(...)"
        )
    name = solver.strip().lower()
    if name not in METHODS:
        raise InvalidValueError(f"solver: unknown method {solver!r}; expected one of {', '.join(sorted(METHODS))}")
    tableau = RUNGE_KUTTA.get(name)
    if tableau is not None and tableau.is_adaptive:
        return ODESolver(name)
    if not unit_time and name != SCIPY:
        raise InvalidValueError(
            f"solver: {name!r} takes steps of a fixed length, in the unit of the times; write "
            f"flows.ODESolver({name!r}, step_size=...)"
        )
    settings: dict[str, Any] = (
        OTHERS[name] if tableau is None else {"step_size": STEP_SIZES[min(tableau.order, max(STEP_SIZES))]}
    )
    return ODESolver(name, **settings)
