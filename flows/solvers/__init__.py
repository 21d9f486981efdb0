"""ODE solvers: settings, gradients through a solve, statistics, errors."""

from flows.solvers.control import ErrorControl
from flows.solvers.errors import SolverError
from flows.solvers.gradient_check import GradientCheck, check_gradients
from flows.solvers.problem import Dynamics, State
from flows.solvers.solver import ODESolver
from flows.solvers.statistics import Attempt, Solution, SolverStatistics

__all__ = [
    "Attempt",
    "Dynamics",
    "ErrorControl",
    "GradientCheck",
    "ODESolver",
    "Solution",
    "SolverError",
    "SolverStatistics",
    "State",
    "check_gradients",
]
