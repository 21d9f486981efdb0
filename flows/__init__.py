"""Neural ODEs and continuous normalizing flows with pluggable divergence estimators."""

from flows import datasets, divergence, evaluation, fields, objectives, regularizers, transforms
from flows.cnf import CNF
from flows.distribution import FlowDistribution
from flows.estimates import Drawn, LogProbEstimate, Transported
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
    "regularizers",
    "transforms",
]
