"""When a figure is no result: its errors say that it cannot be right."""

from __future__ import annotations

import math

from flows.solvers import ODESolver

TOLERANCE = 0.05  # nats an example: a solver error up to this may stand, however small the standard error is
SHARE = 0.1  # of the error of predicted states: a solver error up to this may stand
DEFICIT = 4.0  # standard errors that a figure may lie below its bound
ROUNDING = 1e-3  # nats that it may do so where all points agree
CHECKED_POINTS = 32  # points on which every evaluation takes a solver error
FEW_POINTS = 100  # below this many, a standard error is itself uncertain


def solver_fault(solver_error: float | None, standard_error: float, solver: ODESolver) -> str | None:
    """Say what is wrong if the solver error exceeds the standard error and 0.05 nats.

    Args:
        solver_error: in nats an example; NaN where the tighter solve failed, None where there was none.
        standard_error: of the same figure; NaN where it is unknown.
        solver: of the figure.
    """
    if solver_error is None:
        return None
    if math.isnan(solver_error):
        return f"the solver error is unknown, since a much tighter solve failed; {remedy(solver)}"
    allowed = TOLERANCE if math.isnan(standard_error) else max(TOLERANCE, standard_error)
    if solver_error <= allowed:
        return None
    return f"the solver error of {solver_error:.2g} nats is above {allowed:.2g} nats; {remedy(solver)}"


def prediction_fault(solver_error: float, error: float, standard_error: float, solver: ODESolver) -> str | None:
    """Say what is wrong if the solver error exceeds a tenth of the error and its standard error.

    A worse solve might then be all that the error measures. All are root mean squares in the same units.

    Args:
        solver_error: NaN where the tighter solve failed.
        error: of predicted states; NaN where there are none.
        standard_error: of the error; NaN where it is unknown.
        solver: of the predictions.
    """
    if math.isnan(error):
        return None
    if math.isnan(solver_error):
        return f"the solver error is unknown, since a much tighter solve failed; {remedy(solver)}"
    allowed = max(SHARE * error, 0.0 if math.isnan(standard_error) else standard_error)
    if solver_error <= allowed:
        return None
    return (
        f"the solver error of {solver_error:.2g} is large against the error of {error:.2g}, both in standard "
        f"deviations of the values; {remedy(solver)}"
    )


def bound_fault(
    name: str, excess: float, standard_error: float, num_points: int, solver: ODESolver, exact: bool = True
) -> str | None:
    """Say what is wrong if a figure that cannot be negative lies more than four standard errors below zero.

    Args:
        name: of the figure, such as "gap".
        excess: its value.
        standard_error: of it; NaN where it is unknown.
        num_points: of which the standard error was computed.
        solver: of the figure.
        exact: whether the divergence was, which the advice depends on.
    """
    if not below_zero(excess, standard_error, num_points):
        return None
    cause = remedy(solver) if exact else f"{remedy(solver)}, or take an exact divergence"
    return f"the {name} of {excess:.4f} ± {standard_error:.4f} nats is impossible, it cannot be negative; {cause}"


def below_zero(value: float, standard_error: float, num_points: int) -> bool:
    """Return whether a value lies more than four standard errors below zero.

    With few points Student's t replaces the normal distribution: two points may agree by chance.
    """
    if math.isnan(standard_error) or not -value > max(DEFICIT * standard_error, ROUNDING):
        return False
    if num_points >= FEW_POINTS:
        return True
    from scipy.special import ndtr, stdtrit  # slow to import

    return -value > -float(stdtrit(num_points - 1, ndtr(-DEFICIT))) * standard_error


def remedy(solver: ODESolver) -> str:
    """Say which settings of the solver to change."""
    if solver.grid is not None:
        return "take a finer solver.grid, or an adaptive method such as solver=flow5"
    if solver.is_fixed_step:
        return f"set a smaller solver.step_size (now {solver.step_size:g}), or an adaptive method such as solver=flow5"
    loose = f"set a smaller solver.rtol and solver.atol (now {solver.rtol:g} and {solver.atol:g})"
    if solver.min_step > 0:
        loose += f", and solver.min_step=0 (now {solver.min_step:g})"
    return f"{loose}, in float64 below 1e-6, or another solver.method (now {solver.method})"
