"""Neural ODEs and continuous normalizing flows with pluggable divergence estimators."""

from flows import datasets, divergence, evaluation, fields, objectives, regularizers, transforms
from flows.cnf import CNF, LogProbEstimate, Transported
from flows.distribution import FlowDistribution
from flows.solvers import ODESolver, Solution, SolverError, SolverStatistics

__version__ = "0.1.0"

__all__ = [
    "CNF",
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
    "regularizers",
    "transforms",
]
