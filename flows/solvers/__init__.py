"""ODE solvers: settings, gradients through a solve, statistics, errors."""

from flows.solvers.control import ErrorControl
from flows.solvers.errors import SolverError
from flows.solvers.gradient_check import GradientCheck, check_gradients
from flows.solvers.named import as_solver
from flows.solvers.problem import Compilable, Dynamics, NotCompilableError, State
from flows.solvers.programs import Compilations, compilations, many_solves
from flows.solvers.solver import ODESolver
from flows.solvers.statistics import Attempt, Solution, SolverStatistics

__all__ = [
    "Attempt",
    "Compilable",
    "Compilations",
    "Dynamics",
    "ErrorControl",
    "GradientCheck",
    "NotCompilableError",
    "ODESolver",
    "Solution",
    "SolverError",
    "SolverStatistics",
    "State",
    "as_solver",
    "check_gradients",
    "compilations",
    "many_solves",
]
