"""Neural ODEs and continuous normalizing flows with pluggable divergence estimators."""

from flows import datasets, divergence, evaluation, fields, objectives, path_costs, transforms
from flows.models.cnf import CNF
from flows.models.distribution import FlowDistribution
from flows.models.results import Drawn, LogProbEstimate, Transported
from flows.solvers import ODESolver, Solution, SolverError, SolverStatistics

__version__ = "0.1.0"

__all__ = [
    "CNF",
    "Drawn",
    "FlowDistribution",
    "LogProbEstimate",
    "ODESolver",
    "Solution",
    "SolverError",
    "SolverStatistics",
    "Transported",
    "datasets",
    "divergence",
    "evaluation",
    "fields",
    "objectives",
    "path_costs",
    "transforms",
]
